"""How the codes of vector quantization become values: what operators, kernels and their callers agree on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Format:
    """How codes become values. family: learned or trellis. d: weights of a code; 1 for a trellis.

    bits: of a code. depth: stages of learned codewords, or bits of a state of a trellis.
    """

    family: str
    d: int
    bits: int
    depth: int = 1

    @property
    def by_rows(self) -> bool:
        """Whether a stream of codes belongs to a row of the weight, not to a column."""
        return self.family == "learned"

    @property
    def weights(self) -> int:
        """Weights that one unit of a stream stands for: a code, or the whole words of 32 bits of a trellis."""
        return (32 if self.bits == 3 else 32 // self.bits) if self.family == "trellis" else self.d

    @property
    def name(self) -> str:
        """The name in launch tables."""
        return f"{self.family}.{self.d}.{self.bits}.{self.depth}"

    @property
    def bits_per_weight(self) -> float:
        """Bits of codes per weight."""
        stages = self.depth if self.family == "learned" else 1
        return self.bits * stages / self.d

    def units(self, shape: tuple[int, int]) -> int:
        """Units of a stream of an (O, I) weight."""
        return -(-shape[1 if self.by_rows else 0] // self.weights)

    def view(self, codes: Tensor) -> Tensor:
        """Stored codes (…, bytes) as what the kernels load: whole words where a unit is one."""
        if self.family == "trellis":
            return codes.view(torch.int32)
        if self.bits == 16:
            return codes.view(torch.int16)
        if self.bits == 8 and self.depth in (2, 4):
            # The codes of all stages of a codeword.
            return codes.view(torch.int16 if self.depth == 2 else torch.int32)
        return codes

    def refusal(self, shape: tuple[int, int]) -> str:
        """Why the kernels cannot multiply with such a weight; empty if they can."""
        if self.family == "trellis" and shape[0] % 32:
            return f"{shape[0]} outputs are no multiple of 32, so its paths do not end on whole words"
        return ""
