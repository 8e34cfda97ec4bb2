"""Options of the commands: each is declared once, with its type and help. Nothing heavy is imported here."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from functools import partial, wraps
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import typer

from vqcompress.cli.console import DEBUG, leads
from vqcompress.errors import UsageError
from vqcompress.pipeline.options import QuantizeOptions
from vqcompress.storage import hub
from vqcompress.storage.recipe_files import AS_STORED, LEAST, MOST, packaged, recipe_file
from vqcompress.storage.text import check_calibration, check_text
from vqcompress.storage.trust import trusting

# The keys of `export.FORMATS`, repeated because importing it imports torch.
ExportFormat = Literal["dense", "fp8", "compressed-tensors", "aqlm"]
FORMATS = get_args(ExportFormat)
Bos = Literal["auto", "always", "never"]
BOS_HELP = "Begin each row with the BOS token: auto, always or never; auto does where the model was trained with it."


def flat(command: Callable[..., None]) -> Callable[..., None]:
    """The command with a parameter per option, as typer needs it. It is called with its dataclasses of options."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    parameters = []
    for name, parameter in inspect.signature(command).parameters.items():
        types = get_type_hints(groups[name], include_extras=True) if name in groups else hints
        members = inspect.signature(groups[name]).parameters.values() if name in groups else [parameter]
        parameters += [p.replace(kind=p.KEYWORD_ONLY, annotation=types[p.name]) for p in members]

    @wraps(command)
    def call(**given: Any) -> None:
        made = {name: kind(**{f: given.pop(f) for f in kind.__dataclass_fields__}) for name, kind in groups.items()}
        command(**given, **made)

    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return call


def pinned(model: str, revision: str | None) -> str:
    """MODEL@REVISION, or MODEL if no revision is given."""
    return model if revision is None else f"{model}@{revision}"


def _checked(check: Callable[[str], object]) -> Callable[..., Any]:
    """A callback of typer that checks a value, or each of several, before torch is imported."""

    def callback(value: Any) -> Any:
        for one in [value] if isinstance(value, str) else value or ():
            check(one)
        return value

    return callback


def _check_recipe(name: str) -> None:
    if name != AS_STORED:
        recipe_file(name, packaged())


def _check_file(param: typer.CallbackParam, value: Path | None) -> Path | None:
    if value is not None and not value.parent.is_dir():
        raise UsageError(f"{param.opts[0]} {value}: the directory does not exist")
    return value


def _set_debug(ctx: typer.Context, value: bool) -> None:
    ctx.meta[DEBUG] = value


def _trust(ctx: typer.Context, value: bool) -> None:
    # Trusted until the command ends.
    ctx.with_resource(trusting(value))


def _complete_recipe(incomplete: str) -> list[str]:
    return [name for name in packaged() if name.startswith(incomplete)]


def _complete_cache(incomplete: str) -> list[str]:
    return [name for name in _complete_recipe(incomplete) if name.startswith("kv-")]


_model = partial(typer.Argument, callback=_checked(hub.find))
_recipe = partial(typer.Option, callback=_checked(_check_recipe))
_text = partial(typer.Option, metavar="FILE", callback=_checked(check_text))
_file = partial(typer.Option, metavar="FILE", callback=_check_file, dir_okay=False, writable=True)
_calibration = partial(typer.Option, metavar="N", rich_help_panel="Calibration")
_window = partial(typer.Option, metavar="N", rich_help_panel="Windows")
_hardware = partial(typer.Option, rich_help_panel="Hardware")
_hub = partial(typer.Option, rich_help_panel="Hugging Face hub")
_cache = partial(_recipe, metavar="RECIPE", autocompletion=_complete_cache)
_output = typer.Option("--output", "-o", metavar="OUT", help="Output directory.")

