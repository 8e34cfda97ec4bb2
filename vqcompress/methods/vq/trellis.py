"""Trellis-coded quantization with computed codewords: the code of a weight is a walk through 2**states states.

The idea of QTIP (arXiv 2406.11235, sections 3 and 4): a bit-shift trellis, where a state is a window of the last
`states` bits of a stream that gets k new bits per weight, and the value of a weight is a hash of its state, which looks
like a draw from the unit Gaussian (four bytes of a linear congruence added up, its "1MAD", and a
cubic for the tails). No table is stored, any
weight decodes by itself, and the error comes near the rate-distortion limit, since a walk is one codeword of thousands
of bits. Viterbi's algorithm finds the walk; the stream bites its own tail, so that it has no bits for a first state.

Walks run down the rows of a column, so that the error feedback can go column by column: 256 rows each, the last one
of a column up to 287, at least 16.
Shape legend: N sequences, T weights of one, S = 2**states, k bits of a weight, P = 2**k predecessors of a state,
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
# Words of a deviation of 1.06 leave less over than those of 1 where few bits of a state are older than a weight's own.
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
    """Rows with what a short column is filled up by."""
    return max(rows, LEAST)


@cache
def codewords(states: int) -> Tensor:
    """The value of every state, (2**states,) float32: w (1 − 3c + c w²), where w = (Σ bytes of (a s + b mod 2³²) − 510)
    / 139.4 and c = 0.02.
    """
    with torch.inference_mode(False):
        hash_S = (torch.arange(1 << states) * MULTIPLIER + INCREMENT) & 0xFFFFFFFF
        bytes_4S = torch.stack([(hash_S >> shift) & 255 for shift in (0, 8, 16, 24)])
        word_S = (bytes_4S.sum(0).double() - MEAN) / DEVIATION
        return (word_S * (1 - 3 * CUBIC + CUBIC * word_S.square())).float()


@cache
def _codewords_on(device: torch.device, states: int) -> Tensor:
    with torch.inference_mode(False):
        return codewords(states).to(device)


def decode(codes_NT: Tensor, bits: int, states: int) -> Tensor:
    """The values (N, T), float32, of whole columns: bits [t·k, t·k + states) of a sequence's cyclic stream hashed."""
    values = []
    for part_NT in codes_NT.split(lengths(codes_NT.shape[1]), 1):
        state_NT, have = torch.zeros_like(part_NT, dtype=torch.int32), 0
        while have < states:
            state_NT |= part_NT.int().roll(-(have // bits), 1) << have
            have += bits
        values.append(_codewords_on(codes_NT.device, states)[(state_NT & ((1 << states) - 1)).long()])
    return torch.cat(values, 1)


class Trellis:
    """The quantizer: a column at a time, each a few walks. bits: k, 1 to 4. states: bits of a state."""

    d = 1

    def __init__(self, bits: int, states: int):
        self.bits, self.states = bits, states

    def nearest(self, target_O1: Tensor, block_11: Tensor) -> tuple[Tensor, Tensor]:
        """Codes (padded O,), int32, and values (O, 1) of the walks nearest to a column of unit variance."""
        rows = len(target_O1)
        column_1T = pad((target_O1 / block_11)[:, 0], (0, padded(rows) - rows))[None]
        codes_T = torch.cat([self.walks(part_NT).flatten() for part_NT in self._equal(column_1T)])
        return codes_T, decode(codes_T[None], self.bits, self.states)[0, :rows, None]

    def walks(self, target_NT: Tensor) -> Tensor:
        """Codes (N, T), int32, of the tail-biting walks that are nearest to each sequence."""
        if target_NT.is_cuda:
            from vqcompress.methods.vq import viterbi_kernel as viterbi

            words_on_S = _codewords_on(target_NT.device, self.states)
            return viterbi.walks(target_NT, words_on_S, self.states, self.bits, SHORTEST)
        # numba takes a while to import.
        from vqcompress.methods.vq import viterbi_numba as compiled

        words_S = codewords(self.states).numpy()
        x_NT = np.ascontiguousarray(target_NT.cpu().float().numpy())
        threads = min(torch.get_num_threads(), len(x_NT))
        if threads < 2:
            found = [compiled.walks(x_NT, words_S, self.states, self.bits, SHORTEST)]
        else:
            # Compiled code that lets go of the interpreter; each sequence is on its own, so any split gives the same.
            parts = [(part, words_S, self.states, self.bits, SHORTEST) for part in np.array_split(x_NT, threads)]
            found = list(compiled.pool(threads).map(lambda part: compiled.walks(*part), parts))
        return torch.from_numpy(np.concatenate(found)).to(target_NT.device)

    def _equal(self, column_1T: Tensor) -> list[Tensor]:
        """A column (1, T) as batches of sequences of equal length."""
        sizes = lengths(column_1T.shape[1])
        same = sum(size == sizes[0] for size in sizes) * sizes[0]
        parts = [column_1T[:, :same].view(-1, sizes[0])]
        return parts + ([column_1T[:, same:]] if same < column_1T.shape[1] else [])
