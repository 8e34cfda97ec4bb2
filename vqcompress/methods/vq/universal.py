"""Universal codebooks: trained once on the unit Gaussian, which is what rotated weights look like, and shipped.

They cost no bits of an artifact, need no k-means, and are the same for all layers, so that they stay in a cache.
scripts/train_codebooks.py made the file: int16 entries in steps of 2⁻¹², size after size, hottest entry first.

The d weights of a vector are neighbours in a column, so that the error feedback can go column by column.
Shape legend: O output rows, d vector length, K entries, V = ceil(O / d) vectors of a column.
"""

from __future__ import annotations

import pkgutil
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from vqcompress.methods.vq.learned import nearest

FILE = "gaussian.bin"
STEP = 2.0**-12
# (d, bits) of what the file holds, in its order: 1, 2, 3, 4, 5 and 6 bits per weight.
SIZES = ((8, 8), (4, 8), (2, 6), (2, 8), (1, 5), (1, 6))


@cache
def entries(d: int, bits: int) -> Tensor:
    """The codebook VQ<d, bits, 1> of the unit Gaussian, (2**bits, d) float32. ValueError for a size without one."""
    if (d, bits) not in SIZES:
        known = ", ".join(f"d {d} with bits {b}" for d, b in SIZES)
        raise ValueError(f"there is no universal codebook for d {d} and bits {bits}; there are {known}")
    before = SIZES[: SIZES.index((d, bits))]
    data = pkgutil.get_data(__name__.rpartition(".")[0], FILE)
    assert data is not None
    with torch.inference_mode(False):
        integers = torch.frombuffer(bytearray(data), dtype=torch.int16)
        start, count = sum(d << bits for d, bits in before), d << bits
        return integers[start : start + count].view(-1, d).float() * STEP


class Universal:
    """The quantizer: a column at a time, d rows a vector. book_Kd: what `entries` gives."""

    d = 1

    def __init__(self, book_Kd: Tensor):
        self.book_Kd = book_Kd

    def nearest(self, target_O1: Tensor, block_11: Tensor) -> tuple[Tensor, Tensor]:
        """Codes (V,) and values (O, 1) of the entries nearest to a column of unit variance."""
        rows, d = len(target_O1), self.book_Kd.shape[1]
        x_Vd = pad((target_O1 / block_11)[:, 0], (0, -rows % d)).view(-1, d)
        code_V = nearest(x_Vd, self.book_Kd[None], 1)[:, 0]
        return code_V, self.book_Kd[code_V].flatten()[:rows, None]
