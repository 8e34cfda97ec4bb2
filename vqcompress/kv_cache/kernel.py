"""Keys and values as codes: coding new ones, and attention of one query a row over the codes of all earlier ones.

What `codes.encode` and `codes.attend` mean. Attention splits the tokens, so that few heads fill a device
(flash-decoding): programs of a slice leave the largest score, the sum of weights and the weighted values, and a second
launch merges them. Memory brings a byte for d channels; what takes time are the look-ups in the codebooks, through L1:

- M = 1: a program has one query, and rows of lanes a token each. Lanes keep the maximum, sum and values of their own
  tokens until the end, so that the loop knows no shared memory and no barrier, only the sum of a score over lanes.
- M = 16: a program has the queries of one head of keys, and decodes once for all; products are of matrix units.
- TABLES (M = 1): the products of a query with all entries come first, in a launch of their own for all slices. A score
  is then the sum of G of them: four bytes a look-up instead of 2 d, and no multiplication. For keys coded after their
  rotary embedding only: one that is turned when it is read has other products at every position. (`tl.gather` from
  registers would copy the table into shared memory for every tile.)

Channel i is turned with channel i + D/2, so groups are looked up in two halves, by the same lanes. Of the cosines and
sines `attend` reads the first half only: transformers repeats it.
Shape legend: B rows, Q heads of queries, H of keys and values, R = Q / H, T tokens, D channels, d of a group, G groups,
E entries, S slices. Of a tile: M queries, C tokens, N groups of a half (a power of two), V vectors.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqcompress.kv_cache.codes import CodedTokens
from vqcompress.methods.triton import launch
from vqcompress.methods.triton.launch import Config, DeviceProperties

MOST_SLICES, ENTRIES, LOG2_E = 128, tl.constexpr(256), math.log2(math.e)


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
    book,
    cos,
    sin,
    out,
    rows,
    tokens,
    x_b,
    x_h,
    x_t,
    book_h,
    book_g,
    cos_b,
    groups,
    LENGTH: tl.constexpr,
    HALF: tl.constexpr,
    V: tl.constexpr,
):
    """Of one group of one head. Sums are in the order of the channels, as in `kernels.nearest`."""
    n_V, e_E = tl.program_id(0) * V + tl.arange(0, V), tl.arange(0, ENTRIES)
    h, g = tl.program_id(1) // groups, tl.program_id(1) % groups
    valid_V, b_V, t_V = n_V < rows, (n_V // tokens).to(tl.int64), n_V % tokens
    x_V1 = x + b_V * x_b + h.to(tl.int64) * x_h + t_V.to(tl.int64) * x_t
    book += h * book_h + g * book_g
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


# Unaligned, codes are loaded one by one by the lanes that look them up; else they would change lanes for every tile.
@triton.jit(do_not_specialize=["start", "end"], do_not_specialize_on_alignment=["codes_k", "codes_v"])
def _attend(  # type: ignore[no-untyped-def]
    q_RD,
    table_RGE,
    codes_k,
    codes_v,
    book_k,
    book_v,
    mask_BT,
    cos_BTD,
    sin_BTD,
    scale_k,
    scale_v,
    sum_RSD,
    part_RS2,
    factor,
    start,
    end,
    tokens,
    heads,
    repeat,
    book_h,
    book_g,
    cos_b,
    LENGTH: tl.constexpr,
    HALF: tl.constexpr,
    DTYPE: tl.constexpr,
    TABLES: tl.constexpr,
    M: tl.constexpr,
    C: tl.constexpr,
    N: tl.constexpr,
):
    """Of a slice of the tokens: values weighted by exp2(score − most); `most`, and the sum of the weights."""
    n_N, c_C, tiles = tl.arange(0, N), tl.arange(0, C), (repeat + M - 1) // M
    pair, r_M = tl.program_id(1) // tiles, tl.program_id(1) % tiles * M + tl.arange(0, M)
    b, h, of_pair = (pair // heads).to(tl.int64), pair % heads, pair.to(tl.int64) * tokens
    q_one, q_two = _query(q_RD + pair * repeat * (2 * HALF * LENGTH), r_M, repeat, factor, HALF, LENGTH, N)
    # With one query, lanes keep a maximum and sums of their own tokens.
    ROWS: tl.constexpr = C if M == 1 else M
    most, total = tl.full((ROWS,), -float("inf"), tl.float32), tl.zeros((ROWS,), tl.float32)
    one = tl.zeros((ROWS, N, LENGTH) if M == 1 else (ROWS, N * LENGTH), tl.float32)
    two = tl.zeros((ROWS, N, LENGTH) if M == 1 else (ROWS, N * LENGTH), tl.float32)
    if M > 1:
        q_one, q_two = _operand(q_one, DTYPE), _operand(q_two, DTYPE)
    codes_k, codes_v = codes_k + of_pair * (2 * HALF), codes_v + of_pair * (2 * HALF)
    first, last = _span(start, end, tokens, C)
    k_one, k_two = _codes(codes_k, first + c_C, last, HALF, N)
    v_one, v_two = _codes(codes_v, first + c_C, last, HALF, N)
    for at in range(first, last, C):
        t_C, seen_C = at + c_C, at + c_C < last
        # The next tile's codes are under way while this one's are looked up.
        next_k_one, next_k_two = _codes(codes_k, t_C + C, last, HALF, N)
        next_v_one, next_v_two = _codes(codes_v, t_C + C, last, HALF, N)
        if mask_BT is not None:
            seen_C &= tl.load(mask_BT + b * tokens + t_C, seen_C, 0) != 0
        if TABLES:
            at_1N = table_RGE + tl.program_id(1).to(tl.int64) * (2 * HALF * ENTRIES) + (n_N % HALF * ENTRIES)[None, :]
            product_CN = tl.load(at_1N + k_one.to(tl.int32)) + tl.load(at_1N + HALF * ENTRIES + k_two.to(tl.int32))
            score = tl.sum(tl.where((n_N < HALF)[None, :], product_CN, 0.0), 1)
        else:
            x_one, x_two = _entries(book_k + h * book_h, k_one, k_two, book_g, HALF, LENGTH)
            if cos_BTD is not None:
                x_one, x_two = _turned(x_one, x_two, cos_BTD + b * cos_b, sin_BTD + b * cos_b, t_C, seen_C, HALF)
            if M == 1:
                score = tl.sum(tl.sum(q_one * x_one + q_two * x_two, 2), 1)
            else:
                score = tl.dot(q_one, tl.trans(_operand(x_one, DTYPE)), input_precision="ieee")
                score = tl.dot(q_two, tl.trans(_operand(x_two, DTYPE)), score, input_precision="ieee")
        if scale_k is not None:
            score *= tl.load(scale_k + of_pair + t_C, seen_C, 0.0)
        score = tl.where(seen_C, score, -float("inf"))
        top = tl.maximum(most, score if M == 1 else tl.max(score, 1))
        kept = tl.exp2(most - _finite(top))
        weight = tl.exp2(score - (_finite(top) if M == 1 else _finite(top)[:, None]))
        total, most = total * kept + (weight if M == 1 else tl.sum(weight, 1)), top
        if scale_v is not None:
            weight *= tl.load(scale_v + of_pair + t_C, seen_C, 0.0)
        x_one, x_two = _entries(book_v + h * book_h, v_one, v_two, book_g, HALF, LENGTH)
        if M == 1:
            kept, weight = kept[:, None, None], weight[:, None, None]
            one, two = one * kept + weight * x_one, two * kept + weight * x_two
        else:
            kept, weight = kept[:, None], weight.to(DTYPE)
            one = tl.dot(weight, _operand(x_one, DTYPE), one * kept, input_precision="ieee")
            two = tl.dot(weight, _operand(x_two, DTYPE), two * kept, input_precision="ieee")
        k_one, k_two, v_one, v_two = next_k_one, next_k_two, next_v_one, next_v_two
    if M == 1:
        one, two, most, total = _together(one, two, most, total)
    _leave(one, two, most, total, sum_RSD, part_RS2, pair * repeat + r_M, r_M < repeat, HALF * LENGTH)


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


def default_encode_config(gpu: DeviceProperties, rows: int) -> Config:
    """Config of `encode` where nothing was measured: so many tokens of a program, whose lanes have the entries."""
    return {"V": min(8, triton.next_power_of_2(rows)), "num_warps": max(1, min(rows, 4) * 32 // gpu.warp)}


def encode(x_BHTD: Tensor, book_HGEd: Tensor, cos_BTD: Tensor | None = None, sin_BTD: Tensor | None = None) -> Tensor:
    """Codes, uint8 (B, H, T, G): `codes.encode` of x, turned back first if it has cosines and sines.

    ValueError for shapes that do not fit.
    """
    (batch, heads, tokens, channels), length = x_BHTD.shape, book_HGEd.shape[-1]
    groups, rows = channels // length, batch * tokens
    book = _book(book_HGEd, heads, groups)
    x = x_BHTD if x_BHTD.stride(-1) == 1 else x_BHTD.contiguous()
    out = x.new_empty((batch, heads, tokens, groups), dtype=torch.uint8)
    cos, sin, cos_b = _angles(cos_BTD, sin_BTD, batch, tokens, channels)
    place = heads * groups, length
    config = launch.get_config("kv.encode", x.device, rows, place, lambda gpu: default_encode_config(gpu, rows))
    strides = *x.stride()[:3], *book.stride()[:2], cos_b
    constants = {"LENGTH": length, "HALF": channels // 2, "num_stages": 1}
    grid = triton.cdiv(rows, config["V"]), heads * groups
    launch.run(_encode, grid, x, book, cos, sin, out, rows, tokens, *strides, groups, **constants, **config)
    return out


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
    With M = 16 operands are rounded to float16, as entries are: queries and turned keys, and weights times scale_v,
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
    cos, sin, cos_b = _angles(cos_BTD, sin_BTD, batch, tokens, channels)
    q, books = q_BQD.contiguous(), (_book(book_k, heads, groups), _book(book_v, heads, groups))
    codes = codes_k.contiguous(), codes_v.contiguous()
    mask = None if mask_BT is None else mask_BT.contiguous().view(torch.uint8)
    scales = tuple(scale if scale is None else scale.contiguous() for scale in (scale_k, scale_v))
    kernel = f"kv.attend{'.turned' if turned else ''}{'.float32' if q.itemsize == 4 else ''}"
    place = (*of_all[:4], triton.next_power_of_2(tokens))
    default = lambda gpu: default_config(gpu, of_all, batch, q.itemsize, turned)  # noqa: E731
    chosen = dict(launch.get_config(kernel, q.device, batch, place, default))
    slices, factor, rows, repeat = chosen.pop("SPLIT"), scaling * LOG2_E, batch * queries, queries // heads
    table, strides = None, books[0].stride()[:2]
    if chosen["TABLES"]:
        table = q.new_empty((rows, groups, ENTRIES.value), dtype=torch.float32)
        of_table = q, books[0], table, factor, heads, repeat, *strides
        launch.run(_table, (rows, groups), *of_table, D=channels, LENGTH=length, num_warps=2)
    sum_RSD = q.new_empty((rows, slices, channels), dtype=torch.float32)
    part_RS2 = sum_RSD.new_empty((rows, slices, 2))
    # The interpreter multiplies no bfloat16, and has no need of float16.
    operand = tl.float32 if q.itemsize == 4 or q.device.type == "cpu" else tl.float16
    constants = {"LENGTH": length, "HALF": groups // 2, "N": triton.next_power_of_2(groups // 2), "DTYPE": operand}
    tensors = q, table, *codes, *books, mask, cos, sin, *scales, sum_RSD, part_RS2
    sizes = factor, start, end, tokens, heads, repeat, *strides, cos_b
    grid = slices, batch * heads * triton.cdiv(repeat, chosen["M"])
    launch.run(_attend, grid, *tensors, *sizes, **constants, num_stages=1, **chosen)
    out_BQD, lse_BQ = sum_RSD.new_empty((batch, queries, channels)), sum_RSD.new_empty((batch, queries))
    grid, tile = (rows, triton.cdiv(channels, 32)), {"S": triton.next_power_of_2(slices), "C": 32}
    launch.run(_merge, grid, sum_RSD, part_RS2, out_BQD, lse_BQ, slices, channels, **tile)
    return out_BQD, lse_BQ


def _book(book_HGEd: Tensor, heads: int, groups: int) -> Tensor:
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


def _angles(cos_BTD: Tensor | None, sin_BTD: Tensor | None, batch: int, tokens: int, channels: int) -> tuple[Any, ...]:
    """Cosines and sines, contiguous or None, and how far those of the next row are."""
    if cos_BTD is None or sin_BTD is None:
        return None, None, 0
    if cos_BTD.shape != sin_BTD.shape or cos_BTD.shape[0] not in (1, batch) or cos_BTD.shape[1:] != (tokens, channels):
        found = f"cos and sin are {tuple(cos_BTD.shape)} and {tuple(sin_BTD.shape)}"
        raise ValueError(f"{found}; they must be (1 or {batch}, {tokens}, {channels})")
    return cos_BTD.contiguous(), sin_BTD.contiguous(), tokens * channels if len(cos_BTD) > 1 else 0
