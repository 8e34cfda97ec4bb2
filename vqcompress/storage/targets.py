"""Names and shapes of the weights that can be compressed, without the model that they belong to."""

from __future__ import annotations

import re
from dataclasses import dataclass


def kind(name: str) -> str:
    """A name with every number in it replaced, so that the weights of all blocks and experts fall together."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


@dataclass(frozen=True)
class Target:
    """One weight to compress. name: path of its module in the model. shape: (O, I)."""

    name: str
    shape: tuple[int, int]
    bias: bool

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class Block:
    """One decoder layer. name: path of its module in the model, without a dot at the end."""

    name: str
    targets: tuple[Target, ...]

    def local(self, target: Target) -> str:
        """The target's path inside the block."""
        return target.name.removeprefix(self.name + ".")
