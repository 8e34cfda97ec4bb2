"""Whole numbers of 1 to 16 bits, packed densely into bytes.

A row is one bit stream, least significant bit first: bit j of code n is bit (n·bits + j) of the row, and bit i of a row
is bit i mod 8 of its byte i // 8. A row ends on a byte; the bits left over are zero. Eight codes take exactly `bits`
bytes, so the codes at the same place of their octet share byte and shift, and each place is one vectorized step.
Shape legend: R rows, N codes of a row, B bytes of a row, G octets of codes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def packed_width(count: int, bits: int) -> int:
    """Bytes of a row of `count` codes of `bits` bits."""
    return -(-count * bits // 8)


def pack(codes_RN: Tensor, bits: int) -> Tensor:
    """The codes, whole numbers from 0 to 2**bits − 1, as bytes: uint8 (R, packed_width(N, bits))."""
    rows, count = codes_RN.shape
    octets = -(-count // 8)
    codes_RG8 = pad(codes_RN, (0, octets * 8 - count)).reshape(rows, octets, 8)
    bytes_RGb = codes_RN.new_zeros((rows, octets, bits), dtype=torch.uint8)
    for place in range(8):
        byte, shift = divmod(place * bits, 8)
        window_RG = codes_RG8[:, :, place].int() << shift
        for i in range(-(-(shift + bits) // 8)):
            bytes_RGb[:, :, byte + i] |= (window_RG >> (8 * i) & 0xFF).to(torch.uint8)
    return bytes_RGb.view(rows, octets * bits)[:, : packed_width(count, bits)].contiguous()


def unpack(packed_RB: Tensor, bits: int, count: int) -> Tensor:
    """The `count` codes of a row that `pack` stored, int32 (R, count)."""
    rows, octets = len(packed_RB), -(-count // 8)
    bytes_RGb = pad(packed_RB, (0, octets * bits - packed_RB.shape[1])).reshape(rows, octets, bits)
    codes_RG8 = torch.empty((rows, octets, 8), dtype=torch.int32, device=packed_RB.device)
    for place in range(8):
        byte, shift = divmod(place * bits, 8)
        window_RG = bytes_RGb[:, :, byte].int()
        for i in range(1, -(-(shift + bits) // 8)):
            window_RG |= bytes_RGb[:, :, byte + i].int() << (8 * i)
        codes_RG8[:, :, place] = window_RG.bitwise_right_shift_(shift).bitwise_and_((1 << bits) - 1)
    return codes_RG8.view(rows, octets * 8)[:, :count].contiguous()
