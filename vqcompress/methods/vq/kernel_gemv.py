"""One row of x times a weight of codes (GEMV): lanes make values in registers and multiply them at once.

Two ways. `gemv` decodes. `lut_gemv`, for learned codewords, first multiplies x with every entry of the codebook, then
looks up and adds one product per code (VQ-LLM, arXiv 2503.02236, section 2; CodeGEMM, arXiv 2512.17970); this works
because learned codewords run along the reduction, so that one product serves every row of the weight.

Codebook entries are sorted by use. With HOT > 0 a program keeps the first ones on chip and the rest comes through L1
(the codebook cache of VQ-LLM, section 4); the default is 0, a measurement may choose more. The reduction is cut into
slices whose partial sums go through memory and are added by `kernel_rotate.finish`.
Shape legend: T rows of x, O outputs, I inputs, S slices, A streams and N units of a tile, J weights of a unit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqcompress.methods.triton import launch
from vqcompress.methods.triton.launch import Config, DeviceProperties
from vqcompress.methods.vq.format import Format
from vqcompress.methods.vq.kernel_decode import (
    book_constants,
    learned_values,
    outputs_and_inputs,
    pitch_of,
    slices,
    stage_code,
    trellis_constants,
    trellis_values,
    with_split,
)


@triton.jit
def _learned(  # type: ignore[no-untyped-def]
    x_I,
    codes,
    table,
    out_SO,
    outputs,
    inputs,
    units,
    span,
    BOOK: tl.constexpr,
    HOT: tl.constexpr,
    BA: tl.constexpr,
    BN: tl.constexpr,
):
    """Sums of BA outputs over a slice of `span` codewords. units: codewords of a row."""
    D: tl.constexpr = BOOK[0]
    begin = tl.program_id(1) * span
    end = tl.minimum(begin + span, units)
    o_A, n_N, j_J = tl.program_id(0) * BA + tl.arange(0, BA), tl.arange(0, BN), tl.arange(0, BOOK[1])
    at_A, inside_A = o_A.to(tl.int64) * pitch_of(units, BOOK), o_A < outputs
    sum_ANJ = tl.zeros((BA, BN, BOOK[1]), tl.float32)
    for first in range(begin, end, BN):
        unit_N = first + n_N
        value_ANJ = learned_values(codes, table, at_A, unit_N, inside_A, units, BOOK, HOT)
        i_NJ = unit_N[:, None] * D + j_J[None, :]
        inside_NJ = (unit_N < end)[:, None] & (i_NJ < inputs) & (j_J < D)[None, :]
        x_NJ = tl.load(x_I + i_NJ, inside_NJ, 0.0).to(tl.float32)
        sum_ANJ += value_ANJ * x_NJ[None, :, :]
    sum_A = tl.sum(tl.sum(sum_ANJ, 2), 1)
    tl.store(out_SO + tl.program_id(1).to(tl.int64) * outputs + o_A, sum_A, inside_A)


@triton.jit
def _trellis(  # type: ignore[no-untyped-def]
    x_I,
    codes,
    out_SO,
    units,
    inputs,
    span,
    TRELLIS: tl.constexpr,
    BA: tl.constexpr,
    BN: tl.constexpr,
    J: tl.constexpr,
):
    """Sums of BN units of J outputs over a slice of `span` inputs. units: of a column of the weight."""
    begin = tl.program_id(1) * span
    end = tl.minimum(begin + span, inputs)
    unit_N, a_A = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, BA)
    pitch = units * 3 if TRELLIS[0] == 3 else units
    sum_ANJ = tl.zeros((BA, BN, J), tl.float32)
    for first in range(begin, end, BA):
        i_A = first + a_A
        inside_A = i_A < end
        value_ANJ = trellis_values(codes, i_A.to(tl.int64) * pitch, unit_N, inside_A, units, TRELLIS)
        sum_ANJ += value_ANJ * tl.load(x_I + i_A, inside_A, 0.0).to(tl.float32)[:, None, None]
    o_M = tl.program_id(0) * BN * J + tl.arange(0, BN * J)
    sum_M = tl.reshape(tl.sum(sum_ANJ, 0), (BN * J,))
    tl.store(out_SO + tl.program_id(1).to(tl.int64) * (units * J) + o_M, sum_M, o_M < units * J)


@triton.jit
def _lut(  # type: ignore[no-untyped-def]
    x_TI,
    codes,
    table,
    out_STO,
    rows,
    outputs,
    inputs,
    units,
    span,
    BOOK: tl.constexpr,
    BA: tl.constexpr,
    BN: tl.constexpr,
):
    """Sums of BA outputs over a slice of `span` codewords, by look-ups in the products of x with all entries."""
    D: tl.constexpr = BOOK[0]
    BITS: tl.constexpr = BOOK[2]
    begin, t = tl.program_id(1) * span, tl.program_id(2)
    end = tl.minimum(begin + span, units)
    o_A, n_N, k_K = tl.program_id(0) * BA + tl.arange(0, BA), tl.arange(0, BN), tl.arange(0, 1 << BITS)
    sum_A = tl.zeros((BA,), tl.float32)
    for first in range(begin, end, BN):
        unit_N = first + n_N
        for r in tl.static_range(BOOK[3]):
            product_NK = tl.zeros((BN, 1 << BITS), tl.float32)
            for d in tl.static_range(D):
                i_N = unit_N * D + d
                x_N = tl.load(x_TI + t.to(tl.int64) * inputs + i_N, (unit_N < end) & (i_N < inputs), 0.0).to(tl.float32)
                product_NK += x_N[:, None] * tl.load(table + (r * D << BITS) + k_K * D + d)[None, :]
            inside_AN = (o_A[:, None] < outputs) & (unit_N[None, :] < units)
            at_A1 = o_A[:, None].to(tl.int64) * pitch_of(units, BOOK)
            code_NA = tl.trans(stage_code(codes, at_A1, unit_N[None, :], r, inside_AN, BITS, BOOK[3]))
            sum_A += tl.sum(tl.gather(product_NK, code_NA, 1), 0)
    tl.store(out_STO + (tl.program_id(1).to(tl.int64) * rows + t) * outputs + o_A, sum_A, o_A < outputs)


def name(form: Format, element: int = 2) -> str:
    """`gemv` in launch tables. element: bytes of a number of x; float32 has configs of its own."""
    return f"vq.gemv.{form.name}{'.float32' if element == 4 else ''}"


def default_config(gpu: DeviceProperties, shape: tuple[int, int], form: Format, element: int = 2) -> Config:
    """Config of `gemv` where none was measured. shape: (O, I). element: bytes of a number of x."""
    # 16 bytes of codes for each of 128 threads, as far as their registers go; float32 takes twice as many.
    across, along = (32, 256) if form.bits_per_weight <= 2 else (32, 128) if form.by_rows else (16, 256)
    lanes = triton.next_power_of_2(form.weights)
    return make_config(gpu, shape, form, 2 * across // element, along // lanes, 4)


def make_config(
    gpu: DeviceProperties, shape: tuple[int, int], form: Format, streams: int, units: int, warps: int
) -> Config:
    """Config of `gemv` for tiles of some streams and units."""
    config = {"BA": streams, "BN": max(1, units), "num_warps": warps}
    return with_split(gpu, form, shape, 1, 1, config) | ({"HOT": 0} if form.by_rows else {})


def gemv(x_1I: Tensor, codes: Tensor, table: Tensor, outputs: int, form: Format) -> Tensor:
    """Partial sums of x Vᵀ for one row of x, float32 (S, 1, O); their sum over S is the product.

    x_1I: (1, I), floating. codes: uint8 (streams, bytes) as stored. table: float32 entries (stages · K · d,), unused by
    a trellis.
    """
    codes, inputs = form.view(codes), x_1I.shape[1]
    shape, default = (outputs, inputs), lambda gpu: default_config(gpu, (outputs, inputs), form, x_1I.itemsize)
    config = dict(launch.get_config(name(form, x_1I.itemsize), x_1I.device, 1, shape, default))
    units = form.units(shape)
    along, step = (units, config["BN"]) if form.by_rows else (inputs, config["BA"])
    span, split = slices(along, step, config.pop("SPLIT"))
    out_S1O = x_1I.new_empty((split, 1, outputs), dtype=torch.float32)
    grid = (-(-outputs // outputs_and_inputs(form, config)[0]), split)
    if form.by_rows:
        sizes = (outputs, inputs, units, span)
        launch.run(
            _learned, grid, x_1I.contiguous(), codes, table, out_S1O, *sizes, BOOK=book_constants(form), **config
        )
    else:
        constants = {"TRELLIS": trellis_constants(form, x_1I.device), "J": form.weights}
        launch.run(_trellis, grid, x_1I.contiguous(), codes, out_S1O, units, inputs, span, **constants, **config)
    return out_S1O


def make_lut_config(
    gpu: DeviceProperties, shape: tuple[int, int], form: Format, across: int = 256, products: int = 2048, warps: int = 8
) -> Config:
    """Config of `lut_gemv` for tiles of `across` outputs and `products` products; the default is for no measurement."""
    # At most 8 codewords at a time, with the products of every entry.
    units = max(1, min(8, products >> form.bits))
    split = max(1, min(4 * gpu.processors // -(-shape[0] // across), -(-form.units(shape) // units)))
    return {"BA": across, "BN": units, "SPLIT": split, "num_warps": warps, "num_stages": 1}


def lut_gemv(x_TI: Tensor, codes: Tensor, table: Tensor, outputs: int, form: Format) -> Tensor:
    """Partial sums of x Vᵀ for learned codewords, float32 (S, T, O), by look-ups in products of x with the codebook.

    x_TI: (T, I), floating, few rows. codes: uint8 (O, bytes). table: float32 entries (stages · K · d,).
    """
    (rows, inputs), codes = x_TI.shape, form.view(codes)
    shape, default = (outputs, inputs), lambda gpu: make_lut_config(gpu, (outputs, inputs), form)
    config = dict(launch.get_config(f"vq.lut_gemv.{form.name}", x_TI.device, rows, shape, default))
    units = form.units(shape)
    span, split = slices(units, config["BN"], config.pop("SPLIT"))
    out_STO = x_TI.new_empty((split, rows, outputs), dtype=torch.float32)
    sizes = (rows, outputs, inputs, units, span)
    grid = (-(-outputs // config["BA"]), split, rows)
    launch.run(_lut, grid, x_TI.contiguous(), codes, table, out_STO, *sizes, BOOK=book_constants(form), **config)
    return out_STO
