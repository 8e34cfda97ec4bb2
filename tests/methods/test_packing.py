"""The bit stream of `packing`: what goes in comes out, and the bits lie where the docstring says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vqcompress.methods.packing import pack, packed_width, unpack


def stream(codes: list[int], bits: int) -> bytes:
    """A row by the definition: one large number, the first code in its lowest bits."""
    number = sum(code << (bits * n) for n, code in enumerate(codes))
    return number.to_bytes(-(-len(codes) * bits // 8), "little")


@settings(deadline=None, max_examples=100)
@given(bits=st.integers(1, 16), rows=st.integers(0, 4), count=st.integers(0, 70), seed=st.integers(0, 9))
def test_round_trip_and_place_of_every_bit(bits: int, rows: int, count: int, seed: int) -> None:
    codes_RN = torch.randint(0, 1 << bits, (rows, count), generator=torch.Generator().manual_seed(seed))
    packed_RB = pack(codes_RN, bits)
    assert packed_RB.dtype == torch.uint8
    assert packed_RB.shape == (rows, packed_width(count, bits))
    assert [bytes(row) for row in packed_RB.tolist()] == [stream(row, bits) for row in codes_RN.tolist()]
    unpacked_RN = unpack(packed_RB, bits, count)
    assert unpacked_RN.dtype == torch.int32
    assert torch.equal(unpacked_RN, codes_RN.int())


@pytest.mark.parametrize("bits", [1, 5, 8, 16])
def test_extreme_codes_and_strided_input(bits: int) -> None:
    codes_NR = torch.full((13, 3), (1 << bits) - 1, dtype=torch.int32)
    codes_NR[::2] = 0
    packed_RB = pack(codes_NR.T, bits)
    assert packed_RB.is_contiguous()
    assert torch.equal(unpack(packed_RB, bits, 13), codes_NR.T)
