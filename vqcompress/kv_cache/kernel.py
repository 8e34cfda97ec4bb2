"""Attention of one query per row over coded keys and values; the contract is `codes.attend`.

Attention splits the tokens, so that few heads fill a device
(flash-decoding): programs of a slice leave the largest score, the sum of weights and the weighted values, and a second
launch merges them. Memory brings a byte for d channels; the time goes into look-ups in the codebooks, through L1:

- `_attend_one`: a program has one query, and rows of lanes a token each. Lanes keep the maximum, sum and values of
  their own tokens until the end, so that the loop has no shared memory and no barrier, only the sum of a score over
  lanes. Optionally the products of a query with all entries come first (`_table`), once for all slices. A score is then
  the sum of G of them: four bytes a look-up instead of 2 d, and no multiplication. For keys coded after their rotary
  embedding only: products with keys that are rotated when they are read differ at every position.
- `_attend_group`: a program has the queries of one head of keys and decodes once for all; matrix units multiply.

Channel i is turned with channel i + D/2, so groups are looked up in two halves, by the same lanes. Of the cosines and
sines `attend` reads the first half only: transformers repeats it.
Shape legend: B rows, Q heads of queries, H of keys and values, R = Q / H, T tokens, D channels, d of a group, G groups,
E entries, S slices. Of a tile: M queries, C tokens, N groups of a half (a power of two), V vectors.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqcompress.kv_cache.coded_tokens import CodedTokens
from vqcompress.kv_cache.kernel_encode import ENTRIES, angles_of, books_of
from vqcompress.methods.triton import launch
from vqcompress.methods.triton.launch import Config, DeviceProperties

MOST_SLICES, LOG2_E = 128, math.log2(math.e)


@triton.jit
def _table(  # type: ignore[no-untyped-def]
    q_RD, book, out_RGE, factor, heads, repeat, book_h, book_g, D: tl.constexpr, LENGTH: tl.constexpr
):
    """Products of a query's channels of one group with every entry."""
    row, g, groups = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    e_E, j_d = tl.arange(0, ENTRIES), tl.arange(0, LENGTH)
    q_d = tl.load(q_RD + row * D + g * LENGTH + j_d).to(tl.float32) * factor
    book += row // repeat % heads * book_h + g * book_g
    entry_Ed = tl.load(book + e_E[:, None] * LENGTH + j_d[None, :]).to(tl.float32)
    tl.store(out_RGE + (row.to(tl.int64) * groups + g) * ENTRIES + e_E, tl.sum(entry_Ed * q_d[None, :], 1))


@triton.jit
def _codes(codes, t_C, last, HALF: tl.constexpr, N: tl.constexpr):  # type: ignore[no-untyped-def]
    """Codes of a tile's tokens before the last, of the first half of the groups and of the second: (C, N) each."""
    n_N = tl.arange(0, N)
    at_CN, there_CN = codes + t_C[:, None] * (2 * HALF) + n_N[None, :], (t_C < last)[:, None] & (n_N < HALF)[None, :]
    return tl.load(at_CN, there_CN, 0), tl.load(at_CN + HALF, there_CN, 0)


