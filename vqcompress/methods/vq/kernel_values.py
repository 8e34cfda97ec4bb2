"""Codes of vector quantization become values in registers: the part that all products with words share.

A tile of codes has A streams (columns of the weight for universal, lattice and trellis words, rows for learned ones)
and B units of each; a unit stands for J weights. Words come from a table in float32 through L1, with the hottest
entries in the program's own memory if asked; codewords of a trellis are computed.
Shape legend: A streams, B units of a stream, J weights of a unit, K entries of a table, D weights of an entry.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Of the trellis: see `codebooks.trellis`, whose tests hold the two together.
SEQUENCE = tl.constexpr(256)
MULTIPLIER, INCREMENT = tl.constexpr(34038481), tl.constexpr(76625530)
MEAN, DEVIATION, CUBIC = tl.constexpr(510.0), tl.constexpr(139.4), tl.constexpr(0.02)
# 2²³ as float32: with a whole number below 2²³ in its low bits it is the float of 2²³ + that number.
MAGIC = tl.constexpr(0x4B000000)


@triton.jit
def code_of(codes, at, n, inside, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Code n of the streams that begin at `at`: int32. Of 8 or 16 bits it is an element, else a window of bytes."""
    if BITS == 8 or BITS == 16:
        code = tl.load(codes + at + n, inside, 0).to(tl.int32)
    else:
        byte, shift = n * BITS // 8, n * BITS % 8
        window = tl.load(codes + at + byte, inside, 0).to(tl.int32)
        # The bytes that a code reaches into, and no others: the last stream ends with the memory.
        window |= tl.load(codes + at + byte + 1, inside & (shift + BITS > 8), 0).to(tl.int32) << 8
        if BITS > 9:
            window |= tl.load(codes + at + byte + 2, inside & (shift + BITS > 16), 0).to(tl.int32) << 16
        code = window >> shift
    return code & ((1 << BITS) - 1)


