"""INT8 operators; the body of each defines its result to the last bit, and the CUDA kernels return the same bits.

All arithmetic is float32 whatever the type of x, division is division (never a multiplication by the reciprocal), and
rounding is to nearest, half to even. Registering `torch.library.custom_op`s lets `torch.compile`, fake tensors and
`opcheck` see them.

Shape legend: T tokens, S rows sorted by expert, E experts, O output rows, I input columns.
"""

from typing import Any

import torch
from torch import Tensor

from vqcompress.methods.base import by_expert

INT8_MAX = 127.0
# The smallest normal float32. A scale is never below it, so zero and subnormal rows divide safely and round to zero.
SCALE_MIN = 2.0**-126
# Columns whose int8 products add up exactly in float32: 1024 · 127² < 2²⁴.
EXACT_COLUMNS = 1024
# Whether this CPU adds products of bytes up in 32 bits. Without VNNI oneDNN does so in 16, where they saturate.
BYTE_PRODUCTS = torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported()


def _rows(x_TI: Tensor) -> tuple[Tensor, Tensor]:
    """The codes of `int8_quantize` still as float32, and its scales."""
    x_TI = x_TI.float()
    scale_T1 = (x_TI.abs().amax(1, keepdim=True) / INT8_MAX).clamp_min_(SCALE_MIN)
    return (x_TI / scale_T1).round_().clamp_(-INT8_MAX, INT8_MAX), scale_T1


@torch.library.custom_op("vqcompress::int8_quantize", mutates_args=())
def int8_quantize(x_TI: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 (T, I) and scales float32 (T, 1) of any float x: per-token, symmetric, dynamic.

    scale = max(absmax / 127, 2⁻¹²⁶); code = round(x / scale) clamped to ±127, so −128 never occurs. A zero row gets
    zero codes. A row that holds NaN or Inf gets a scale that is not finite and unspecified codes.
    Source: SmoothQuant, arXiv 2211.10438, equation 1 and section 2 (per-token activation).
    """
    codes_TI, scale_T1 = _rows(x_TI)
    return codes_TI.to(torch.int8).contiguous(), scale_T1


@int8_quantize.register_fake
def _(x_TI: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x_TI, dtype=torch.int8, memory_format=torch.contiguous_format), x_TI.new_empty(
        (x_TI.shape[0], 1), dtype=torch.float32
    )


def _products(codes_TI: Tensor, codes_OI: Tensor) -> Tensor:
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
        codes_TI, scale_x = _rows(x_TI)
    else:
        codes_TI = (x_TI.float() / input_scale).round_().clamp_(-INT8_MAX, INT8_MAX)
        # A row with NaN shows in its scale, since no integer can.
        scale_x = input_scale + 0 * codes_TI.sum(1, keepdim=True)
    acc_TO = _products(codes_TI, codes_OI)
    return acc_TO.mul_(scale_x * scale_O).to(x_TI.dtype)


@torch.library.custom_op("vqcompress::int8_grouped", mutates_args=())
def int8_grouped(x_SI: Tensor, ends_E: Tensor, codes_EOI: Tensor, scale_EO: Tensor) -> Tensor:
    """`int8_linear` with per-token scales of every expert's rows with its codes and scales, (S, O).

    What rows behind the last expert's get is not specified.
    """
    return by_expert(
        x_SI, ends_E, codes_EOI.shape[1], lambda x_TI, e: int8_linear(x_TI, codes_EOI[e], scale_EO[e], None)
    )


@int8_linear.register_fake
def _(x_TI: Tensor, codes_OI: Tensor, *_: Any) -> Tensor:
    return x_TI.new_empty((x_TI.shape[0], codes_OI.shape[0]))


@int8_grouped.register_fake
def _(x_SI: Tensor, ends_E: Tensor, codes_EOI: Tensor, *_: Any) -> Tensor:
    return x_SI.new_empty((x_SI.shape[0], codes_EOI.shape[1]))


# Triton is imported when a kernel first runs: it takes a while, and is not installed everywhere.


@int8_quantize.register_kernel("cuda")
def _(x_TI: Tensor) -> tuple[Tensor, Tensor]:
    from vqcompress.methods.int8 import kernel

    return kernel.quantize(x_TI)


@int8_linear.register_kernel("cuda")
def _(x_TI: Tensor, codes_OI: Tensor, scale_O: Tensor, input_scale: Tensor | None) -> Tensor:
    from vqcompress.methods.int8 import kernel

    return kernel.linear(x_TI, codes_OI, scale_O, input_scale)


@int8_grouped.register_kernel("cuda")
def _(x_SI: Tensor, ends_E: Tensor, codes_EOI: Tensor, scale_EO: Tensor) -> Tensor:
    from vqcompress.methods.int8 import kernel

    return kernel.grouped(x_SI, ends_E, codes_EOI, scale_EO)
