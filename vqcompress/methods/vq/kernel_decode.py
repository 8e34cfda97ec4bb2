"""Codes of vector quantization become values in registers, for all kernels that multiply with them.

A tile has A streams of codes and B units of each; a unit stands for J weights. Learned codewords are rows of a codebook
and run along a row of the weight; a trellis runs down a column, and its codewords are computed from the state.
Constants of the kernels: FORM is what `form_constants` returns; TILE is (BO, BI, HOT), the outputs and inputs of a tile
and the number of entries of a stage that a program keeps on chip.
Shape legend: A streams, B units of a stream, J weights of a unit (a power of two), K entries of a stage, D weights of
an entry, M = B · J; of a tile of the weight I inputs and O outputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqcompress.methods.triton import launch
from vqcompress.methods.triton.launch import Config
from vqcompress.methods.vq import bitshift
from vqcompress.methods.vq.format import Format

SEQUENCE = tl.constexpr(bitshift.SEQUENCE)
MULTIPLIER, INCREMENT = tl.constexpr(bitshift.MULTIPLIER), tl.constexpr(bitshift.INCREMENT)
MEAN, DEVIATION, CUBIC = tl.constexpr(bitshift.MEAN), tl.constexpr(bitshift.DEVIATION), tl.constexpr(bitshift.CUBIC)
# 2²³ as float32: with a whole number below 2²³ in its low bits it is the float of 2²³ + that number.
MAGIC = tl.constexpr(0x4B000000)


def form_constants(form: Format, device: torch.device) -> tuple[int, ...]:
    """FORM: whether streams are rows, D, J, bits of a code, stages or bits of a state, whether to use NVIDIA's dp4a."""
    gpu = launch.device_properties(device)
    # The interpreter knows no assembly.
    dp4a = isinstance(gpu.arch, int) and gpu.name != "interpreter"
    return int(form.by_rows), form.d, triton.next_power_of_2(form.weights), form.bits, form.depth, int(dp4a)


