"""The FP8 operator in tiles of 128; its body defines the result, and the CUDA kernels return the same codes.

All arithmetic is float32 whatever the type of x, division is division (never a multiplication by the reciprocal), and
rounding is to nearest, half to even. `torch.library.custom_op` lets `torch.compile`, fake tensors and `opcheck` see it.

Shape legend: T tokens, E experts, O output rows, I input columns, P = ceil(O / 128) and J = ceil(I / 128) tiles.
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


def fp8_quantize(x_TI: Tensor, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """The values of the codes, E4M3 numbers as float32 (T, I), and scales float32 (T, J) of any float x: dynamic.

    Tiles are 1×128. scale = max(amax / 448, 2⁻¹²⁶), with `power_of_two` rounded up to a power of two (UE8M0); code =
    x / scale rounded to E4M3, saturating at ±448. The last tile holds the I mod 128 columns that are left. A zero tile
    gets zero codes; no finite x gives a NaN; NaN and Inf give NaN codes. Bit-exact.
    Source: DeepSeek-V3, arXiv 2412.19437, section 3.3.2 (fine-grained quantization).
    """
    columns = x_TI.shape[1]
    x_TJC = F.pad(x_TI.float(), (0, -columns % TILE)).unflatten(1, (-1, TILE))
    scale_TJ = e4m3_scale(x_TJC.abs().amax(2), power_of_two)
    ratio_TJC = (x_TJC / scale_TJ[:, :, None]).clamp_(-E4M3_MAX, E4M3_MAX)
    # Rounded in float32, since a CPU converts to float8 slowly: adding and subtracting 1.5 · 2²⁰ times a number's power
    # of two, at least that of the smallest normal one, leaves the three bits of a mantissa, half to even.
    power_TJC = (ratio_TJC.view(torch.int32) & 0x7F800000).clamp_(min=(127 - 6) << 23).view(torch.float32)
    power_TJC.mul_(1.5 * 2**20)
    return ratio_TJC.add_(power_TJC).sub_(power_TJC).flatten(1)[:, :columns], scale_TJ


def fp8_rounded(x_TI: Tensor, power_of_two: bool) -> Tensor:
    """x rounded by `fp8_quantize`: codes times scales, float32 (T, I)."""
    codes_TI, scale_TJ = fp8_quantize(x_TI, power_of_two)
    return codes_TI * scale_TJ.repeat_interleave(TILE, 1)[:, : x_TI.shape[1]]


@torch.library.custom_op("vqcompress::fp8_linear", mutates_args=())
def fp8_linear(
    x_TI: Tensor, codes: Tensor, scale: Tensor, power_of_two: bool = False, ends_E: Tensor | None = None
) -> Tensor:
    """x Wᵀ, (T, O) in the type of x, for W = codes · the scale of their 128×128 tile and x through `fp8_quantize`.

    codes: (O, I) float8_e4m3fn, or float32 that carries the same values. scale: float32 (P, J).
    ends_E: int32; then codes (E, O, I) and scale (E, P, J) are of experts, the rows of x are sorted by expert, and the
    rows of each end here. Rows behind the last expert's get unspecified results.
    y = Σ_j (partial_j · scale_x[t, j]) · scale_w[o // 128, j] in float32, where partial_j is the sum over the 128
    products of slice j (each product is exact) as accumulated by the device; then y is rounded to the type of x. The
    order of additions and of the two multiplications and the fusing of a multiplication with an addition are free; the
    codes and scales of x are those of `fp8_quantize`.
    Source: DeepSeek-V3, arXiv 2412.19437, section 3.3.2 (promotion to float32 every N_C = 128 elements).
    """
    if ends_E is not None:
        return by_expert(
            x_TI, ends_E, codes.shape[1], lambda rows_TI, e: fp8_linear(rows_TI, codes[e], scale[e], power_of_two)
        )
    codes_TI, scale_TJ = fp8_quantize(x_TI, power_of_two)
    codes_OI, scale_JO = codes.float(), scale.T.repeat_interleave(TILE, 1)[:, : len(codes)]
    y_TO = torch.zeros((len(x_TI), len(codes)), dtype=torch.float32, device=x_TI.device)
    for j, (x_TC, w_OC) in enumerate(zip(codes_TI.split(TILE, 1), codes_OI.split(TILE, 1), strict=True)):
        y_TO += (x_TC @ w_OC.T).mul_(scale_TJ[:, j : j + 1]).mul_(scale_JO[j])
    return y_TO.to(x_TI.dtype)


@fp8_linear.register_fake
def _(x_TI: Tensor, codes: Tensor, *_: Any, **__: Any) -> Tensor:
    return x_TI.new_empty((x_TI.shape[0], codes.shape[-2]))


@fp8_linear.register_kernel("cuda")
def _(*arguments: Any, **options: Any) -> Tensor:
    # Triton is imported when a kernel first runs: that takes a while, and it is not installed everywhere.
    from vqcompress.methods.fp8 import kernel

    return kernel.linear(*arguments, **options)
