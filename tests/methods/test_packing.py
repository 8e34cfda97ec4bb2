"""The bit stream of `packing`: what goes in comes out, and the bits lie where the docstring says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vqcompress.methods.vq.packing import MAX_BITS, check_padding, pack, packed_width, unpack


def random_codes(rows: int, count: int, bits: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 1 << bits, (rows, count), generator=torch.Generator().manual_seed(seed))


def stream(codes: list[int], bits: int) -> bytes:
    """A row by the definition: one large number, the first code in its lowest bits."""
    number = sum(code << (bits * n) for n, code in enumerate(codes))
    return number.to_bytes(-(-len(codes) * bits // 8), "little")


@settings(deadline=None, max_examples=100)
@given(bits=st.integers(1, MAX_BITS), rows=st.integers(0, 4), count=st.integers(0, 70), seed=st.integers(0, 9))
def test_round_trip_and_place_of_every_bit(bits: int, rows: int, count: int, seed: int) -> None:
    codes_RN = random_codes(rows, count, bits, seed)
    packed_RB = pack(codes_RN, bits)
    assert packed_RB.dtype == torch.uint8
    assert packed_RB.shape == (rows, packed_width(count, bits))
    assert [bytes(row) for row in packed_RB.tolist()] == [stream(row, bits) for row in codes_RN.tolist()]
    unpacked_RN = unpack(packed_RB, bits, count)
    assert unpacked_RN.dtype == torch.int32
    assert torch.equal(unpacked_RN, codes_RN.int())
    check_padding(packed_RB, bits, count)


@pytest.mark.parametrize("bits", range(1, MAX_BITS + 1))
def test_extreme_codes_and_strided_input(bits: int) -> None:
    codes_NR = torch.full((13, 3), (1 << bits) - 1, dtype=torch.int32)
    codes_NR[::2] = 0
    packed_RB = pack(codes_NR.T, bits)
    assert packed_RB.is_contiguous()
    assert torch.equal(unpack(packed_RB, bits, 13), codes_NR.T)


def test_results_do_not_alias_the_argument() -> None:
    codes_RN = torch.zeros((1, 4), dtype=torch.uint8)
    pack(codes_RN, 8).fill_(7)
    assert not codes_RN.any()


@pytest.mark.parametrize("bits", [0, 17, -1])
def test_bits_out_of_range(bits: int) -> None:
    with pytest.raises(ValueError, match="1 to 16 bits"):
        packed_width(4, bits)


@pytest.mark.parametrize("code", [-1, 8])
def test_code_out_of_range(code: int) -> None:
    with pytest.raises(ValueError, match="3 bits hold 0 to 7"):
        pack(torch.tensor([[0, code]]), 3)


@pytest.mark.parametrize("codes", [torch.zeros(4, dtype=torch.int64), torch.zeros(1, 4)])
def test_codes_of_the_wrong_kind(codes: Tensor) -> None:
    with pytest.raises(ValueError, match="whole numbers"):
        pack(codes, 3)


@pytest.mark.parametrize("packed", [torch.zeros((2, 3), dtype=torch.uint8), torch.zeros((2, 2), dtype=torch.int32)])
def test_bytes_of_the_wrong_kind(packed: Tensor) -> None:
    with pytest.raises(ValueError, match=r"uint8 \(R, 2\)"):
        unpack(packed, 3, 4)


def test_stray_bits_are_found() -> None:
    packed_RB = pack(random_codes(2, 3, 3), 3)
    packed_RB[1, -1] |= 0x80
    with pytest.raises(ValueError, match="not zero"):
        check_padding(packed_RB, 3, 3)
