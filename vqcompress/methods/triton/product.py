"""The launcher of products of quantized activations with quantized weights, shared by INT8 and FP8.

Activations are quantized, `multiply` computes tiles of y, and where the inputs are split over several programs
`_finish` adds their partial sums. Shape legend: T tokens, E experts, O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqcompress.methods.triton import launch
from vqcompress.methods.triton.launch import Config, DeviceProperties
from vqcompress.methods.triton.tiles import padded_experts, tiles_of

# Outputs of a row that a program of `_finish` writes.
FINISHED = 512
Quantize = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Product:
    """The parts of a method's product.

    name: in launch tables. multiply: the kernel. sums: type of partial sums; int32 ones are scaled by `_finish`.
    default_config: (device, rows, outputs, inputs) → config.
    """

    name: str
    multiply: Any
    sums: torch.dtype
    default_config: Callable[[DeviceProperties, int, int, int], Config]


@triton.jit(do_not_specialize=["tokens"])
def _finish(sums, scale_T, scale_O, y_TO, tokens, outputs, BLOCK: tl.constexpr, SPLIT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Part of a row of y from SPLIT partial sums (SPLIT, T, O), added in order and scaled if scales are given."""
    t = tl.program_id(0).to(tl.int64)
    o_B = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    has_B = o_B < outputs
    acc_B = tl.zeros((BLOCK,), sums.dtype.element_ty)
    for s in tl.static_range(SPLIT):
        acc_B += tl.load(sums + (s * tokens.to(tl.int64) + t) * outputs + o_B, mask=has_B, other=0)
    y_B = acc_B.to(tl.float32)
    if scale_T is not None:
        y_B *= tl.load(scale_T + t) * tl.load(scale_O + o_B, mask=has_B, other=0.0)
    tl.store(y_TO + t * outputs + o_B, y_B.to(y_TO.dtype.element_ty), mask=has_B)


def multiply(
    product: Product, x_TI: Tensor, ends_E: Tensor | None, codes: Tensor, scale: Tensor, quantize: Quantize
) -> Tensor:
    """x Wᵀ, (T, O) in the type of x.

    codes: one-byte codes (O, I), or (E, O, I) with ends_E (E,) int32, the end of each expert's rows. scale: of the
    codes, float32. quantize: x → its codes and scales.
    """
    (tokens, inputs), outputs, experts = x_TI.shape, codes.shape[-2], 0 if ends_E is None else len(ends_E)
    y_TO = x_TI.new_empty((tokens, outputs))
    if not tokens:
        return y_TO
    name, shape = (".grouped", (experts, outputs, inputs)) if experts else (".linear", (outputs, inputs))
    # The default depends on the average number of rows of an expert.
    rows = triton.cdiv(tokens, max(1, experts))
    default = lambda gpu: product.default_config(gpu, rows, outputs, inputs)  # noqa: E731
    config = dict(launch.get_config(product.name + name, x_TI.device, tokens, shape, default))
    split = config["SPLIT"] = 1 if experts else config["SPLIT"]
    codes_TI, scale_x = quantize(x_TI)
    if codes_TI.dtype == torch.float16:
        # The matrix units have no E4M3: the kernel reads the bytes of the codes and converts them to float16.
        codes = codes.view(torch.int8)
    out = y_TO if split == 1 else x_TI.new_empty((split, tokens, outputs), dtype=product.sums)
    tensors = (codes_TI, scale_x, codes.contiguous(), scale.contiguous(), ends_E, out)
    grid = (tiles_of(tokens, config["BLOCK_T"], experts) * triton.cdiv(outputs, config["BLOCK_O"]), split)
    launch.run(product.multiply, grid, *tensors, tokens, outputs, inputs, EXPERTS=padded_experts(experts), **config)
    if split > 1:
        grid = (tokens, triton.cdiv(outputs, FINISHED))
        scales = (scale_x, scale) if product.sums == torch.int32 else (None, None)
        constants = {"BLOCK": FINISHED, "SPLIT": split, "enable_fp_fusion": False}
        launch.run(_finish, grid, out, *scales, y_TO, tokens, outputs, **constants)
    return y_TO
