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

CPU = torch.device("cpu")
# The range of float16 scales: its smallest normal number, and its largest.
TINY, HALF_MAX = 2.0**-14, 65504.0


class KVQuantizer(ABC):
    """Stores keys or values: x (B, H, T, D) as parts whose third axis is T, and back.

    With a `book`, parts are the `codes` of its entries and optionally a `scale` (B, H, T). `codes.attend` reads them
    without decoding: its queries go through `enter` first, and its output through `leave`.
    """

    book: Tensor | None = None
    # Whether entries are in the basis of x, so that the rotary embedding can be applied after a look-up.
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
class Learned(KVQuantizer):
    """Codes of calibrated codebooks. book: (H, G, E, d), from `codes.learn`."""

    book: Tensor
    plain = True

    def encode(self, x_BHTD: Tensor, cos: Tensor | None = None, sin: Tensor | None = None) -> dict[str, Tensor]:
        """Codes. cos, sin: encode x without its rotary embedding."""
        return {"codes": kv.encode_unrotated(x_BHTD, self.book, cos, sin)}

    def decode(self, parts: dict[str, Tensor]) -> Tensor:
        """The entries."""
        return kv.decode(parts["codes"], self.book)


class Universal(KVQuantizer):
    """Codes of a Gaussian codebook for rotated heads, with a float16 scale per token and head. d: channels of a code.

    Random signs and a Hadamard transform make the channels of a head look Gaussian, whatever the text
    (NSNQuant, arXiv 2505.18231, section 4; without its centring, which needs more than one token).
    """

    def __init__(self, d: int, device: torch.device = CPU):
        self.book: Tensor = kv.gaussian(d, device)

    def encode(self, x_BHTD: Tensor) -> dict[str, Tensor]:
        """Codes and scales (B, H, T)."""
        x_BHTD = self.enter(x_BHTD)
        scale_BHT = x_BHTD.square().mean(-1).sqrt().clamp(min=TINY, max=HALF_MAX).half()
        return {"codes": kv.encode_unrotated(x_BHTD / scale_BHT.float()[..., None], self.book), "scale": scale_BHT}

    def decode(self, parts: dict[str, Tensor]) -> Tensor:
        """Entries times scales, rotated back."""
        return self.leave(kv.decode(parts["codes"], self.book) * parts["scale"].float()[..., None])

    def enter(self, x: Tensor) -> Tensor:
        """x in float32, rotated."""
        return x.float() @ kv.rotation(x.shape[-1], x.device)

    def leave(self, x: Tensor) -> Tensor:
        """x rotated back."""
        return x @ kv.rotation(x.shape[-1], x.device).T


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
