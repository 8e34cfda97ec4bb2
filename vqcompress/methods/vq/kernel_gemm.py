"""Some rows of x times a weight of codes (GEMM), for one weight or for the experts of a mixture in one launch.

A tile of values is made in registers and goes to the matrix units. Every tile of rows decodes again, so for many rows
the values are better written out once (`kernel_dequantize`). The reduction is cut into slices whose partial sums go
through memory and are added by `kernel_rotate.finish`.
Shape legend: T rows of x, O outputs, I inputs, E experts, S slices, A streams and N units of a tile, J weights of a
unit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqcompress.methods.triton import launch
from vqcompress.methods.triton.launch import Config, DeviceProperties
from vqcompress.methods.triton.tiles import padded_experts, rows_of, tiles_of
from vqcompress.methods.vq.format import Format
from vqcompress.methods.vq.kernel_decode import (
    book_constants,
    learned_values,
    operand_type,
    outputs_and_inputs,
    pitch_of,
    slices,
    trellis_constants,
    trellis_values,
    with_split,
)


@triton.jit
def _learned(  # type: ignore[no-untyped-def]
    x_TI,
    codes,
    table,
    ends_E,
    out_STO,
    rows,
    outputs,
    inputs,
    units,
    span,
    BOOK: tl.constexpr,
    EXPERTS: tl.constexpr,
    DTYPE: tl.constexpr,
    BT: tl.constexpr,
    BA: tl.constexpr,
    BN: tl.constexpr,
):
    """Sums of BT rows and BA outputs over a slice of `span` codewords. units: codewords of a row."""
    D: tl.constexpr = BOOK[0]
    J: tl.constexpr = BOOK[1]
    expert, first, last = rows_of(tl.program_id(2), ends_E, rows, BT, EXPERTS)
    if first >= last:
        return
    if EXPERTS[0]:
        codes += expert.to(tl.int64) * outputs * pitch_of(units, BOOK)
        table += expert * (BOOK[3] * D << BOOK[2])
    # Rows count from the tile's first, so that no thread carries 64-bit offsets through the loop.
    t_T, m_M, count = tl.arange(0, BT), tl.arange(0, BN * J), last - first
    x_T1 = x_TI + first.to(tl.int64) * inputs + t_T[:, None] * inputs
    begin = tl.program_id(1) * span
    end = tl.minimum(begin + span, units)
    o_A = tl.program_id(0) * BA + tl.arange(0, BA)
    at_A, inside_A = o_A.to(tl.int64) * pitch_of(units, BOOK), o_A < outputs
    sum_TA = tl.zeros((BT, BA), tl.float32)
    for step in range(begin, end, BN):
        value_ANJ = learned_values(codes, table, at_A, step + tl.arange(0, BN), inside_A, units, BOOK, 0)
        value_AM = tl.reshape(value_ANJ, (BA, BN * J)).to(DTYPE)
        unit_M = step + m_M // J
        i_M = unit_M * D + m_M % J
        inside_M = (unit_M < end) & (i_M < inputs) & (m_M % J < D)
        x_TM = tl.load(x_T1 + i_M[None, :], (t_T[:, None] < count) & inside_M[None, :], 0.0)
        sum_TA = tl.dot(x_TM.to(DTYPE), tl.trans(value_AM), sum_TA, input_precision="ieee")
    out_TA = out_STO + (tl.program_id(1).to(tl.int64) * rows + first + t_T[:, None]) * outputs + o_A[None, :]
    tl.store(out_TA, sum_TA, (t_T[:, None] < count) & inside_A[None, :])


@triton.jit
def _trellis(  # type: ignore[no-untyped-def]
    x_TI,
    codes,
    ends_E,
    out_STO,
    rows,
    units,
    inputs,
    span,
    TRELLIS: tl.constexpr,
    EXPERTS: tl.constexpr,
    DTYPE: tl.constexpr,
    BT: tl.constexpr,
    BA: tl.constexpr,
    BN: tl.constexpr,
    J: tl.constexpr,
):
    """Sums of BT rows and BN units of J outputs over a slice of `span` inputs. units: of a column of the weight."""
    expert, first, last = rows_of(tl.program_id(2), ends_E, rows, BT, EXPERTS)
    if first >= last:
        return
    pitch = units * 3 if TRELLIS[0] == 3 else units
    if EXPERTS[0]:
        codes += expert.to(tl.int64) * inputs * pitch
    t_T, a_A, count = tl.arange(0, BT), tl.arange(0, BA), last - first
    x_T1 = x_TI + first.to(tl.int64) * inputs + t_T[:, None] * inputs
    begin = tl.program_id(1) * span
    end = tl.minimum(begin + span, inputs)
    unit_N = tl.program_id(0) * BN + tl.arange(0, BN)
    sum_TM = tl.zeros((BT, BN * J), tl.float32)
    for step in range(begin, end, BA):
        i_A = step + a_A
        inside_A = i_A < end
        value_ANJ = trellis_values(codes, i_A.to(tl.int64) * pitch, unit_N, inside_A, units, TRELLIS)
        value_AM = tl.reshape(value_ANJ, (BA, BN * J)).to(DTYPE)
        x_TA = tl.load(x_T1 + i_A[None, :], (t_T[:, None] < count) & inside_A[None, :], 0.0)
        sum_TM = tl.dot(x_TA.to(DTYPE), value_AM, sum_TM, input_precision="ieee")
    outputs, o_M = units * J, tl.program_id(0) * BN * J + tl.arange(0, BN * J)
    out_TM = out_STO + (tl.program_id(1).to(tl.int64) * rows + first + t_T[:, None]) * outputs + o_M[None, :]
    tl.store(out_TM, sum_TM, (t_T[:, None] < count) & (o_M[None, :] < outputs))


def name(form: Format, experts: int = 0, element: int = 2) -> str:
    """`gemm` in launch tables. element: bytes of a number of x; float32 has configs of its own."""
    return f"vq.gemm.{form.name}{'.float32' if element == 4 else ''}{'.grouped' if experts else ''}"


def default_config(
    gpu: DeviceProperties, rows: int, shape: tuple[int, int], form: Format, experts: int = 0, element: int = 2
) -> Config:
    """Config of `gemm` where none was measured. shape: (O, I). element: bytes of a number of x."""
    # Products of float32 have no matrix units, and lie in registers with both operands.
    across, along, most = (32, 128, 64) if element == 2 else (16, 64, 16)
    lanes = triton.next_power_of_2(form.weights)
    block_T = min(most, max(16, triton.next_power_of_2(-(-rows // experts) if experts else rows)))
    # Idle lanes, and codes that lie across bytes, take registers too.
    warps = 8 if block_T == 64 and (lanes != form.weights or 8 % form.bits) else 4
    tile = {"BT": block_T, "BA": across, "BN": max(1, along // lanes), "num_warps": warps}
    return make_config(gpu, rows, shape, form, experts, tile)


def make_config(
    gpu: DeviceProperties, rows: int, shape: tuple[int, int], form: Format, experts: int, tile: Config
) -> Config:
    """Config of `gemm` for tiles of BT rows, BA streams and BN units."""
    return with_split(gpu, form, shape, rows, max(1, tiles_of(rows, tile["BT"], experts)), tile)


def gemm(
    x_TI: Tensor, codes: Tensor, table: Tensor, outputs: int, form: Format, ends_E: Tensor | None = None
) -> Tensor:
    """Partial sums of x Vᵀ, float32 (S, T, O); their sum over S is the product.

    x_TI: (T, I), floating. codes: uint8 (streams, bytes) as stored, with experts (E, streams, bytes). table: float32
    entries (stages · K · d,), with experts (E, stages · K · d); unused by a trellis. ends_E: int32 (E,), the end of
    each expert's rows if x is sorted by expert.
    """
    rows, inputs = x_TI.shape
    if not rows:
        return x_TI.new_empty((1, 0, outputs), dtype=torch.float32)
    codes, experts, shape = form.view(codes.contiguous()), 0 if ends_E is None else len(ends_E), (outputs, inputs)
    config = dict(
        launch.get_config(
            name(form, experts, x_TI.itemsize),
            x_TI.device,
            rows,
            (experts, *shape) if experts else shape,
            lambda gpu: default_config(gpu, rows, shape, form, experts, x_TI.itemsize),
        )
    )
    units = form.units(shape)
    along, step = (units, config["BN"]) if form.by_rows else (inputs, config["BA"])
    span, split = slices(along, step, config.pop("SPLIT"))
    out_STO = x_TI.new_empty((split, rows, outputs), dtype=torch.float32)
    grid = (-(-outputs // outputs_and_inputs(form, config)[0]), split, tiles_of(rows, config["BT"], experts))
    constants = {"EXPERTS": padded_experts(experts), "DTYPE": operand_type(x_TI), **config}
    if form.by_rows:
        constants["BOOK"], sizes = book_constants(form), (rows, outputs, inputs, units, span)
        launch.run(_learned, grid, x_TI.contiguous(), codes, table.contiguous(), ends_E, out_STO, *sizes, **constants)
    else:
        constants |= {"TRELLIS": trellis_constants(form, x_TI.device), "J": form.weights}
        launch.run(_trellis, grid, x_TI.contiguous(), codes, ends_E, out_STO, rows, units, inputs, span, **constants)
    return out_STO
