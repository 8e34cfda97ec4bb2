"""x Wᵀ for a weight of words, as a torch operator whose body is its meaning; a GPU runs the kernels in its place.

Shape legend: T rows of x, O outputs, I inputs, K entries of a table.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vqcompress.methods.base import by_expert
from vqcompress.methods.hadamard import hadamard
from vqcompress.methods.triton import launch
from vqcompress.methods.vq import bitshift
from vqcompress.methods.vq.format import Format
from vqcompress.methods.vq.learned import sum_entries
from vqcompress.methods.vq.packing import unpack


def values(codes: Tensor, table: Tensor, form: Format, shape: tuple[int, int]) -> Tensor:
    """The float32 (O, I) values of stored codes, before scales and rotation. table: learned entries."""
    rows, columns = shape
    if form.family == "trellis":
        codes_IC = unpack(codes, form.bits, bitshift.padded(rows))
        return bitshift.decode(codes_IC, form.bits, form.depth).T[:rows]
    codes_OC = unpack(codes, form.bits, form.units(shape) * form.depth)
    entries_RKd = table.view(form.depth, -1, form.d)
    return sum_entries(codes_OC.view(rows, -1, form.depth), entries_RKd)[:, :columns]


def reference(
    x_TI: Tensor, codes: Tensor, table: Tensor, scale_O: Tensor, signs: Tensor | None, form: Format
) -> Tensor:
    """What `vq_linear` means, in plain torch on any device; differentiable in x."""
    shape = (len(scale_O), x_TI.shape[1])
    value_OI = values(codes, table, form, shape)
    x = x_TI.float()
    if signs is not None:
        x = hadamard(x * (1.0 - 2.0 * unpack(signs, 1, shape[1])))
    y_TO = x @ value_OI.T
    if signs is not None:
        y_TO = hadamard(y_TO)
    return (y_TO * scale_O.float()).to(x_TI.dtype)


@torch.library.custom_op("vqcompress::vq_linear", mutates_args=())
def vq_linear(
    x_TI: Tensor,
    codes: Tensor,
    table: Tensor,
    scale_O: Tensor,
    signs: Tensor | None,
    family: str,
    d: int,
    bits: int,
    depth: int,
) -> Tensor:
    """x Wᵀ, (T, O) in the type of x, for W = diag(scale) · V, with signs diag(scale) · H · V · H · diag(signs).

    V (O, I) are the values of the codes, in float32; H is the orthonormal block Hadamard transform (see `hadamard`).
    codes: as stored. table: float32, the entries of learned codebooks; one zero for a trellis. scale_O: bfloat16.
    signs: packed bits (1, ·), a set one is −1. family, d, bits, depth: see `Format`. Sums are float32; a kernel may
    round x H and V to the type of x first, and the order of additions is free.
    """
    return reference(x_TI, codes, table, scale_O, signs, Format(family, d, bits, depth))


@vq_linear.register_fake
def _(x_TI: Tensor, codes: Tensor, table: Tensor, scale_O: Tensor, *_: Any) -> Tensor:
    return x_TI.new_empty((x_TI.shape[0], scale_O.shape[0]))


def path(form: Format, device: torch.device, rows: int, shape: tuple[int, int]) -> str:
    """How a GPU multiplies x (rows, I): `fused` (decoded tile by tile), `lut_gemv` or `dequantize`, then dense.

    Without a measurement up to 64 rows are fused; above, every tile of x would decode the weight once more.
    """
    default = {"path": "fused" if rows <= 64 else "dequantize"}
    return str(launch.get_config(f"vq.path.{form.name}", device, rows, shape, lambda gpu: default)["path"])


@vq_linear.register_kernel("cuda")
def _(x_TI: Tensor, codes: Tensor, table: Tensor, scale_O: Tensor, signs: Tensor | None, *form: Any) -> Tensor:
    return on_gpu(x_TI, codes, table, scale_O, signs, Format(*form))


def on_gpu(
    x_TI: Tensor, codes: Tensor, table: Tensor, scale_O: Tensor, signs: Tensor | None, form: Format, way: str = ""
) -> Tensor:
    """`vq_linear` by the kernels. way: a `path`, in place of the measured one."""
    from vqcompress.methods.vq.kernel_dequantize import dequantize
    from vqcompress.methods.vq.kernel_gemm import gemm
    from vqcompress.methods.vq.kernel_gemv import gemv, lut_gemv
    from vqcompress.methods.vq.kernel_rotate import finish, rotate

    shape = (len(scale_O), x_TI.shape[1])
    way = way or path(form, x_TI.device, len(x_TI), shape)
    if signs is not None:
        x_TI = rotate(x_TI, signs)
    if way == "dequantize":
        value_IO = dequantize(codes, table, shape, form, x_TI.dtype).T
        short = x_TI.is_cuda and x_TI.dtype != torch.float32
        # Before the scales a sum may be more than float16 holds.
        sums_STO = (torch.mm(x_TI, value_IO, out_dtype=torch.float32) if short else x_TI @ value_IO)[None]
    else:
        multiply = lut_gemv if way == "lut_gemv" else gemv if len(x_TI) == 1 else gemm
        sums_STO = multiply(x_TI, codes, table, shape[0], form)
    return finish(sums_STO, scale_O, x_TI.dtype, signs is not None)


@torch.library.custom_op("vqcompress::vq_grouped", mutates_args=())
def vq_grouped(
    x_SI: Tensor,
    ends_E: Tensor,
    codes: Tensor,
    table: Tensor,
    scale_EO: Tensor,
    signs: Tensor | None,
    family: str,
    d: int,
    bits: int,
    depth: int,
) -> Tensor:
    """`vq_linear` of every expert's rows with its codes, table, scale and signs, each stacked (E, …): (S, O).

    x_SI: sorted by expert. ends_E: int32, where the rows of each one end. What rows behind the last get is not
    specified.
    """

    def linear(x_TI: Tensor, e: int) -> Tensor:
        own = None if signs is None else signs[e]
        y_TO: Tensor = vq_linear(x_TI, codes[e], table[e], scale_EO[e], own, family, d, bits, depth)
        return y_TO

    return by_expert(x_SI, ends_E, scale_EO.shape[1], linear)


@vq_grouped.register_fake
def _(x_SI: Tensor, ends_E: Tensor, codes: Tensor, table: Tensor, scale_EO: Tensor, *_: Any) -> Tensor:
    return x_SI.new_empty((x_SI.shape[0], scale_EO.shape[1]))


@vq_grouped.register_kernel("cuda")
def _(
    x_SI: Tensor, ends_E: Tensor, codes: Tensor, table: Tensor, scale: Tensor, signs: Tensor | None, *form: Any
) -> Tensor:
    return grouped_on_gpu(x_SI, ends_E, codes, table, scale, signs, Format(*form))


def grouped_on_gpu(
    x_SI: Tensor, ends_E: Tensor, codes: Tensor, table: Tensor, scale_EO: Tensor, signs: Tensor | None, form: Format
) -> Tensor:
    """`vq_grouped` by the kernels: tiles of all experts are decoded and multiplied in one launch."""
    from vqcompress.methods.vq.kernel_gemm import gemm
    from vqcompress.methods.vq.kernel_rotate import finish, rotate

    row_S = torch.arange(len(x_SI), device=x_SI.device, dtype=torch.int32)
    # Rows behind the last expert's count as its own here; their results are not specified.
    expert_S = torch.searchsorted(ends_E, row_S, right=True, out_int32=True).clamp(max=len(ends_E) - 1)
    if signs is not None:
        x_SI = rotate(x_SI, signs[:, 0], expert_T=expert_S)
    sums_sSO = gemm(x_SI, codes, table, scale_EO.shape[1], form, ends_E)
    return finish(sums_sSO, scale_EO, x_SI.dtype, signs is not None, expert_T=expert_S)
