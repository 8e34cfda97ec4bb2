"""The orthonormal block Walsh–Hadamard transform, and random signs for it.

With random signs before it, it spreads what is large in one channel over all channels of its block, and no literal
matrix is stored: n = m·b channels are m blocks of b, the largest power of two that divides n, and the b × b matrix is
Sylvester's (QuIP#, arXiv 2402.04396, section 3; QuaRot, arXiv 2404.00456, section 3).
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

# Up to here one matrix product is faster than butterflies; a larger block is a Kronecker product of two.
WHOLE = 256


def block_size(n: int) -> int:
    """The largest power of two that divides n."""
    return n & -n


@cache
def _sylvester(b: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The b × b matrix of ±1, b a power of two: entry (i, j) is −1 to the number of bits that i and j share."""
    # What is first made inside of `generate` could otherwise never meet autograd.
    with torch.inference_mode(False), torch.no_grad():
        matrix = torch.ones(1, 1, dtype=dtype, device=device)
        while len(matrix) < b:
            matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
        return matrix


def _transform(x: Tensor) -> Tensor:
    """x (…, b) times Sylvester's matrix."""
    b = x.shape[-1]
    if b <= WHOLE:
        return x @ _sylvester(b, x.dtype, x.device)
    x = _transform(x.unflatten(-1, (b // WHOLE, WHOLE)))
    return _transform(x.transpose(-1, -2)).transpose(-1, -2).flatten(-2)


def hadamard(x: Tensor, dim: int = -1) -> Tensor:
    """x times blockdiag(Hadamard_b)/√b along an axis of n = m·b, in the type and on the device of x.

    The matrix is orthonormal and symmetric, so the transform is its own inverse. n odd: x itself.
    """
    n = x.shape[dim]
    b = block_size(n)
    if b == 1:
        return x
    blocks = x.movedim(dim, -1).unflatten(-1, (n // b, b))
    return (_transform(blocks) * b**-0.5).flatten(-2).movedim(-1, dim)


def random_signs(n: int, generator: torch.Generator) -> Tensor:
    """n numbers ±1, (n,) float32 on the CPU, that depend on the generator only."""
    return torch.randint(0, 2, (n,), generator=generator).float() * 2 - 1
