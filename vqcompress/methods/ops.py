"""INT8 and FP8 matrix products as torch operators; the body of each is its meaning, to the last bit where it says so.

`torch.library.custom_op` lets `torch.compile`, fake tensors and `opcheck` see them, and lets a device's kernel replace
the body (`op.register_kernel("cuda")`) under the same contract. Everything is computed in float32 whatever the type of
x, division is division (never a multiplication by the reciprocal), and rounding is to nearest, half to even.

Products of experts read rows that are sorted by expert: ends_E, int32, says where the rows of each one end.

Shape legend: T tokens, S rows sorted by expert, E experts, O output rows, I input columns, P = ceil(O / 128) and
J = ceil(I / 128) tiles.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

INT8_MAX = 127.0
E4M3_MAX = 448.0
TILE = 128
# The smallest normal float32. A scale is never below it, so zero and subnormal rows divide safely and round to zero.
SCALE_MIN = 2.0**-126
# Columns whose int8 products add up exactly in float32: 1024 · 127² < 2²⁴.
EXACT_COLUMNS = 1024
# Whether this CPU adds products of bytes up in 32 bits. Without VNNI oneDNN does so in 16, where they saturate.
BYTE_PRODUCTS = torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported()


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


def _int8_rows(x_TI: Tensor) -> tuple[Tensor, Tensor]:
    """The codes of `int8_quantize` still as float32, and its scales."""
    x_TI = x_TI.float()
    scale_T1 = (x_TI.abs().amax(1, keepdim=True) / INT8_MAX).clamp_min_(SCALE_MIN)
    return (x_TI / scale_T1).round_().clamp_(-INT8_MAX, INT8_MAX), scale_T1


def _fp8_ratios(x_TI: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """x over the scale of its tile, (T, J, 128) with the last tile padded by zeros, and the scales (T, J)."""
    tokens, columns = x_TI.shape
    tiles = -(-columns // TILE)
    x_TJC = F.pad(x_TI.float(), (0, tiles * TILE - columns)).view(tokens, tiles, TILE)
    scale_TJ = e4m3_scale(x_TJC.abs().amax(2), power_of_two)
    return x_TJC / scale_TJ[:, :, None], scale_TJ


def _fp8_tiles(x_TI: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """The codes of `fp8_quantize` with the last tile padded by zeros, (T, J·128), and its scales."""
    ratio_TJC, scale_TJ = _fp8_ratios(x_TI, power_of_two)
    return to_e4m3(ratio_TJC).flatten(1), scale_TJ


def fp8_rounded(x_TI: Tensor, power_of_two: bool) -> Tensor:
    """What `fp8_quantize` makes of x, times its scales again: float32 (T, I), a third of the time of making codes."""
    ratio_TJC, scale_TJ = _fp8_ratios(x_TI, power_of_two)
    ratio_TJC.clamp_(-E4M3_MAX, E4M3_MAX)
    # 2²⁰ · 1.5 times a number's power of two, or that of the smallest normal one, 2⁻⁶: added and taken off again, it
    # leaves the three bits of a mantissa, rounded to nearest, half to even.
    power_TJC = (ratio_TJC.view(torch.int32) & 0x7F800000).clamp_(min=(127 - 6) << 23).view(torch.float32)
    power_TJC.mul_(1.5 * 2**20)
    rounded_TJC = ratio_TJC.add_(power_TJC).sub_(power_TJC).mul_(scale_TJ[:, :, None])
    return rounded_TJC.flatten(1)[:, : x_TI.shape[1]]


@torch.library.custom_op("vqcompress::int8_quantize", mutates_args=())
def int8_quantize(x_TI: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 (T, I) and scales float32 (T, 1) of any float x: per-token, symmetric, dynamic.

    scale = max(absmax / 127, 2⁻¹²⁶); code = round(x / scale) clamped to ±127, so −128 never occurs. A zero row gets
    zero codes. A row that holds NaN or Inf gets a scale that is not finite and unspecified codes.
    Source: SmoothQuant, arXiv 2211.10438, equation 1 and section 2 (per-token activation).
    """
    codes_TI, scale_T1 = _int8_rows(x_TI)
    return codes_TI.to(torch.int8).contiguous(), scale_T1


@int8_quantize.register_fake
def _(x_TI: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x_TI, dtype=torch.int8, memory_format=torch.contiguous_format), x_TI.new_empty(
        (x_TI.shape[0], 1), dtype=torch.float32
    )


def _int8_products(codes_TI: Tensor, codes_OI: Tensor) -> Tensor:
    """The sums of `int8_linear`, float32 (T, O). codes_TI: integers as float32."""
    columns = codes_TI.shape[1]
    if BYTE_PRODUCTS and codes_OI.dtype == torch.int8 and columns > 1:
        # torch 2.13 misreads the strides of a single column, and of a single row unless it is a new tensor.
        bytes_TI = torch.empty(codes_TI.shape, dtype=torch.int8).copy_(codes_TI)
        return torch._int_mm(bytes_TI, codes_OI.T).float()
    codes_OI = codes_OI.float()
    if columns <= EXACT_COLUMNS:
        return codes_TI @ codes_OI.T
    # Each chunk is exact in float32; float64 keeps their sum exact, so the only rounding is the last one.
    total_TO = codes_TI.new_zeros((codes_TI.shape[0], codes_OI.shape[0]), dtype=torch.float64)
    for i in range(0, columns, EXACT_COLUMNS):
        total_TO += codes_TI[:, i : i + EXACT_COLUMNS] @ codes_OI[:, i : i + EXACT_COLUMNS].T
    return total_TO.float()


