"""W8A8: INT8 weights per output row times INT8 activations (SmoothQuant, arXiv 2211.10438, without the smoothing).

Smoothing changes the weight and the statistics before `encode`; this method sees only the result.
Shape legend: T tokens, O output rows, I input columns.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from vqcompress.methods.base import Layout, Method, PackedTensors, Shape, expert_of
from vqcompress.methods.feedback import Grid, grid_codes
from vqcompress.methods.hadamard import hadamard
from vqcompress.methods.int8 import reference
from vqcompress.methods.packing import packed_width
from vqcompress.methods.rotation import pack_signs, rotate, signs_of_input, unpack_signs
from vqcompress.methods.statistics import Statistics


class INT8(Method):
    """ŵ = code · scale with scale = max(row absmax / 127, 2⁻¹²⁶) and code = round(w / scale), so |w − ŵ| ≤ scale / 2.

    Packed tensors: `codes` int8 (O, I) in ±127; `scale` float32 (O,); with `per_tensor` also `input_scale`
    float32 (); with a rotation, where these are of W · diag(signs) · H, `signs` uint8 (1, packed_width(I, 1)).
    activations: "per_token" scales every row of x by itself at run time (SmoothQuant's O1, table 2); "per_tensor" uses
    one scale for all of x, max absmax / 127 over the calibration tokens (O3), and clips what lies beyond.
    """

    name: ClassVar[str] = "int8"
    activations: Literal["per_token", "per_tensor"] = "per_token"
    rotation: bool = Field(False, description="randomized Hadamard transform of the input, at run time")
    feedback: bool = Field(False, description="let later columns correct the error of earlier ones; needs the Hessian")

    @model_validator(mode="after")
    def _fit_together(self) -> INT8:
        """Nobody has seen the magnitudes of rotated inputs."""
        if self.rotation and self.activations == "per_tensor":
            raise ValueError("a rotation needs activations=per_token")
        return self

    @property
    def needs(self) -> frozenset[str]:
        """`absmax` for a static activation scale, the Hessian for error feedback."""
        asked = {"absmax": self.activations == "per_tensor", "hessian": self.feedback}
        return frozenset(name for name, wanted in asked.items() if wanted)

    def layout(self, shape: Shape) -> Layout:
        """Codes, scale and, with per_tensor, input_scale, with a rotation signs."""
        layout: Layout = {"codes": (torch.int8, shape), "scale": (torch.float32, (shape[0],))}
        if self.activations == "per_tensor":
            layout["input_scale"] = (torch.float32, ())
        if self.rotation:
            layout["signs"] = (torch.uint8, (1, packed_width(shape[1], 1)))
        return layout

    def encode(
        self, weight_OI: Tensor, statistics: Statistics, generator: torch.Generator, shared: PackedTensors | None = None
    ) -> PackedTensors:
        """The tensors of a weight. ValueError if it holds NaN or Inf, or per_tensor has no calibration tokens."""
        super().check({"weight": weight_OI}, (weight_OI.shape[0], weight_OI.shape[1]))
        signs_I, tensors = None, {}
        if self.rotation:
            signs_I = signs_of_input(weight_OI.shape[1], statistics, generator).to(weight_OI)
            weight_OI, tensors["signs"] = hadamard(weight_OI * signs_I), pack_signs(signs_I)
        codes_OI, scale_O1 = reference.int8_quantize(weight_OI)
        if self.feedback:
            grid = Grid(scale_O1.expand_as(weight_OI), reference.to_int8)
            codes_OI = grid_codes(weight_OI, statistics, grid, signs_I)
        tensors |= {"codes": codes_OI.to(torch.int8).contiguous(), "scale": scale_O1.flatten()}
        if self.activations == "per_tensor":
            if statistics.absmax_I is None or statistics.tokens == 0:
                raise ValueError("int8 with activations='per_tensor' needs absmax over at least one calibration token")
            largest = statistics.absmax_I.float().max().to(weight_OI.device)
            tensors["input_scale"] = (largest / reference.INT8_MAX).clamp_min(reference.SCALE_MIN)
        return tensors

    def decode(self, tensors: PackedTensors, shape: Shape) -> Tensor:
        """Code · scale of its row, rotated back, float32 (O, I)."""
        weight_OI = tensors["codes"].float() * tensors["scale"][:, None]
        return hadamard(weight_OI) * unpack_signs(tensors["signs"], shape[1]) if self.rotation else weight_OI

    def check(self, tensors: PackedTensors, shape: Shape) -> None:
        """Raise ValueError for a code of −128 and for scales that are not positive and finite."""
        super().check(tensors, shape)
        if (tensors["codes"] == -128).any():
            raise ValueError("codes holds -128; INT8 codes are in ±127")
        for name in tensors.keys() & {"scale", "input_scale"}:
            if not (tensors[name] > 0).all():
                raise ValueError(f"{name} holds a value that is not positive")

    def prepare(
        self, tensors: PackedTensors, shape: Shape, dtype: torch.dtype = torch.float32, packed: bool = False
    ) -> PackedTensors:
        """The parts; on a CPU that multiplies floats faster than bytes, with `codes` as float32 made once."""
        if packed or reference.BYTE_PRODUCTS or tensors["codes"].device.type != "cpu":
            return dict(tensors)
        return {**tensors, "codes": tensors["codes"].float()}

    def has_kernel(self, shape: Shape) -> bool:
        """Always."""
        return True

    def linear(self, x_TI: Tensor, prepared: PackedTensors, shape: Shape) -> Tensor:
        """x Wᵀ of `reference.int8_linear`, the activation per token or with the stored scale."""
        x_TI = rotate(x_TI, prepared["signs"]) if self.rotation else x_TI
        y_TO: Tensor = reference.int8_linear(x_TI, prepared["codes"], prepared["scale"], prepared.get("input_scale"))
        return y_TO

    def grouped(self, x_SI: Tensor, ends_E: Tensor, prepared: PackedTensors, shape: Shape) -> Tensor:
        """`linear` of the rows of every expert, in one product unless scales of activations are stored."""
        if "input_scale" in prepared:
            return super().grouped(x_SI, ends_E, prepared, shape)
        if self.rotation:
            x_SI = rotate(x_SI, prepared["signs"], expert_of(ends_E, len(x_SI)))
        y_SO: Tensor = reference.int8_linear(x_SI, prepared["codes"], prepared["scale"], None, ends_E)
        return y_SO
