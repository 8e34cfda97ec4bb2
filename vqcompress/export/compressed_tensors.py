"""compressed-tensors, as llm-compressor writes it: W8A8 INT8 (`int-quantized`) and FP8_BLOCK (`float-quantized`).

Source: the package compressed-tensors. Codes are copied bit for bit. Scales stay float32, which readers accept;
llm-compressor writes bfloat16. `stays_dense.py` decides which weights are written dense.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vqcompress.export.rewrite import Export, mixture_of, mixtures, one_method
from vqcompress.export.stays_dense import dense_modules, partial_tile, stays_dense
from vqcompress.export.verify import Reader
from vqcompress.methods import Method, PackedTensors
from vqcompress.methods.fp8.method import FP8
from vqcompress.methods.fp8.reference import TILE
from vqcompress.methods.int8.method import INT8
from vqcompress.model.stream import BlockStream
from vqcompress.storage.artifact import Artifact, Entry

# This reader rounds activations to steps of amax / 127.5; artifacts use amax / 127.
READER = Reader("compressed-tensors>=0.20", rounds=True, bound=0.01)


def export(stream: BlockStream, artifact: Artifact) -> Export:
    """`X.weight`, `X.weight_scale` and, with static scales of activations, `X.input_scale`."""
    experts = mixtures(stream)

    def why(entry: Entry) -> str:
        if isinstance(entry.method, FP8) and entry.method.power_of_two_scales:
            return "rounds scales of activations to powers of two"
        if isinstance(entry.method, INT8) and entry.method.rotation:
            return "is rotated at run time"
        # vLLM has no kernel for experts with static scales.
        if _is_static(entry.method) and mixture_of(entry.target.name) in experts:
            return "is an expert's with a static scale of activations"
        return ""

    instead = (
        "compressed-tensors needs fp8-tile, or int8 with `none` in place of `fold` for smoothing that does not fold"
    )
    method = one_method(stream, artifact, (INT8, FP8), instead, why)
    is_int8 = isinstance(method, INT8)
    compressed, left_dense = stays_dense(stream, artifact, (lambda _: "") if is_int8 else partial_tile)
    config = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized" if is_int8 else "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], **_scheme(method)}},
        "ignore": dense_modules(stream, compressed),
    }
    return Export(config, _write, compressed, left_dense, any(mixture_of(name) in experts for name in compressed))


def _is_static(method: Method) -> bool:
    """Whether a method stores one scale for all activations of a layer."""
    return isinstance(method, INT8) and method.activations == "per_tensor"


def _scheme(method: Method) -> dict[str, Any]:
    """The config group that describes how weights and activations are rounded."""
    if isinstance(method, FP8):
        number = {"num_bits": 8, "type": "float", "symmetric": True}
        weights = {"strategy": "block", "block_structure": [TILE, TILE], "dynamic": False}
        activations = {"strategy": "group", "group_size": TILE, "dynamic": True}
    else:
        number = {"num_bits": 8, "type": "int", "symmetric": True}
        weights = {"strategy": "channel", "dynamic": False}
        activations = {"strategy": "tensor" if _is_static(method) else "token", "dynamic": not _is_static(method)}
    return {"weights": {**number, **weights}, "input_activations": {**number, **activations}}


def _write(entry: Entry, parts: PackedTensors) -> dict[str, Tensor]:
    scale = parts["scale"] if isinstance(entry.method, FP8) else parts["scale"][:, None]
    found = {"weight": parts["codes"], "weight_scale": scale}
    return found | ({"input_scale": parts["input_scale"][None]} if "input_scale" in parts else {})
