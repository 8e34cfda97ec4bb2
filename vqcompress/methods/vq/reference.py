"""x Wᵀ for a weight of codes, as a torch operator whose body is its meaning; a GPU runs the kernels in its place.

Shape legend: T rows of x, O outputs, I inputs, E experts, K entries of a table.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vqcompress.methods.base import by_expert, expert_of
from vqcompress.methods.hadamard import hadamard
from vqcompress.methods.packing import unpack
from vqcompress.methods.rotation import unpack_signs
from vqcompress.methods.triton import launch
from vqcompress.methods.vq import bitshift
from vqcompress.methods.vq.format import Format
from vqcompress.methods.vq.learned import sum_entries


def values(codes: Tensor, table: Tensor, form: Format, shape: tuple[int, int]) -> Tensor:
    """The float32 (O, I) values of stored codes, before scales and rotation. table: learned entries."""
    codes = unpack(codes, form.bits, form.stream(shape)[1])
    if not form.by_rows:
        return bitshift.decode(codes, form.bits, form.depth).T[: shape[0]]
    return sum_entries(codes.view(shape[0], -1, form.depth), table.view(form.depth, -1, form.d))[:, : shape[1]]


def reference(
    x_TI: Tensor, codes: Tensor, table: Tensor, scale_O: Tensor, signs: Tensor | None, form: Format
) -> Tensor:
    """`vq_linear` without experts, in plain torch on any device; differentiable in x."""
    shape = (len(scale_O), x_TI.shape[1])
    value_OI = values(codes, table, form, shape)
    x = x_TI.float()
    if signs is not None:
        x = hadamard(x * unpack_signs(signs, shape[1]))
    y_TO = x @ value_OI.T
    if signs is not None:
        y_TO = hadamard(y_TO)
    return (y_TO * scale_O.float()).to(x_TI.dtype)


@torch.library.custom_op("vqcompress::vq_linear", mutates_args=())
def vq_linear(
    x_TI: Tensor,
    codes: Tensor,
    table: Tensor,
    scale: Tensor,
    signs: Tensor | None,
    form: str,
    ends_E: Tensor | None = None,
) -> Tensor:
    """x Wᵀ, (T, O) in the type of x, for W = diag(scale) · V, with signs diag(scale) · H · V · H · diag(signs).

    V (O, I) are the values of the codes, in float32; H is the orthonormal block Hadamard transform (see `hadamard`).
    codes: as stored. table: float32, the entries of learned codebooks; one zero for a trellis. scale: bfloat16 (O,).
    signs: packed bits (1, ·), a set one is −1. form: the name of a `Format`. Sums are float32; a kernel may round x H
    and V to the type of x first, and the order of additions is free.

    ends_E: for experts, whose codes, table, scale and signs are stacked (E, …), while x is sorted by expert: int32,
    where the rows of each one end. What rows behind the last get is not specified.
    """
    if ends_E is None:
        return reference(x_TI, codes, table, scale, signs, Format.parse(form))

    def linear(rows_TI: Tensor, e: int) -> Tensor:
        own = None if signs is None else signs[e]
        return reference(rows_TI, codes[e], table[e], scale[e], own, Format.parse(form))

    return by_expert(x_TI, ends_E, scale.shape[1], linear)


@vq_linear.register_fake
def _(x_TI: Tensor, codes: Tensor, table: Tensor, scale: Tensor, *_: Any) -> Tensor:
    return x_TI.new_empty((x_TI.shape[0], scale.shape[-1]))


@vq_linear.register_kernel("cuda")
def on_gpu(
    x_TI: Tensor,
    codes: Tensor,
    table: Tensor,
    scale: Tensor,
    signs: Tensor | None,
    form: str,
    ends_E: Tensor | None = None,
    route: str = "",
) -> Tensor:
    """`vq_linear` by the kernels. route: `fused`, decoded tile by tile, or `dequantize`, once and then dense.

    Without a measurement up to 64 rows are fused; above, every tile of x would decode the weight once more. Experts are
    fused in one launch.
    """
    from vqcompress.methods.triton.rotate import finish, rotate
    from vqcompress.methods.vq.kernel_dequantize import dequantize
    from vqcompress.methods.vq.kernel_multiply import multiply

    kind, rows, shape, expert_T = Format.parse(form), len(x_TI), (scale.shape[-1], x_TI.shape[1]), None
    if ends_E is not None:
        # What rows behind the last expert's get is not specified.
        expert_T = expert_of(ends_E, rows)
        route = "fused"
    default = {"route": "fused" if rows <= 64 else "dequantize"}
    route = route or launch.get_config(f"vq.route.{form}", x_TI.device, rows, shape, lambda gpu: default)["route"]
    if signs is not None:
        x_TI = rotate(x_TI, signs.flatten(0, -2), expert_T)
    if route == "fused":
        sums_STO = multiply(x_TI, codes, table, shape[0], kind, ends_E)
    else:
        value_IO = dequantize(codes, table, shape, kind, x_TI.dtype).T
        short = x_TI.is_cuda and x_TI.dtype != torch.float32
        # Before the scales a sum may be more than float16 holds.
        sums_STO = (torch.mm(x_TI, value_IO, out_dtype=torch.float32) if short else x_TI @ value_IO)[None]
    return finish(sums_STO, scale, x_TI.dtype, signs is not None, expert_T)
