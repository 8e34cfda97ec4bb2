"""INT8 matrix products on a GPU: the operator of `reference`, to the last bit.

`_quantize` reads a row of x, finds its largest magnitude, and writes codes and the row's scale. `_multiply` is a matrix
product of codes by tensor cores, which add up in int32 and are therefore exact in any order; so the work may be divided
freely:

- Many rows: a program computes one tile of y. Programs that run at the same time compute neighbouring tiles, GROUP
  tiles of rows high, so that what they read is still in the L2 cache for the next one.
- Few rows: the time is that of reading the weight, and y has fewer tiles than the device has processors. Each tile's
  inputs are split over SPLIT programs, and `_finish` adds their int32 sums and scales them.
- Experts: rows come sorted by expert. The number of tiles of each is only known on the device, so the grid has the
  largest possible number of programs, and each looks for its expert; surplus ones return at once.

A tensor's offset may exceed 2³¹, so offsets of rows are 64 bits wide; nothing else is.
Shape legend: T tokens, O output rows, I input columns, E experts. Within a kernel T, O and I are also the sides of a
program's tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqcompress.methods.triton import launch
from vqcompress.methods.triton.launch import Config, DeviceProperties
from vqcompress.methods.triton.product import Product, multiply
from vqcompress.methods.triton.tiles import most_stages, rows_of, split_for, tile_of

# Columns of a row that a program reads at once, at most.
HELD = 16384
INT8_MAX = tl.constexpr(127.0)
SCALE_MIN = tl.constexpr(2.0**-126)
# 1.5 · 2²³. A float32 of that size has a step of 1, so adding it rounds a small number to an integer, half to even, and
# leaves it in the lowest bits.
TO_INTEGER = tl.constexpr(12582912.0)


@triton.jit
def _code(x, scale):  # type: ignore[no-untyped-def]
    """round(x / scale) within ±127, int8."""
    rounded = tl.clamp(tl.div_rn(x, scale), -INT8_MAX, INT8_MAX) + TO_INTEGER
    return rounded.to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def _quantize(  # type: ignore[no-untyped-def]
    x_TI, input_scale, codes_TI, scale_T, inputs, BLOCK: tl.constexpr, STATIC: tl.constexpr
):
    """Codes and the scale of one row. STATIC: with the scale given."""
    t = tl.program_id(0).to(tl.int64)
    x_I, codes_I = x_TI + t * inputs, codes_TI + t * inputs
    i_B = tl.arange(0, BLOCK)
    # Bits of magnitudes are ordered as the magnitudes, with NaN on top; a maximum of floats would drop NaN.
    most_B = tl.zeros((BLOCK,), tl.int32)
    for i in range(0, inputs, BLOCK):
        x_B = tl.load(x_I + i + i_B, mask=i + i_B < inputs, other=0.0).to(tl.float32)
        most_B = tl.maximum(most_B, x_B.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    amax = tl.max(most_B, 0).to(tl.float32, bitcast=True)
    if STATIC:
        # A row with NaN shows in its scale, since no code can.
        scale = tl.where(amax == amax, tl.load(input_scale), amax)
    else:
        scale = tl.div_rn(amax, INT8_MAX)
        scale = tl.where(scale < SCALE_MIN, SCALE_MIN, scale)
    tl.store(scale_T + t, scale)
    for i in range(0, inputs, BLOCK):
        x_B = tl.load(x_I + i + i_B, mask=i + i_B < inputs, other=0.0).to(tl.float32)
        tl.store(codes_I + i + i_B, _code(x_B, scale), mask=i + i_B < inputs)


@triton.jit(do_not_specialize=["tokens"])
def _multiply(  # type: ignore[no-untyped-def]
    codes_TI,
    scale_T,
    codes_EOI,
    scale_EO,
    ends_E,
    out,
    tokens,
    outputs,
    inputs,
    EXPERTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    GROUP: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """One tile of y, or of the s-th of SPLIT int32 sums. out: y (T, O) or the sums (SPLIT, T, O)."""
    tile_T, tile_O = tile_of(outputs, BLOCK_O, GROUP)
    expert, first, last = rows_of(tile_T, ends_E, tokens, BLOCK_T, EXPERTS)
    if first >= last:
        return
    s = tl.program_id(1)
    share = tl.cdiv(tl.cdiv(inputs, BLOCK_I), SPLIT) * BLOCK_I
    t_T, o_O, i_I = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_O), tl.arange(0, BLOCK_I)
    # A tile's rows count from its first ones, so that no thread carries offsets of 64 bits through the loop.
    row = tl.cast(expert, tl.int64) * outputs + tile_O * BLOCK_O
    x_TI = codes_TI + first.to(tl.int64) * inputs + s * share + t_T[:, None] * inputs + i_I[None, :]
    w_IO = codes_EOI + row * inputs + s * share + o_O[None, :] * inputs + i_I[:, None]
    has_T, has_O = t_T < last - first, o_O < outputs - tile_O * BLOCK_O
    acc_TO = tl.zeros((BLOCK_T, BLOCK_O), tl.int32)
    for i in range(s * share, tl.minimum((s + 1) * share, inputs), BLOCK_I):
        has_I = tl.arange(0, BLOCK_I) < inputs - i
        x = tl.load(x_TI, mask=has_T[:, None] & has_I[None, :], other=0)
        w = tl.load(w_IO, mask=has_O[None, :] & has_I[:, None], other=0)
        acc_TO = tl.dot(x, w, acc_TO, out_dtype=tl.int32)
        x_TI += BLOCK_I
        w_IO += BLOCK_I
    out += (s.to(tl.int64) * tokens + first) * outputs + tile_O * BLOCK_O
    out_TO = out + t_T[:, None] * outputs + o_O[None, :]
    has_TO = has_T[:, None] & has_O[None, :]
    if SPLIT > 1:
        tl.store(out_TO, acc_TO, mask=has_TO)
    else:
        scale_TO = (
            tl.load(scale_T + first + t_T, mask=has_T)[:, None] * tl.load(scale_EO + row + o_O, mask=has_O)[None, :]
        )
        tl.store(out_TO, (acc_TO.to(tl.float32) * scale_TO).to(out.dtype.element_ty), mask=has_TO)


def quantize(x_TI: Tensor, input_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes int8 (T, I) and scales float32 (T, 1): those of `reference.int8_quantize`, exactly.

    input_scale: one float32 scale () for all rows instead; it is repeated in the scales, except that a row with NaN
    gets NaN.
    """
    tokens, inputs = x_TI.shape
    codes_TI = x_TI.new_empty((tokens, inputs), dtype=torch.int8)
    scale_T1 = x_TI.new_empty((tokens, 1), dtype=torch.float32)
    block = min(HELD, triton.next_power_of_2(inputs))
    # 16 numbers for a thread, and twice as many for the longest rows.
    config = {"BLOCK": block, "num_warps": max(1, min(16, block // 512)), "enable_fp_fusion": False}
    arguments = (x_TI.contiguous(), input_scale, codes_TI, scale_T1, inputs)
    launch.run(_quantize, (tokens,), *arguments, STATIC=input_scale is not None, **config)
    return codes_TI, scale_T1


def linear(
    x_TI: Tensor, codes: Tensor, scale: Tensor, input_scale: Tensor | None = None, ends_E: Tensor | None = None
) -> Tensor:
    """`reference.int8_linear`, exactly. codes: int8. ends_E: read on the device only; about a thousand experts at most.

    Source: SmoothQuant, arXiv 2211.10438, section 4.
    """
    product = Product("int8", _multiply, torch.int32, default_config)
    return multiply(product, x_TI, ends_E, codes, scale, lambda x_TI: quantize(x_TI, input_scale))


def make_config(block_T: int, block_O: int, block_I: int, split: int, warps: int, stages: int) -> Config:
    """Config of `_multiply` with such blocks."""
    blocks = {"BLOCK_T": block_T, "BLOCK_O": block_O, "BLOCK_I": block_I, "GROUP": 8, "SPLIT": split}
    return {**blocks, "num_warps": warps, "num_stages": stages, "enable_fp_fusion": False}


def default_config(gpu: DeviceProperties, rows: int, outputs: int, inputs: int) -> Config:
    """Config of `_multiply` for x (rows, inputs) times a weight (outputs, inputs), where none were measured."""
    block_T = min(128, max(16, triton.next_power_of_2(rows)))
    block_O, block_I = (64, 256) if block_T < 64 else (128, 128)
    tiles_T = triton.cdiv(rows, block_T)
    if block_T == 128 and gpu.arch in (90, "gfx942") and tiles_T * triton.cdiv(outputs, 256) >= gpu.processors:
        # Three quarters of the reads that square tiles take. Not on Blackwell, whose own product of integers is not in
        # every Triton, and whose older one spills registers then.
        block_O = 256
    elif tiles_T * triton.cdiv(outputs, block_O) < gpu.processors:
        block_O = 64
    split = split_for(gpu, tiles_T * triton.cdiv(outputs, block_O), rows, inputs, block_I)
    stages = min(4 if gpu.warp == 32 else 2, most_stages(gpu, (block_T + block_O) * block_I))
    return make_config(block_T, block_O, block_I, split, 8 if block_T * block_O > 8192 else 4, stages)