Model = Annotated[str, _model(metavar="MODEL", help="Hugging Face directory, hub id, or 'demo'.")]
AnyModel = Annotated[str, _model(metavar="MODEL", help="Artifact, Hugging Face directory, hub id, or 'demo'.")]
Models = Annotated[list[str], _model(metavar="MODEL", help="Artifacts, Hugging Face directories or hub ids.")]
Artifact = Annotated[str, _model(metavar="ARTIFACT", help="Output directory of quantize, or hub id.")]
Output = Annotated[Path, _output]
OptionalOutput = Annotated[Path | None, _output]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result in OUT; keep other files.")]
Baseline = Annotated[
    str | None, typer.Option(metavar="MODEL", help="Original model to compare with.", callback=_checked(hub.find))
]
Text = Annotated[str, _text(help="Text, JSONL or Parquet file, or dataset id.")]
KVCache = Annotated[str | None, _cache(help=f"Quantize the KV cache: kv-fp8, the artifact's recipe or '{AS_STORED}'.")]
Format = Annotated[ExportFormat, typer.Option(metavar="FORMAT", help=f"Output format: {', '.join(FORMATS)}.")]
Html = Annotated[Path | None, _file("--html", help="Write an HTML page with charts.")]
Seed = Annotated[int, typer.Option(metavar="N", min=0, max=2**31 - 1, help="Random seed.")]
Device = Annotated[Literal["auto", "cpu", "cuda"], _hardware(help="Device to compute on; auto prefers a GPU.")]
CpuWeights = Annotated[
    Literal["auto", "dense", "packed"],
    _hardware(help="On a CPU, decode weights once (dense) or in every call (packed)."),
]
Revision = Annotated[str | None, _hub(metavar="REV", help="Branch, tag or commit of MODEL; same as MODEL@REV.")]
Trust = Annotated[bool, _hub("--trust-remote-code", help="Run Python code of the model.", callback=_trust)]
Debug = Annotated[bool, typer.Option("--debug", help="Show a traceback on errors.", is_eager=True, callback=_set_debug)]


@dataclass(frozen=True)
class Common:
    """Options of nearly every command."""

    trust_remote_code: Trust = False
    json: Annotated[Path | None, _file(allow_dash=True, help="Write the result as JSON; - for stdout.")] = None
    debug: Debug = False


@dataclass(frozen=True)
class RunOptions:
    """A run of `quantize`, planned or done."""

    model: Model
    recipe: Annotated[
        str | None, _recipe(metavar="NAME|FILE", help="Packaged recipe or YAML file.", autocompletion=_complete_recipe)
    ] = None
    target_bits: Annotated[
        float | None,
        typer.Option(
            metavar="BITS", min=LEAST, max=MOST, help="Target average of bits per weight; each weight gets a setting."
        ),
    ] = None
    kv_cache: Annotated[str | None, _cache(help="Also compress the KV cache: kv-fp8, kv-vq-4bit or kv-vq-2bit.")] = None
    seed: Seed = 0
    texts: Annotated[
        list[str] | None,
        typer.Option(
            "--calibration",
            metavar="FILE[=SHARE]",
            callback=_checked(check_calibration),
            help="Text, JSONL, Parquet, dataset id, or 'self'; repeatable. Default: built-in text.",
            rich_help_panel="Calibration",
        ),
    ] = None
    samples: Annotated[int | None, _calibration(min=1, help="Number of rows. Default: up to 128.")] = None
    seqlen: Annotated[int | None, _calibration(min=2, help="Tokens per row. Default: context, up to 2048.")] = None
    bos: Annotated[Bos, _calibration(help=BOS_HELP)] = "auto"
    device: Device = "auto"
    states: Annotated[Literal["memory", "disk"], _hardware(help="Where to keep hidden states.")] = "memory"
    revision: Revision = None

    def job(self, out: Path | None = None, overwrite: bool = False) -> QuantizeOptions:
        """The options that the pipeline takes."""
        same = {name: value for name, value in vars(self).items() if name != "revision"}
        same["model"] = pinned(self.model, self.revision)
        return QuantizeOptions(out=out, overwrite=overwrite, **same)


@dataclass(frozen=True)
class WindowOptions:
    """How a text is cut into windows; the arguments of `perplexity` and `compare`."""

    seqlen: Annotated[int | None, _window(min=2, help="Tokens per window. Default: the model's context.")] = None
    stride: Annotated[int | None, _window(min=1, help="Tokens between starts. Default: no overlap.")] = None
    limit: Annotated[int | None, _window("--windows", min=1, help="Number of windows. Default: all.")] = None
    bos: Annotated[Bos, _window(help=BOS_HELP)] = "auto"


@dataclass(frozen=True)
class Upload:
    """Where to upload the result."""

    push_to_hub: Annotated[str | None, _hub(metavar="REPO", help="Upload the result to this repository.")] = None
    private: Annotated[bool, _hub("--private", help="Make a new repository private.")] = False

    def check(self) -> None:
        """UsageError or VQCompressError if the upload would fail."""
        if self.private and self.push_to_hub is None:
            raise UsageError("--private needs --push-to-hub REPO")
        if self.push_to_hub is not None and leads():
            hub.check_upload(self.push_to_hub)

    def push(self, folder: Path) -> None:
        """Upload a directory, if that was asked for, and print its address."""
        if self.push_to_hub is not None and leads():
            print(f"pushed  {hub.push(folder, self.push_to_hub, self.private)}")
