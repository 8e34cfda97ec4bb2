"""Storing a weight as it is, so that nothing else has to ask whether a layer is compressed.

Shape legend: O output rows, I input columns.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from vqcompress.methods.method import Layout, Method, Parts, Shape
from vqcompress.statistics import Statistics

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Keep(Method):
    """The weight itself in one part, `weight` (O, I).

    dtype: what to store it as. float32 holds every weight exactly; a 16-bit type holds exactly what came from a
    checkpoint of that type and rounds anything else to nearest, half to even.
    """

    name: ClassVar[str] = "keep"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    def layout(self, shape: Shape) -> Layout:
        """The weight."""
        return {"weight": (DTYPES[self.dtype], shape)}

    def encode(
        self, weight_OI: Tensor, statistics: Statistics, generator: torch.Generator, shared: Parts | None = None
    ) -> Parts:
        """A copy of the weight. ValueError if it holds NaN or Inf, or is too large for the type."""
        super().check({"weight": weight_OI}, (weight_OI.shape[0], weight_OI.shape[1]))
        stored_OI = weight_OI.to(DTYPES[self.dtype], copy=True)
        if not torch.isfinite(stored_OI).all():
            raise ValueError(f"keep: the weight reaches {weight_OI.abs().max().item():.4g}, beyond dtype={self.dtype}")
        return {"weight": stored_OI}

    def decode(self, parts: Parts, shape: Shape) -> Tensor:
        """The weight, float32 (O, I)."""
        return parts["weight"].float()

    def prepare(self, parts: Parts, shape: Shape, dtype: torch.dtype = torch.float32) -> Parts:
        """The stored weight, not a copy of it where inputs have its type."""
        return {"weight": parts["weight"].to(dtype)}
