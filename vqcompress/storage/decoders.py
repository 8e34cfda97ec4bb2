"""How the tensors of checkpoints that other tools have compressed are stored, and what they stand for.

Sources: README_WEIGHTS.md of DeepSeek-V3 (`fp8`), the OCP Microscaling Formats specification 1.0 (`mxfp4`), and the
package compressed-tensors, which decodes its own formats.
Shape legend: E experts, R rows of an expert's matrix, G groups of 32 numbers, B bytes.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vqcompress.errors import VQCompressError
from vqcompress.methods.fp8.reference import TILE
from vqcompress.storage.checkpoint import Checkpoint

# Part → tensor.
Parts = dict[str, Tensor]
# The sixteen numbers of four bits E2M1.
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
# Two of them in a byte, the first in its low half.
TWO_E2M1 = (torch.int8, torch.uint8, getattr(torch, "float4_e2m1fn_x2", None))
# compressed-tensors' names of what a weight is made of.
PARTS: tuple[str, ...] = (
    "weight_packed",
    "weight",
    "weight_scale",
    "weight_zero_point",
    "weight_global_scale",
    "weight_g_idx",
)
PARTS += ("weight_shape",)


@dataclass(frozen=True)
class Stored:
    """How one dense tensor is stored. parts: part → name on disk, the codes first. decode: → float, of that shape.

    tiles: the codes are E4M3 numbers in 128×128 tiles and `scale` their multipliers.
    """

    parts: dict[str, str]
    shape: tuple[int, ...]
    decode: Callable[[Parts], Tensor]
    tiles: bool = False


def _powers(scale: Tensor) -> Tensor:
    """Scales as float32; a byte stands for a power of two (E8M0)."""
    if scale.dtype != torch.uint8:
        return scale.float()
    # The exponent 255 is NaN.
    return torch.where(scale == 255, torch.nan, torch.ldexp(torch.ones(scale.shape), scale.int() - 127))


def _numbers(codes: Tensor) -> Tensor:
    """The float32 numbers of E4M3 codes, or of two E2M1 codes in a byte."""
    if codes.dtype not in TWO_E2M1:
        return codes.float()
    codes = codes.view(torch.uint8)
    return torch.stack((E2M1[(codes & 15).int()], E2M1[(codes >> 4).int()]), -1).flatten(-2)


def fp8(source: Checkpoint, settings: dict[str, Any]) -> dict[str, Stored]:
    """E4M3 or E2M1 codes with a multiplier for each block, row or tensor: `X.weight_scale_inv` and its other names."""
    block, found = settings.get("weight_block_size"), {}
    for name, info in source.tensors.items():
        names = [f"{name}_scale_inv", f"{name}_scale"]
        if name.endswith(".weight"):
            names += [f"{name.removesuffix('weight')}{last}" for last in ("scale", "qscale_weight")]
        scale = next((other for other in names if other in source.tensors), None)
        if scale is None or info.dtype.itemsize > 1 or len(info.shape) < 2:
            continue
        two = info.dtype in TWO_E2M1
        shape = (*info.shape[:-1], info.shape[-1] * 2) if two else info.shape
        # One for all, one for each row, or one for each expert.
        grid = source.tensors[scale].shape
        grid += (1,) * (len(shape) - len(grid))
        # Rows and columns of a block: as the config says, unless the scales do not fit that.
        sides = zip(shape[-2:], grid[-2:], (0, 0) if two or not block else block, strict=True)
        steps = [side if side and -(-n // side) == count else max(1, n // count) for n, count, side in sides]
        fits = [-(-n // side) == count for n, count, side in zip(shape[-2:], grid[-2:], steps, strict=True)]
        if (
            len(grid) != len(shape)
            or not all(fits)
            or any(c not in (1, n) for n, c in zip(shape[:-2], grid, strict=False))
        ):
            raise VQCompressError(f"{scale} of shape {source.tensors[scale].shape} has no scales for {name}, {shape}")

        def decode(parts: Parts, grid: tuple[int, ...] = grid, steps: list[int] = steps) -> Tensor:
            weight, scale = _numbers(parts["codes"]), _powers(parts["scale"]).reshape(grid)
            rows = scale.repeat_interleave(steps[0], -2)[..., : weight.shape[-2], :]
            return weight.mul_(rows.repeat_interleave(steps[1], -1)[..., : weight.shape[-1]])

        tiles = steps == [TILE, TILE] and len(shape) == 2 and info.dtype == torch.float8_e4m3fn
        found[name] = Stored({"codes": name, "scale": scale}, shape, decode, tiles)
    return found


def _mxfp4_weight(parts: Parts) -> Tensor:
    """Experts (E, 32 G, R) of codes (E, R, G, B = 16) and exponents (E, R, G); bfloat16 holds all of its numbers."""
    experts = zip(parts["codes"], parts["scale"], strict=True)
    return torch.stack([(_numbers(c) * _powers(s)[..., None]).flatten(1).T.bfloat16() for c, s in experts])


def mxfp4(source: Checkpoint, settings: dict[str, Any]) -> dict[str, Stored]:
    """Experts as gpt-oss stores them: `X_blocks` and `X_scales` of the matrices (E, 32 G, R), one matrix per expert."""
    found = {}
    for name, info in source.tensors.items():
        dense, scale = name.removesuffix("_blocks"), f"{name.removesuffix('_blocks')}_scales"
        if dense != name and scale in source.tensors:
            if len(info.shape) != 4 or info.shape[:3] != source.tensors[scale].shape or info.shape[3] != 16:
                raise VQCompressError(f"{name} has another shape than experts in MXFP4: {info.shape}")
            experts, rows, groups, _ = info.shape
            found[dense] = Stored({"codes": name, "scale": scale}, (experts, groups * 32, rows), _mxfp4_weight)
    return found


def compressed_tensors(source: Checkpoint, settings: dict[str, Any]) -> dict[str, Stored]:
    """`X.weight` or `X.weight_packed` with `X.weight_scale`; VQCompressError for models that more than weights make."""
    # Both change what a layer computes beyond its weight.
    for key in ("sparsity_config", "transform_config"):
        extra = settings.get(key) or {}
        if extra.get("config_groups") or extra.get("format", "dense") != "dense":
            raise VQCompressError(f"{source.path} has a {key}, which is not read; start from its dense weights")
    modules = [n.removesuffix(".weight_scale") for n in source.tensors if n.endswith(".weight_scale")]
    known = {m: {part: f"{m}.{part}" for part in PARTS if f"{m}.{part}" in source.tensors} for m in modules}
    shapes = source.read(parts["weight_shape"] for parts in known.values() if "weight_shape" in parts)
    found = {}
    for module, parts in known.items():
        codes = source.tensors[next(iter(parts.values()))]
        if codes.dtype.itemsize > 1 and "weight_packed" not in parts:
            raise VQCompressError(f"{module}.weight is stored as {codes.dtype}, and a scale lies beside it")
        shape = codes.shape
        if "weight_shape" in parts:
            shape = tuple(shapes[parts["weight_shape"]].tolist())
        elif "weight_packed" in parts:
            shape = (*shape[:-1], shape[-1] * 2)
        scheme = _scheme(module, settings)

        def decode(tensors: Parts, module: str = module, scheme: dict[str, Any] = scheme) -> Tensor:
            try:
                return _decompress(tensors, scheme)
            except Exception as error:  # the package raises what it comes across
                raise VQCompressError(f"compressed-tensors cannot decode {module}: {error}") from error

        weights = scheme["weights"]
        tiles = weights.get("block_structure") == [TILE, TILE] and codes.dtype == torch.float8_e4m3fn
        found[f"{module}.weight"] = Stored(parts, shape, decode, tiles)
    return found


def _scheme(module: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The config group of a module, with its format: one that names the module, else one for a class of layers."""
    groups = list(settings.get("config_groups", {}).values())

    def names(target: str) -> bool:
        return bool(re.match(target[3:], module)) if target.startswith("re:") else target == module

    classes = (group for group in groups if not all(t.startswith("re:") or "." in t for t in group["targets"]))
    group = next((group for group in groups if any(map(names, group["targets"]))), next(classes, None))
    if group is None or not group.get("weights"):
        raise VQCompressError(f"the quantization_config says nothing about {module}, which has scales")
    # The package knows the order of columns no more.
    weights = {key: value for key, value in group["weights"].items() if key != "actorder"}
    return {**group, "weights": weights, "format": group.get("format") or settings.get("format")}


