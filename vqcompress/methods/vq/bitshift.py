"""Bit-shift trellis with computed codewords: the codes of a column are paths through 2**state_bits states.

The idea of QTIP (arXiv 2406.11235, sections 3 and 4): a bit-shift trellis, where a state is a window of the last
`state_bits` bits of a stream that gets k new bits per weight, and the value of a weight is a hash of its state that
looks like a draw from the unit Gaussian (the sum of four bytes of a linear congruence, "1MAD", and a cubic for the
tails). No table is stored, any weight decodes by itself, and the error comes near the rate-distortion limit, since a
path is one codeword of thousands of bits. Viterbi's algorithm finds the path; the stream is cyclic (tail-biting), so
that no first state is stored.

Paths run down the rows of a column, so that the error feedback can go column by column: 256 rows each, the last one
of a column up to 287, at least 16.
Shape legend: N sequences, T weights of one, S = 2**state_bits, k bits of a weight, P = 2**k predecessors of a state,
Q = S / P classes of states with the same successors.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import groupby

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
def codewords(state_bits: int, device: torch.device = torch.device("cpu")) -> Tensor:  # noqa: B008
    """The value of every state s, (2**state_bits,) float32: w (1 − 3c + c w²) with c = 0.02.

    w = (Σ bytes of (a s + b mod 2³²) − 510) / 139.4.
    """
    with torch.inference_mode(False):
        hash_S = (torch.arange(1 << state_bits) * MULTIPLIER + INCREMENT) & 0xFFFFFFFF
        bytes_4S = torch.stack([(hash_S >> shift) & 255 for shift in (0, 8, 16, 24)])
        sum_S = (bytes_4S.sum(0).double() - MEAN) / DEVIATION
        return (sum_S * (1 - 3 * CUBIC + CUBIC * sum_S.square())).float().to(device)


def decode(codes_NT: Tensor, bits: int, state_bits: int) -> Tensor:
    """The values (N, T), float32, of whole columns; bits [t·k, t·k + state_bits) of a sequence's stream are hashed."""
    values = []
    for part_NT in codes_NT.split(lengths(codes_NT.shape[1]), 1):
        state_NT = torch.zeros_like(part_NT, dtype=torch.int32)
        for have in range(0, state_bits, bits):
            state_NT |= part_NT.int().roll(-(have // bits), 1) << have
        values.append(codewords(state_bits, codes_NT.device)[(state_NT & ((1 << state_bits) - 1)).long()])
    return torch.cat(values, 1)


@dataclass(frozen=True)
class PathSearch:
    """The quantizer of a column at a time, by the nearest trellis paths. bits: k, 1 to 4. state_bits: of a state."""

    bits: int
    state_bits: int

    def nearest(self, target_O1: Tensor, block_11: Tensor, group: int) -> tuple[Tensor, Tensor]:
        """Codes (padded O,), int32, and values (O, 1) of the paths nearest to a column of unit variance."""
        rows = len(target_O1)
        column_T = pad((target_O1 / block_11)[:, 0], (0, padded(rows) - rows))
        # Sequences of equal length are searched together.
        parts = groupby(column_T.split(lengths(len(column_T))), len)
        codes_T = torch.cat([self.paths(torch.stack(list(some))).flatten() for _, some in parts])
        return codes_T, decode(codes_T[None], self.bits, self.state_bits)[0, :rows, None]

    def paths(self, target_NT: Tensor) -> Tensor:
        """Codes (N, T), int32, of the tail-biting path nearest to each sequence."""
        settings = self.state_bits, self.bits, SHORTEST
        codewords_S = codewords(self.state_bits, target_NT.device)
        if target_NT.is_cuda:
            from vqcompress.methods.vq import viterbi_kernel

            return viterbi_kernel.walks(target_NT, codewords_S, *settings)
        # numba takes a while to import.
        from vqcompress.methods.vq import viterbi_numba

        # Sequences are independent, so any split over threads gives the same codes.
        shares = np.array_split(target_NT.float().numpy(), min(torch.get_num_threads(), len(target_NT)))
        with ThreadPoolExecutor(len(shares)) as pool:
            found = pool.map(lambda x_NT: viterbi_numba.paths(x_NT, codewords_S.numpy(), *settings), shares)
            return torch.from_numpy(np.concatenate(list(found)))
