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

MAX_BITS = 16


def packed_width(count: int, bits: int) -> int:
    """Bytes that a row of `count` codes of `bits` bits takes. ValueError if either is out of range."""
    if not 1 <= bits <= MAX_BITS:
        raise ValueError(f"bits is {bits}; codes have 1 to {MAX_BITS} bits")
    if count < 0:
        raise ValueError(f"count is {count}; a row cannot have fewer than 0 codes")
    return -(-count * bits // 8)


def pack(codes_RN: Tensor, bits: int) -> Tensor:
    """The codes as bytes, uint8 (R, packed_width(N, bits)). ValueError unless whole numbers from 0 to 2**bits − 1."""
    if codes_RN.ndim != 2 or codes_RN.is_floating_point() or codes_RN.is_complex():
        raise ValueError(f"codes must be whole numbers (R, N); these are {codes_RN.dtype} {tuple(codes_RN.shape)}")
    rows, count = codes_RN.shape
    width = packed_width(count, bits)
    if codes_RN.numel():
        low, high = (int(x) for x in codes_RN.aminmax())
        if low < 0 or high >= 1 << bits:
            raise ValueError(f"codes range from {low} to {high}; {bits} bits hold 0 to {(1 << bits) - 1}")
    if bits == 8:
        return codes_RN.to(torch.uint8, copy=True, memory_format=torch.contiguous_format)
    octets = -(-count // 8)
    codes_RG8 = pad(codes_RN, (0, octets * 8 - count)).reshape(rows, octets, 8)
    bytes_RGb = codes_RN.new_zeros((rows, octets, bits), dtype=torch.uint8)
    for place in range(8):
        byte, shift = divmod(place * bits, 8)
        window_RG = codes_RG8[:, :, place].int() << shift
        for i in range(-(-(shift + bits) // 8)):
            bytes_RGb[:, :, byte + i] |= (window_RG >> (8 * i) & 0xFF).to(torch.uint8)
    return bytes_RGb.view(rows, octets * bits)[:, :width].contiguous()


def unpack(packed_RB: Tensor, bits: int, count: int) -> Tensor:
    """The codes that `pack` stored, int32 (R, count). ValueError unless the bytes are uint8 (R, packed_width)."""
    width = packed_width(count, bits)
    if packed_RB.dtype != torch.uint8 or packed_RB.ndim != 2 or packed_RB.shape[1] != width:
        found = f"{packed_RB.dtype} {tuple(packed_RB.shape)}"
        raise ValueError(f"{count} codes of {bits} bits are packed as uint8 (R, {width}); this is {found}")
    if bits == 8:
        return packed_RB.int()
    rows, octets = len(packed_RB), -(-count // 8)
    bytes_RGb = pad(packed_RB, (0, octets * bits - width)).reshape(rows, octets, bits)
    codes_RG8 = torch.empty((rows, octets, 8), dtype=torch.int32, device=packed_RB.device)
    for place in range(8):
        byte, shift = divmod(place * bits, 8)
        window_RG = bytes_RGb[:, :, byte].int()
        for i in range(1, -(-(shift + bits) // 8)):
            window_RG |= bytes_RGb[:, :, byte + i].int() << (8 * i)
        codes_RG8[:, :, place] = window_RG.bitwise_right_shift_(shift).bitwise_and_((1 << bits) - 1)
    return codes_RG8.view(rows, octets * 8)[:, :count].contiguous()


def check_padding(packed_RB: Tensor, bits: int, count: int) -> None:
    """Raise ValueError if a bit behind the last code of a row is not zero."""
    used = count * bits % 8
    if used and (packed_RB[:, -1] >> used).any():
        raise ValueError(f"a bit behind the {count} codes of a row is not zero")
