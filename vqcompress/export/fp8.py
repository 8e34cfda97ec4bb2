"""`quant_method: fp8`, as DeepSeek-V3 and Qwen3 are published: E4M3 codes and a float32 multiplier per 128×128 tile.

Source: DeepSeek-V3's README_WEIGHTS.md; FineGrainedFP8Config of transformers. The codes and scales of `fp8` artifacts
are copied bit for bit. Activations are rounded in 1×128 tiles at run time and need nothing stored.
`stays_dense.py` decides which weights are written dense.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vqcompress.export.rewrite import Export, one_method
from vqcompress.export.stays_dense import dense_modules, partial_tile, stays_dense
from vqcompress.export.verify import Reader
from vqcompress.methods import PackedTensors
from vqcompress.methods.fp8.method import FP8
from vqcompress.methods.fp8.reference import TILE
from vqcompress.model.stream import BlockStream
from vqcompress.storage.artifact import Artifact, Entry

READER = Reader()


def export(stream: BlockStream, artifact: Artifact) -> Export:
    """`X.weight` and `X.weight_scale_inv`; weights that do not fill their tiles are written dense."""
    method = one_method(stream, artifact, (FP8,), "fp8 needs fp8-tile")
    compressed, left_dense = stays_dense(stream, artifact, partial_tile)
    config: dict[str, Any] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "weight_block_size": [TILE, TILE],
        "modules_to_not_convert": dense_modules(stream, compressed),
    }
    if isinstance(method, FP8) and method.power_of_two_scales:
        config["scale_fmt"] = "ue8m0"
    return Export(config, _write, compressed, left_dense)


def _write(entry: Entry, parts: PackedTensors) -> dict[str, Tensor]:
    return {"weight": parts["codes"], "weight_scale_inv": parts["scale"]}
