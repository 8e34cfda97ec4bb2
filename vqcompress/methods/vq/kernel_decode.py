"""Codes of vector quantization become values in registers, for all kernels that multiply with them.

A tile has A streams of codes and B units of each; a unit stands for J weights. Learned codewords are rows of a codebook
and run along a row of the weight; a trellis runs down a column, and its codewords are computed from the state.
Shape legend: A streams, B units of a stream, J weights of a unit (a power of two), K entries of a stage, D weights of
an entry.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqcompress.methods.triton import launch
from vqcompress.methods.triton.launch import Config, DeviceProperties
from vqcompress.methods.vq import bitshift
from vqcompress.methods.vq.format import Format

SEQUENCE = tl.constexpr(bitshift.SEQUENCE)
MULTIPLIER, INCREMENT = tl.constexpr(bitshift.MULTIPLIER), tl.constexpr(bitshift.INCREMENT)
MEAN, DEVIATION, CUBIC = tl.constexpr(bitshift.MEAN), tl.constexpr(bitshift.DEVIATION), tl.constexpr(bitshift.CUBIC)
# 2²³ as float32: with a whole number below 2²³ in its low bits it is the float of 2²³ + that number.
MAGIC = tl.constexpr(0x4B000000)


@triton.jit
def _code(codes, at, n, inside, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
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
def stage_code(codes, at, n, r, inside, BITS: tl.constexpr, DEPTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Code r of the DEPTH codes of codeword n, int32. Two or four codes of 8 bits are one element of `codes`."""
    if BITS == 8 and (DEPTH == 2 or DEPTH == 4):
        return (tl.load(codes + at + n, inside, 0).to(tl.int32) >> (8 * r)) & 255
    else:
        return _code(codes, at, n * DEPTH + r, inside, BITS)


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
def _codeword(state, STATES: tl.constexpr, ASM: tl.constexpr):  # type: ignore[no-untyped-def]
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
def trellis_values(codes, at_A, unit_B, inside_A, units, TRELLIS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Values (A, B, J), float32, of the units B of streams that begin at the elements A of codes (int32).

    TRELLIS: see `trellis_constants`. Sequences of 256 weights bite their tails.
    """
    K: tl.constexpr = TRELLIS[0]
    at_A1, unit_1B = at_A[:, None], unit_B[None, :]
    inside_AB = inside_A[:, None] & (unit_1B < units)
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
    return _codeword((window_ABJ >> (j_J % 32).to(tl.int64)).to(tl.int32), TRELLIS[1], TRELLIS[2])


@triton.jit
def learned_values(codes, table, at_A, unit_B, inside_A, units, BOOK: tl.constexpr, HOT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Values (A, B, J), float32, of the codewords B of streams that begin at the elements A of codes.

    table: entries (DEPTH, K, D). BOOK: see `book_constants`. HOT: entries of a stage that the program keeps on chip.
    """
    D: tl.constexpr = BOOK[0]
    BITS: tl.constexpr = BOOK[2]
    DEPTH: tl.constexpr = BOOK[3]
    at_A1, unit_1B = at_A[:, None], unit_B[None, :]
    inside_AB = inside_A[:, None] & (unit_1B < units)
    value_ABJ = _entries(table, stage_code(codes, at_A1, unit_1B, 0, inside_AB, BITS, DEPTH), D, BOOK[1], HOT)
    for r in tl.static_range(1, DEPTH):
        code_AB = stage_code(codes, at_A1, unit_1B, r, inside_AB, BITS, DEPTH)
        value_ABJ += _entries(table + (r * D << BITS), code_AB, D, BOOK[1], HOT)
    return value_ABJ


@triton.jit
def pitch_of(units, BOOK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Elements of a row of learned codes, as `Format.view` gives them. units: codewords of a row."""
    # Passed as an argument, `units` carries the divisibility that wide loads need; keep it where it can be kept.
    bits: tl.constexpr = BOOK[2] * BOOK[3]
    if BOOK[2] == 16:
        pitch = units * BOOK[3]
    elif BOOK[2] == 8 and (BOOK[3] == 2 or BOOK[3] == 4):
        pitch = units
    elif bits % 8 == 0:
        pitch = units * (bits // 8)
    else:
        pitch = (units * bits + 7) // 8
    return pitch


def book_constants(form: Format) -> tuple[int, ...]:
    """The constant BOOK of kernels with learned codewords: D, J, bits of a code, stages."""
    return form.d, triton.next_power_of_2(form.d), form.bits, form.depth


def trellis_constants(form: Format, device: torch.device) -> tuple[int, ...]:
    """The constant TRELLIS of kernels: bits of a weight, bits of a state, whether to use NVIDIA's dp4a."""
    gpu = launch.device_properties(device)
    # The interpreter does not know it either.
    return form.bits, form.depth, int(isinstance(gpu.arch, int) and gpu.name != "interpreter")


def operand_type(x: Tensor) -> tl.dtype:
    """The type that matrix units read for x. The interpreter multiplies no bfloat16."""
    if x.device.type == "cpu":
        return tl.float32
    return {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}[x.dtype]


def slices(length: int, step: int, split: int) -> tuple[int, int]:
    """Length of a slice of a reduction in whole steps, and the number of slices, which is about `split`."""
    span = -(-length // (split * step)) * step
    return span, -(-length // span)


def outputs_and_inputs(form: Format, config: Config) -> tuple[int, int]:
    """Outputs and inputs of a tile of BA streams with BN units."""
    across, along = config["BA"], config["BN"] * form.weights
    return (across, along) if form.by_rows else (along, across)


def with_split(
    gpu: DeviceProperties, form: Format, shape: tuple[int, int], rows: int, tiles: int, config: Config
) -> Config:
    """The config with SPLIT, the number of slices of the reduction, and defaults. tiles: tiles of rows.

    Four programs per processor, as long as partial sums cost less memory traffic than the codes; at least one program
    per processor, since partial sums that are read again soon stay in the cache (VQ-LLM, section 5).
    """
    outputs, step = outputs_and_inputs(form, config)
    programs = -(-shape[0] // outputs) * tiles
    # A partial sum is written and read, four bytes each, for every output; codes are read once.
    affordable = int(shape[1] * form.bits_per_weight / 8 / (2 * 4 * 2 * rows))
    wanted = min(4 * gpu.processors // programs, max(affordable, -(-gpu.processors // programs)))
    return {"SPLIT": max(1, min(wanted, -(-shape[1] // step))), "num_stages": 2, **config}
