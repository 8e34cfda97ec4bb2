"""The block Hadamard transform is orthonormal, its own inverse, and what the definition says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vqcompress.methods.hadamard import hadamard, random_signs


def by_definition(n: int) -> Tensor:
    """blockdiag(Hadamard_b)/√b in float64, entry by entry: −1 to the number of common bits of row and column."""
    b = n & -n
    rows = [[(-1) ** (i & j).bit_count() for j in range(b)] for i in range(b)]
    return torch.block_diag(*[torch.tensor(rows, dtype=torch.float64)] * (n // b)) / b**0.5


@pytest.mark.parametrize("n", [1, 3, 6, 256, 1536])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_the_matrix_of_the_definition(n: int, dtype: torch.dtype) -> None:
    x = torch.randn(5, n, dtype=dtype, generator=torch.Generator().manual_seed(n))
    expected = (x.double() @ by_definition(n)).to(dtype)
    assert hadamard(x).dtype == dtype
    torch.testing.assert_close(hadamard(x), expected)
    torch.testing.assert_close(hadamard(x.T, dim=0), expected.T)


@pytest.mark.parametrize("n", [1, 6, 512, 3 * 2048, 2**17])
def test_it_is_its_own_inverse_and_keeps_lengths(n: int) -> None:
    x = torch.randn(3, n, 2, generator=torch.Generator().manual_seed(n))
    y = hadamard(x, dim=1)
    assert y.shape == x.shape
    torch.testing.assert_close(hadamard(y, dim=1), x, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(y.double().norm(dim=1), x.double().norm(dim=1), atol=0, rtol=1e-5)


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (8,)])
def test_any_number_of_rows(shape: tuple[int, ...]) -> None:
    assert hadamard(torch.ones(shape)).shape == shape


def test_what_is_cached_in_inference_mode_meets_autograd_later() -> None:
    with torch.inference_mode():
        hadamard(torch.ones(1, 128))
    x = torch.ones(1, 128, requires_grad=True)
    hadamard(x).square().sum().backward()
    assert x.grad is not None


def test_signs_depend_on_the_generator_only() -> None:
    draws = [random_signs(1000, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert set(draws[0].tolist()) == {-1.0, 1.0}
    assert abs(draws[0].mean()) < 0.1
