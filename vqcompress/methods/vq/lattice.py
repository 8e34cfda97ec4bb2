"""Codewords from the E8 lattice: 16 bits for 8 weights, computed from 256 patterns instead of a table of 65,536.

The E8P codebook of QuIP# (arXiv 2402.04396, section 4.2): E8 + 1/4 is the union of D̂8 + 1/4 and D̂8 − 1/4, where D̂8
are the vectors of half-odd numbers with an even sum. A word is one of 256 patterns of absolute values in D̂8 (all 227
up to a squared norm of 10 and 29 of those with 12), seven free signs (the eighth makes the sum even) and one bit for
the shift. What it leaves over is coded once more at 3 bits per weight by the universal codebook VQ<8,8,1>, at 4 bits by
E8P, each with a step of its own (residual quantization, section 4.3).

The 8 weights of a word are neighbours in a column, so that the error feedback can go column by column.
Shape legend: N vectors of 8 weights, P patterns, O rows, V = ceil(O / 8) words of a column, B bytes of a word.
"""

from __future__ import annotations

import itertools
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from vqcompress.methods.vq import universal
from vqcompress.methods.vq.learned import nearest

DIMENSION = 8
SHIFT = 0.25
# Steps of the first and the second words, by bits per weight: those with the least error on the unit Gaussian.
FIRST = {2: 0.965, 3: 1.0, 4: 1.12}
SECOND = {3: 0.30, 4: 0.29}


@cache
def patterns() -> Tensor:
    """The absolute values of D̂8 that words are made of, (256, 8) float32, shortest first: about the hottest first."""
    with torch.inference_mode(False):
        half_N8 = torch.tensor(list(itertools.product((0.5, 1.5, 2.5, 3.5), repeat=DIMENSION)))
        norm_N = half_N8.square().sum(1)
        order_N = norm_N.argsort(stable=True)
        # Among the 224 of norm 12 those without a 2.5 come first: five coordinates of 1.5 are a little likelier.
        last_N = (norm_N[order_N] == 12) & (half_N8[order_N].amax(1) > 2)
        order_N = order_N[last_N.long().argsort(stable=True)]
        return half_N8[order_N[norm_N[order_N] <= 12][:256]]


@cache
def _patterns_on(device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return patterns().to(device)


def nearest_e8p(x_N8: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (N,) int32 below 2**16, and words (N, 8) in lattice units, nearest to each vector.

    A code has the pattern in bits 0–7, the signs of coordinates 0–6 in bits 8–14, and bit 15 set if the shift is −1/4.
    """
    pattern_P8 = _patterns_on(x_N8.device)
    if x_N8.device.type == "cpu":
        # numba takes a while to import.
        from vqcompress.methods.vq import viterbi_numba as compiled

        norm_P, odd_P = pattern_P8.square().sum(1) / 2, (pattern_P8.sum(1) % 2).int()
        facts = (pattern_P8.T.contiguous().numpy(), norm_P.numpy(), odd_P.numpy())
        code_N = torch.from_numpy(compiled.e8p(x_N8.contiguous().numpy(), *facts))
        return code_N, e8p(code_N)
    codes, words = nearest_e8p(x_N8.cpu())
    return codes.to(x_N8.device), words.to(x_N8.device)


def e8p(code_N: Tensor) -> Tensor:
    """The words (N, 8) float32, in lattice units, of codes below 2**16."""
    pattern_N8 = _patterns_on(code_N.device)[(code_N & 255).long()]
    negative_N8 = code_N[:, None] >> torch.arange(8, 16, device=code_N.device, dtype=torch.int32) & 1
    minus_N = negative_N8[:, 7].clone()
    # Σ ±p is even: the sum of the pattern and the number of minus signs have the same parity.
    negative_N8[:, 7] = (negative_N8[:, :7].sum(1) + pattern_N8.sum(1).int()) % 2
    return pattern_N8 * (1 - 2 * negative_N8) + SHIFT * (1 - 2 * minus_N[:, None])


def decode(codes_NB: Tensor) -> Tensor:
    """The values (N, 8) float32 of words of 2, 3 or 4 bytes: as many bits per weight."""
    code_NB = codes_NB.int()
    bits = code_NB.shape[1]
    value_N8 = FIRST[bits] * e8p(code_NB[:, 0] | code_NB[:, 1] << 8)
    if bits == 3:
        value_N8 = value_N8 + SECOND[3] * universal.entries(8, 8).to(code_NB.device)[code_NB[:, 2].long()]
    elif bits == 4:
        value_N8 = value_N8 + SECOND[4] * e8p(code_NB[:, 2] | code_NB[:, 3] << 8)
    return value_N8


def table(bits: int) -> Tensor:
    """What kernels look words of 2, 3 or 4 bits per weight up in, (4098,) float32: 256 × 8 numbers for the first words,
    as many for the second, and the two shifts, all times their steps.

    The last coordinate of a pattern is negative if its sum is odd: with it the sign that makes the sum even is the
    parity of the other seven.
    """
    pattern_P8 = patterns().clone()
    pattern_P8[:, 7] *= 1 - 2 * (pattern_P8.sum(1) % 2)
    second_P8 = {2: torch.zeros(256, DIMENSION), 3: universal.entries(8, 8), 4: pattern_P8}[bits]
    step, second = FIRST[bits], SECOND.get(bits, 0.0)
    shifts = torch.tensor([step * SHIFT, second * SHIFT])
    return torch.cat([(step * pattern_P8).flatten(), (second * second_P8).flatten(), shifts])


class Lattice:
    """The quantizer: a column at a time, 8 rows a word. bits: per weight, 2 to 4."""

    d = 1

    def __init__(self, bits: int):
        self.bits = bits

    def nearest(self, target_O1: Tensor, block_11: Tensor) -> tuple[Tensor, Tensor]:
        """Codes (V, B) uint8 and values (O, 1) of the words nearest to a column of unit variance."""
        rows = len(target_O1)
        codes_VB = self.words(pad((target_O1 / block_11)[:, 0], (0, -rows % DIMENSION)).view(-1, DIMENSION))
        return codes_VB, decode(codes_VB).flatten()[:rows, None]

    def words(self, x_N8: Tensor) -> Tensor:
        """Codes (N, B) uint8 nearest to each vector; the second stage codes what the first leaves over."""
        step = FIRST[self.bits]
        code_N, word_N8 = nearest_e8p(x_N8 / step)
        codes = [code_N & 255, code_N >> 8]
        rest_N8 = (x_N8 - step * word_N8) / SECOND.get(self.bits, 1.0)
        if self.bits == 3:
            codes.append(nearest(rest_N8, universal.entries(8, 8).to(x_N8.device)[None], 1)[:, 0])
        elif self.bits == 4:
            second_N, _ = nearest_e8p(rest_N8)
            codes += [second_N & 255, second_N >> 8]
        return torch.stack([code.to(torch.uint8) for code in codes], 1)
