"""The options that commands share: their names, words of help and types. Nothing heavy is imported."""

from __future__ import annotations

from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from vqcompress.storage.recipe_files import packaged
from vqcompress.storage.trust import trusting

DEBUG = "vqcompress.debug"
# As in `export.FORMATS`, which brings torch along.
FORMATS = ("dense", "fp8", "compressed-tensors", "aqlm")
# Packaged recipes of a cache, which are given as --kv-cache, have names that begin so.
OF_CACHE = "kv-"


class Weights(StrEnum):
    """How a CPU keeps compressed weights; auto is dense if that fits into memory."""

    auto = "auto"
    dense = "dense"
    packed = "packed"


class States(StrEnum):
    """Where hidden states are kept between two blocks."""

    memory = "memory"
    disk = "disk"


class Device(StrEnum):
    """Where to compute."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


def _set_debug(ctx: typer.Context, value: bool) -> None:
    if value:
        ctx.meta[DEBUG] = True


def _trust(ctx: typer.Context, value: bool) -> None:
    if value:
        # Until the command is over.
        ctx.with_resource(trusting())


def _complete_recipe(incomplete: str) -> list[str]:
    return [name for name in packaged() if name.startswith(incomplete) and not name.startswith(OF_CACHE)]


def _complete_model(incomplete: str) -> list[str]:
    if not "demo".startswith(incomplete):
        # The shell completes paths.
        return []
    return ["demo", *(path.name for path in Path().glob(f"{incomplete}*/"))]


def _complete_cache(incomplete: str) -> list[str]:
    return [name for name in packaged() if name.startswith(incomplete) and name.startswith(OF_CACHE)]


def _complete_format(incomplete: str) -> list[str]:
    return [name for name in FORMATS if name.startswith(incomplete)]


def pinned(model: str, revision: str | None) -> str:
    """MODEL at a revision of it, as every other place that takes a model spells it."""
    return model if revision is None else f"{model}@{revision}"


_model = partial(typer.Argument, metavar="MODEL", autocompletion=_complete_model)
Model = Annotated[str, _model(help="A Hugging Face directory, a hub id, or 'demo'.")]
Either = Annotated[str, _model(help="An artifact, a directory, a hub id, or 'demo'.")]
Source = Annotated[str, typer.Argument(metavar="ARTIFACT", help="A directory of `quantize`, a hub id, or ID@REV.")]
Recipe = Annotated[
    str | None,
    typer.Option("--recipe", help="A packaged recipe (see `recipes`) or a file.", autocompletion=_complete_recipe),
]
KVCache = Annotated[
    str | None,
    typer.Option(
        "--kv-cache",
        metavar="RECIPE",
        help="Keep keys and values as codes: kv-vq-4bit, kv-vq-2bit, kv-fp8; as an artifact says: artifact.",
        autocompletion=_complete_cache,
    ),
]
Format = Annotated[
    str, typer.Option("--format", help=f"The format to write: {', '.join(FORMATS)}.", autocompletion=_complete_format)
]
Revision = Annotated[
    str | None,
    typer.Option("--revision", metavar="REV", help="Branch, tag or commit of a hub id; the same as MODEL@REV."),
]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.", callback=_trust)
]
Push = Annotated[
    str | None, typer.Option("--push-to-hub", metavar="REPO", help="Upload the result to the hub when it is finished.")
]
Private = Annotated[bool, typer.Option("--private", help="Make the repository of --push-to-hub a private one.")]
TargetBits = Annotated[
    float | None,
    typer.Option("--target-bits", help="Bits per weight to keep to, 1.5 to 6: a setting is chosen for each weight."),
]
Calibration = Annotated[
    list[str] | None,
    typer.Option("--calibration", help="Text, JSONL, Parquet or dataset id; repeatable. Default: a built-in text."),
]
Samples = Annotated[int | None, typer.Option("--samples", min=1, help="Rows of calibration. Default: up to 128.")]
Seqlen = Annotated[int | None, typer.Option("--seqlen", min=2, help="Tokens a row. Default: the context, ≤ 2048.")]
Kept = Annotated[States, typer.Option("--states", help="Where the hidden states of the rows are kept meanwhile.")]
Seed = Annotated[int, typer.Option("--seed", min=0, max=2**63 - 1, help="Same seed, same result.")]
Where = Annotated[Device, typer.Option("--device", help="Where to compute; auto takes a GPU if there is one.")]
CpuWeights = Annotated[
    Weights,
    typer.Option("--cpu-weights", help="On a CPU: decode weights once (dense) or at every call (packed)."),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace an artifact or unfinished run there, and no file of others.")
]
Json = Annotated[str | None, typer.Option("--json", metavar="FILE", help="Write JSON there; - is stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.", callback=_set_debug)]
