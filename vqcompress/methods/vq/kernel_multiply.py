"""Few rows of x times a weight of codes: values are made in registers and multiplied there.

One row (GEMV) is multiplied by the lanes that made the values. Several rows (GEMM), of one weight or of the experts of
a mixture, go through the matrix units. Every tile of rows decodes again, so for many rows the values are better written
out once (`kernel_dequantize`). The reduction is cut into slices whose partial sums go through memory and are added by
`triton.rotate.finish`.

Entries of a codebook are sorted by use. With HOT > 0 a program of the GEMV keeps the first ones on chip and the rest
comes through L1 (the codebook cache of VQ-LLM, arXiv 2503.02236, section 4); the default is 0, a measurement may choose
more.
Shape legend: T rows of x, O outputs, I inputs, E experts, S slices. Of a tile: BT rows, BO outputs, BI inputs.
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
    form_constants,
    operand_type,
    slice_of,
    tile,
    tile_config,
    tile_constants,
    tile_inputs,
)


@triton.jit
def _gemv(x_I, codes, table, out_SO, outputs, inputs, units, pitch, FORM: tl.constexpr, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sums of BO outputs over a slice of the inputs. units, pitch: see `tile`."""
    BO: tl.constexpr = TILE[0]
    BI: tl.constexpr = TILE[1]
    STEP: tl.constexpr = BI // FORM[2] if FORM[0] else BI
    begin, end = slice_of(inputs, units, FORM, STEP)
    sum_IO = tl.zeros((BI, BO), tl.float32)
    for at in range(begin, end, STEP):
        value_IO, i_I = tile(codes, table, at, outputs, inputs, units, pitch, FORM, TILE)
        sum_IO += value_IO * tl.load(x_I + i_I, i_I < inputs, 0.0).to(tl.float32)[:, None]
    o_O = tl.program_id(0) * BO + tl.arange(0, BO)
    tl.store(out_SO + tl.program_id(1).to(tl.int64) * outputs + o_O, tl.sum(sum_IO, 0), o_O < outputs)


@triton.jit
def _gemm(  # type: ignore[no-untyped-def]
    x_TI,
    codes,
    table,
    ends_E,
    out_STO,
    rows,
    outputs,
    inputs,
    units,
    pitch,
    FORM: tl.constexpr,
    EXPERTS: tl.constexpr,
    DTYPE: tl.constexpr,
    BT: tl.constexpr,
    TILE: tl.constexpr,
):
    """Sums of BT rows and BO outputs over a slice of the inputs. units, pitch: see `tile`."""
    expert, first_row, last_row = rows_of(tl.program_id(2), ends_E, rows, BT, EXPERTS)
    if first_row >= last_row:
        return
    if EXPERTS[0]:
        codes += expert.to(tl.int64) * (outputs if FORM[0] else inputs) * pitch
        table += expert * (FORM[4] * FORM[1] << FORM[3]) if FORM[0] else 0
    # Rows count from the tile's first, so that no thread carries 64-bit offsets through the loop.
    t_T1 = tl.arange(0, BT)[:, None]
    inside_T1, x_T1 = t_T1 < last_row - first_row, x_TI + first_row.to(tl.int64) * inputs + t_T1 * inputs
    BO: tl.constexpr = TILE[0]
    BI: tl.constexpr = TILE[1]
    STEP: tl.constexpr = BI // FORM[2] if FORM[0] else BI
    begin, end = slice_of(inputs, units, FORM, STEP)
    sum_TO = tl.zeros((BT, BO), tl.float32)
    for at in range(begin, end, STEP):
        value_IO, i_I = tile(codes, table, at, outputs, inputs, units, pitch, FORM, TILE)
        rows_TI = tl.load(x_T1 + i_I[None, :], inside_T1 & (i_I < inputs)[None, :], 0.0)
        sum_TO = tl.dot(rows_TI.to(DTYPE), value_IO.to(DTYPE), sum_TO, input_precision="ieee")
    o_1O = tl.program_id(0) * BO + tl.arange(0, BO)[None, :]
    out_TO = out_STO + (tl.program_id(1).to(tl.int64) * rows + first_row + t_T1) * outputs + o_1O
    tl.store(out_TO, sum_TO, inside_T1 & (o_1O < outputs))


def name(form: Format, rows: int, experts: int, element: int) -> str:
    """The kernel in launch tables. element: bytes of a number of x; float32 has configs of its own."""
    kernel = "gemv" if rows == 1 and not experts else "gemm"
    return f"vq.{kernel}.{form.name}{'.float32' if element == 4 else ''}{'.grouped' if experts else ''}"


