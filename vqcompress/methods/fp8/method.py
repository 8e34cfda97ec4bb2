"""FP8 in DeepSeek-V3's layout: E4M3 weights in 128×128 tiles times E4M3 activations in 1×128 tiles, no calibration.

Source: DeepSeek-V3, arXiv 2412.19437, section 3.3; stored as its checkpoints are, without padding.
Shape legend: T tokens, O output rows, I input columns, P = ceil(O / 128) and J = ceil(I / 128) tiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vqcompress.methods.base import Layout, Method, PackedTensors, Shape, is_finite
from vqcompress.methods.fp8 import reference
from vqcompress.methods.statistics import Statistics

# Weights that are worked on at once.
STRIP = 2**19


def expand_tiles(scale_PJ: Tensor, shape: Shape) -> Tensor:
    """The scale of every element, (O, I), from one scale per 128×128 tile; edge tiles are cropped."""
    return scale_PJ.repeat_interleave(reference.TILE, 0)[: shape[0]].repeat_interleave(reference.TILE, 1)[:, : shape[1]]


def quantize_tiles(weight_OI: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """Codes float8_e4m3fn (O, I) and scales float32 (P, J) of a weight, one per 128×128 tile; refuses NaN and Inf.

    scale = max(amax / 448, 2⁻¹²⁶), rounded up to a power of two if asked; code = w / scale rounded to E4M3. A tile at
    the edge holds fewer weights.
    """
    (rows, columns), tiles = weight_OI.shape, -(-weight_OI.shape[1] // reference.TILE)
    codes_OI, scales = weight_OI.new_empty((rows, columns), dtype=torch.float8_e4m3fn), []
    for strip in _strips(weight_OI):
        some = weight_OI[strip].float()
        margin = 0, -columns % reference.TILE, 0, -len(some) % reference.TILE
        padded = (F.pad(some, margin) if any(margin) else some).reshape(-1, reference.TILE, tiles, reference.TILE)
        largest = padded.abs().amax((1, 3), keepdim=True)
        # NaN or Inf if anything in the tile is.
        if not is_finite(largest):
            raise ValueError("weight holds NaN or Inf")
        scale = reference.e4m3_scale(largest, power_of_two)
        codes = reference.to_e4m3(padded / scale).view(-1, tiles * reference.TILE)
        codes_OI[strip] = codes[: len(some), :columns]
        scales.append(scale[:, 0, :, 0])
    return codes_OI, torch.cat(scales) if scales else weight_OI.new_empty((0, tiles), dtype=torch.float32)


def _e4m3_to_half(codes: Tensor) -> Tensor:
    """Exactly 2⁻⁸ times each code, float16; NaN, which `check` refuses, gives 1.875.

    E4M3 has a sign, four bits of exponent and three of mantissa; float16 has room for all of them seven bits up, and
    subnormal numbers mean the same there. torch converts float8 on a CPU one number at a time.
    """
    # Of a negative number all higher bits are 1, and the second of them is no sign.
    bits = codes.view(torch.int8).to(torch.int16).bitwise_left_shift_(7)
    return bits.bitwise_and_(~0x4000).view(torch.float16)


def _strips(matrix: Tensor) -> Iterator[slice]:
    """Rows of whole tiles that fit together into a CPU's cache, where the same arithmetic takes a third of the time."""
    rows = len(matrix)
    if matrix.device.type == "cpu":
        rows = max(1, STRIP // (reference.TILE * max(1, matrix.shape[1]))) * reference.TILE
    return (slice(start, start + rows) for start in range(0, len(matrix), max(1, rows)))


class FP8(Method):
    """ŵ = code · scale of its tile; |w − ŵ| ≤ max(|w| · 2⁻⁴, scale · 2⁻¹⁰).

    Packed tensors: `codes` float8_e4m3fn (O, I); `scale` float32 (P, J), a multiplier (`weight_scale_inv` in
    a checkpoint).
    power_of_two_scales: round the scales of weights and activations up to powers of two (UE8M0), which some GPUs need.
    """

    name: ClassVar[str] = "fp8"
    any_float: ClassVar[bool] = True
    power_of_two_scales: bool = False

    def layout(self, shape: Shape) -> Layout:
        """Codes and scale."""
        tiles = (-(-shape[0] // reference.TILE), -(-shape[1] // reference.TILE))
        return {"codes": (torch.float8_e4m3fn, shape), "scale": (torch.float32, tiles)}

    def encode(
        self, weight_OI: Tensor, statistics: Statistics, generator: torch.Generator, shared: PackedTensors | None = None
    ) -> PackedTensors:
        """The tensors of a weight, without a look at its statistics. ValueError if it holds NaN or Inf."""
        codes_OI, scale_PJ = quantize_tiles(weight_OI, self.power_of_two_scales)
        return {"codes": codes_OI, "scale": scale_PJ}

    def decode(self, tensors: PackedTensors, shape: Shape) -> Tensor:
        """Code · scale of its tile, float32 (O, I)."""
        weight_OI = tensors["scale"].new_empty(shape)
        for strip in _strips(tensors["codes"]):
            codes, tiles = (
                tensors["codes"][strip],
                slice(strip.start // reference.TILE, -(-strip.stop // reference.TILE)),
            )
            scale = expand_tiles(tensors["scale"][tiles], (len(codes), shape[1]))
            weight_OI[strip] = _e4m3_to_half(codes).float().mul_(256).mul_(scale)
        return weight_OI

    def check(self, tensors: PackedTensors, shape: Shape) -> None:
        """Raise ValueError for NaN codes and for scales that are not positive, finite and, if asked, powers of two."""
        super().check(tensors, shape)
        scale_PJ = tensors["scale"]
        if not (scale_PJ > 0).all():
            raise ValueError("scale holds a value that is not positive")
        if self.power_of_two_scales and not (torch.frexp(scale_PJ).mantissa == 0.5).all():
            raise ValueError("scale holds a value that is not a power of two, but power_of_two_scales is on")

    def prepare(
        self, tensors: PackedTensors, shape: Shape, dtype: torch.dtype = torch.float32, packed: bool = False
    ) -> PackedTensors:
        """The parts; on a CPU, which has no FP8 product, the float32 weight that they stand for."""
        on_cpu = tensors["codes"].device.type == "cpu"
        return {"weight": self.decode(tensors, shape)} if on_cpu and not packed else dict(tensors)

    def has_kernel(self, shape: Shape) -> bool:
        """Always."""
        return True

    def linear(self, x_TI: Tensor, prepared: PackedTensors, shape: Shape) -> Tensor:
        """x Wᵀ of `reference.fp8_linear`, the activation in 1×128 tiles; a decoded weight times x rounded as there."""
        if "weight" in prepared:
            return (reference.fp8_rounded(x_TI, self.power_of_two_scales) @ prepared["weight"].T).to(x_TI.dtype)
        y_TO: Tensor = reference.fp8_linear(x_TI, prepared["codes"], prepared["scale"], self.power_of_two_scales)
        return y_TO

    def grouped(self, x_SI: Tensor, ends_E: Tensor, prepared: PackedTensors, shape: Shape) -> Tensor:
        """`linear` of the rows of every expert, of `reference.fp8_grouped`."""
        if "weight" in prepared:
            return super().grouped(x_SI, ends_E, prepared, shape)
        codes, scale = prepared["codes"], prepared["scale"]
        y_SO: Tensor = reference.fp8_grouped(x_SI, ends_E, codes, scale, self.power_of_two_scales)
        return y_SO
