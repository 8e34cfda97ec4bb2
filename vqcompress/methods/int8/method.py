"""W8A8: INT8 weights per output row times INT8 activations (SmoothQuant, arXiv 2211.10438, without the smoothing).

Smoothing changes the weight and the statistics before `encode`; this method sees only the result.
Shape legend: T tokens, O output rows, I input columns.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from vqcompress.methods.base import Layout, Method, PackedTensors, Shape
from vqcompress.methods.int8 import reference
from vqcompress.methods.statistics import Statistics


class INT8(Method):
    """ŵ = code · scale with scale = max(row absmax / 127, 2⁻¹²⁶) and code = round(w / scale), so |w − ŵ| ≤ scale / 2.

    Packed tensors: `codes` int8 (O, I) in ±127; `scale` float32 (O,); with `per_tensor` also `input_scale`
    float32 ().
    activations: "per_token" scales every row of x by itself at run time (SmoothQuant's O1, table 2); "per_tensor" uses
    one scale for all of x, max absmax / 127 over the calibration tokens (O3), and clips what lies beyond.
    """

    name: ClassVar[str] = "int8"
    activations: Literal["per_token", "per_tensor"] = "per_token"

    @property
    def needs(self) -> frozenset[str]:
        """`absmax` for a static activation scale."""
        return frozenset({"absmax"}) if self.activations == "per_tensor" else frozenset()

    def layout(self, shape: Shape) -> Layout:
        """Codes, scale and, with per_tensor, input_scale."""
        layout: Layout = {"codes": (torch.int8, shape), "scale": (torch.float32, (shape[0],))}
        if self.activations == "per_tensor":
            layout["input_scale"] = (torch.float32, ())
        return layout

    def encode(
        self, weight_OI: Tensor, statistics: Statistics, generator: torch.Generator, shared: PackedTensors | None = None
    ) -> PackedTensors:
        """The tensors of a weight. ValueError if it holds NaN or Inf, or per_tensor has no calibration tokens."""
        super().check({"weight": weight_OI}, (weight_OI.shape[0], weight_OI.shape[1]))
        codes_OI, scale_O1 = reference.int8_quantize(weight_OI)
        tensors = {"codes": codes_OI.to(torch.int8).contiguous(), "scale": scale_O1.flatten()}
        if self.activations == "per_tensor":
            if statistics.absmax_I is None or statistics.tokens == 0:
                raise ValueError("int8 with activations='per_tensor' needs absmax over at least one calibration token")
            largest = statistics.absmax_I.float().max().to(weight_OI.device)
            tensors["input_scale"] = (largest / reference.INT8_MAX).clamp_min(reference.SCALE_MIN)
        return tensors

    def decode(self, tensors: PackedTensors, shape: Shape) -> Tensor:
        """Code · scale of its row, float32 (O, I)."""
        return tensors["codes"].float() * tensors["scale"][:, None]

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
        y_TO: Tensor = reference.int8_linear(x_TI, prepared["codes"], prepared["scale"], prepared.get("input_scale"))
        return y_TO

    def grouped(self, x_SI: Tensor, ends_E: Tensor, prepared: PackedTensors, shape: Shape) -> Tensor:
        """`linear` of the rows of every expert, in one product unless scales of activations are stored."""
        if "input_scale" in prepared:
            return super().grouped(x_SI, ends_E, prepared, shape)
        y_SO: Tensor = reference.int8_linear(x_SI, prepared["codes"], prepared["scale"], None, ends_E)
        return y_SO