def default_config(
    gpu: DeviceProperties, rows: int, shape: tuple[int, int], form: Format, experts: int, element: int
) -> Config:
    """Config of `multiply` where none was measured. shape: (O, I). element: bytes of a number of x."""
    if rows == 1 and not experts:
        # 16 bytes of codes for each of 128 threads, as far as their registers go; float32 takes twice as many.
        across, along = (32, 256) if form.bits_per_weight <= 2 else (32, 128) if form.by_rows else (16, 256)
        return make_config(gpu, rows, shape, form, experts, tile_config(form, 2 * across // element, along, 4))
    # Products of float32 have no matrix units, and lie in registers with both operands.
    across, along, most = (32, 128, 64) if element == 2 else (16, 64, 16)
    block_T = min(most, max(16, triton.next_power_of_2(-(-rows // experts) if experts else rows)))
    # Idle lanes, and codes that lie across bytes, take registers too.
    idle = form.weights != triton.next_power_of_2(form.weights)
    warps = 8 if block_T == 64 and (idle or 8 % form.bits) else 4
    return make_config(gpu, rows, shape, form, experts, {"BT": block_T, **tile_config(form, across, along, warps)})


def make_config(
    gpu: DeviceProperties, rows: int, shape: tuple[int, int], form: Format, experts: int, blocks: Config
) -> Config:
    """The config with SPLIT, the number of slices of the reduction. blocks: BO and BI, and BT for several rows.

    Four programs per processor, as long as partial sums cost less memory traffic than the codes; at least one program
    per processor, since partial sums that are read again soon stay in the cache (VQ-LLM, section 5).
    """
    tiles_T = max(1, tiles_of(rows, blocks["BT"], experts)) if "BT" in blocks else 1
    programs = -(-shape[0] // blocks["BO"]) * tiles_T
    # A partial sum is written and read, four bytes each, for every output; codes are read once.
    affordable = int(shape[1] * form.bits_per_weight / 8 / (2 * 4 * 2 * rows))
    wanted = min(4 * gpu.processors // programs, max(affordable, -(-gpu.processors // programs)))
    tiles = -(-shape[1] // tile_inputs(form, blocks["BI"]))
    # No slice is empty.
    split = -(-tiles // -(-tiles // max(1, min(wanted, tiles))))
    return {"SPLIT": split, "num_stages": 2, **blocks}


def multiply(
    x_TI: Tensor, codes: Tensor, table: Tensor, outputs: int, form: Format, ends_E: Tensor | None = None
) -> Tensor:
    """Partial sums of x Vᵀ, float32 (S, T, O); their sum over S is the product.

    x_TI: (T, I), floating. codes: uint8 (streams, bytes) as stored, with experts (E, streams, bytes). table: float32
    entries (stages · K · d,), with experts (E, stages · K · d); unused by a trellis. ends_E: int32 (E,), the end of
    each expert's rows if x is sorted by expert.
    """
    (rows, inputs), experts = x_TI.shape, 0 if ends_E is None else len(ends_E)
    if not rows:
        return x_TI.new_empty((1, 0, outputs), dtype=torch.float32)
    codes, shape = form.view(codes.contiguous()), (outputs, inputs)
    config = dict(
        launch.get_config(
            name(form, rows, experts, x_TI.itemsize),
            x_TI.device,
            rows,
            (experts, *shape) if experts else shape,
            lambda gpu: default_config(gpu, rows, shape, form, experts, x_TI.itemsize),
        )
    )
    out_STO = x_TI.new_empty((config.pop("SPLIT"), rows, outputs), dtype=torch.float32)
    grid = -(-outputs // config["BO"]), len(out_STO), tiles_of(rows, config.get("BT", 1), experts)
    constants = {"FORM": form_constants(form, x_TI.device), "TILE": tile_constants(config)}
    tensors, sizes = (
        (x_TI.contiguous(), codes, table.contiguous()),
        (outputs, inputs, form.units(shape), codes.shape[-1]),
    )
    if rows == 1 and not experts:
        launch.run(_gemv, grid, *tensors, out_STO, *sizes, **constants, **config)
    else:
        constants |= {"EXPERTS": padded_experts(experts), "DTYPE": operand_type(x_TI)}
        launch.run(_gemm, grid, *tensors, ends_E, out_STO, rows, *sizes, **constants, **config)
    return out_STO
