"""The arguments of attention to coded keys and values, shared by the reference and the kernel.

Shape legend: B rows, H heads, T tokens, D channels of a head, d channels of a group, G = D / d groups, E entries.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class CodedTokens(NamedTuple):
    """Keys and values of one layer as codes, and what attention to them needs.

    codes_k, codes_v: uint8 (B, H, T, G). book_k, book_v: codebooks (H or 1, G or 1, E, d). start, end: the tokens that
    are attended to. mask_BT: True where a token counts, None for all. cos_BTD, sin_BTD: (B or 1, T, D) if keys were
    coded before their rotary embedding. scale_k, scale_v: (B, H, T), factors of a token's entries.
    """

    codes_k: Tensor
    book_k: Tensor
    codes_v: Tensor
    book_v: Tensor
    start: int
    end: int
    mask_BT: Tensor | None = None
    cos_BTD: Tensor | None = None
    sin_BTD: Tensor | None = None
    scale_k: Tensor | None = None
    scale_v: Tensor | None = None
