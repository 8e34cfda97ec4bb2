"""Coding of new keys and values; the contract is `codes.encode`.

Shape legend: B rows, H heads, T tokens, D channels, d of a group, G groups, E entries; V vectors of a tile.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqcompress.methods.triton import launch
from vqcompress.methods.triton.launch import Config, DeviceProperties

ENTRIES = tl.constexpr(256)


@triton.jit
def _turned_back(x_V1, cos_BTD, sin_BTD, angle_V, c, valid_V, HALF: tl.constexpr):  # type: ignore[no-untyped-def]
    """Channel c of tokens without their rotary embedding."""
    x_V = tl.load(x_V1 + c, valid_V, 0.0).to(tl.float32)
    if cos_BTD is not None:
        other_V = tl.load(x_V1 + tl.where(c < HALF, c + HALF, c - HALF), valid_V, 0.0).to(tl.float32)
        cos_V = tl.load(cos_BTD + angle_V + c, valid_V, 1.0).to(tl.float32)
        sin_V = tl.load(sin_BTD + angle_V + c, valid_V, 0.0).to(tl.float32)
        size_V = cos_V * cos_V + sin_V * sin_V
        x_V = x_V * (cos_V / size_V) + tl.where(c < HALF, other_V, -other_V) * (sin_V / size_V)
    return x_V


@triton.jit
def _encode(  # type: ignore[no-untyped-def]
    x,
    x_strides,
    book,
    book_strides,
    angles,
    out,
    rows,
    tokens,
    groups,
    LENGTH: tl.constexpr,
    HALF: tl.constexpr,
    V: tl.constexpr,
):
    """Codes of one group of one head. x_strides: of B, H, T. book_strides: of H, G. angles: cos, sin, stride of B.

    Sums are in the order of the channels, as in `kernel_nearest`.
    """
    cos, sin, cos_b = angles
    n_V, e_E = tl.program_id(0) * V + tl.arange(0, V), tl.arange(0, ENTRIES)
    h, g = tl.program_id(1) // groups, tl.program_id(1) % groups
    valid_V, b_V, t_V = n_V < rows, (n_V // tokens).to(tl.int64), n_V % tokens
    x_V1 = x + b_V * x_strides[0] + h.to(tl.int64) * x_strides[1] + t_V.to(tl.int64) * x_strides[2]
    book += h * book_strides[0] + g * book_strides[1]
    angle_V = b_V * cos_b + t_V.to(tl.int64) * 2 * HALF
    dot_VE, square_E = tl.zeros((V, ENTRIES), tl.float32), tl.zeros((ENTRIES,), tl.float32)
    for i in tl.static_range(LENGTH):
        x_V = _turned_back(x_V1, cos, sin, angle_V, g * LENGTH + i, valid_V, HALF)
        entry_E = tl.load(book + e_E * LENGTH + i).to(tl.float32)
        dot_VE += x_V[:, None] * entry_E[None, :]
        square_E += entry_E * entry_E
    code_V = tl.argmin((square_E * 0.5)[None, :] - dot_VE, 1)
    heads = tl.num_programs(1) // groups
    out_V = ((b_V * heads + h) * tokens + t_V) * groups + g
    tl.store(out + out_V, code_V.to(tl.uint8), valid_V)


def default_config(gpu: DeviceProperties, rows: int) -> Config:
    """Config of `encode` where none was measured. Lanes of a program have the entries."""
    return {"V": min(8, triton.next_power_of_2(rows)), "num_warps": max(1, min(rows, 4) * 32 // gpu.warp)}


def encode(x_BHTD: Tensor, book_HGEd: Tensor, cos_BTD: Tensor | None = None, sin_BTD: Tensor | None = None) -> Tensor:
    """Codes, uint8 (B, H, T, G): `codes.encode` of x, turned back first if it has cosines and sines.

    ValueError for shapes that do not fit.
    """
    (batch, heads, tokens, channels), length = x_BHTD.shape, book_HGEd.shape[-1]
    groups, rows = channels // length, batch * tokens
    book = books_of(book_HGEd, heads, groups)
    x = x_BHTD if x_BHTD.stride(-1) == 1 else x_BHTD.contiguous()
    out = x.new_empty((batch, heads, tokens, groups), dtype=torch.uint8)
    angles = angles_of(cos_BTD, sin_BTD, batch, tokens, channels)
    place = heads * groups, length
    config = launch.get_config("kv.encode", x.device, rows, place, lambda gpu: default_config(gpu, rows))
    constants = {"LENGTH": length, "HALF": channels // 2, "num_stages": 1}
    grid = triton.cdiv(rows, config["V"]), heads * groups
    tensors = (x, x.stride()[:3], book, book.stride()[:2], angles, out)
    launch.run(_encode, grid, *tensors, rows, tokens, groups, **constants, **config)
    return out


def books_of(book_HGEd: Tensor, heads: int, groups: int) -> Tensor:
    """A codebook for every head and group, a view."""
    of_heads, of_groups, entries, length = book_HGEd.shape
    if (
        of_heads not in (1, heads)
        or of_groups not in (1, groups)
        or entries != ENTRIES.value
        or length not in (2, 4, 8)
    ):
        wanted = f"(1 or {heads}, 1 or {groups}, {ENTRIES.value}, 2, 4 or 8)"
        raise ValueError(f"codebooks are {tuple(book_HGEd.shape)}; they must be {wanted}")
    return book_HGEd.contiguous().expand(heads, groups, -1, -1)


def angles_of(
    cos_BTD: Tensor | None, sin_BTD: Tensor | None, batch: int, tokens: int, channels: int
) -> tuple[Any, ...]:
    """Cosines and sines, contiguous or None, and how far those of the next row are."""
    if cos_BTD is None or sin_BTD is None:
        return None, None, 0
    if cos_BTD.shape != sin_BTD.shape or cos_BTD.shape[0] not in (1, batch) or cos_BTD.shape[1:] != (tokens, channels):
        found = f"cos and sin are {tuple(cos_BTD.shape)} and {tuple(sin_BTD.shape)}"
        raise ValueError(f"{found}; they must be (1 or {batch}, {tokens}, {channels})")
    return cos_BTD.contiguous(), sin_BTD.contiguous(), tokens * channels if len(cos_BTD) > 1 else 0
