"""Ways to store the keys or the values of a layer.

Shape legend: B rows, H heads of keys and values, T tokens, D channels of a head, G groups of d channels, E entries.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from vqcompress.errors import VQCompressError
from vqcompress.kv_cache import codes as kv
from vqcompress.methods.fp8 import reference as fp8


class KVQuantizer(ABC):
    """Stores keys or values: x (B, H, T, D) as parts whose third axis is T, and back."""

    @abstractmethod
    def encode(self, x_BHTD: Tensor) -> dict[str, Tensor]:
        """The parts to store."""

    @abstractmethod
    def decode(self, parts: dict[str, Tensor]) -> Tensor:
        """float32 (B, H, T, D)."""


@dataclass(frozen=True)
class Learned(KVQuantizer):
    """Codes of calibrated codebooks. book: (H, G, E, d), from `codes.learn`."""

    book: Tensor

    def encode(self, x_BHTD: Tensor) -> dict[str, Tensor]:
        """Codes; VQCompressError unless there is a codebook for each head and group of channels."""
        (heads, groups, _, d), (_, found, _, channels) = self.book.shape, x_BHTD.shape
        if (heads, groups * d) != (found, channels):
            stored = f"{heads} heads of {groups * d} channels"
            raise VQCompressError(f"the cache has codebooks for {stored}, but the model {found} of {channels}")
        return {"codes": kv.encode(x_BHTD, self.book)}

    def decode(self, parts: dict[str, Tensor]) -> Tensor:
        """The entries."""
        return kv.decode(parts["codes"], self.book)


class FP8(KVQuantizer):
    """E4M3 with a scale for each token and head, as activations of `fp8` (DeepSeek-V3, arXiv 2412.19437, 3.3.2)."""

    def encode(self, x_BHTD: Tensor) -> dict[str, Tensor]:
        """Codes and scales."""
        scale = fp8.e4m3_scale(x_BHTD.float().abs().amax(-1, keepdim=True), False)
        # As bytes: index_select and cat have no FP8 on every device.
        return {"codes": fp8.to_e4m3(x_BHTD.float() / scale).view(torch.uint8), "scale": scale}

    def decode(self, parts: dict[str, Tensor]) -> Tensor:
        """Codes times scales."""
        return parts["codes"].view(torch.float8_e4m3fn).float() * parts["scale"]
