"""Products with weights that are stored as words of vector quantization, without the dense weight in memory.

The values V (O, I) of the codes are made in registers, tile by tile, and multiplied at once. What a program does is
chosen by the number of rows of x: for one row products are added up in the lanes that made the values; for some the
tile goes to the matrix units; for many V is written out once (`dequantize`) and the matrix library multiplies. Learned
words of a row of the weight can also be multiplied *on the codes*: the products of x with every entry of the codebook
first, then one look-up and addition per code (VQ-LLM, arXiv 2503.02236, section 2; CodeGEMM, arXiv 2512.17970).

Two ideas of VQ-LLM, as far as Triton lets them be. The codebook cache: entries are sorted by use, the HOT first ones
are kept on chip by the program and the rest comes through L1 (section 4; none are kept unless a measurement says so).
The codebook-centric dataflow: a program owns a codebook and a slice of the reduction, whose partial sums go through
memory; slices are as many as fill the device while the traffic of the sums stays below that of the codes (section 5).

Universal, lattice and trellis words run down the columns of the weight, so a stream of codes belongs to a column and a
tile is (columns, words, rows of a word); learned words run along its rows, and a tile is (rows, words, columns of a
word). Shape legend: T rows of x, O outputs, I inputs, S slices of the reduction, N words of a tile, J weights of a
word, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqcompress.methods.triton import launch
from vqcompress.methods.triton.launch import Config, DeviceProperties
from vqcompress.methods.triton.tiles import rows_of, tiles_of
from vqcompress.methods.vq.format import Format
from vqcompress.methods.vq.kernel_values import stage_of, values_of


@triton.jit
def _multiply(  # type: ignore[no-untyped-def]
    x_TI,
    codes,
    table,
    ends_E,
    out_STO,
    rows,
    outputs,
    inputs,
    pitch,
    units,
    span,
    codes_of_expert,
    table_of_expert,
    E,
    FAMILY: tl.constexpr,
    D: tl.constexpr,
    BITS: tl.constexpr,
    DEPTH: tl.constexpr,
    HOT: tl.constexpr,
    ASM: tl.constexpr,
    DTYPE: tl.constexpr,
    EXPERTS: tl.constexpr,
    BT: tl.constexpr,
    BA: tl.constexpr,
    BN: tl.constexpr,
    J: tl.constexpr,
):
    """Partial sums x Vᵀ over a slice of the inputs. A tile has BA streams of BN units of J weights.

    Of column words BA counts inputs and BN · J outputs; of row words BA outputs and BN · J inputs. BT 1: one row of x,
    multiplied where the values are. DTYPE: of the operands of a matrix product.
    """
    by_rows: tl.constexpr = FAMILY == "learned"
    tile, slice_, rows_tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    expert, first, last = rows_of(rows_tile, ends_E, E, rows, BT, EXPERTS)
    if first >= last:
        return
    if EXPERTS:
        codes += expert.to(tl.int64) * codes_of_expert
        table += expert * table_of_expert
    # A tile's rows count from its first, so that no thread carries offsets of 64 bits through the loop.
    t_T, count = tl.arange(0, BT), last - first
    x_TI += first.to(tl.int64) * inputs
    x_T1 = x_TI + t_T[:, None] * inputs
    begin = slice_ * span
    # Of row words slices and steps count words, of column words inputs.
    end = tl.minimum(begin + span, units if by_rows else inputs)
    n_N, j_J, m_M = tl.arange(0, BN), tl.arange(0, J), tl.arange(0, BN * J)
    across_A = tl.arange(0, BA)
    if by_rows:
        stream_A, streams = tile * BA + across_A, outputs
        o_O = stream_A
    else:
        unit_N, streams = tile * BN + n_N, end
        o_O = tile * BN * J + m_M
    if BT == 1:
        sum_ANJ = tl.zeros((BA, BN, J), tl.float32)
    else:
        sum_TO = tl.zeros((BT, BA if by_rows else BN * J), tl.float32)
    for first_of_step in range(begin, end, BN if by_rows else BA):
        if by_rows:
            unit_N = first_of_step + n_N
        else:
            stream_A = first_of_step + across_A
        at_A, inside_A = stream_A.to(tl.int64) * pitch, stream_A < streams
        value_ANJ = values_of(codes, table, at_A, unit_N, inside_A, units, FAMILY, D, BITS, DEPTH, HOT, ASM, J)
        if BT == 1:
            if by_rows:
                i_NJ = unit_N[:, None] * D + j_J[None, :]
                inside_NJ = (unit_N < end)[:, None] & (i_NJ < inputs) & (j_J < D)[None, :]
                x_ANJ = tl.load(x_TI + i_NJ, inside_NJ, 0.0)[None, :, :]
            else:
                x_ANJ = tl.load(x_TI + stream_A, inside_A, 0.0)[:, None, None]
            sum_ANJ += value_ANJ * x_ANJ.to(tl.float32)
        else:
            value_AM = tl.reshape(value_ANJ, (BA, BN * J)).to(DTYPE)
            if by_rows:
                unit_M = first_of_step + m_M // J
                i_I = unit_M * D + m_M % J
                inside_I = (unit_M < end) & (i_I < inputs) & (m_M % J < D)
                value_IO = tl.trans(value_AM)
            else:
                i_I, inside_I, value_IO = stream_A, inside_A, value_AM
            x_TB = tl.load(x_T1 + i_I[None, :], (t_T[:, None] < count) & inside_I[None, :], 0.0)
            sum_TO = tl.dot(x_TB.to(DTYPE), value_IO, sum_TO, input_precision="ieee")
    if BT == 1:
        sum_TO = tl.sum(tl.sum(sum_ANJ, 2), 1)[None, :] if by_rows else tl.reshape(tl.sum(sum_ANJ, 0), (1, BN * J))
    out_TO = out_STO + (slice_.to(tl.int64) * rows + first + t_T[:, None]) * outputs + o_O[None, :]
    tl.store(out_TO, sum_TO, (t_T[:, None] < count) & (o_O[None, :] < outputs))


@triton.jit
def _dequantize(  # type: ignore[no-untyped-def]
    codes,
    table,
    out,
    streams,
    length,
    pitch,
    units,
    FAMILY: tl.constexpr,
    D: tl.constexpr,
    BITS: tl.constexpr,
    DEPTH: tl.constexpr,
    HOT: tl.constexpr,
    ASM: tl.constexpr,
    BA: tl.constexpr,
    BN: tl.constexpr,
    J: tl.constexpr,
):
    """Values of streams, written stream by stream: V (O, I) of row words, Vᵀ (I, O) of column words."""
    a_A = tl.program_id(0) * BA + tl.arange(0, BA)
    unit_N = tl.program_id(1) * BN + tl.arange(0, BN)
    at_A, inside_A = a_A.to(tl.int64) * pitch, a_A < streams
    value_ANJ = values_of(codes, table, at_A, unit_N, inside_A, units, FAMILY, D, BITS, DEPTH, HOT, ASM, J)
    m_M = tl.arange(0, BN * J)
    place_M = tl.program_id(1) * BN * J + m_M
    if FAMILY == "learned" and D != J:
        # A word that is no power of two long leaves lanes over.
        place_M = tl.where(m_M % J < D, (tl.program_id(1) * BN + m_M // J) * D + m_M % J, length)
    out_AM = out + a_A[:, None].to(tl.int64) * length + place_M[None, :]
    value_AM = tl.reshape(value_ANJ, (BA, BN * J)).to(out.dtype.element_ty)
    tl.store(out_AM, value_AM, inside_A[:, None] & (place_M[None, :] < length))


@triton.jit
def _on_codes(  # type: ignore[no-untyped-def]
    x_TI,
    codes,
    table,
    out_STO,
    rows,
    outputs,
    inputs,
    pitch,
    units,
    span,
    D: tl.constexpr,
    BITS: tl.constexpr,
    DEPTH: tl.constexpr,
    BA: tl.constexpr,
    BN: tl.constexpr,
):
    """Partial sums for one row of x: its products with every entry, then a look-up and an addition per code."""
    tile, slice_, t = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    o_A, n_N, k_K = tile * BA + tl.arange(0, BA), tl.arange(0, BN), tl.arange(0, 1 << BITS)
    begin = slice_ * span
    end = tl.minimum(begin + span, units)
    sum_A = tl.zeros((BA,), tl.float32)
    for first in range(begin, end, BN):
        unit_N = first + n_N
        for r in tl.static_range(DEPTH):
            product_NK = tl.zeros((BN, 1 << BITS), tl.float32)
            for d in tl.static_range(D):
                i_N = unit_N * D + d
                x_N = tl.load(x_TI + t.to(tl.int64) * inputs + i_N, (unit_N < end) & (i_N < inputs), 0.0).to(tl.float32)
                product_NK += x_N[:, None] * tl.load(table + (r * D << BITS) + k_K * D + d)[None, :]
            inside_AN = (o_A[:, None] < outputs) & (unit_N[None, :] < units)
            at_A1 = o_A[:, None].to(tl.int64) * pitch
            code_NA = tl.trans(stage_of(codes, at_A1, unit_N[None, :], r, inside_AN, BITS, DEPTH))
            sum_A += tl.sum(tl.gather(product_NK, code_NA, 1), 0)
    tl.store(out_STO + (slice_.to(tl.int64) * rows + t) * outputs + o_A, sum_A, o_A < outputs)


def _steps(form: Format, config: Config) -> tuple[int, int]:
    """Outputs and inputs of a tile."""
    across, along = config["BA"], config["BN"] * form.weights
    return (across, along) if form.by_rows else (along, across)


def _slices(length: int, step: int, split: int) -> tuple[int, int]:
    """Length of a slice in whole steps, and how many slices that makes, for about so many."""
    span = -(-length // (split * step)) * step
    return span, -(-length // span)


def make_config(
    form: Format, rows: int, shape: tuple[int, int], experts: int, gpu: DeviceProperties, **chosen: int
) -> Config:
    """Config with as many slices of the reduction as fill a device four times, while their sums cost less than codes.

    At least as many as fill it once: what is written and read again soon stays in the cache.
    """
    outputs, step = _steps(form, chosen)
    programs = -(-shape[0] // outputs) * max(1, min(tiles_of(rows, chosen["BT"], experts), rows))
    # A partial sum is written and read, four bytes each, for every output; codes are read once.
    affordable = int(shape[1] * form.bits_per_weight / 8 / (2 * 4 * 2 * rows))
    wanted = min(4 * gpu.processors // programs, max(affordable, -(-gpu.processors // programs)))
    return {"HOT": 0, "SPLIT": max(1, min(wanted, -(-shape[1] // step))), "num_stages": 2, **chosen}


def default_config(
    gpu: DeviceProperties, rows: int, shape: tuple[int, int], form: Format, experts: int = 0, element: int = 2
) -> Config:
    """Config of `multiply` where nothing was measured. SPLIT: slices of the reduction. element: bytes of one of x."""
    lanes = triton.next_power_of_2(form.weights)
    if rows == 1 and not experts:
        # 16 bytes of codes for each of 128 threads, as far as their registers go; float32 takes twice as many.
        across, along = (32, 256) if form.bits_per_weight <= 2 else (32, 128) if form.by_rows else (16, 256)
        size = {"BT": 1, "BA": 2 * across // element, "BN": max(1, along // lanes), "num_warps": 4}
    else:
        # Products of float32 have no matrix units, and lie in registers with both operands.
        across, along, most = (32, 128, 64) if element == 2 else (16, 64, 16)
        of_a_tile = triton.next_power_of_2(-(-rows // experts) if experts else rows)
        size = {"BT": min(most, max(16, of_a_tile)), "BA": across, "BN": max(1, along // lanes)}
        # Lanes to spare, and codes that lie across bytes, take registers too.
        size["num_warps"] = 8 if size["BT"] == 64 and (lanes != form.weights or 8 % form.bits) else 4
    return make_config(form, rows, shape, experts, gpu, **size)


def named(form: Format, experts: int = 0, element: int = 2) -> str:
    """`multiply` in tables of config. Products of float32 have other ones."""
    return f"words.{form.name}{'.float32' if element == 4 else ''}{'.grouped' if experts else ''}"


def multiply(
    x_TI: Tensor,
    codes: Tensor,
    table: Tensor,
    outputs: int,
    form: Format,
    ends_E: Tensor | None = None,
) -> Tensor:
    """Partial sums of x Vᵀ, float32 (S, T, O): their sum over S is the product.

    codes: as stored, uint8 (streams, bytes), with experts (E, streams, bytes). table: float32 numbers, see
    `codebooks.product.table`, with experts one for all or (E, ·). ends_E: int32, where the rows of each expert end, if
    x is sorted by expert.
    """
    rows, inputs = x_TI.shape
    if not rows:
        return x_TI.new_empty((1, 0, outputs), dtype=torch.float32)
    codes, experts = form.view(codes), 0 if ends_E is None else len(ends_E)
    shape = (outputs, inputs)
    kernel = named(form, experts, x_TI.itemsize)

    def default(gpu: DeviceProperties) -> Config:
        return default_config(gpu, rows, shape, form, experts, x_TI.itemsize)

    of_all = (experts, *shape) if experts else shape
    chosen = dict(launch.get_config(kernel, x_TI.device, rows, of_all, default))
    units = form.units(shape)
    along, step = (units, chosen["BN"]) if form.by_rows else (inputs, chosen["BA"])
    span, split = _slices(along, step, chosen.pop("SPLIT"))
    out_STO = x_TI.new_empty((split, rows, outputs), dtype=torch.float32)
    tiles = tiles_of(rows, chosen["BT"], experts)
    grid = (-(-outputs // _steps(form, chosen)[0]), split, tiles)
    sizes = rows, outputs, inputs, codes.shape[-1], units, span
    strides = codes.stride(0) if experts else 0, table.stride(0) if table.ndim > 1 else 0, experts
    launch.run(
        _multiply,
        grid,
        x_TI.contiguous(),
        codes,
        table,
        ends_E,
        out_STO,
        *sizes,
        *strides,
        **_constants(form, x_TI),
        DTYPE=_operand(x_TI),
        EXPERTS=triton.next_power_of_2(experts) if experts else 0,
        J=triton.next_power_of_2(form.weights),
        **chosen,
    )
    return out_STO


def make_dequantize_config(form: Format, across: int = 16, along: int = 256, warps: int = 4) -> Config:
    """Config of `dequantize` for tiles of so many values; as given here where nothing was measured."""
    along = max(1, along // triton.next_power_of_2(form.weights))
    return {"BA": across, "BN": along, "HOT": 0, "num_warps": warps}


def dequantize(codes: Tensor, table: Tensor, shape: tuple[int, int], form: Format, dtype: torch.dtype) -> Tensor:
    """The values (O, I) of codes; of column words a view of Vᵀ, as a matrix library likes it."""
    codes = form.view(codes)
    streams, length = shape if form.by_rows else shape[::-1]
    out = codes.new_empty((streams, length), dtype=dtype)
    kernel = f"words.dequantize.{form.name}"
    chosen = launch.get_config(kernel, codes.device, 1, shape, lambda gpu: make_dequantize_config(form))
    grid = -(-streams // chosen["BA"]), -(-length // (chosen["BN"] * form.weights))
    sizes = streams, length, codes.shape[-1], form.units(shape)
    launch.run(
        _dequantize,
        grid,
        codes,
        table,
        out,
        *sizes,
        **_constants(form, codes),
        J=triton.next_power_of_2(form.weights),
        **chosen,
    )
    return out if form.by_rows else out.T


def make_lut_config(
    gpu: DeviceProperties, shape: tuple[int, int], form: Format, across: int = 256, products: int = 2048, warps: int = 8
) -> Config:
    """Config of `lut_gemv` for so many outputs and products of a tile; as given here where nothing was measured."""
    # Products with every entry of so many words, 8 of a thread; as many look-ups.
    groups = max(1, min(8, products >> form.bits))
    split = max(1, min(4 * gpu.processors // -(-shape[0] // across), -(-form.units(shape) // groups)))
    return {"BA": across, "BN": groups, "SPLIT": split, "num_warps": warps, "num_stages": 1}


def lut_gemv(x_TI: Tensor, codes: Tensor, table: Tensor, outputs: int, form: Format) -> Tensor:
    """What `multiply` answers for learned words, by look-ups in the products of x with the codebook."""
    rows, inputs = x_TI.shape
    codes, shape = form.view(codes), (outputs, inputs)
    kernel, default = f"words.lut_gemv.{form.name}", lambda gpu: make_lut_config(gpu, shape, form)
    chosen = dict(launch.get_config(kernel, x_TI.device, rows, shape, default))
    span, split = _slices(form.units(shape), chosen["BN"], chosen.pop("SPLIT"))
    out_STO = x_TI.new_empty((split, rows, outputs), dtype=torch.float32)
    sizes = rows, outputs, inputs, codes.shape[-1], form.units(shape), span
    constants = {"D": form.d, "BITS": form.bits, "DEPTH": form.depth}
    grid = -(-outputs // chosen["BA"]), split, rows
    launch.run(_on_codes, grid, x_TI.contiguous(), codes, table, out_STO, *sizes, **constants, **chosen)
    return out_STO


def _constants(form: Format, where: Tensor) -> dict[str, Any]:
    known = launch.device_properties(where.device)
    # One instruction of NVIDIA's, which the interpreter does not know either.
    asm = isinstance(known.arch, int) and known.name != "interpreter"
    return {"FAMILY": form.family, "D": form.d, "BITS": form.bits, "DEPTH": form.depth, "ASM": asm}


def _operand(x_TI: Tensor) -> Any:
    """The type that a matrix product reads. The interpreter multiplies no bfloat16."""
    if x_TI.device.type == "cpu":
        return tl.float32
    return {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}[x_TI.dtype]
