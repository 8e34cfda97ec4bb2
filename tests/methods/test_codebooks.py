"""The words of vector quantization: universal, of a lattice, of a trellis; and the searches for them."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from vqcompress.methods.vq import lattice, trellis, universal
from vqcompress.methods.vq.packing import pack


def gaussian(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn((rows, columns), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("d", "bits"), universal.SIZES)
def test_universal_entries_are_a_fixed_point_of_k_means(d: int, bits: int) -> None:
    book_Kd = universal.entries(d, bits)
    assert book_Kd.shape == (1 << bits, d)
    x_Nd = gaussian(200_000, d)
    code_N = torch.cdist(x_Nd, book_Kd).argmin(1) if d > 1 else (x_Nd - book_Kd[:, 0]).abs().argmin(1)
    uses_K = torch.bincount(code_N, minlength=len(book_Kd))
    mean_Kd = torch.zeros_like(book_Kd).index_add_(0, code_N, x_Nd) / uses_K[:, None]
    assert ((mean_Kd - book_Kd).square().sum(1) * uses_K).sum() / uses_K.sum() < 0.02 * (
        x_Nd - book_Kd[code_N]
    ).square().sum(1).mean()
    # Hottest first, but for the noise of counting.
    assert uses_K[: len(uses_K) // 4].sum() > 1.1 * uses_K[-(len(uses_K) // 4) :].sum()


def test_words_of_the_lattice_are_those_of_e8() -> None:
    code_N = torch.arange(1 << 16, dtype=torch.int32)
    word_N8 = lattice.e8p(code_N)
    assert len(word_N8.unique(dim=0)) == 1 << 16
    shifted_N8 = word_N8 - torch.where(code_N >> 15 == 1, -0.25, 0.25)[:, None]
    assert ((shifted_N8 - 0.5) % 1 == 0).all()
    assert (shifted_N8.sum(1) % 2 == 0).all()
    assert (lattice.patterns().square().sum(1).diff() >= 0).all()


def e8p_in_torch(x_N8: Tensor) -> tuple[Tensor, Tensor]:
    """`lattice.nearest_e8p` in torch operations."""
    pattern_P8 = lattice.patterns()
    best_N = torch.full((len(x_N8),), torch.inf)
    code_N = torch.zeros(len(x_N8), dtype=torch.int32)
    odd_P = pattern_P8.sum(1) % 2
    for minus, shift in enumerate((lattice.SHIFT, -lattice.SHIFT)):
        y_N8 = x_N8 - shift
        size_N8, negative_N8 = y_N8.abs(), y_N8 < 0
        # With the signs of y the product is as large as can be. If they break the parity, the cheapest one flips.
        gain_NP = torch.addmm(-pattern_P8.square().sum(1) / 2, size_N8, pattern_P8.T)
        cheapest_NP = (size_N8[:, None] * pattern_P8).amin(2)
        flips_NP = (negative_N8.sum(1)[:, None] + odd_P) % 2
        gain_N, index_N = (gain_NP - 2 * flips_NP * cheapest_NP).max(1)
        flip_N = (size_N8 * pattern_P8[index_N]).argmin(1)
        flips_N8 = torch.nn.functional.one_hot(flip_N, 8) * flips_NP.gather(1, index_N[:, None])
        sign_N8 = negative_N8.int() ^ flips_N8.int()
        bits_N = (sign_N8[:, :7] << torch.arange(8, 15, dtype=torch.int32)).sum(1)
        # Half the squared distance.
        cost_N = y_N8.square().sum(1) / 2 - gain_N
        code_N = torch.where(cost_N < best_N, index_N.int() | bits_N.int() | minus << 15, code_N)
        best_N = torch.minimum(cost_N, best_N)
    return code_N, lattice.e8p(code_N)


def test_nearest_word_of_the_lattice_against_all() -> None:
    word_K8 = lattice.e8p(torch.arange(1 << 16, dtype=torch.int32))
    x_N8 = gaussian(60, 8) * torch.linspace(0.2, 3, 60)[:, None]
    best_N = torch.cdist(x_N8, word_K8).amin(1)
    for search in (lattice.nearest_e8p, e8p_in_torch):
        code_N, found_N8 = search(x_N8)
        assert torch.equal(found_N8, lattice.e8p(code_N))
        torch.testing.assert_close((x_N8 - found_N8).norm(dim=1), best_N)


@pytest.mark.parametrize("states", [8, 12, 16])
def test_codewords_look_gaussian(states: int) -> None:
    word_S = trellis.codewords(states).double()
    assert abs(word_S.mean()) < 0.1
    assert 0.9 < word_S.std() < 1.1


@pytest.mark.parametrize(
    ("rows", "cut"),
    [(1, [16]), (16, [16]), (255, [255]), (287, [287]), (288, [256, 32]), (600, [256, 256, 88]), (530, [256, 274])],
)
def test_columns_are_cut_into_sequences(rows: int, cut: list[int]) -> None:
    assert trellis.lengths(rows) == cut
    assert sum(cut) == trellis.padded(rows)


@pytest.mark.parametrize(("bits", "states"), [(1, 8), (2, 8), (3, 10), (2, 11), (4, 9)])
def test_a_value_depends_on_its_window_of_the_cyclic_stream(bits: int, states: int) -> None:
    codes_1T = torch.randint(0, 1 << bits, (1, 40), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    packed = pack(codes_1T, bits)[0].tolist()
    stream = "".join(f"{byte:08b}"[::-1] for byte in packed)[: 40 * bits]
    value_T = trellis.decode(codes_1T, bits, states)[0]
    for t in range(40):
        window = [stream[(t * bits + i) % len(stream)] for i in range(states)]
        state = int("".join(reversed(window)), 2)
        assert value_T[t] == trellis.codewords(states)[state]


def test_walks_against_all() -> None:
    """Of all cyclic streams of 16 bits the search finds nearly the best; its first pass is an approximation."""
    streams_NT = torch.tensor(list(itertools.product((0, 1), repeat=16)), dtype=torch.int32)
    values_NT = trellis.decode(streams_NT, 1, 8)
    x_NT = gaussian(60, 16, 2)
    value_NT = trellis.decode(trellis.Trellis(1, 8).walks(x_NT), 1, 8)
    best_N = torch.cdist(x_NT, values_NT).square().amin(1)
    error_N = (x_NT - value_NT).square().sum(1)
    assert (error_N >= best_N - 1e-4).all()
    assert (error_N < best_N + 1e-4).float().mean() > 0.4
    assert error_N.sum() < 1.25 * best_N.sum()


def test_errors_on_the_unit_gaussian() -> None:
    """The full figures are scripts/bench_codebooks.py's; here a few sequences guard them."""
    x_NT = gaussian(48, 256, 3)
    for bits, states, bound in ((2, 12, 1.24), (3, 12, 1.27), (4, 12, 1.35)):
        value_NT = trellis.decode(trellis.Trellis(bits, states).walks(x_NT), bits, states)
        assert (x_NT - value_NT).square().mean() / x_NT.var() < bound * 4.0**-bits
