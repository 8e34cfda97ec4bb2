"""Codebooks of 256 entries for the unit Gaussian, which rotated and scaled keys and values look like.

They ship with the package, so that a cache needs no calibration. scripts/train_codebooks.py made the file: int16
entries in steps of 2⁻¹², size after size, most used entry first.
"""

from __future__ import annotations

import pkgutil
from functools import cache

import torch
from torch import Tensor

FILE = "gaussian.bin"
STEP = 2.0**-12
ENTRIES = 256
# Dimensions of the codebooks in the file, in its order: 1, 2 and 4 bits per channel.
DIMENSIONS = (8, 4, 2)


@cache
def entries(d: int) -> Tensor:
    """The codebook of vectors of length d, (256, d) float32. ValueError for another length than 8, 4 or 2."""
    if d not in DIMENSIONS:
        raise ValueError(f"there is no Gaussian codebook for d {d}; there are d {', '.join(map(str, DIMENSIONS))}")
    start = ENTRIES * sum(DIMENSIONS[: DIMENSIONS.index(d)])
    data = pkgutil.get_data(__name__.rpartition(".")[0], FILE)
    assert data is not None
    with torch.inference_mode(False):
        integers = torch.frombuffer(bytearray(data), dtype=torch.int16)
        return integers[start : start + ENTRIES * d].view(-1, d).float() * STEP
