"""Options that commands share: names, types and help. Nothing heavy is imported here."""

from __future__ import annotations

from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from vqcompress.storage.recipe_files import packaged
from vqcompress.storage.trust import trusting

DEBUG = "vqcompress.debug"
# The keys of `export.FORMATS`, repeated because importing it imports torch.
FORMATS = ("dense", "fp8", "compressed-tensors", "aqlm")
# Prefix of the packaged KV cache recipes.
CACHE_PREFIX = "kv-"


class Weights(StrEnum):
    """How compressed weights are held on a CPU; auto means dense if that fits into memory."""

    auto = "auto"
    dense = "dense"
    packed = "packed"


class States(StrEnum):
    """Where hidden states are kept between blocks."""

    memory = "memory"
    disk = "disk"


class Device(StrEnum):
    """The device to compute on."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


def _set_debug(ctx: typer.Context, value: bool) -> None:
    if value:
        ctx.meta[DEBUG] = True


def _trust(ctx: typer.Context, value: bool) -> None:
    if value:
        # Trusted until the command ends.
        ctx.with_resource(trusting())


def _complete_recipe(incomplete: str) -> list[str]:
    return [name for name in packaged() if name.startswith(incomplete) and not name.startswith(CACHE_PREFIX)]


def _complete_model(incomplete: str) -> list[str]:
    if not "demo".startswith(incomplete):
        # The shell completes paths.
        return []
    return ["demo", *(path.name for path in Path().glob(f"{incomplete}*/"))]


def _complete_cache(incomplete: str) -> list[str]:
    return [name for name in packaged() if name.startswith(incomplete) and name.startswith(CACHE_PREFIX)]


def _complete_format(incomplete: str) -> list[str]:
    return [name for name in FORMATS if name.startswith(incomplete)]


def pinned(model: str, revision: str | None) -> str:
    """MODEL@REVISION, or MODEL if no revision is given."""
    return model if revision is None else f"{model}@{revision}"


_model = partial(typer.Argument, metavar="MODEL", autocompletion=_complete_model)
Model = Annotated[str, _model(help="Hugging Face directory, hub id, or 'demo'.")]
Either = Annotated[str, _model(help="Artifact, Hugging Face directory, hub id, or 'demo'.")]
Source = Annotated[str, typer.Argument(metavar="ARTIFACT", help="Output directory of `quantize`, or hub id.")]
Recipe = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        metavar="NAME",
        help="Packaged recipe (see `recipes`) or YAML file.",
        autocompletion=_complete_recipe,
    ),
]
KVCache = Annotated[
    str | None,
    typer.Option(
        "--kv-cache",
        metavar="RECIPE",
        help="Quantize the KV cache: kv-fp8, kv-vq-4bit, kv-vq-2bit, or 'artifact' for what the artifact stores.",
        autocompletion=_complete_cache,
    ),
]
Format = Annotated[
    str, typer.Option("--format", help=f"Output format: {', '.join(FORMATS)}.", autocompletion=_complete_format)
]
Revision = Annotated[
    str | None,
    typer.Option("--revision", metavar="REV", help="Branch, tag or commit of a hub id (or MODEL@REV)."),
]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Allow Python code from the model repository.", callback=_trust)
]
Push = Annotated[
    str | None, typer.Option("--push-to-hub", metavar="REPO", help="Upload the result to this Hugging Face repository.")
]
Private = Annotated[bool, typer.Option("--private", help="Create a private repository (--push-to-hub).")]
TargetBits = Annotated[
    float | None,
    typer.Option(
        "--target-bits",
        help="Choose a setting per weight for this average, 1.5 to 6 bits.",
    ),
]
Calibration = Annotated[
    list[str] | None,
    typer.Option(
        "--calibration",
        help="Text, JSONL or Parquet file, or dataset id; repeatable (default: built-in text).",
    ),
]
Samples = Annotated[
    int | None, typer.Option("--samples", metavar="N", min=1, help="Calibration rows (default: up to 128).")
]
Seqlen = Annotated[
    int | None,
    typer.Option("--seqlen", metavar="N", min=2, help="Tokens per row (default: context, up to 2048)."),
]
Kept = Annotated[States, typer.Option("--states", help="Where to keep hidden states between blocks.")]
Seed = Annotated[int, typer.Option("--seed", metavar="N", min=0, max=2**63 - 1, help="Random seed.")]
Where = Annotated[Device, typer.Option("--device", help="Device; auto uses a GPU if available.")]
CpuWeights = Annotated[
    Weights,
    typer.Option("--cpu-weights", help="On a CPU, decode weights once (dense) or at every call (packed)."),
]
Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="Overwrite an existing artifact or unfinished run; other files are left alone."),
]
Json = Annotated[str | None, typer.Option("--json", metavar="FILE", help="Write the result as JSON; - for stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show a traceback on errors.", callback=_set_debug)]
