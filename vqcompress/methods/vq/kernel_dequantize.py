"""The values of codes written out, so that a matrix library multiplies many rows with them.

Shape legend: O outputs, I inputs. Of a tile: BO outputs, BI inputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqcompress.methods.triton import launch
from vqcompress.methods.vq.format import Format
from vqcompress.methods.vq.kernel_decode import form_constants, tile, tile_config, tile_constants, tile_inputs


@triton.jit
def _dequantize(  # type: ignore[no-untyped-def]
    codes, table, out, outputs, inputs, units, pitch, stride_O, stride_I, FORM: tl.constexpr, TILE: tl.constexpr
):
    """Values of BO outputs and BI inputs. units, pitch: see `tile`. stride_O, stride_I: of out; one of them is 1."""
    at = tl.program_id(1) * (TILE[1] // FORM[2] if FORM[0] else TILE[1])
    value_IO, i_I = tile(codes, table, at, outputs, inputs, units, pitch, FORM, TILE)
    o_O = tl.program_id(0) * TILE[0] + tl.arange(0, TILE[0])
    out_IO = out + i_I[:, None].to(tl.int64) * stride_I + o_O[None, :].to(tl.int64) * stride_O
    tl.store(out_IO, value_IO.to(out.dtype.element_ty), (i_I < inputs)[:, None] & (o_O < outputs)[None, :])


def dequantize(codes: Tensor, table: Tensor, shape: tuple[int, int], form: Format, dtype: torch.dtype) -> Tensor:
    """The values (O, I) of codes in a floating type; those of a trellis as a view of their transpose.

    codes: uint8 (streams, bytes) as stored. table: float32 entries (stages · K · d,), unused by a trellis.
    """
    codes, (outputs, inputs) = form.view(codes), shape
    out_OI = codes.new_empty(shape if form.by_rows else shape[::-1], dtype=dtype)
    out_OI = out_OI if form.by_rows else out_OI.T
    name, default = f"vq.dequantize.{form.name}", tile_config(form, 16, 256, 4)
    config = dict(launch.get_config(name, codes.device, 1, shape, lambda gpu: default))
    grid = -(-outputs // config["BO"]), -(-inputs // tile_inputs(form, config["BI"]))
    sizes = (outputs, inputs, form.units(shape), codes.shape[1], *out_OI.stride())
    constants = {"FORM": form_constants(form, codes.device), "TILE": tile_constants(config)}
    launch.run(_dequantize, grid, codes, table, out_OI, *sizes, **constants, **config)
    return out_OI