@triton.jit
def stage_of(codes, at, n, r, inside, BITS: tl.constexpr, DEPTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Code r of the DEPTH codes of word n: int32. Two or four codes of 8 bits are one element."""
    if BITS == 8 and (DEPTH == 2 or DEPTH == 4):
        return (tl.load(codes + at + n, inside, 0).to(tl.int32) >> (8 * r)) & 255
    else:
        return code_of(codes, at, n * DEPTH + r, inside, BITS)


@triton.jit
def _entries(table, code_AB, D: tl.constexpr, J: tl.constexpr, HOT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Entries (A, B, J) of a table (K, D), zeros behind D, the HOT first ones from the program's own memory."""
    j_J = tl.arange(0, J)
    at_ABJ = code_AB[:, :, None] * D + j_J[None, None, :]
    if HOT == 0:
        value_ABJ = tl.load(table + at_ABJ) if D == J else tl.load(table + at_ABJ, (j_J < D)[None, None, :], 0.0)
    else:
        hot_M = tl.arange(0, HOT * J)
        hot_M = tl.load(table + hot_M // J * D + hot_M % J, hot_M % J < D, 0.0)
        count: tl.constexpr = code_AB.shape[0] * code_AB.shape[1] * J
        index_ABJ = tl.minimum(code_AB, HOT - 1)[:, :, None] * J + j_J[None, None, :]
        value_M = tl.gather(hot_M, tl.reshape(index_ABJ, (count,)), 0)
        value_ABJ = tl.reshape(value_M, (code_AB.shape[0], code_AB.shape[1], J))
        cold_AB1 = code_AB[:, :, None] >= HOT
        cold_ABJ = tl.load(table + at_ABJ, cold_AB1 & (j_J < D)[None, None, :], 0.0)
        value_ABJ = tl.where(cold_AB1, cold_ABJ, value_ABJ)
    return value_ABJ


@triton.jit
def _e8p(table, code_AB, stage, HOT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Words (A, B, 8) of the lattice. table: 256 patterns, the last coordinate negative if their sum is odd; 512 rows
    of it, then the shifts of both stages."""
    j_8 = tl.arange(0, 8)
    value_AB8 = _entries(table + stage * 2048, code_AB & 255, 8, 8, HOT)
    sign_AB = code_AB >> 8 & 127
    # An odd number of minus signs changes the eighth.
    odd_AB = sign_AB ^ (sign_AB >> 4)
    odd_AB = odd_AB ^ (odd_AB >> 2)
    sign_AB |= ((odd_AB ^ (odd_AB >> 1)) & 1) << 7
    # A sign to where a float has its own.
    flip_AB8 = (sign_AB[:, :, None] << (31 - j_8)[None, None, :]) & -0x80000000
    value_AB8 = (value_AB8.to(tl.int32, bitcast=True) ^ flip_AB8).to(tl.float32, bitcast=True)
    shift = tl.load(table + 4096 + stage)
    return value_AB8 + tl.where(code_AB >> 15 & 1 != 0, -shift, shift)[:, :, None]


@triton.jit
def _hashed(state, STATES: tl.constexpr, ASM: tl.constexpr):  # type: ignore[no-untyped-def]
    """The codeword of a state, float32. ASM: add up the four bytes of the hash by one instruction."""
    hashed = (state & ((1 << STATES) - 1)) * MULTIPLIER + INCREMENT
    if ASM:
        # Also adds 2²³ in the form of its bits, which makes a float of the sum without a conversion.
        total = tl.inline_asm_elementwise(
            "dp4a.u32.u32 $0, $1, 0x01010101, 0x4B000000;", "=r,r", [hashed], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        pairs = (hashed & 0x00FF00FF) + ((hashed >> 8) & 0x00FF00FF)
        total = ((pairs & 0xFFFF) + (pairs >> 16)) | MAGIC
    n = total.to(tl.float32, bitcast=True) - (8388608.0 + MEAN)
    return n * ((1 - 3 * CUBIC) / DEVIATION + (CUBIC / (DEVIATION * DEVIATION * DEVIATION)) * (n * n))


@triton.jit
def _walked(codes, at_A1, unit_1B, inside_AB, units, K: tl.constexpr, STATES: tl.constexpr, ASM: tl.constexpr):  # type: ignore[no-untyped-def]
    """Values (A, B, J) of a trellis, from whole words of the streams; a sequence of 256 weights bites its tail."""
    sequence: tl.constexpr = SEQUENCE // 32 * K if K != 3 else SEQUENCE // 32
    following_1B = unit_1B + 1
    ends_1B = (following_1B % sequence == 0) | (following_1B == units)
    following_1B = tl.where(ends_1B, unit_1B // sequence * sequence, following_1B)
    if K == 3:
        j_J = tl.arange(0, 32)[None, None, :] * 3
        first_AB = tl.load(codes + at_A1 + unit_1B * 3, inside_AB, 0)[:, :, None]
        second_AB = tl.load(codes + at_A1 + unit_1B * 3 + 1, inside_AB, 0)[:, :, None]
        third_AB = tl.load(codes + at_A1 + unit_1B * 3 + 2, inside_AB, 0)[:, :, None]
        next_AB = tl.load(codes + at_A1 + following_1B * 3, inside_AB, 0)[:, :, None]
        low_ABJ = tl.where(j_J < 32, first_AB, tl.where(j_J < 64, second_AB, third_AB))
        high_ABJ = tl.where(j_J < 32, second_AB, tl.where(j_J < 64, third_AB, next_AB))
    else:
        j_J = tl.arange(0, 32 // K)[None, None, :] * K
        low_ABJ = tl.load(codes + at_A1 + unit_1B, inside_AB, 0)[:, :, None]
        high_ABJ = tl.load(codes + at_A1 + following_1B, inside_AB, 0)[:, :, None]
    window_ABJ = (high_ABJ.to(tl.int64) << 32) | (low_ABJ.to(tl.int64) & 0xFFFFFFFF)
    return _hashed((window_ABJ >> (j_J % 32).to(tl.int64)).to(tl.int32), STATES, ASM)


@triton.jit
def values_of(  # type: ignore[no-untyped-def]
    codes,
    table,
    at_A,
    unit_B,
    inside_A,
    units,
    FAMILY: tl.constexpr,
    D: tl.constexpr,
    BITS: tl.constexpr,
    DEPTH: tl.constexpr,
    HOT: tl.constexpr,
    ASM: tl.constexpr,
    J: tl.constexpr,
):
    """Values (A, B, J), float32, of the units B of streams that begin at the elements A of codes."""
    at_A1, unit_1B = at_A[:, None], unit_B[None, :]
    inside_AB = inside_A[:, None] & (unit_1B < units)
    if FAMILY == "trellis":
        value_ABJ = _walked(codes, at_A1, unit_1B, inside_AB, units, BITS, DEPTH, ASM)
    elif FAMILY == "lattice":
        if BITS == 24:
            word_AB = tl.load(codes + at_A1 + unit_1B * 3, inside_AB, 0).to(tl.int32)
            word_AB |= tl.load(codes + at_A1 + unit_1B * 3 + 1, inside_AB, 0).to(tl.int32) << 8
        else:
            word_AB = tl.load(codes + at_A1 + unit_1B, inside_AB, 0).to(tl.int32)
        value_ABJ = _e8p(table, word_AB & 0xFFFF, 0, HOT)
        if BITS == 24:
            third_AB = tl.load(codes + at_A1 + unit_1B * 3 + 2, inside_AB, 0).to(tl.int32)
            value_ABJ += _entries(table + 2048, third_AB, 8, 8, HOT)
        if BITS == 32:
            value_ABJ += _e8p(table, (word_AB >> 16) & 0xFFFF, 1, HOT)
    elif FAMILY == "universal":
        value_ABJ = _entries(table, code_of(codes, at_A1, unit_1B, inside_AB, BITS), D, J, HOT)
    else:
        value_ABJ = _entries(table, stage_of(codes, at_A1, unit_1B, 0, inside_AB, BITS, DEPTH), D, J, HOT)
        for r in tl.static_range(1, DEPTH):
            code_AB = stage_of(codes, at_A1, unit_1B, r, inside_AB, BITS, DEPTH)
            value_ABJ += _entries(table + (r * D << BITS), code_AB, D, J, HOT)
    return value_ABJ