@triton.jit
def _code(codes_AB, unit_1B, r, inside_AB, BITS: tl.constexpr, DEPTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Code r of the DEPTH codes of learned codewords, int32. codes_AB: where the streams begin, (A, 1)."""
    if BITS * DEPTH == 8 or BITS * DEPTH == 16 or BITS * DEPTH == 32:
        code_AB = tl.load(codes_AB + unit_1B, inside_AB, 0).to(tl.int32) >> (BITS * r)
    else:
        bit_1B = (unit_1B * DEPTH + r) * BITS
        byte_AB, shift_1B = codes_AB + bit_1B // 8, bit_1B % 8
        code_AB = tl.load(byte_AB, inside_AB, 0).to(tl.int32)
        # The bytes that a code reaches into, and no others: the last stream ends with the memory.
        code_AB |= tl.load(byte_AB + 1, inside_AB & (shift_1B + BITS > 8), 0).to(tl.int32) << 8
        if BITS > 9:
            code_AB |= tl.load(byte_AB + 2, inside_AB & (shift_1B + BITS > 16), 0).to(tl.int32) << 16
        code_AB >>= shift_1B
    return code_AB & ((1 << BITS) - 1)


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
def _learned(codes_A1, table, unit_1B, inside_AB, FORM: tl.constexpr, HOT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Values (A, B, J), float32, of learned codewords. table: entries (stages, K, D). HOT: entries to keep on chip."""
    D: tl.constexpr = FORM[1]
    BITS: tl.constexpr = FORM[3]
    value_ABJ = _entries(table, _code(codes_A1, unit_1B, 0, inside_AB, BITS, FORM[4]), D, FORM[2], HOT)
    for r in tl.static_range(1, FORM[4]):
        code_AB = _code(codes_A1, unit_1B, r, inside_AB, BITS, FORM[4])
        value_ABJ += _entries(table + (r * D << BITS), code_AB, D, FORM[2], HOT)
    return value_ABJ


@triton.jit
def _codeword(state, STATES: tl.constexpr, DP4A: tl.constexpr):  # type: ignore[no-untyped-def]
    """The codeword of a state, float32. DP4A: add up the four bytes of the hash by one instruction."""
    hashed = (state & ((1 << STATES) - 1)) * MULTIPLIER + INCREMENT
    if DP4A:
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
def _trellis(codes_A1, unit_1B, inside_AB, units, FORM: tl.constexpr):  # type: ignore[no-untyped-def]
    """Values (A, B, J), float32, of a trellis. Its sequences of 256 weights are cyclic. units: of a stream."""
    J: tl.constexpr = FORM[2]
    BITS: tl.constexpr = FORM[3]
    following_1B = unit_1B + 1
    ends_1B = (following_1B % (SEQUENCE // J) == 0) | (following_1B == units)
    following_1B = tl.where(ends_1B, unit_1B // (SEQUENCE // J) * (SEQUENCE // J), following_1B)
    WORDS: tl.constexpr = J * BITS // 32
    bit_J = tl.arange(0, J)[None, None, :] * BITS
    low_ABJ = tl.load(codes_A1 + unit_1B * WORDS, inside_AB, 0)[:, :, None]
    high_ABJ = tl.load(codes_A1 + following_1B * WORDS, inside_AB, 0)[:, :, None]
    if WORDS == 3:
        second_ABJ = tl.load(codes_A1 + unit_1B * 3 + 1, inside_AB, 0)[:, :, None]
        third_ABJ = tl.load(codes_A1 + unit_1B * 3 + 2, inside_AB, 0)[:, :, None]
        high_ABJ = tl.where(bit_J < 32, second_ABJ, tl.where(bit_J < 64, third_ABJ, high_ABJ))
        low_ABJ = tl.where(bit_J < 32, low_ABJ, tl.where(bit_J < 64, second_ABJ, third_ABJ))
    window_ABJ = (high_ABJ.to(tl.int64) << 32) | (low_ABJ.to(tl.int64) & 0xFFFFFFFF)
    return _codeword((window_ABJ >> (bit_J % 32).to(tl.int64)).to(tl.int32), FORM[4], FORM[5])


@triton.jit
def tile(codes, table, at, outputs, inputs, units, pitch, FORM: tl.constexpr, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Values (I, O), float32, of this program's BO outputs and BI inputs from `at` on, and the numbers of those inputs.

    at: the first unit of a row, or the first input of a trellis; a loop that counts tiles spills registers. units: of a
    stream. pitch: elements of a stream. Where a codeword has D < J weights, the other lanes have the number `inputs`.
    """
    BO: tl.constexpr = TILE[0]
    BI: tl.constexpr = TILE[1]
    D: tl.constexpr = FORM[1]
    J: tl.constexpr = FORM[2]
    if FORM[0]:
        o_A, unit_B = tl.program_id(0) * BO + tl.arange(0, BO), at + tl.arange(0, BI // J)
        inside_AB = (o_A < outputs)[:, None] & (unit_B < units)[None, :]
        codes_A1 = codes + o_A[:, None].to(tl.int64) * pitch
        value_ABJ = _learned(codes_A1, table, unit_B[None, :], inside_AB, FORM, TILE[2])
        value_IO = tl.trans(tl.reshape(value_ABJ, (BO, BI)))
        m_I = tl.arange(0, BI)
        i_I = at * D + m_I if D == J else tl.where(m_I % J < D, at * D + m_I // J * D + m_I % J, inputs)
    else:
        i_I, unit_B = at + tl.arange(0, BI), tl.program_id(0) * (BO // J) + tl.arange(0, BO // J)
        inside_AB = (i_I < inputs)[:, None] & (unit_B < units)[None, :]
        value_ABJ = _trellis(codes + i_I[:, None].to(tl.int64) * pitch, unit_B[None, :], inside_AB, units, FORM)
        value_IO = tl.reshape(value_ABJ, (BI, BO))
    return value_IO, i_I


@triton.jit
def slice_of(inputs, units, FORM: tl.constexpr, STEP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Begin and end of this program's slice of the reduction, one of num_programs(1), as `tile` counts `at`.

    STEP: what a tile adds to `at`.
    """
    length = units if FORM[0] else inputs
    span = tl.cdiv(tl.cdiv(length, STEP), tl.num_programs(1)) * STEP
    return tl.program_id(1) * span, tl.minimum((tl.program_id(1) + 1) * span, length)


def tile_config(form: Format, across: int, along: int, warps: int) -> Config:
    """Config of a tile of `across` streams and `along` weights, idle lanes included, of each."""
    BO, BI = (across, along) if form.by_rows else (along, across)
    return {"BO": BO, "BI": BI, "num_warps": warps}


def tile_constants(config: Config) -> tuple[int, ...]:
    """TILE, taken out of a config."""
    return config.pop("BO"), config.pop("BI"), config.pop("HOT", 0)


def tile_inputs(form: Format, BI: int) -> int:
    """Inputs of a tile with BI lanes for them."""
    return BI // triton.next_power_of_2(form.d) * form.d if form.by_rows else BI


def operand_type(x: Tensor) -> tl.dtype:
    """The type that matrix units read for x. The interpreter multiplies no bfloat16."""
    if x.device.type == "cpu":
        return tl.float32
    return {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}[x.dtype]
