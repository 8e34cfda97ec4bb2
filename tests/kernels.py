"""What tests of kernels share: a process with Triton's interpreter, and launches compiled ahead of time.

Functions that run in the interpreter are called in a process of its own, since Triton reads TRITON_INTERPRET when it is
imported; they must be importable from a test module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any

import numpy as np
import pytest
import torch

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
# Devices that every kernel must compile for.
ARCHS: list[int | str] = [80, 90, 100, "gfx942"]


def _begin() -> None:
    """Poison fresh memory, as the tests' own process does."""
    torch.set_num_threads(1)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)


@contextmanager
def interpreter() -> Iterator[Callable[..., Any]]:
    """call(function, *arguments) → its result, from a process where kernels run on CPU tensors."""
    version = pytest.importorskip("triton").__version__
    if tuple(map(int, version.split(".")[:2])) < (3, 9) and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        pytest.skip("the interpreter of older Tritons has no loops of a variable length with NumPy 2.4")
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            # Starts the process.
            pool.submit(_begin).result()
        yield lambda function, *arguments: pool.submit(function, *arguments).result()


def relative_rms(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The root mean square of the error over that of what is expected; 0 for nothing, infinite for NaN."""
    error = (found.double() - expected.double()).square().mean().sqrt().item() if found.numel() else 0.0
    size = expected.double().square().mean().sqrt().item() if found.numel() else 1.0
    return error / max(size, 1e-30) if error == error else float("inf")
