"""Trellis-coded weights: 1 to 4 bits each, codewords computed from a window of a column's bit stream.

The best method at every size (docs/vq.md). `bitshift` has the codewords and the search for a trellis path.
Shape legend: O output rows, I input columns, C codes of a column, padded to at least 16.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from vqcompress.methods.base import PackedTensors
from vqcompress.methods.feedback import Quantizer
from vqcompress.methods.statistics import Statistics
from vqcompress.methods.vq import bitshift
from vqcompress.methods.vq.base import VectorQuantizer
from vqcompress.methods.vq.format import Format


class Trellis(VectorQuantizer):
    """`codes` (I, packed_width(C, bits)) holds one stream per *column* of the weight, from its first row to its last.

    An entry of V is the codeword of its state, the `state_bits` bits of the stream that begin with its own.
    """

    codebook: Literal["trellis"] = Field("trellis", description="codewords computed from a trellis path")
    bits: int = Field(2, ge=1, le=4, description="bits per weight")
    state_bits: int = Field(14, ge=8, le=16, description="bits of a trellis state; each doubles the time")

    @property
    def form(self) -> Format:
        """One code per weight; the depth is the number of bits of a state."""
        return Format("trellis", 1, self.bits, self.state_bits)

    def _quantizer(
        self, weight_OI: Tensor, statistics: Statistics, generator: torch.Generator, shared: PackedTensors
    ) -> tuple[Quantizer, PackedTensors]:
        return bitshift.PathSearch(self.bits, self.state_bits), {}
