"""How the keys or the values of a layer are stored.

Shape legend: B rows, H heads of keys and values, T tokens, D channels of a head, G groups of d channels, E entries.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vqcompress import ops
from vqcompress.codebooks import kv
from vqcompress.errors import VQCompressError


class Coder:
    """How the keys or the values of a layer are stored: x (B, H, T, D) to parts whose third axis is T, and back."""

    def encode(self, x_BHTD: Tensor) -> dict[str, Tensor]:
        """The parts to store."""
        raise NotImplementedError

    def check(self, x_BHTD: Tensor) -> None:
        """VQCompressError if it cannot store keys or values of this shape."""

    def decode(self, parts: dict[str, Tensor]) -> Tensor:
        """float32 (B, H, T, D)."""
        raise NotImplementedError


@dataclass(frozen=True)
class Learned(Coder):
    """Codes of calibrated codebooks. book_HGEd: `kv.learn`."""

    book_HGEd: Tensor

    def check(self, x_BHTD: Tensor) -> None:
        """As above: a head, or one for all, has a codebook for each group of its channels."""
        (heads, groups, _, d), (_, found, _, channels) = self.book_HGEd.shape, x_BHTD.shape
        if heads not in (1, found) or groups * d != channels:
            stored = f"{heads} heads of {groups * d} channels"
            raise VQCompressError(f"the cache has codebooks for {stored}, but the model {found} of {channels}")

    def encode(self, x_BHTD: Tensor) -> dict[str, Tensor]:
        """Codes."""
        return {"codes": kv.encode(x_BHTD, self.book_HGEd)}

    def decode(self, parts: dict[str, Tensor]) -> Tensor:
        """The entries."""
        return kv.decode(parts["codes"], self.book_HGEd)


@dataclass(frozen=True)
class Universal(Coder):
    """Codes of the Gaussian's codebook and a scale for each token and head. d: channels of a code."""

    d: int

    def encode(self, x_BHTD: Tensor) -> dict[str, Tensor]:
        """Codes and scales."""
        codes, scale = kv.universal_encode(x_BHTD, self.d)
        return {"codes": codes, "scale": scale}

    def decode(self, parts: dict[str, Tensor]) -> Tensor:
        """Entries times scales, turned back."""
        return kv.universal_decode(parts["codes"], parts["scale"], self.d)


class FP8(Coder):
    """E4M3 with a scale for each token and head, as activations of `fp8` (DeepSeek-V3, arXiv 2412.19437, 3.3.2)."""

    def encode(self, x_BHTD: Tensor) -> dict[str, Tensor]:
        """Codes and scales."""
        scale = ops.e4m3_scale(x_BHTD.float().abs().amax(-1, keepdim=True), False)
        return {"codes": ops.to_e4m3(x_BHTD.float() / scale), "scale": scale}

    def decode(self, parts: dict[str, Tensor]) -> Tensor:
        """Codes times scales."""
        return parts["codes"].float() * parts["scale"]
