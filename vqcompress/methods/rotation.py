"""The rotation of an input at run time, H · diag(signs) · x, as a torch operator; a GPU runs the kernel in its place.

Shape legend: T tokens, E experts, I input columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vqcompress.methods.hadamard import hadamard, random_signs
from vqcompress.methods.packing import pack, unpack
from vqcompress.methods.statistics import Statistics


@torch.library.custom_op("vqcompress::rotate", mutates_args=())
def rotate(x_TI: Tensor, signs: Tensor, expert_T: Tensor | None = None) -> Tensor:
    """H(x · signs), (T, I) in the type of x; computed in float32 and rounded once.

    signs: packed bits (1, ·), a set one is −1; of experts (E, 1, ·), and expert_T, int32, says which of them a row has.
    H is the orthonormal block Hadamard transform (QuIP#, arXiv 2402.04396, section 3).
    """
    signs_EI = unpack_signs(signs.flatten(0, -2), x_TI.shape[1])
    return hadamard(x_TI.float() * (signs_EI if expert_T is None else signs_EI[expert_T])).to(x_TI.dtype)


@rotate.register_fake
def _(x_TI: Tensor, signs: Tensor, expert_T: Tensor | None = None) -> Tensor:
    return torch.empty_like(x_TI)


@rotate.register_kernel("cuda")
def _(x_TI: Tensor, signs: Tensor, expert_T: Tensor | None = None) -> Tensor:
    # Triton is imported when a kernel first runs: that takes a while, and it is not installed everywhere.
    from vqcompress.methods.triton import rotate as kernel

    return kernel.rotate(x_TI, signs.flatten(0, -2), expert_T)


def unpack_signs(signs_EB: Tensor, columns: int) -> Tensor:
    """The packed signs as ±1, float32 (E, I)."""
    return 1.0 - 2.0 * unpack(signs_EB, 1, columns)


def pack_signs(signs_I: Tensor) -> Tensor:
    """Signs ±1 (I,) as they are stored, uint8 (1, packed_width(I, 1))."""
    return pack((signs_I[None] < 0).int(), 1)


def signs_of_input(columns: int, statistics: Statistics, generator: torch.Generator) -> Tensor:
    """Random signs ±1 (I,): by the seed of the input, so that its readers have the same, or else by the generator."""
    return random_signs(
        columns, generator if statistics.seed is None else torch.Generator().manual_seed(statistics.seed)
    )
