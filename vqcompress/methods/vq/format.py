"""How the codes of vector quantization become values: what operators, kernels and their callers agree on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vqcompress.methods.vq.bitshift import padded


@dataclass(frozen=True)
class Format:
    """How codes become values. family: learned or trellis. d: weights of a code; 1 for a trellis.

    bits: of a code. depth: stages of learned codewords, or bits of a state of a trellis.
    """

    family: str
    d: int
    bits: int
    depth: int = 1

    @classmethod
    def parse(cls, name: str) -> Format:
        """The format with this `name`."""
        family, *numbers = name.split(".")
        return cls(family, *map(int, numbers))

    @property
    def name(self) -> str:
        """The name in operators and launch tables: family, d, bits and depth with dots between them."""
        return f"{self.family}.{self.d}.{self.bits}.{self.depth}"

    @property
    def by_rows(self) -> bool:
        """Whether a stream of codes belongs to a row of the weight, not to a column."""
        return self.family == "learned"

    @property
    def weights(self) -> int:
        """Weights of one unit of a stream: those of a code, or of the fewest whole 32-bit words of a trellis."""
        return self.d if self.by_rows else 32 if self.bits == 3 else 32 // self.bits

    @property
    def bits_per_weight(self) -> float:
        """Bits of codes per weight."""
        return self.bits * self.depth / self.d if self.by_rows else self.bits

    def units(self, shape: tuple[int, int]) -> int:
        """Units of a stream of an (O, I) weight."""
        return -(-shape[1 if self.by_rows else 0] // self.weights)

    def stream(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Number of bit streams of an (O, I) weight, and codes of one."""
        return (shape[0], self.units(shape) * self.depth) if self.by_rows else (shape[1], padded(shape[0]))

    def view(self, codes: Tensor) -> Tensor:
        """Stored codes (…, bytes) as the kernels load them: in elements of a unit of 16 or 32 bits, or of a byte."""
        if not self.by_rows:
            return codes.view(torch.int32)
        return codes.view({16: torch.int16, 32: torch.int32}.get(self.bits * self.depth, torch.uint8))

    def has_kernel(self, shape: tuple[int, int]) -> bool:
        """Whether the kernels multiply with such a weight: sequences of a trellis have to end on whole words."""
        return self.by_rows or shape[0] % 32 == 0
