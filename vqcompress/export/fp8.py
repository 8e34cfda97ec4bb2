"""`quant_method: fp8`, as DeepSeek-V3 and Qwen3 are published: E4M3 codes and a float32 multiplier per 128×128 tile.

Source: DeepSeek-V3's README_WEIGHTS.md; FineGrainedFP8Config of transformers. The codes and scales of `fp8` artifacts
are copied bit for bit. Activations are rounded in 1×128 tiles at run time and need nothing stored. Which weights stay
dense: those with a partial tile, and all that vLLM merges with them (`rewrite.stays_dense`).
"""

from __future__ import annotations

from typing import Any

from vqcompress.export.rewrite import Export, dense_modules, mixture_of, refuse, stays_dense, tensors
from vqcompress.methods.fp8.method import FP8
from vqcompress.methods.fp8.reference import TILE
from vqcompress.model.stream import BlockStream
from vqcompress.storage.artifact import Artifact, Entry
from vqcompress.storage.targets import Target


def export(stream: BlockStream, artifact: Artifact) -> Export:
    """`X.weight` and `X.weight_scale_inv`; weights that do not fill their tiles are written dense."""
    method = next(iter(artifact.entries.values())).method

    def why(entry: Entry) -> str:
        if not isinstance(entry.method, FP8):
            return f"is compressed by {entry.method.name}"
        if entry.method != method:
            return "has another power_of_two_scales than the other weights"
        return unsupported(stream, entry)

    refuse(artifact, "fp8", why, "quantize with fp8-tile")
    held, left_dense = stays_dense(stream, artifact, partial_tile)
    config: dict[str, Any] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "weight_block_size": [TILE, TILE],
        "modules_to_not_convert": dense_modules(stream, held),
    }
    if isinstance(method, FP8) and method.power_of_two_scales:
        config["scale_fmt"] = "ue8m0"
    found = tensors(
        stream, artifact, held, lambda _, parts: {"weight": parts["codes"], "weight_scale_inv": parts["scale"]}
    )
    return Export({**artifact.config, "quantization_config": config}, held, left_dense, found)


def partial_tile(target: Target) -> str:
    """Why a weight stays dense ("" if it does not): readers differ on partial tiles.

    transformers 5.24 computes the rows of a tile as rows // tiles, and would load 192 rows as two tiles of 96.
    """
    rows, columns = target.shape
    return f"{rows} × {columns} is no multiple of {TILE}" if rows % TILE or columns % TILE else ""


def unsupported(stream: BlockStream, entry: Entry) -> str:
    """Why no format of plain linear layers can store a target, or ""."""
    if entry.smoothed:
        return "divides its input by a smoothing vector at run time"
    return "is an expert's that the checkpoint stores fused" if mixture_of(entry.target.name) in stream.mixtures else ""
