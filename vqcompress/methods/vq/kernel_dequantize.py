"""The values of codes written out, so that a matrix library multiplies many rows with them.

Shape legend: O outputs, I inputs, A streams and N units of a tile, J weights of a unit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqcompress.methods.triton import launch
from vqcompress.methods.triton.launch import Config
from vqcompress.methods.vq.format import Format
from vqcompress.methods.vq.kernel_decode import (
    book_constants,
    learned_values,
    pitch_of,
    trellis_constants,
    trellis_values,
)


@triton.jit
def _learned(codes, table, out_OI, outputs, inputs, units, BOOK: tl.constexpr, BA: tl.constexpr, BN: tl.constexpr):  # type: ignore[no-untyped-def]
    """Values of BA rows and BN codewords. units: codewords of a row."""
    D: tl.constexpr = BOOK[0]
    J: tl.constexpr = BOOK[1]
    o_A, m_M = tl.program_id(0) * BA + tl.arange(0, BA), tl.arange(0, BN * J)
    inside_A, first = o_A < outputs, tl.program_id(1) * BN
    unit_N = first + tl.arange(0, BN)
    at_A = o_A.to(tl.int64) * pitch_of(units, BOOK)
    value_ANJ = learned_values(codes, table, at_A, unit_N, inside_A, units, BOOK, 0)
    # Lanes behind a codeword whose length is no power of two write nothing.
    i_M = tl.where(m_M % J < D, (first + m_M // J) * D + m_M % J, inputs)
    value_AM = tl.reshape(value_ANJ, (BA, BN * J)).to(out_OI.dtype.element_ty)
    out_AM = out_OI + o_A[:, None].to(tl.int64) * inputs + i_M[None, :]
    tl.store(out_AM, value_AM, inside_A[:, None] & (i_M < inputs)[None, :])


@triton.jit
def _trellis(  # type: ignore[no-untyped-def]
    codes, out_IO, units, inputs, TRELLIS: tl.constexpr, BA: tl.constexpr, BN: tl.constexpr, J: tl.constexpr
):
    """Values of BA columns and BN units of J outputs, transposed."""
    i_A = tl.program_id(0) * BA + tl.arange(0, BA)
    inside_A, unit_N = i_A < inputs, tl.program_id(1) * BN + tl.arange(0, BN)
    pitch = units * 3 if TRELLIS[0] == 3 else units
    value_ANJ = trellis_values(codes, i_A.to(tl.int64) * pitch, unit_N, inside_A, units, TRELLIS)
    o_M = tl.program_id(1) * BN * J + tl.arange(0, BN * J)
    value_AM = tl.reshape(value_ANJ, (BA, BN * J)).to(out_IO.dtype.element_ty)
    out_AM = out_IO + i_A[:, None].to(tl.int64) * (units * J) + o_M[None, :]
    tl.store(out_AM, value_AM, inside_A[:, None] & (o_M < units * J)[None, :])


def make_config(form: Format, across: int = 16, along: int = 256, warps: int = 4) -> Config:
    """Config for tiles of across × along values; by default, where none was measured."""
    return {"BA": across, "BN": max(1, along // triton.next_power_of_2(form.weights)), "num_warps": warps}


def dequantize(codes: Tensor, table: Tensor, shape: tuple[int, int], form: Format, dtype: torch.dtype) -> Tensor:
    """The values (O, I) of codes in a floating type; those of a trellis as a view of their transpose.

    codes: uint8 (streams, bytes) as stored. table: float32 entries (stages · K · d,), unused by a trellis.
    """
    codes, (outputs, inputs) = form.view(codes), shape
    streams, length = shape if form.by_rows else shape[::-1]
    out = codes.new_empty((streams, length), dtype=dtype)
    default = lambda gpu: make_config(form)  # noqa: E731
    config = launch.get_config(f"vq.dequantize.{form.name}", codes.device, 1, shape, default)
    grid = -(-streams // config["BA"]), -(-length // (config["BN"] * form.weights))
    if form.by_rows:
        sizes = (outputs, inputs, form.units(shape))
        launch.run(_learned, grid, codes, table, out, *sizes, BOOK=book_constants(form), **config)
        return out
    constants = {"TRELLIS": trellis_constants(form, codes.device), "J": form.weights}
    launch.run(_trellis, grid, codes, out, form.units(shape), inputs, **constants, **config)
    return out.T
