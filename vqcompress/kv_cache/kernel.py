"""Attention of one query per row over coded keys and values; the contract is `codes.attend`.

Attention splits the tokens, so that few heads fill a device (flash-decoding): programs of a slice leave the largest
score, the sum of weights and the weighted values, and a second launch merges them. A program has the queries that share
a head of keys: it decodes once for all of them, and matrix units multiply. Memory brings a byte for d channels; the
time goes into look-ups in the codebooks, through L1.

Channel i is turned with channel i + D/2, so groups are looked up in two halves. Of the cosines and sines the first half
is read only: transformers repeats it.
Shape legend: B rows, Q heads of queries, H of keys and values, R = Q / H, T tokens, D channels, d of a group, G groups,
E entries, S slices. Of a tile: M queries, C tokens, N groups of a half (a power of two).
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqcompress.methods.triton import launch
from vqcompress.methods.triton.launch import Config, DeviceProperties

# Queries of a program: the fewest rows of a matrix product.
QUERIES = 16
MOST_SLICES, LOG2_E = 128, math.log2(math.e)
ENTRIES = tl.constexpr(256)


@triton.jit
def _entries(codes, book, t_C, last, HALF: tl.constexpr, LENGTH: tl.constexpr, N: tl.constexpr):  # type: ignore[no-untyped-def]
    """Entries of a tile's tokens before the last, both halves of the groups, float32 (C, N, d) each.

    Behind the groups there are those of any.
    """
    n_N, j_11d = tl.arange(0, N), tl.arange(0, LENGTH)[None, None, :]
    at_CN, there_CN = codes + t_C[:, None] * (2 * HALF) + n_N[None, :], (t_C < last)[:, None] & (n_N < HALF)[None, :]
    one_CN, two_CN = tl.load(at_CN, there_CN, 0).to(tl.int32), tl.load(at_CN + HALF, there_CN, 0).to(tl.int32)
    group_1N = (n_N % HALF)[None, :]
    one_CN, two_CN = (group_1N * ENTRIES + one_CN) * LENGTH, ((group_1N + HALF) * ENTRIES + two_CN) * LENGTH
    one_CNd, two_CNd = tl.load(book + one_CN[:, :, None] + j_11d), tl.load(book + two_CN[:, :, None] + j_11d)
    return one_CNd.to(tl.float32), two_CNd.to(tl.float32)


@triton.jit
def _turned(one_CNd, two_CNd, cos_TD, sin_TD, t_C, last, HALF: tl.constexpr):  # type: ignore[no-untyped-def]
    """Both halves of keys with their rotary embedding."""
    n_N, j_d = tl.arange(0, one_CNd.shape[1]), tl.arange(0, one_CNd.shape[2])
    c_Nd = n_N[:, None] * one_CNd.shape[2] + j_d[None, :]
    at_CNd = t_C[:, None, None] * (2 * HALF * one_CNd.shape[2]) + c_Nd[None, :, :]
    there_CN1 = (t_C < last)[:, None, None] & (n_N < HALF)[None, :, None]
    cos_CNd = tl.load(cos_TD + at_CNd, there_CN1, 0.0).to(tl.float32)
    sin_CNd = tl.load(sin_TD + at_CNd, there_CN1, 0.0).to(tl.float32)
    return one_CNd * cos_CNd - two_CNd * sin_CNd, two_CNd * cos_CNd + one_CNd * sin_CNd


@triton.jit
def _operand(x_CNd, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """A tile as a matrix product reads it, (C, N · d)."""
    return tl.reshape(x_CNd, (x_CNd.shape[0], x_CNd.shape[1] * x_CNd.shape[2])).to(DTYPE)


@triton.jit
def _finite(top):  # type: ignore[no-untyped-def]
    """The number that is subtracted from scores: the largest, but 0 while there is none, so that all weights are 0."""
    return tl.where(top == -float("inf"), 0.0, top)


# Tuples: codes and books of keys and of values, angles (cosines, sines, stride of B; None without), out (sums, parts),
# sizes (T, H, R), SHAPE (d, G / 2, N).
@triton.jit(do_not_specialize=["start", "end"])
def _attend(  # type: ignore[no-untyped-def]
    q_RD,
    codes,
    books,
    angles,
    out,
    factor,
    start,
    end,
    sizes,
    SHAPE: tl.constexpr,
    DTYPE: tl.constexpr,
    M: tl.constexpr,
    C: tl.constexpr,
):
    """M queries of a head, one slice of the tokens.

    Leaves values weighted by exp2(score − most), `most`, and the sum of the weights.
    """
    LENGTH: tl.constexpr = SHAPE[0]
    HALF: tl.constexpr = SHAPE[1]
    N: tl.constexpr = SHAPE[2]
    WIDTH: tl.constexpr = HALF * LENGTH
    tokens, heads, repeat = sizes
    tiles = (repeat + M - 1) // M
    pair, r_M = tl.program_id(1) // tiles, tl.program_id(1) % tiles * M + tl.arange(0, M)
    b, h, of_pair = (pair // heads).to(tl.int64), pair % heads, pair.to(tl.int64) * tokens * (2 * HALF)
    row_M, c_1C = pair.to(tl.int64) * repeat + r_M, tl.arange(0, N * LENGTH)[None, :]
    own_M, own_MC = r_M < repeat, (r_M < repeat)[:, None] & (c_1C < WIDTH)
    at_MC = q_RD + row_M[:, None] * (2 * WIDTH) + c_1C
    q_one = (tl.load(at_MC, own_MC, 0.0).to(tl.float32) * factor).to(DTYPE)
    q_two = (tl.load(at_MC + WIDTH, own_MC, 0.0).to(tl.float32) * factor).to(DTYPE)
    most_M, total_M = tl.full((M,), -float("inf"), tl.float32), tl.zeros((M,), tl.float32)
    one, two = tl.zeros((M, N * LENGTH), tl.float32), tl.zeros((M, N * LENGTH), tl.float32)
    of_head = h * (2 * WIDTH) * ENTRIES
    # Whole tiles for each slice.
    slices = tl.num_programs(0)
    span = tl.maximum(((end - start + slices - 1) // slices + C - 1) // C * C, 0)
    first = start + tl.program_id(0) * span
    last = tl.minimum(first + span, end)
    for at in range(first, last, C):
        t_C = at + tl.arange(0, C)
        x_one, x_two = _entries(codes[0] + of_pair, books[0] + of_head, t_C, last, HALF, LENGTH, N)
        if angles[0] is not None:
            cos, sin = angles[0] + b * angles[2], angles[1] + b * angles[2]
            x_one, x_two = _turned(x_one, x_two, cos, sin, t_C, last, HALF)
        score_MC = tl.dot(q_one, tl.trans(_operand(x_one, DTYPE)), input_precision="ieee")
        score_MC = tl.dot(q_two, tl.trans(_operand(x_two, DTYPE)), score_MC, input_precision="ieee")
        score_MC = tl.where((t_C < last)[None, :], score_MC, -float("inf"))
        top_M = tl.maximum(most_M, tl.max(score_MC, 1))
        kept_M, weight_MC = tl.exp2(most_M - _finite(top_M)), tl.exp2(score_MC - _finite(top_M)[:, None])
        total_M, most_M = total_M * kept_M + tl.sum(weight_MC, 1), top_M
        x_one, x_two = _entries(codes[1] + of_pair, books[1] + of_head, t_C, last, HALF, LENGTH, N)
        weight_MC = weight_MC.to(DTYPE)
        one = tl.dot(weight_MC, _operand(x_one, DTYPE), one * kept_M[:, None], input_precision="ieee")
        two = tl.dot(weight_MC, _operand(x_two, DTYPE), two * kept_M[:, None], input_precision="ieee")
    at_M = row_M * slices + tl.program_id(0)
    tl.store(out[1] + at_M * 2, most_M, own_M)
    tl.store(out[1] + at_M * 2 + 1, total_M, own_M)
    at_MC = out[0] + at_M[:, None] * (2 * WIDTH) + c_1C
    tl.store(at_MC, one, own_MC)
    tl.store(at_MC + WIDTH, two, own_MC)


@triton.jit
def _merge(sum_RSD, part_RS2, out_RD, lse_R, slices, channels, S: tl.constexpr, C: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of C channels of a query: all slices together."""
    row, s_S, c_C = tl.program_id(0).to(tl.int64), tl.arange(0, S), tl.program_id(1) * C + tl.arange(0, C)
    at_S, there_S, there_C = row * slices + s_S, s_S < slices, c_C < channels
    most_S = tl.load(part_RS2 + at_S * 2, there_S, -float("inf"))
    top = tl.max(most_S, 0)
    weight_S = tl.exp2(most_S - _finite(top))
    total = tl.sum(tl.load(part_RS2 + at_S * 2 + 1, there_S, 0.0) * weight_S, 0)
    sum_SC = tl.load(sum_RSD + at_S[:, None] * channels + c_C[None, :], there_S[:, None] & there_C[None, :], 0.0)
    out_C = tl.sum(sum_SC * weight_S[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(out_RD + row * channels + c_C, out_C, there_C)
    # Both are logarithms to the base 2.
    tl.store(lse_R + row, (top + tl.log2(total)) * 0.6931471805599453)


def default_config(
    gpu: DeviceProperties, shape: tuple[int, ...], batch: int, size: int = 8192, threads: int = 256
) -> Config:
    """Config of `attend` where none was measured: tiles of about `size` numbers, in slices that fill a device.

    shape: Q, H, D, d, T. A slice has two tiles at least.
    """
    queries, heads, channels, _, tokens = shape
    programs, warps = batch * heads * triton.cdiv(queries // heads, QUERIES), threads // gpu.warp
    tile = max(16, size // triton.next_power_of_2(channels))
    # Not more than fill it: the codebooks of all programs that a multiprocessor holds should stay in its L1.
    split = min(16 * gpu.processors // (warps * max(1, programs)), tokens // (2 * tile), MOST_SLICES)
    return {"C": tile, "num_warps": warps, "SPLIT": max(1, split)}


def attend(
    q_BQD: Tensor, codes: list[Tensor], books: list[Tensor], angles: list[Tensor], start: int, end: int, scaling: float
) -> tuple[Tensor, Tensor]:
    """Values (B, Q, D) and logarithms of sums of exponentials (B, Q), float32: `codes.attend` for an even G.

    Slices are merged in a fixed order. Queries, rotated keys and weights are rounded to float16, as entries are, by
    2⁻¹² each.
    """
    (batch, queries, channels), (_, heads, tokens, groups) = q_BQD.shape, codes[0].shape
    rows, repeat, length = batch * queries, queries // heads, books[0].shape[3]
    shape, turn = (queries, heads, channels, length, tokens), (None, None, 0)
    if angles:
        turn = *(part.contiguous() for part in angles), tokens * channels if len(angles[0]) > 1 else 0  # type: ignore[assignment]
    name = "kv.attend.turned" if angles else "kv.attend"
    place = (*shape[:4], triton.next_power_of_2(tokens))
    config = dict(launch.get_config(name, q_BQD.device, batch, place, lambda gpu: default_config(gpu, shape, batch)))
    slices = config.pop("SPLIT")
    sum_RSD = q_BQD.new_empty((rows, slices, channels), dtype=torch.float32)
    part_RS2, out_BQD = sum_RSD.new_empty((rows, slices, 2)), sum_RSD.new_empty((batch, queries, channels))
    lse_BQ = sum_RSD.new_empty((batch, queries))
    stored = [tuple(part.contiguous() for part in pair) for pair in (codes, books)]
    # The interpreter multiplies no bfloat16, and has no need of float16.
    operand = tl.float32 if q_BQD.device.type == "cpu" else tl.float16
    constants = {"SHAPE": (length, groups // 2, triton.next_power_of_2(groups // 2)), "DTYPE": operand, "M": QUERIES}
    tensors = q_BQD.contiguous(), *stored, turn, (sum_RSD, part_RS2), scaling * LOG2_E, start, end
    grid = slices, batch * heads * triton.cdiv(repeat, QUERIES)
    launch.run(_attend, grid, *tensors, (tokens, heads, repeat), **constants, num_stages=1, **config)
    grid, tile = (rows, triton.cdiv(channels, 32)), {"S": triton.next_power_of_2(slices), "C": 32}
    launch.run(_merge, grid, sum_RSD, part_RS2, out_BQD, lse_BQ, slices, channels, **tile)
    return out_BQD, lse_BQ