@torch.library.custom_op("vqcompress::int8_linear", mutates_args=())
def int8_linear(x_TI: Tensor, codes_OI: Tensor, scale_O: Tensor, input_scale: Tensor | None) -> Tensor:
    """x Wᵀ, (T, O) in the type of x, for W = codes · scale per row and x rounded to INT8 on the way in.

    codes_OI: integers in ±127, as int8 or as float32 that carries the same integers. scale_O: float32.
    input_scale: None for the per-token scales of `int8_quantize`; else one positive float32 scale () for all of x,
    code = round(x / input_scale) clamped to ±127.
    y = float32(acc) · (scale_x · scale_w), where acc is the exact integer sum, rounded to float32 once; then y is
    rounded to the type of x. I ≤ 131,072, so that acc fits in 32 bits. Bit-exact.
    Source: SmoothQuant, arXiv 2211.10438, section 4 (O1 per token, O3 static per tensor).
    """
    if input_scale is None:
        codes_TI, scale_x = _int8_rows(x_TI)
    else:
        codes_TI = (x_TI.float() / input_scale).round_().clamp_(-INT8_MAX, INT8_MAX)
        # A row with NaN shows in its scale, since no integer can.
        scale_x = input_scale + 0 * codes_TI.sum(1, keepdim=True)
    acc_TO = _int8_products(codes_TI, codes_OI)
    return acc_TO.mul_(scale_x * scale_O).to(x_TI.dtype)


@torch.library.custom_op("vqcompress::fp8_quantize", mutates_args=())
def fp8_quantize(x_TI: Tensor, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """Codes float8_e4m3fn (T, I) and scales float32 (T, J) of any float x, in tiles of 1×128, dynamic.

    scale = max(amax / 448, 2⁻¹²⁶), with `power_of_two` rounded up to a power of two (UE8M0); code = x / scale rounded
    to E4M3, saturating at ±448. The last tile holds the I mod 128 columns that are left. A zero tile gets zero codes;
    no finite x gives a NaN; NaN and Inf give NaN codes. Bit-exact.
    Source: DeepSeek-V3, arXiv 2412.19437, section 3.3.2 (fine-grained quantization).
    """
    codes_TI, scale_TJ = _fp8_tiles(x_TI, power_of_two)
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
    codes_TI, scale_TJ = _fp8_tiles(x_TI, power_of_two)
    rows, columns = codes_OI.shape
    codes_TI, codes_OI = codes_TI.float(), codes_OI.float()
    scale_JO = scale_PJ.T.repeat_interleave(TILE, 1)[:, :rows]
    y_TO = torch.zeros((len(x_TI), rows), dtype=torch.float32, device=x_TI.device)
    for j, at in enumerate(range(0, columns, TILE)):
        end = min(at + TILE, columns)
        y_TO += (codes_TI[:, at:end] @ codes_OI[:, at:end].T).mul_(scale_TJ[:, j : j + 1]).mul_(scale_JO[j])
    return y_TO.to(x_TI.dtype)


def by_expert(x_SI: Tensor, ends_E: Tensor, outputs: int, linear: Callable[[Tensor, int], Tensor]) -> Tensor:
    """linear(rows, e) of the rows of every expert, (S, O); zeros behind the last expert's."""
    y_SO, start = x_SI.new_zeros((len(x_SI), outputs)), 0
    for e, end in enumerate(ends_E.tolist()):
        if end > start:
            y_SO[start:end] = linear(x_SI[start:end], e)
        start = end
    return y_SO


@torch.library.custom_op("vqcompress::int8_grouped", mutates_args=())
def int8_grouped(x_SI: Tensor, ends_E: Tensor, codes_EOI: Tensor, scale_EO: Tensor) -> Tensor:
    """`int8_linear` with per-token scales of every expert's rows with its codes and scales, (S, O).

    What rows behind the last expert's get is not specified.
    """
    return by_expert(
        x_SI, ends_E, codes_EOI.shape[1], lambda x_TI, e: int8_linear(x_TI, codes_EOI[e], scale_EO[e], None)
    )


@torch.library.custom_op("vqcompress::fp8_grouped", mutates_args=())
def fp8_grouped(x_SI: Tensor, ends_E: Tensor, codes_EOI: Tensor, scale_EPJ: Tensor, power_of_two: bool) -> Tensor:
    """`fp8_linear` of every expert's rows with its codes and scales, (S, O).

    What rows behind the last expert's get is not specified.
    """
    return by_expert(
        x_SI, ends_E, codes_EOI.shape[1], lambda x_TI, e: fp8_linear(x_TI, codes_EOI[e], scale_EPJ[e], power_of_two)
    )


@int8_linear.register_fake
@fp8_linear.register_fake
def _(x_TI: Tensor, codes_OI: Tensor, *_: Any) -> Tensor:
    return x_TI.new_empty((x_TI.shape[0], codes_OI.shape[0]))


@int8_grouped.register_fake
@fp8_grouped.register_fake
def _(x_SI: Tensor, ends_E: Tensor, codes_EOI: Tensor, *_: Any) -> Tensor:
    return x_SI.new_empty((x_SI.shape[0], codes_EOI.shape[1]))


def _kernel(module: str, function: str) -> Callable[..., Any]:
    """What a GPU runs, imported when first called: Triton takes a while, and is not everywhere."""
    return lambda *arguments: getattr(import_module(f"vqcompress.methods.{module}.kernel"), function)(*arguments)


for _operator, _module, _function in (
    (int8_quantize, "int8", "quantize"),
    (int8_linear, "int8", "linear"),
    (int8_grouped, "int8", "grouped"),
    (fp8_quantize, "fp8", "quantize"),
    (fp8_linear, "fp8", "linear"),
    (fp8_grouped, "fp8", "grouped"),
):
    _operator.register_kernel("cuda")(_kernel(_module, _function))