def _decompress(tensors: Parts, scheme: dict[str, Any]) -> Tensor:
    """The weight of a module, by the package. Scales in 16 bits are widened, so that products are not rounded."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
    from compressed_tensors.quantization import QuantizationScheme

    if tensors["weight_scale"].dtype in (torch.bfloat16, torch.float16):
        tensors = {**tensors, "weight_scale": tensors["weight_scale"].float()}
    read = QuantizationScheme.model_validate(scheme)
    order = tensors.pop("weight_g_idx", None)
    if order is None or (order < 0).any():
        weight: Tensor = BaseCompressor.get_value_from_registry(read.format).decompress(tensors, read)["weight"]
        return weight
    # Columns in the order of activations: each has the number of its group.
    bits, scale, shape = read.weights.num_bits, tensors["weight_scale"], torch.Size(tensors["weight_shape"].tolist())
    codes, zero = unpack_from_int32(tensors["weight_packed"], bits, shape).int(), tensors.get("weight_zero_point")
    if zero is not None:
        codes -= unpack_from_int32(zero, bits, scale.shape, packed_dim=0)[:, order]
    return codes * scale[:, order]


# quant_method → the dense tensors of a checkpoint, by name.
FORMATS: dict[str, Callable[[Checkpoint, dict[str, Any]], dict[str, Stored]]] = {
    "fp8": fp8,
    "mxfp4": mxfp4,
    "compressed-tensors": compressed_tensors,
}
