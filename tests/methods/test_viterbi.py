"""The kernel of Viterbi's algorithm: against the compiled search on a CPU, and compiled ahead of time for GPUs."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from kernels import ARCHS, needs_gpu

from vqcompress.methods.vq import bitshift

SLOW = pytest.mark.slow


def gaussian(sequences: int, length: int) -> np.ndarray:
    return np.random.default_rng(length + sequences).standard_normal((sequences, length), np.float32)


def by_cpu(x_NT: np.ndarray, bits: int, state_bits: int) -> np.ndarray:
    from vqcompress.methods.vq import viterbi_numba as compiled

    return compiled.paths(x_NT, bitshift.codewords(state_bits).numpy(), state_bits, bits, bitshift.SHORTEST)


def by_interpreter(x_NT: np.ndarray, bits: int, state_bits: int, settings: dict[str, int]) -> np.ndarray:
    """What the kernel answers under Triton's interpreter; to be called in a process that has it on."""
    import triton

    from vqcompress.methods.vq import viterbi_kernel as viterbi

    assert not isinstance(viterbi._walk, triton.JITFunction)
    before = {name: getattr(viterbi, name) for name in settings}
    try:
        for name, value in settings.items():
            setattr(viterbi, name, value)
        words_S = bitshift.codewords(state_bits)
        return viterbi.walks(torch.from_numpy(x_NT), words_S, state_bits, bits, bitshift.SHORTEST).numpy()
    finally:
        for name, value in before.items():
            setattr(viterbi, name, value)


@pytest.fixture(scope="module")
def interpret(interpreted: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    return lambda *arguments: interpreted(by_interpreter, *arguments)


@pytest.mark.parametrize(
    ("bits", "state_bits", "sequences", "length"), [(1, 8, 2, 16), (2, 10, 1, 40), (3, 9, 2, 16), (4, 8, 2, 16)]
)
def test_kernel_answers_what_the_cpu_does(
    interpret: Callable[..., np.ndarray], bits: int, state_bits: int, sequences: int, length: int
) -> None:
    x_NT = gaussian(sequences, length)
    assert np.array_equal(interpret(x_NT, bits, state_bits, {}), by_cpu(x_NT, bits, state_bits))


@pytest.mark.parametrize("bits", [2, *(pytest.param(bits, marks=SLOW) for bits in (1, 4))])
def test_costs_in_tiles(interpret: Callable[..., np.ndarray], bits: int) -> None:
    """As for more states than registers hold; and back pointers for one sequence at a time."""
    x_NT = gaussian(2, 16)
    found_NT = interpret(x_NT, bits, 10, {"IN_REGISTERS": 9, "TILE": 8, "SCRATCH": 2 * 16 << 10 - bits})
    assert np.array_equal(found_NT, by_cpu(x_NT, bits, 10))


@pytest.mark.parametrize(
    ("arch", "bits", "state_bits"),
    [
        (90, 2, 12),
        *(
            pytest.param(arch, 2, size, marks=SLOW)
            for arch in ARCHS
            for size in (12, 14, 16)
            if (arch, size) != (90, 12)
        ),
        *(pytest.param(90, bits, size, marks=SLOW) for bits in (1, 4) for size in (14, 16)),
    ],
)
def test_compiles_without_spills(arch: int | str, bits: int, state_bits: int) -> None:
    """As launched: costs and words do stay in registers, a program fits a processor, and nothing becomes an fma."""
    pytest.importorskip("triton")
    import ahead

    from vqcompress.methods.triton import launch
    from vqcompress.methods.vq import viterbi_kernel as viterbi

    with launch.recording(arch) as calls:
        x_NT = torch.empty((3, 256), device="meta")
        viterbi.walks(x_NT, torch.empty(1 << state_bits, device="meta"), state_bits, bits, bitshift.SHORTEST)
    kernel = ahead.compile_call(calls[0], arch)
    used = ahead.resources(kernel)
    assert used.stack == 0
    assert used.shared <= launch.DEVICES[arch].shared
    if arch == "gfx942":
        assert not re.search(r"v_(pk_)?(fma|fmac|mad|mac)_(legacy_)?f32", kernel.asm["amdgcn"])
    else:
        assert "fma.rn.f32" not in kernel.asm["ptx"]


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_kernel_on_a_gpu(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for state_bits in (8, 12, 14, 15, 16):
        for sequences, length in ((5, 256), (2, 287), (1, 16), (3, 40)):
            x_NT = gaussian(sequences, length)
            found_NT = bitshift.PathSearch(bits, state_bits).paths(torch.from_numpy(x_NT).cuda())
            assert found_NT.is_cuda
            assert np.array_equal(found_NT.cpu().numpy(), by_cpu(x_NT, bits, state_bits)), (state_bits, length)
    # Back pointers for 150 sequences at a time.
    monkeypatch.setattr("vqcompress.methods.vq.viterbi_kernel.SCRATCH", 150 * 256 << 14 - bits)
    x_NT = gaussian(400, 256)
    found_NT = bitshift.PathSearch(bits, 14).paths(torch.from_numpy(x_NT).cuda())
    assert np.array_equal(found_NT[::50].cpu().numpy(), by_cpu(x_NT[::50], bits, 14))
