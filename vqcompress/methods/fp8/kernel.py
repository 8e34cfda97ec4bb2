"""FP8 matrix products on a GPU in DeepSeek-V3's tiles: the operator of `reference`.

`_quantize` rounds to E4M3 with integers, so its bytes are those of the contract on every device. `_multiply` goes
through the inputs in slices of 128, the width of a tile: tensor cores add up the products of one slice, starting from
zero, and the result is scaled and added in float32 by the ordinary units. So the few bits that Hopper's tensor cores
keep of a sum of FP8 products (DeepSeek-V3, arXiv 2412.19437, section 3.3.2) bound the error of 128 terms only.
The scale of a slice is that of x times that of the weight: one number for a row of a tile, since no tile of y is wider
than one of the weight.

Few rows and experts are as in `int8/kernel.py`; the float32 sums of a split are added in a fixed order, so that y is
always the same. Where tensor cores have no E4M3, x is rounded all the same, but both operands are multiplied as
float16, which holds every E4M3 number: the products are exact there too.
Shape legend: T tokens, O output rows, I input columns, E experts, P = ceil(O / 128) and J = ceil(I / 128) tiles. Within
a kernel T, O and I are also the sides of a program's tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqcompress.methods.triton import launch
from vqcompress.methods.triton.launch import Config, DeviceProperties
from vqcompress.methods.triton.product import Product, multiply
from vqcompress.methods.triton.tiles import absmax, most_stages, rows_of, split_for, tile_of, wide

# The side of a tile, here and in kernels.
SIDE = 128
TILE = tl.constexpr(SIDE)
SCALE_MIN = tl.constexpr(2.0**-126)
E4M3_MAX = tl.constexpr(448.0)
# The bits of float32 448, infinity, and the least normal number of E4M3, 2⁻⁶.
MOST, INFINITY, NORMAL = tl.constexpr(0x43E00000), tl.constexpr(0x7F800000), tl.constexpr(0x3C800000)
# A float32 of the size 2¹⁴ has the step of the subnormal numbers of E4M3, 2⁻⁹.
TO_SUBNORMAL = tl.constexpr(16384.0)
# The difference of the exponents' biases, 127 − 7, in place in float32.
BIAS = tl.constexpr(120 << 23)


@triton.jit
def _e4m3(ratio):  # type: ignore[no-untyped-def]
    """The nearest E4M3 byte, ties to even, saturating at ±448; NaN only for NaN."""
    bits = ratio.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    held = tl.minimum(size, MOST)
    # Three bits of the mantissa stay. Half of the last one, less if it is even, carries where it has to.
    normal = (held - BIAS + 0x7FFFF + ((held >> 20) & 1)) >> 20
    subnormal = (held.to(tl.float32, bitcast=True) + TO_SUBNORMAL).to(tl.int32, bitcast=True) & 0xFF
    code = tl.where(held < NORMAL, subnormal, normal)
    code = tl.where(size > INFINITY, 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def _half(code):  # type: ignore[no-untyped-def]
    """The value of an E4M3 byte, given as int8, as float16; NaN gives 480."""
    # With the bits in place, and the copy of the sign below it removed, the exponent's bias is 15 instead of 7;
    # subnormal numbers are right as well.
    return ((code.to(tl.int16) << 7) & -0x4001).to(tl.float16, bitcast=True) * 256.0


@triton.jit
def _quantize(  # type: ignore[no-untyped-def]
    x_TI, codes_TI, scale_TJ, inputs, tiles_J, TILES: tl.constexpr, POWER_OF_TWO: tl.constexpr
):
    """Codes and scales of TILES tiles of a row. codes_TI: of bytes, or of float16 for the values of the codes."""
    t = tl.program_id(0).to(tl.int64)
    j_J = tl.program_id(1) * TILES + tl.arange(0, TILES)
    i_JC = j_J[:, None] * TILE + tl.arange(0, TILE)[None, :]
    x_JC = tl.load(x_TI + t * inputs + i_JC, mask=i_JC < inputs, other=0.0).to(tl.float32)
    scale_J = tl.div_rn(absmax(x_JC, 1), E4M3_MAX)
    scale_J = tl.where(scale_J < SCALE_MIN, SCALE_MIN, scale_J)
    if POWER_OF_TWO:
        # As `reference.power_of_two_ceil`.
        scale_J = ((scale_J.to(tl.int32, bitcast=True) + 0x7FFFFF) & INFINITY).to(tl.float32, bitcast=True)
    tl.store(scale_TJ + t * tiles_J + j_J, scale_J, mask=j_J < tiles_J)
    code_JC = _e4m3(tl.div_rn(x_JC, scale_J[:, None]))
    if codes_TI.dtype.element_ty == tl.float16:
        value_JC = _half(code_JC.to(tl.int8, bitcast=True))
        value_JC = tl.where((code_JC & 0x7F) == 0x7F, float("nan"), value_JC)
        tl.store(codes_TI + t * inputs + i_JC, value_JC.to(tl.float16), mask=i_JC < inputs)
    else:
        tl.store(codes_TI + t * inputs + i_JC, code_JC, mask=i_JC < inputs)


@triton.jit(do_not_specialize=["tokens"])
def _multiply(  # type: ignore[no-untyped-def]
    codes_TI,
    scale_TJ,
    codes_EOI,
    scale_EPJ,
    ends_E,
    out,
    tokens,
    outputs,
    inputs,
    EXPERTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    GROUP: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """One tile of y, or of the s-th of SPLIT float32 sums. out: y (T, O) or the sums (SPLIT, T, O).

    codes: both E4M3; or those of x as float16 and those of the weight as int8, which has the same bytes.
    """
    tile_T, tile_O = tile_of(outputs, BLOCK_O, GROUP)
    expert, first, last = rows_of(tile_T, ends_E, tokens, BLOCK_T, EXPERTS)
    if first >= last:
        return
    s = tl.program_id(1)
    tiles_J = tl.cdiv(inputs, TILE)
    share = tl.cdiv(tiles_J, SPLIT)
    t_T = (first + tl.arange(0, BLOCK_T)).to(tl.int64)
    o_O = tile_O * BLOCK_O + tl.arange(0, BLOCK_O)
    i_I = s * share * TILE + tl.arange(0, TILE)
    row_O = tl.cast(expert, tl.int64) * outputs + o_O
    x_TI = codes_TI + t_T[:, None] * inputs + i_I[None, :]
    w_IO = codes_EOI + row_O[None, :] * inputs + i_I[:, None]
    scale_T = scale_TJ + t_T * tiles_J
    scale_J = scale_EPJ + (tl.cast(expert, tl.int64) * tl.cdiv(outputs, TILE) + tile_O * BLOCK_O // TILE) * tiles_J
    has_T, has_O = t_T < last, o_O < outputs
    acc_TO = tl.zeros((BLOCK_T, BLOCK_O), tl.float32)
    for j in range(s * share, tl.minimum((s + 1) * share, tiles_J)):
        has_I = tl.arange(0, TILE) < inputs - j * TILE
        x = tl.load(x_TI, mask=has_T[:, None] & has_I[None, :], other=0.0)
        w = tl.load(w_IO, mask=has_O[None, :] & has_I[:, None], other=0.0)
        scale = tl.load(scale_T + j, mask=has_T, other=0.0) * tl.load(scale_J + j)
        if w.dtype == tl.int8:
            w = _half(w)
        acc_TO += tl.dot(x, w) * scale[:, None]
        x_TI += TILE
        w_IO += TILE
    out_TO = out + (s.to(tl.int64) * tokens + t_T)[:, None] * outputs + o_O[None, :]
    tl.store(out_TO, acc_TO.to(out.dtype.element_ty), mask=has_T[:, None] & has_O[None, :])


def quantize(x_TI: Tensor, power_of_two: bool = False, half: bool = False) -> tuple[Tensor, Tensor]:
    """Codes float8_e4m3fn (T, I) and scales float32 (T, J): those of `reference.fp8_quantize`, exactly.

    half: the values of the codes as float16 instead, for devices whose matrix products do not read E4M3.
    """
    tokens, inputs = x_TI.shape
    tiles = triton.cdiv(inputs, SIDE)
    codes_TI = x_TI.new_empty((tokens, inputs), dtype=torch.float16 if half else torch.float8_e4m3fn)
    scale_TJ = x_TI.new_empty((tokens, tiles), dtype=torch.float32)
    # 8 numbers for a thread: one load of 16 bytes.
    of_a_program = min(8, triton.next_power_of_2(tiles))
    arguments = (x_TI.contiguous(), codes_TI if half else codes_TI.view(torch.uint8), scale_TJ, inputs, tiles)
    constants = {"TILES": of_a_program, "POWER_OF_TWO": power_of_two, "enable_fp_fusion": False}
    launch.run(_quantize, (tokens, triton.cdiv(tiles, of_a_program)), *arguments, **constants)
    return codes_TI, scale_TJ


def linear(
    x_TI: Tensor, codes: Tensor, scale: Tensor, power_of_two: bool = False, ends_E: Tensor | None = None
) -> Tensor:
    """`reference.fp8_linear`, the same bits every time. codes: float8_e4m3fn. ends_E: read on the device only.

    About a thousand experts at most. Source: DeepSeek-V3, arXiv 2412.19437, section 3.3.2.
    """
    half = not launch.device_properties(x_TI.device).has_fp8
    product = Product("fp8", _multiply, torch.float32, default_config)
    return multiply(product, x_TI, ends_E, codes, scale, lambda x_TI: quantize(x_TI, power_of_two, half))


def make_config(block_T: int, block_O: int, split: int, warps: int, stages: int) -> Config:
    """Config of `_multiply` with such blocks."""
    blocks = {"BLOCK_T": block_T, "BLOCK_O": block_O, "GROUP": 16, "SPLIT": split}
    # Scaling and adding are one operation; the contract leaves that open.
    return {**blocks, "num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}


def fitting_stages(gpu: DeviceProperties, block_T: int, block_O: int) -> int:
    """`most_stages` of such blocks."""
    return most_stages(gpu, SIDE * (block_T + block_O if gpu.has_fp8 else 2 * block_T + block_O))


def default_config(gpu: DeviceProperties, rows: int, outputs: int, inputs: int) -> Config:
    """Config of `_multiply` for x (rows, inputs) times a weight (outputs, inputs), where none were measured."""
    # Not higher: the sum and that of a slice lie in registers, and while one program scales, another multiplies.
    block_T = 16 if rows <= 16 else 64
    tiles_T = triton.cdiv(rows, block_T)
    block_O = 128 if block_T == 64 and tiles_T * triton.cdiv(outputs, 128) >= gpu.processors else 64
    split = split_for(gpu, tiles_T * triton.cdiv(outputs, block_O), rows, inputs, SIDE)
    most = 2 if gpu.warp == 64 else 3 if block_T == 64 else 5
    stages = min(most, fitting_stages(gpu, block_T, block_O))
    warps = 4 if block_T * block_O < 8192 or wide(gpu) else 8
    return make_config(block_T, block_O, split, warps, stages)
