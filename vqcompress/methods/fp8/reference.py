"""FP8 operators in tiles of 128; the body of each defines its result, and the CUDA kernels return the same codes.

All arithmetic is float32 whatever the type of x, division is division (never a multiplication by the reciprocal), and
rounding is to nearest, half to even. Registering `torch.library.custom_op`s lets `torch.compile`, fake tensors and
`opcheck` see them.

Shape legend: T tokens, S rows sorted by expert, E experts, O output rows, I input columns, P = ceil(O / 128) and
J = ceil(I / 128) tiles.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vqcompress.methods.base import by_expert

E4M3_MAX = 448.0
TILE = 128
# The smallest normal float32. A scale is never below it, so zero and subnormal tiles divide safely and round to zero.
SCALE_MIN = 2.0**-126


def power_of_two_ceil(scale: Tensor) -> Tensor:
    """The smallest power of two that is ≥ each element of a float32 tensor of normal positive numbers (UE8M0)."""
    # Adding a full mantissa carries into the exponent unless the mantissa is zero; exact, unlike exp2(ceil(log2)).
    return ((scale.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)


def e4m3_scale(amax: Tensor, power_of_two: bool) -> Tensor:
    """max(amax / 448, 2⁻¹²⁶), rounded up to a power of two if asked; float32, the shape of `amax`."""
    scale = (amax / E4M3_MAX).clamp_min_(SCALE_MIN)
    return power_of_two_ceil(scale) if power_of_two else scale


def to_e4m3(ratio: Tensor) -> Tensor:
    """The nearest float8_e4m3fn, ties to even, saturating at ±448; only NaN gives NaN."""
    return ratio.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def _ratios(x_TI: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """x over the scale of its tile, (T, J, 128) with the last tile padded by zeros, and the scales (T, J)."""
    tokens, columns = x_TI.shape
    tiles = -(-columns // TILE)
    x_TJC = F.pad(x_TI.float(), (0, tiles * TILE - columns)).view(tokens, tiles, TILE)
    scale_TJ = e4m3_scale(x_TJC.abs().amax(2), power_of_two)
    return x_TJC / scale_TJ[:, :, None], scale_TJ


def _tiles(x_TI: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """The codes of `fp8_quantize` with the last tile padded by zeros, (T, J·128), and its scales."""
    ratio_TJC, scale_TJ = _ratios(x_TI, power_of_two)
    return to_e4m3(ratio_TJC).flatten(1), scale_TJ


def fp8_rounded(x_TI: Tensor, power_of_two: bool) -> Tensor:
    """What `fp8_quantize` makes of x, times its scales again: float32 (T, I), a third of the time of making codes."""
    ratio_TJC, scale_TJ = _ratios(x_TI, power_of_two)
    ratio_TJC.clamp_(-E4M3_MAX, E4M3_MAX)
    # 2²⁰ · 1.5 times a number's power of two, or that of the smallest normal one, 2⁻⁶: added and taken off again, it
    # leaves the three bits of a mantissa, rounded to nearest, half to even.
    power_TJC = (ratio_TJC.view(torch.int32) & 0x7F800000).clamp_(min=(127 - 6) << 23).view(torch.float32)
    power_TJC.mul_(1.5 * 2**20)
    rounded_TJC = ratio_TJC.add_(power_TJC).sub_(power_TJC).mul_(scale_TJ[:, :, None])
    return rounded_TJC.flatten(1)[:, : x_TI.shape[1]]


@torch.library.custom_op("vqcompress::fp8_quantize", mutates_args=())
def fp8_quantize(x_TI: Tensor, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """Codes float8_e4m3fn (T, I) and scales float32 (T, J) of any float x, in tiles of 1×128, dynamic.

    scale = max(amax / 448, 2⁻¹²⁶), with `power_of_two` rounded up to a power of two (UE8M0); code = x / scale rounded
    to E4M3, saturating at ±448. The last tile holds the I mod 128 columns that are left. A zero tile gets zero codes;
    no finite x gives a NaN; NaN and Inf give NaN codes. Bit-exact.
    Source: DeepSeek-V3, arXiv 2412.19437, section 3.3.2 (fine-grained quantization).
    """
    codes_TI, scale_TJ = _tiles(x_TI, power_of_two)
    return codes_TI[:, : x_TI.shape[1]].contiguous(), scale_TJ.contiguous()


@fp8_quantize.register_fake
def _(x_TI: Tensor, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    tokens, columns = x_TI.shape
    return (
        x_TI.new_empty((tokens, columns), dtype=torch.float8_e4m3fn),
        x_TI.new_empty((tokens, (columns + TILE - 1) // TILE), dtype=torch.float32),
    )


@torch.library.custom_op("vqcompress::fp8_linear", mutates_args=())
def fp8_linear(x_TI: Tensor, codes_OI: Tensor, scale_PJ: Tensor, power_of_two: bool) -> Tensor:
    """x Wᵀ, (T, O) in the type of x, for W = codes · the scale of their 128×128 tile and x through `fp8_quantize`.

    codes_OI: float8_e4m3fn, or float32 that carries the same values. scale_PJ: float32.
    y = Σ_j (partial_j · scale_x[t, j]) · scale_w[o // 128, j] in float32, where partial_j is the sum over the 128
    products of slice j (each product is exact) as accumulated by the device; then y is rounded to the type of x. The
    order of additions and of the two multiplications and the fusing of a multiplication with an addition are free; the
    codes and scales of x are those of `fp8_quantize`.
    Source: DeepSeek-V3, arXiv 2412.19437, section 3.3.2 (promotion to float32 every N_C = 128 elements).
    """
    codes_TI, scale_TJ = _tiles(x_TI, power_of_two)
    rows, columns = codes_OI.shape
    codes_TI, codes_OI = codes_TI.float(), codes_OI.float()
    scale_JO = scale_PJ.T.repeat_interleave(TILE, 1)[:, :rows]
    y_TO = torch.zeros((len(x_TI), rows), dtype=torch.float32, device=x_TI.device)
    for j, at in enumerate(range(0, columns, TILE)):
        end = min(at + TILE, columns)
        y_TO += (codes_TI[:, at:end] @ codes_OI[:, at:end].T).mul_(scale_TJ[:, j : j + 1]).mul_(scale_JO[j])
    return y_TO.to(x_TI.dtype)


@torch.library.custom_op("vqcompress::fp8_grouped", mutates_args=())
def fp8_grouped(x_SI: Tensor, ends_E: Tensor, codes_EOI: Tensor, scale_EPJ: Tensor, power_of_two: bool) -> Tensor:
    """`fp8_linear` of every expert's rows with its codes and scales, (S, O).

    What rows behind the last expert's get is not specified.
    """
    return by_expert(
        x_SI, ends_E, codes_EOI.shape[1], lambda x_TI, e: fp8_linear(x_TI, codes_EOI[e], scale_EPJ[e], power_of_two)
    )


@fp8_linear.register_fake
def _(x_TI: Tensor, codes_OI: Tensor, *_: Any) -> Tensor:
    return x_TI.new_empty((x_TI.shape[0], codes_OI.shape[0]))


@fp8_grouped.register_fake
def _(x_SI: Tensor, ends_E: Tensor, codes_EOI: Tensor, *_: Any) -> Tensor:
    return x_SI.new_empty((x_SI.shape[0], codes_EOI.shape[1]))


# Triton is imported when a kernel first runs: it takes a while, and is not installed everywhere.


@fp8_quantize.register_kernel("cuda")
def _(x_TI: Tensor, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    from vqcompress.methods.fp8 import kernel

    return kernel.quantize(x_TI, power_of_two)


@fp8_linear.register_kernel("cuda")
def _(x_TI: Tensor, codes_OI: Tensor, scale_PJ: Tensor, power_of_two: bool) -> Tensor:
    from vqcompress.methods.fp8 import kernel

    return kernel.linear(x_TI, codes_OI, scale_PJ, power_of_two)


@fp8_grouped.register_kernel("cuda")
def _(x_SI: Tensor, ends_E: Tensor, codes_EOI: Tensor, scale_EPJ: Tensor, power_of_two: bool) -> Tensor:
    from vqcompress.methods.fp8 import kernel

    return kernel.grouped(x_SI, ends_E, codes_EOI, scale_EPJ, power_of_two)