@triton.jit
def _entries(book, one_CN, two_CN, book_g, HALF: tl.constexpr, LENGTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Entries of codes, of both halves, float32 (C, N, d) each. Behind the groups those of any."""
    group_1N, j_11d = (tl.arange(0, one_CN.shape[1]) % HALF)[None, :], tl.arange(0, LENGTH)[None, None, :]
    one_CN = group_1N * book_g + one_CN.to(tl.int32) * LENGTH
    two_CN = (group_1N + HALF) * book_g + two_CN.to(tl.int32) * LENGTH
    one_CNd, two_CNd = tl.load(book + one_CN[:, :, None] + j_11d), tl.load(book + two_CN[:, :, None] + j_11d)
    return one_CNd.to(tl.float32), two_CNd.to(tl.float32)


@triton.jit
def _turned(one_CNd, two_CNd, cos_TD, sin_TD, t_C, there_C, HALF: tl.constexpr):  # type: ignore[no-untyped-def]
    """Both halves of keys with their rotary embedding."""
    n_N, j_d = tl.arange(0, one_CNd.shape[1]), tl.arange(0, one_CNd.shape[2])
    c_Nd = n_N[:, None] * one_CNd.shape[2] + j_d[None, :]
    at_CNd = t_C[:, None, None] * (2 * HALF * one_CNd.shape[2]) + c_Nd[None, :, :]
    there_CN1 = there_C[:, None, None] & (n_N < HALF)[None, :, None]
    cos_CNd = tl.load(cos_TD + at_CNd, there_CN1, 0.0).to(tl.float32)
    sin_CNd = tl.load(sin_TD + at_CNd, there_CN1, 0.0).to(tl.float32)
    return one_CNd * cos_CNd - two_CNd * sin_CNd, two_CNd * cos_CNd + one_CNd * sin_CNd


@triton.jit
def _query(q_RD, r_M, repeat, factor, HALF: tl.constexpr, LENGTH: tl.constexpr, N: tl.constexpr):  # type: ignore[no-untyped-def]
    """Both halves of queries times a factor, float32 (M, N, d) each, zeros behind the groups."""
    c_Nd = tl.arange(0, N)[:, None] * LENGTH + tl.arange(0, LENGTH)[None, :]
    own_MNd = (r_M < repeat)[:, None, None] & (c_Nd < HALF * LENGTH)[None, :, :]
    at_MNd = q_RD + (r_M * (2 * HALF * LENGTH))[:, None, None] + c_Nd[None, :, :]
    one_MNd, two_MNd = tl.load(at_MNd, own_MNd, 0.0), tl.load(at_MNd + HALF * LENGTH, own_MNd, 0.0)
    return one_MNd.to(tl.float32) * factor, two_MNd.to(tl.float32) * factor


@triton.jit
def _operand(x_CNd, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """A tile as a matrix product reads it, (C, N · d)."""
    return tl.reshape(x_CNd, (x_CNd.shape[0], x_CNd.shape[1] * x_CNd.shape[2])).to(DTYPE)


@triton.jit
def _finite(top):  # type: ignore[no-untyped-def]
    """What is taken off scores: the largest, but 0 while nothing can be attended to, so that all weights are 0."""
    return tl.where(top == -float("inf"), 0.0, top)


@triton.jit
def _span(start, end, tokens, C: tl.constexpr):  # type: ignore[no-untyped-def]
    """The first token of this program's slice, and the one after its last."""
    end, slices = tl.minimum(end, tokens), tl.num_programs(0)
    span = tl.maximum(((end - start + slices - 1) // slices + C - 1) // C * C, 0)
    first = start + tl.program_id(0) * span
    return first, tl.minimum(first + span, end)


@triton.jit
def _leave(one, two, most, total, sum_RSD, part_RS2, row_M, own_M, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Store what a slice found, (M, N · d) of either half."""
    at_M, c_1C = row_M.to(tl.int64) * tl.num_programs(0) + tl.program_id(0), tl.arange(0, one.shape[1])[None, :]
    tl.store(part_RS2 + at_M * 2, most, own_M)
    tl.store(part_RS2 + at_M * 2 + 1, total, own_M)
    at_MC, own_MC = sum_RSD + at_M[:, None] * (2 * WIDTH) + c_1C, own_M[:, None] & (c_1C < WIDTH)
    tl.store(at_MC, one, own_MC)
    tl.store(at_MC + WIDTH, two, own_MC)


@triton.jit
def _together(one_CNd, two_CNd, most_C, total_C):  # type: ignore[no-untyped-def]
    """What the lanes of one query found, as one row."""
    top = tl.max(most_C, 0, keep_dims=True)
    weight_C = tl.exp2(most_C - _finite(top))
    one_Nd = tl.sum(one_CNd * weight_C[:, None, None], 0, keep_dims=True)
    two_Nd = tl.sum(two_CNd * weight_C[:, None, None], 0, keep_dims=True)
    total = tl.sum(total_C * weight_C, 0, keep_dims=True)
    return _operand(one_Nd, tl.float32), _operand(two_Nd, tl.float32), top, total


@triton.jit
def _looked_up(table_GE, k_one, k_two, HALF: tl.constexpr):  # type: ignore[no-untyped-def]
    """Scores (C,) as sums of a query's products with the entries of codes, from their table."""
    n_N = tl.arange(0, k_one.shape[1])
    at_1N = table_GE + (n_N % HALF * ENTRIES)[None, :]
    product_CN = tl.load(at_1N + k_one.to(tl.int32)) + tl.load(at_1N + HALF * ENTRIES + k_two.to(tl.int32))
    return tl.sum(tl.where((n_N < HALF)[None, :], product_CN, 0.0), 1)


@triton.jit
def _keys(books, h, k_one, k_two, angles, b, t_C, seen_C, HALF: tl.constexpr, LENGTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Both halves of the keys of codes, with their rotary embedding if they were coded without it."""
    x_one, x_two = _entries(books[0] + h * books[2], k_one, k_two, books[3], HALF, LENGTH)
    if angles[0] is not None:
        cos, sin = angles[0] + b * angles[2], angles[1] + b * angles[2]
        x_one, x_two = _turned(x_one, x_two, cos, sin, t_C, seen_C, HALF)
    return x_one, x_two


@triton.jit
def _seen(mask_BT, b, tokens, t_C, last):  # type: ignore[no-untyped-def]
    """Whether tokens count: before the end, and not masked."""
    seen_C = t_C < last
    if mask_BT is not None:
        seen_C &= tl.load(mask_BT + b * tokens + t_C, seen_C, 0) != 0
    return seen_C


# The kernels of attention take tuples: books (of keys, of values, strides of H and G), angles (cosines, sines, stride
# of B), scales (of keys, of values), out (sums, parts), sizes (T, H, R), SHAPE (d, G / 2, N); None for what is absent.
# Unaligned, codes are loaded one by one by the lanes that look them up; else they would change lanes for every tile.
@triton.jit(do_not_specialize=["start", "end"], do_not_specialize_on_alignment=["codes_k", "codes_v"])
def _attend_one(  # type: ignore[no-untyped-def]
    q_RD,
    table_RGE,
    codes_k,
    codes_v,
    books,
    mask_BT,
    angles,
    scales,
    out,
    factor,
    start,
    end,
    sizes,
    SHAPE: tl.constexpr,
    C: tl.constexpr,
):
    """One query, one slice of the tokens: values weighted by exp2(score − most); `most`, and the sum of the weights.

    Lanes keep a maximum and sums of their own tokens until the end. table_RGE: see `_table`, or None.
    """
    LENGTH: tl.constexpr = SHAPE[0]
    HALF: tl.constexpr = SHAPE[1]
    N: tl.constexpr = SHAPE[2]
    tokens, heads, repeat = sizes
    row, r_M, c_C = tl.program_id(1), tl.program_id(1) % repeat + tl.arange(0, 1), tl.arange(0, C)
    pair = row // repeat
    b, h, of_pair = (pair // heads).to(tl.int64), pair % heads, pair.to(tl.int64) * tokens
    q_one, q_two = _query(q_RD + pair * repeat * (2 * HALF * LENGTH), r_M, repeat, factor, HALF, LENGTH, N)
    most_C, total_C = tl.full((C,), -float("inf"), tl.float32), tl.zeros((C,), tl.float32)
    one, two = tl.zeros((C, N, LENGTH), tl.float32), tl.zeros((C, N, LENGTH), tl.float32)
    codes_k, codes_v = codes_k + of_pair * (2 * HALF), codes_v + of_pair * (2 * HALF)
    first, last = _span(start, end, tokens, C)
    k_one, k_two = _codes(codes_k, first + c_C, last, HALF, N)
    v_one, v_two = _codes(codes_v, first + c_C, last, HALF, N)
    for at in range(first, last, C):
        t_C = at + c_C
        # The next tile's codes are under way while this one's are looked up.
        next_k_one, next_k_two = _codes(codes_k, t_C + C, last, HALF, N)
        next_v_one, next_v_two = _codes(codes_v, t_C + C, last, HALF, N)
        seen_C = _seen(mask_BT, b, tokens, t_C, last)
        if table_RGE is not None:
            score_C = _looked_up(table_RGE + row.to(tl.int64) * (2 * HALF * ENTRIES), k_one, k_two, HALF)
        else:
            x_one, x_two = _keys(books, h, k_one, k_two, angles, b, t_C, seen_C, HALF, LENGTH)
            score_C = tl.sum(tl.sum(q_one * x_one + q_two * x_two, 2), 1)
        if scales[0] is not None:
            score_C *= tl.load(scales[0] + of_pair + t_C, seen_C, 0.0)
        score_C = tl.where(seen_C, score_C, -float("inf"))
        top_C = tl.maximum(most_C, score_C)
        kept_C, weight_C = tl.exp2(most_C - _finite(top_C)), tl.exp2(score_C - _finite(top_C))
        total_C, most_C = total_C * kept_C + weight_C, top_C
        if scales[1] is not None:
            weight_C *= tl.load(scales[1] + of_pair + t_C, seen_C, 0.0)
        x_one, x_two = _entries(books[1] + h * books[2], v_one, v_two, books[3], HALF, LENGTH)
        kept_C11, weight_C11 = kept_C[:, None, None], weight_C[:, None, None]
        one, two = one * kept_C11 + weight_C11 * x_one, two * kept_C11 + weight_C11 * x_two
        k_one, k_two, v_one, v_two = next_k_one, next_k_two, next_v_one, next_v_two
    one, two, most, total = _together(one, two, most_C, total_C)
    _leave(one, two, most, total, out[0], out[1], pair * repeat + r_M, r_M < repeat, HALF * LENGTH)


@triton.jit(do_not_specialize=["start", "end"], do_not_specialize_on_alignment=["codes_k", "codes_v"])
def _attend_group(  # type: ignore[no-untyped-def]
    q_RD,
    codes_k,
    codes_v,
    books,
    mask_BT,
    angles,
    scales,
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
    """As `_attend_one` for M queries that share a head of keys: it is decoded once, and matrix units multiply."""
    LENGTH: tl.constexpr = SHAPE[0]
    HALF: tl.constexpr = SHAPE[1]
    N: tl.constexpr = SHAPE[2]
    tokens, heads, repeat = sizes
    tiles, c_C = (repeat + M - 1) // M, tl.arange(0, C)
    pair, r_M = tl.program_id(1) // tiles, tl.program_id(1) % tiles * M + tl.arange(0, M)
    b, h, of_pair = (pair // heads).to(tl.int64), pair % heads, pair.to(tl.int64) * tokens
    q_one, q_two = _query(q_RD + pair * repeat * (2 * HALF * LENGTH), r_M, repeat, factor, HALF, LENGTH, N)
    q_one, q_two = _operand(q_one, DTYPE), _operand(q_two, DTYPE)
    most_M, total_M = tl.full((M,), -float("inf"), tl.float32), tl.zeros((M,), tl.float32)
    one, two = tl.zeros((M, N * LENGTH), tl.float32), tl.zeros((M, N * LENGTH), tl.float32)
    codes_k, codes_v = codes_k + of_pair * (2 * HALF), codes_v + of_pair * (2 * HALF)
    first, last = _span(start, end, tokens, C)
    k_one, k_two = _codes(codes_k, first + c_C, last, HALF, N)
    v_one, v_two = _codes(codes_v, first + c_C, last, HALF, N)
    for at in range(first, last, C):
        t_C = at + c_C
        next_k_one, next_k_two = _codes(codes_k, t_C + C, last, HALF, N)
        next_v_one, next_v_two = _codes(codes_v, t_C + C, last, HALF, N)
        seen_C = _seen(mask_BT, b, tokens, t_C, last)
        x_one, x_two = _keys(books, h, k_one, k_two, angles, b, t_C, seen_C, HALF, LENGTH)
        score_MC = tl.dot(q_one, tl.trans(_operand(x_one, DTYPE)), input_precision="ieee")
        score_MC = tl.dot(q_two, tl.trans(_operand(x_two, DTYPE)), score_MC, input_precision="ieee")
        if scales[0] is not None:
            score_MC *= tl.load(scales[0] + of_pair + t_C, seen_C, 0.0)
        score_MC = tl.where(seen_C, score_MC, -float("inf"))
        top_M = tl.maximum(most_M, tl.max(score_MC, 1))
        kept_M, weight_MC = tl.exp2(most_M - _finite(top_M)), tl.exp2(score_MC - _finite(top_M)[:, None])
        total_M, most_M = total_M * kept_M + tl.sum(weight_MC, 1), top_M
        if scales[1] is not None:
            weight_MC *= tl.load(scales[1] + of_pair + t_C, seen_C, 0.0)
        x_one, x_two = _entries(books[1] + h * books[2], v_one, v_two, books[3], HALF, LENGTH)
        kept_M1, weight_MC = kept_M[:, None], weight_MC.to(DTYPE)
        one = tl.dot(weight_MC, _operand(x_one, DTYPE), one * kept_M1, input_precision="ieee")
        two = tl.dot(weight_MC, _operand(x_two, DTYPE), two * kept_M1, input_precision="ieee")
        k_one, k_two, v_one, v_two = next_k_one, next_k_two, next_v_one, next_v_two
    _leave(one, two, most_M, total_M, out[0], out[1], pair * repeat + r_M, r_M < repeat, HALF * LENGTH)


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


def make_config(
    gpu: DeviceProperties, shape: tuple[int, ...], batch: int, m: int, tables: int, size: int, warps: int
) -> Config:
    """Config of `attend` with tiles of about so many numbers, and slices of two tiles at least that fill a device."""
    queries, heads, channels, _, tokens = shape
    programs = batch * (queries if m == 1 else heads * triton.cdiv(queries // heads, m))
    tile = max(16, size // triton.next_power_of_2(channels))
    # Not more than fill it: the codebooks of all programs that a multiprocessor holds should stay in its L1.
    split = min(16 * gpu.processors // (warps * max(1, programs)), tokens // (2 * tile), MOST_SLICES)
    return {"M": m, "TABLES": tables, "C": tile, "num_warps": warps, "SPLIT": max(1, split)}


def default_config(gpu: DeviceProperties, shape: tuple[int, ...], batch: int, element: int, turned: bool) -> Config:
    """Config of `attend` where nothing was measured. shape: Q, H, D, d, T. element: bytes of one of q."""
    queries, heads, *_, tokens = shape
    # Products of float32 have no matrix units.
    if queries > heads and element == 2:
        return make_config(gpu, shape, batch, 16, 0, 8192, 256 // gpu.warp)
    return make_config(gpu, shape, batch, 1, int(not turned and tokens >= 1024), 8192, 256 // gpu.warp)


def attend(q_BQD: Tensor, coded: CodedTokens, scaling: float) -> tuple[Tensor, Tensor]:
    """Values (B, Q, D) and logarithms of sums of exponentials (B, Q), float32: `codes.attend`.

    Slices are merged in a fixed order.
    In `_attend_group` operands are rounded to float16, as entries are (queries, rotated keys, weights times scale_v),
    by 2⁻¹² each; float32 queries stay. ValueError for shapes that do not fit.
    """
    codes_k, book_k, codes_v, book_v, start, end, mask_BT, cos_BTD, sin_BTD, scale_k, scale_v = coded
    (batch, queries, channels), (_, heads, tokens, groups) = q_BQD.shape, codes_k.shape
    length, turned, of_all = book_k.shape[-1], cos_BTD is not None, (queries, heads, channels, book_k.shape[-1], tokens)
    beside = {"codes_v": (codes_v, codes_k.shape), "book_v": (book_v, book_k.shape), "mask": (mask_BT, (batch, tokens))}
    beside |= {"scale_k": (scale_k, codes_k.shape[:3]), "scale_v": (scale_v, codes_k.shape[:3])}
    for name, (given, shape) in beside.items():
        if given is not None and given.shape != shape:
            raise ValueError(f"{name} is {tuple(given.shape)}; beside codes_k it must be {tuple(shape)}")
    if queries % heads or groups % 2 or groups * length != channels:
        raise ValueError(
            f"{queries} queries of {channels} do not fit {heads} heads of {groups} codes of {length} channels"
        )
    angles = angles_of(cos_BTD, sin_BTD, batch, tokens, channels)
    q, books = q_BQD.contiguous(), (books_of(book_k, heads, groups), books_of(book_v, heads, groups))
    codes = codes_k.contiguous(), codes_v.contiguous()
    mask = None if mask_BT is None else mask_BT.contiguous().view(torch.uint8)
    scales = tuple(scale if scale is None else scale.contiguous() for scale in (scale_k, scale_v))
    kernel = f"kv.attend{'.turned' if turned else ''}{'.float32' if q.itemsize == 4 else ''}"
    place = (*of_all[:4], triton.next_power_of_2(tokens))
    default = lambda gpu: default_config(gpu, of_all, batch, q.itemsize, turned)  # noqa: E731
    chosen = dict(launch.get_config(kernel, q.device, batch, place, default))
    slices, factor, rows, repeat = chosen.pop("SPLIT"), scaling * LOG2_E, batch * queries, queries // heads
    table, strides = None, books[0].stride()[:2]
    if chosen.pop("TABLES"):
        table = q.new_empty((rows, groups, ENTRIES.value), dtype=torch.float32)
        of_table = q, books[0], table, factor, heads, repeat, *strides
        launch.run(_table, (rows, groups), *of_table, D=channels, LENGTH=length, num_warps=2)
    sum_RSD = q.new_empty((rows, slices, channels), dtype=torch.float32)
    part_RS2 = sum_RSD.new_empty((rows, slices, 2))
    tensors = (*codes, (*books, *strides), mask, angles, scales, (sum_RSD, part_RS2))
    sizes = factor, start, end, (tokens, heads, repeat)
    shape = (length, groups // 2, triton.next_power_of_2(groups // 2))
    if (m := chosen.pop("M")) == 1:
        launch.run(_attend_one, (slices, rows), q, table, *tensors, *sizes, SHAPE=shape, num_stages=1, **chosen)
    else:
        # The interpreter multiplies no bfloat16, and has no need of float16.
        operand = tl.float32 if q.itemsize == 4 or q.device.type == "cpu" else tl.float16
        constants = {"SHAPE": shape, "DTYPE": operand, "M": m, "num_stages": 1}
        grid = slices, batch * heads * triton.cdiv(repeat, m)
        launch.run(_attend_group, grid, q, *tensors, *sizes, **constants, **chosen)
    out_BQD, lse_BQ = sum_RSD.new_empty((batch, queries, channels)), sum_RSD.new_empty((batch, queries))
    grid, tile = (rows, triton.cdiv(channels, 32)), {"S": triton.next_power_of_2(slices), "C": 32}
    launch.run(_merge, grid, sum_RSD, part_RS2, out_BQD, lse_BQ, slices, channels, **tile)
    return out_BQD, lse_BQ
