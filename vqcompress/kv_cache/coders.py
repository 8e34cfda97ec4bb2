"""How the keys or the values of a layer are stored.

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

CPU = torch.device("cpu")


class Coder(ABC):
    """How the keys or the values of a layer are stored: x (B, H, T, D) to parts whose third axis is T, and back.

    With a `book`, parts are `codes` of its entries, and a `scale` (B, H, T) or none: `kv.attend` reads them without
    decoding, for queries that went through `enter`, and what it weighs has to go through `leave`.
    """

    book: Tensor | None = None
    # Whether entries are of x as it is, so that keys can be turned by their rotary embedding after a look-up.
    plain = False

    @abstractmethod
    def encode(self, x_BHTD: Tensor) -> dict[str, Tensor]:
        """The parts to store."""

    @abstractmethod
    def decode(self, parts: dict[str, Tensor]) -> Tensor:
        """float32 (B, H, T, D)."""

    def check(self, x_BHTD: Tensor) -> None:
        """VQCompressError unless there is a codebook for each head and group of channels, or one for all."""
        if self.book is None:
            return
        (heads, groups, _, d), (_, found, _, channels) = self.book.shape, x_BHTD.shape
        if channels % d or heads not in (1, found) or groups not in (1, channels // d):
            stored = f"{heads} heads of {groups * d} channels"
            raise VQCompressError(f"the cache has codebooks for {stored}, but the model {found} of {channels}")

    def enter(self, x: Tensor) -> Tensor:
        """x (…, D) in the basis of the entries."""
        return x

    def leave(self, x: Tensor) -> Tensor:
        """x (…, D) back from the basis of the entries."""
        return x


@dataclass(frozen=True)
class Learned(Coder):
    """Codes of calibrated codebooks. book: (H, G, E, d), what `kv.learn` gives."""

    book: Tensor
    plain = True

    def encode(self, x_BHTD: Tensor, cos: Tensor | None = None, sin: Tensor | None = None) -> dict[str, Tensor]:
        """Codes; of x without its rotary embedding, if cos and sin of its tokens are given."""
        return {"codes": kv.coded(x_BHTD, self.book, cos, sin)}

    def decode(self, parts: dict[str, Tensor]) -> Tensor:
        """The entries."""
        return kv.decode(parts["codes"], self.book)


class Universal(Coder):
    """Codes of the Gaussian's codebook and a scale for each token and head. d: channels of a code."""

    def __init__(self, d: int, device: torch.device = CPU):
        self.d, self.book = d, kv.gaussian(d, device)

    def encode(self, x_BHTD: Tensor) -> dict[str, Tensor]:
        """Codes and scales."""
        codes, scale = kv.universal_encode(x_BHTD, self.d)
        return {"codes": codes, "scale": scale}

    def decode(self, parts: dict[str, Tensor]) -> Tensor:
        """Entries times scales, turned back."""
        return kv.universal_decode(parts["codes"], parts["scale"], self.d)

    def enter(self, x: Tensor) -> Tensor:
        """Rotated."""
        return x.float() @ kv.rotation(x.shape[-1], x.device)

    def leave(self, x: Tensor) -> Tensor:
        """Rotated back."""
        return x @ kv.rotation(x.shape[-1], x.device).T


class FP8(Coder):
    """E4M3 with a scale for each token and head, as activations of `fp8` (DeepSeek-V3, arXiv 2412.19437, 3.3.2)."""

    def encode(self, x_BHTD: Tensor) -> dict[str, Tensor]:
        """Codes and scales."""
        scale = fp8.e4m3_scale(x_BHTD.float().abs().amax(-1, keepdim=True), False)
        # As bytes: of a type that every copy knows.
        return {"codes": fp8.to_e4m3(x_BHTD.float() / scale).view(torch.uint8), "scale": scale}

    def decode(self, parts: dict[str, Tensor]) -> Tensor:
        """Codes times scales."""
        return parts["codes"].view(torch.float8_e4m3fn).float() * parts["scale"]
