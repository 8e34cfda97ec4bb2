"""Bit-shift trellis with computed codewords: the codes of a column are paths through 2**state_bits states.

The idea of QTIP (arXiv 2406.11235, sections 3 and 4): a bit-shift trellis, where a state is a window of the last
`state_bits` bits of a stream that gets k new bits per weight, and the value of a weight is a hash of its state that
looks like a draw from the unit Gaussian (the sum of four bytes of a linear congruence, "1MAD", and a cubic for the
tails). No table is stored, any
weight decodes by itself, and the error comes near the rate-distortion limit, since a path is one codeword of thousands
of bits. Viterbi's algorithm finds the path; the stream is cyclic (tail-biting), so that no first state is stored.

Paths run down the rows of a column, so that the error feedback can go column by column: 256 rows each, the last one
of a column up to 287, at least 16.
Shape legend: N sequences, T weights of one, S = 2**state_bits, k bits of a weight, P = 2**k predecessors of a state,
Q = S / P classes of states with the same successors.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

SEQUENCE = 256
# A remainder shorter than this joins the sequence before it; also half the stretch on which the seam is chosen.
SHORTEST = 32
# So that no bit of a state stands twice in it: at one bit per weight a state of 16 bits is a window of 16 weights.
LEAST = 16
# Full-period linear congruence modulo 2**32; its four bytes have the mean 127.5 and the variance (256² − 1) / 12 each.
MULTIPLIER, INCREMENT = 34038481, 76625530
# Deviation 1.06 has less error than 1 where few bits of a state are older than a weight's own.
MEAN, DEVIATION = 510.0, 139.4
# A sum of four is short in the tails: the cubic of a Cornish–Fisher expansion, its size chosen by the error at 4 bits.
CUBIC = 0.02


def lengths(rows: int) -> list[int]:
    """How the rows of a column are cut into sequences; their sum is `padded(rows)`."""
    rows = padded(rows)
    if rows < SEQUENCE + SHORTEST:
        return [rows]
    full, rest = divmod(rows, SEQUENCE)
    if rest >= SHORTEST:
        return [SEQUENCE] * full + [rest]
    return [SEQUENCE] * (full - 1) + [SEQUENCE + rest]


def padded(rows: int) -> int:
    """Rows of a column, a short one filled up."""
    return max(rows, LEAST)


@cache
def codewords(state_bits: int) -> Tensor:
    """The value of every state s, (2**state_bits,) float32: w (1 − 3c + c w²) with c = 0.02.

    w = (Σ bytes of (a s + b mod 2³²) − 510) / 139.4.
    """
    with torch.inference_mode(False):
        hash_S = (torch.arange(1 << state_bits) * MULTIPLIER + INCREMENT) & 0xFFFFFFFF
        bytes_4S = torch.stack([(hash_S >> shift) & 255 for shift in (0, 8, 16, 24)])
        sum_S = (bytes_4S.sum(0).double() - MEAN) / DEVIATION
        return (sum_S * (1 - 3 * CUBIC + CUBIC * sum_S.square())).float()


@cache
def _codewords_on(device: torch.device, state_bits: int) -> Tensor:
    with torch.inference_mode(False):
        return codewords(state_bits).to(device)


def decode(codes_NT: Tensor, bits: int, state_bits: int) -> Tensor:
    """The values (N, T), float32, of whole columns; bits [t·k, t·k + state_bits) of a sequence's stream are hashed."""
    values = []
    for part_NT in codes_NT.split(lengths(codes_NT.shape[1]), 1):
        state_NT, have = torch.zeros_like(part_NT, dtype=torch.int32), 0
        while have < state_bits:
            state_NT |= part_NT.int().roll(-(have // bits), 1) << have
            have += bits
        values.append(_codewords_on(codes_NT.device, state_bits)[(state_NT & ((1 << state_bits) - 1)).long()])
    return torch.cat(values, 1)


class PathSearch:
    """The quantizer of a column at a time, by the nearest trellis paths. bits: k, 1 to 4. state_bits: of a state."""

    d = 1

    def __init__(self, bits: int, state_bits: int):
        self.bits, self.state_bits = bits, state_bits

    def nearest(self, target_O1: Tensor, block_11: Tensor) -> tuple[Tensor, Tensor]:
        """Codes (padded O,), int32, and values (O, 1) of the paths nearest to a column of unit variance."""
        rows = len(target_O1)
        column_1T = pad((target_O1 / block_11)[:, 0], (0, padded(rows) - rows))[None]
        codes_T = torch.cat([self.paths(part_NT).flatten() for part_NT in _equal_lengths(column_1T)])
        return codes_T, decode(codes_T[None], self.bits, self.state_bits)[0, :rows, None]

    def paths(self, target_NT: Tensor) -> Tensor:
        """Codes (N, T), int32, of the tail-biting path nearest to each sequence."""
        if target_NT.is_cuda:
            from vqcompress.methods.vq import viterbi_kernel

            codewords_S = _codewords_on(target_NT.device, self.state_bits)
            return viterbi_kernel.walks(target_NT, codewords_S, self.state_bits, self.bits, SHORTEST)
        # numba takes a while to import.
        from vqcompress.methods.vq import viterbi_numba

        settings = codewords(self.state_bits).numpy(), self.state_bits, self.bits, SHORTEST
        x_NT = np.ascontiguousarray(target_NT.cpu().float().numpy())
        codes_NT = np.empty(x_NT.shape, np.int32)

        def search(first: int, last: int) -> None:
            codes_NT[first:last] = viterbi_numba.paths(x_NT[first:last], *settings)

        # Sequences are independent, so any split over threads gives the same codes.
        viterbi_numba.in_shares(search, len(x_NT), torch.get_num_threads())
        return torch.from_numpy(codes_NT).to(target_NT.device)


def _equal_lengths(column_1T: Tensor) -> list[Tensor]:
    """A column (1, T) as batches of sequences of equal length."""
    sizes = lengths(column_1T.shape[1])
    same = sum(size == sizes[0] for size in sizes) * sizes[0]
    batches = [column_1T[:, :same].view(-1, sizes[0])]
    return batches + ([column_1T[:, same:]] if same < column_1T.shape[1] else [])
