"""Rows of tokens that are cut from a text.

Shape legend: n tokens of a text, N rows, L tokens of a row.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from vqcompress.errors import VQCompressError

DEFAULT_SAMPLES = 128
FEWEST_SAMPLES = 8


def too_short(name: str, tokens: int, length: int, wanted: int, what: str) -> VQCompressError:
    """The error for a text with too few tokens. length: of a row. what: the options that ask for less."""
    rows = f"{tokens // length} rows of {length}, and {wanted} are needed"
    longest = f" (at most {tokens // wanted})" if tokens >= 2 * wanted else ""
    return VQCompressError(f"{name} is too short: its {tokens} tokens give {rows}; give more text or {what}{longest}")


def cut_rows(tokens: Tensor, count: int, length: int, seed: int, name: str) -> Tensor:
    """Calibration rows (N, L) int64: windows without overlap, drawn by the seed, in text order.

    tokens: (n,) the whole text. name: of the text, for the error if it is too short.
    """
    windows = len(tokens) // length
    if windows < count:
        raise too_short(name, len(tokens), length, count, "a smaller --samples or --seqlen")
    order = torch.randperm(windows, generator=torch.Generator().manual_seed(seed))[:count].sort().values
    return tokens[: windows * length].view(windows, length)[order].long()


def fingerprint(rows: Tensor) -> str:
    """SHA-256 of calibration rows."""
    return hashlib.sha256(rows.contiguous().numpy().tobytes()).hexdigest()
