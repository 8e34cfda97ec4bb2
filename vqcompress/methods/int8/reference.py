"""The INT8 operator; its body defines the result to the last bit, and the CUDA kernels return the same bits.

All arithmetic is float32 whatever the type of x, division is division (never a multiplication by the reciprocal), and
rounding is to nearest, half to even. `torch.library.custom_op` lets `torch.compile`, fake tensors and `opcheck` see it.

Shape legend: T tokens, E experts, O output rows, I input columns.
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


def int8_quantize(x_TI: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, integers as float32 (T, I), and scales float32 (T, 1) of any float x: per row, symmetric, dynamic.

    scale = max(absmax / 127, 2⁻¹²⁶); code = round(x / scale) clamped to ±127, so −128 never occurs. A zero row gets
    zero codes. A row that holds NaN or Inf gets a scale that is not finite and unspecified codes.
    Source: SmoothQuant, arXiv 2211.10438, equation 1 and section 2 (per-token activation).
    """
    x_TI = x_TI.float()
    scale_T1 = (x_TI.abs().amax(1, keepdim=True) / INT8_MAX).clamp_min_(SCALE_MIN)
    return to_int8(x_TI / scale_T1), scale_T1


def to_int8(ratio: Tensor) -> Tensor:
    """The nearest integer within ±127, half to even, as a float; overwrites the ratio."""
    return ratio.round_().clamp_(-INT8_MAX, INT8_MAX)


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
def int8_linear(
    x_TI: Tensor, codes: Tensor, scale: Tensor, input_scale: Tensor | None = None, ends_E: Tensor | None = None
) -> Tensor:
    """x Wᵀ, (T, O) in the type of x, for W = codes · scale per row and x rounded to INT8 on the way in.

    codes: (O, I) integers in ±127, as int8 or as float32 that carries the same integers. scale: float32 (O,).
    input_scale: None for the per-token scales of `int8_quantize`; else one positive float32 scale () for all of x,
    code = round(x / input_scale) clamped to ±127.
    ends_E: int32; then codes (E, O, I) and scale (E, O) are of experts, the rows of x are sorted by expert, and the
    rows of each end here. Rows behind the last expert's get unspecified results.
    y = float32(acc) · (scale_x · scale_w), where acc is the exact integer sum, rounded to float32 once; then y is
    rounded to the type of x. I ≤ 131,072, so that acc fits in 32 bits. Bit-exact.
    Source: SmoothQuant, arXiv 2211.10438, section 4 (O1 per token, O3 static per tensor).
    """
    if ends_E is not None:
        return by_expert(
            x_TI, ends_E, codes.shape[1], lambda rows_TI, e: int8_linear(rows_TI, codes[e], scale[e], input_scale)
        )
    if input_scale is None:
        codes_TI, scale_x = int8_quantize(x_TI)
    else:
        codes_TI = to_int8(x_TI.float() / input_scale)
        # A row with NaN shows in its scale, since no integer can.
        scale_x = input_scale + 0 * codes_TI.sum(1, keepdim=True)
    return _products(codes_TI, codes).mul_(scale_x * scale).to(x_TI.dtype)


@int8_linear.register_fake
def _(x_TI: Tensor, codes: Tensor, *_: Any, **__: Any) -> Tensor:
    return x_TI.new_empty((x_TI.shape[0], codes.shape[-2]))


@int8_linear.register_kernel("cuda")
def _(*arguments: Any, **options: Any) -> Tensor:
    # Triton is imported when a kernel first runs: that takes a while, and it is not installed everywhere.
    from vqcompress.methods.int8 import kernel

    return kernel.linear(*arguments, **options)
