"""Leaving a weight as it is, so that recipes can say so like anything else.

Shape legend: O output rows, I input columns.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from vqcompress.methods.base import Layout, Method, PackedTensors, Shape
from vqcompress.methods.statistics import Statistics


class Keep(Method):
    """The weight itself in one part, `weight` (O, I). In an artifact it keeps its own name, type and bytes."""

    name: ClassVar[str] = "keep"
    dense: ClassVar[bool] = True

    def layout(self, shape: Shape) -> Layout:
        """The weight."""
        return {"weight": (torch.float32, shape)}

    def encode(
        self, weight_OI: Tensor, statistics: Statistics, generator: torch.Generator, shared: PackedTensors | None = None
    ) -> PackedTensors:
        """A copy of the weight. ValueError if it holds NaN or Inf."""
        tensors = {"weight": weight_OI.float().clone()}
        self.check(tensors, (weight_OI.shape[0], weight_OI.shape[1]))
        return tensors

    def decode(self, tensors: PackedTensors, shape: Shape) -> Tensor:
        """The weight, float32 (O, I)."""
        return tensors["weight"].float()
