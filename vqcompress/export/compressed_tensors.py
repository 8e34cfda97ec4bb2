"""compressed-tensors, as llm-compressor writes it: W8A8 INT8 (`int-quantized`) and FP8_BLOCK (`float-quantized`).

Source: the package compressed-tensors. Codes are copied bit for bit. Scales stay float32, which readers accept;
llm-compressor writes bfloat16.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vqcompress.export.fp8 import partial_tile, unsupported
from vqcompress.export.rewrite import Export, dense_modules, mixture_of, mixtures, refuse, stays_dense, tensors
from vqcompress.methods import Method, PackedTensors
from vqcompress.methods.fp8.method import FP8
from vqcompress.methods.fp8.reference import TILE
from vqcompress.methods.int8.method import INT8
from vqcompress.model.stream import BlockStream
from vqcompress.storage.artifact import Artifact, Entry

NO_EXPERTS = (
    "transformers cannot load experts in compressed-tensors; the export is for vLLM, so leave --verify out"
    " (an fp8 artifact can be verified with --format fp8)"
)


def export(stream: BlockStream, artifact: Artifact) -> Export:
    """`X.weight`, `X.weight_scale` and, with static scales of activations, `X.input_scale`."""
    first = next(iter(artifact.entries.values()))
    experts = mixtures(stream)

    def why(entry: Entry) -> str:
        if not isinstance(entry.method, (INT8, FP8)):
            return f"is compressed by {entry.method.name}"
        if entry.method != first.method:
            return f"has other settings than {first.target.name}"
        if isinstance(entry.method, FP8) and entry.method.power_of_two_scales:
            return "rounds scales of activations to powers of two"
        static = isinstance(entry.method, INT8) and entry.method.activations == "per_tensor"
        if static and mixture_of(entry.target.name) in experts:
            # vLLM has no kernel for experts with static scales.
            return "is an expert's with a static scale of activations"
        return unsupported(stream, entry)

    instead = "quantize with fp8-tile, or with int8 and `none` in place of `fold` for smoothing that does not fold"
    refuse(artifact, "compressed-tensors", why, instead)
    is_int8 = isinstance(first.method, INT8)
    held, left_dense = stays_dense(stream, artifact, (lambda _: "") if is_int8 else partial_tile)
    config = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized" if is_int8 else "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], **_scheme(first.method)}},
        "ignore": dense_modules(stream, held),
    }
    found = tensors(stream, artifact, held, _write)
    unreadable = NO_EXPERTS if any(mixture_of(name) in experts for name in held) else ""
    return Export({**artifact.config, "quantization_config": config}, held, left_dense, found, unreadable)


def _scheme(method: Method) -> dict[str, Any]:
    """The config group that describes how weights and activations are rounded."""
    if isinstance(method, FP8):
        kind = {"num_bits": 8, "type": "float", "symmetric": True}
        weights = {"strategy": "block", "block_structure": [TILE, TILE], "dynamic": False}
        activations = {"strategy": "group", "group_size": TILE, "dynamic": True}
    else:
        kind = {"num_bits": 8, "type": "int", "symmetric": True}
        weights = {"strategy": "channel", "dynamic": False}
        static = isinstance(method, INT8) and method.activations == "per_tensor"
        activations = {"strategy": "tensor" if static else "token", "dynamic": not static}
    return {"weights": {**kind, **weights}, "input_activations": {**kind, **activations}}


def _write(entry: Entry, parts: PackedTensors) -> dict[str, Tensor]:
    scale = parts["scale"] if isinstance(entry.method, FP8) else parts["scale"][:, None]
    found = {"weight": parts["codes"], "weight_scale": scale}
    return found | ({"input_scale": parts["input_scale"][None]} if "input_scale" in parts else {})
