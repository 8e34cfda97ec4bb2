"""FP8 in DeepSeek-V3's layout: E4M3 weights in 128×128 tiles times E4M3 activations in 1×128 tiles, no calibration.

Source: DeepSeek-V3, arXiv 2412.19437, section 3.3; stored as its checkpoints are, without padding.
Shape legend: T tokens, O output rows, I input columns, P = ceil(O / 128) and J = ceil(I / 128) tiles.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from vqcompress.methods.base import Layout, Method, PackedTensors, Shape, is_finite
from vqcompress.methods.feedback import Grid, grid_codes
from vqcompress.methods.fp8 import reference
from vqcompress.methods.statistics import Statistics

# Numbers that are encoded or decoded at once: they fit into a CPU's cache, which takes a third of the time.
STRIP = 2**19


def expand_tiles(scale_PJ: Tensor, shape: Shape) -> Tensor:
    """The scale of every element, (O, I), from one scale per 128×128 tile; edge tiles are cropped."""
    return scale_PJ.repeat_interleave(reference.TILE, 0)[: shape[0]].repeat_interleave(reference.TILE, 1)[:, : shape[1]]


def quantize_tiles(weight_OI: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """Codes float8_e4m3fn (O, I) and scales float32 (P, J) of a weight, one per 128×128 tile; refuses NaN and Inf.

    scale = max(amax / 448, 2⁻¹²⁶), rounded up to a power of two if asked; code = w / scale rounded to E4M3. A tile at
    the edge holds fewer weights.
    """
    rows, columns = weight_OI.shape
    margin = 0, -columns % reference.TILE, 0, -rows % reference.TILE
    tiles_PCJD = F.pad(weight_OI.float(), margin).unflatten(1, (-1, reference.TILE)).unflatten(0, (-1, reference.TILE))
    largest_P1J1 = tiles_PCJD.abs().amax((1, 3), keepdim=True)
    # NaN or Inf if anything in the tile is.
    if not is_finite(largest_P1J1):
        raise ValueError("weight holds NaN or Inf")
    scale_P1J1 = reference.e4m3_scale(largest_P1J1, power_of_two)
    codes_PCJD = reference.to_e4m3(tiles_PCJD / scale_P1J1)
    return codes_PCJD.flatten(2).flatten(0, 1)[:rows, :columns], scale_P1J1[:, 0, :, 0]


def _to_e4m3(ratio: Tensor) -> Tensor:
    return reference.to_e4m3(ratio).float()


def _strips(matrix: Tensor) -> tuple[Tensor, ...]:
    """Rows of whole tiles of a matrix, about STRIP numbers at a time."""
    return matrix.split(max(1, STRIP // (reference.TILE * matrix.shape[1])) * reference.TILE)


class FP8(Method):
    """ŵ = code · scale of its tile; |w − ŵ| ≤ max(|w| · 2⁻⁴, scale · 2⁻¹⁰).

    Packed tensors: `codes` float8_e4m3fn (O, I); `scale` float32 (P, J), a multiplier (`weight_scale_inv` in
    a checkpoint).
    power_of_two_scales: round the scales of weights and activations up to powers of two (UE8M0), which some GPUs need.
    """

    name: ClassVar[str] = "fp8"
    power_of_two_scales: bool = False
    feedback: bool = Field(False, description="let later columns correct the error of earlier ones; needs the Hessian")

    @property
    def needs(self) -> frozenset[str]:
        """The Hessian for error feedback."""
        return frozenset({"hessian"} if self.feedback else ())

    def layout(self, shape: Shape) -> Layout:
        """Codes and scale."""
        tiles = (-(-shape[0] // reference.TILE), -(-shape[1] // reference.TILE))
        return {"codes": (torch.float8_e4m3fn, shape), "scale": (torch.float32, tiles)}

    def encode(
        self, weight_OI: Tensor, statistics: Statistics, generator: torch.Generator, shared: PackedTensors | None = None
    ) -> PackedTensors:
        """The tensors of a weight; its statistics count with feedback only. ValueError if it holds NaN or Inf."""
        strips = [quantize_tiles(strip, self.power_of_two_scales) for strip in _strips(weight_OI)]
        codes, scales = zip(*strips, strict=True)
        codes_OI, scale_PJ = torch.cat(codes), torch.cat(scales)
        if self.feedback:
            grid = Grid(expand_tiles(scale_PJ, (weight_OI.shape[0], weight_OI.shape[1])), _to_e4m3)
            codes_OI = grid_codes(weight_OI, statistics, grid).to(torch.float8_e4m3fn)
        return {"codes": codes_OI, "scale": scale_PJ}

    def decode(self, tensors: PackedTensors, shape: Shape) -> Tensor:
        """Code · scale of its tile, float32 (O, I)."""
        strips = _strips(tensors["codes"])
        scales = tensors["scale"].split(-(-len(strips[0]) // reference.TILE))
        expanded = (expand_tiles(scale, (len(codes), shape[1])) for codes, scale in zip(strips, scales, strict=True))
        return torch.cat([codes.float().mul_(scale) for codes, scale in zip(strips, expanded, strict=True)])

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
        """The packed tensors; on a CPU, which has no FP8 product, the float32 weight that they stand for."""
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
        """`linear` of the rows of every expert, in one product unless the weight is decoded."""
        if "weight" in prepared:
            return super().grouped(x_SI, ends_E, prepared, shape)
        codes, scale = prepared["codes"], prepared["scale"]
        y_SO: Tensor = reference.fp8_linear(x_SI, codes, scale, self.power_of_two_scales, ends_E)
        return y_SO
