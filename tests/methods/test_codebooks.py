"""The codewords of a trellis and the search for paths."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from vqcompress.methods.packing import pack
from vqcompress.methods.vq import bitshift


def gaussian(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn((rows, columns), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("state_bits", [8, 12, 16])
def test_codewords_look_gaussian(state_bits: int) -> None:
    word_S = bitshift.codewords(state_bits).double()
    assert abs(word_S.mean()) < 0.1
    assert 0.9 < word_S.std() < 1.1


@pytest.mark.parametrize(
    ("rows", "cut"),
    [(1, [16]), (16, [16]), (255, [255]), (287, [287]), (288, [256, 32]), (600, [256, 256, 88]), (530, [256, 274])],
)
def test_columns_are_cut_into_sequences(rows: int, cut: list[int]) -> None:
    assert bitshift.lengths(rows) == cut
    assert sum(cut) == bitshift.padded(rows)


@pytest.mark.parametrize(("bits", "state_bits"), [(1, 8), (3, 10), (2, 11), (4, 9)])
def test_a_value_depends_on_its_window_of_the_cyclic_stream(bits: int, state_bits: int) -> None:
    codes_1T = torch.randint(0, 1 << bits, (1, 40), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    packed = pack(codes_1T, bits)[0].tolist()
    stream = "".join(f"{byte:08b}"[::-1] for byte in packed)[: 40 * bits]
    value_T = bitshift.decode(codes_1T, bits, state_bits)[0]
    for t in range(40):
        window = [stream[(t * bits + i) % len(stream)] for i in range(state_bits)]
        state = int("".join(reversed(window)), 2)
        assert value_T[t] == bitshift.codewords(state_bits)[state]


def test_paths_against_all() -> None:
    """Of all cyclic streams of 16 bits the search finds nearly the best; its first pass is an approximation."""
    streams_NT = torch.tensor(list(itertools.product((0, 1), repeat=16)), dtype=torch.int32)
    values_NT = bitshift.decode(streams_NT, 1, 8)
    x_NT = gaussian(40, 16, 2)
    value_NT = bitshift.decode(bitshift.PathSearch(1, 8).paths(x_NT), 1, 8)
    best_N = torch.cdist(x_NT, values_NT).square().amin(1)
    error_N = (x_NT - value_NT).square().sum(1)
    assert (error_N >= best_N - 1e-4).all()
    assert (error_N < best_N + 1e-4).float().mean() > 0.4
    assert error_N.sum() < 1.25 * best_N.sum()
