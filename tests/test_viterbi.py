"""The kernel of Viterbi's algorithm: against the compiled search on a CPU, and compiled ahead of time for GPUs."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vqcompress.codebooks import trellis

TARGETS = [("cuda", 80, 32), ("cuda", 90, 32), ("cuda", 100, 32), ("hip", "gfx942", 64)]

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def gaussian(sequences: int, length: int) -> np.ndarray:
    return np.random.default_rng(length + sequences).standard_normal((sequences, length), np.float32)


def by_cpu(x_NT: np.ndarray, bits: int, states: int) -> np.ndarray:
    from vqcompress.codebooks import compiled

    return compiled.walks(x_NT, trellis.codewords(states).numpy(), states, bits, trellis.SHORTEST)


def by_interpreter(x_NT: np.ndarray, bits: int, states: int, settings: dict[str, int]) -> np.ndarray:
    """What the kernel answers under Triton's interpreter; to be called in a process that has it on."""
    import triton

    from vqcompress.kernels import viterbi

    assert not isinstance(viterbi._walk, triton.JITFunction)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    before = {name: getattr(viterbi, name) for name in settings}
    try:
        for name, value in settings.items():
            setattr(viterbi, name, value)
        words_S = trellis.codewords(states)
        return viterbi.walks(torch.from_numpy(x_NT), words_S, states, bits, trellis.SHORTEST).numpy()
    finally:
        for name, value in before.items():
            setattr(viterbi, name, value)


@pytest.fixture(scope="module")
def interpret() -> Iterator[Callable[..., np.ndarray]]:
    """`by_interpreter` in a process of its own, since Triton reads TRITON_INTERPRET when it is imported."""
    version = pytest.importorskip("triton").__version__
    if tuple(map(int, version.split(".")[:2])) < (3, 9) and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        pytest.skip("the interpreter of older Tritons has no loops of a variable length with NumPy 2.4")
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            # Starts the process.
            pool.submit(int).result()
        yield lambda *arguments: pool.submit(by_interpreter, *arguments).result()


@pytest.mark.parametrize("states", [8, 10])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_kernel_answers_what_the_cpu_does(interpret: Callable[..., np.ndarray], bits: int, states: int) -> None:
    for sequences, length in ((3, 16), (1, 40), (1, 64)):
        x_NT = gaussian(sequences, length)
        assert np.array_equal(interpret(x_NT, bits, states, {}), by_cpu(x_NT, bits, states))


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_costs_in_tiles(interpret: Callable[..., np.ndarray], bits: int) -> None:
    """As for more states than registers hold; and back pointers for two sequences at a time."""
    rows, classes = 2 * 18, 1 << 10 - bits
    x_NT = gaussian(3, 18)
    found_NT = interpret(x_NT, bits, 10, {"IN_REGISTERS": 9, "TILE": 8, "SCRATCH": 2 * rows * classes})
    assert np.array_equal(found_NT, by_cpu(x_NT, bits, 10))


def compiled_for(target: tuple[str, Any, int], bits: int, states: int) -> Any:
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget

    from vqcompress.kernels import viterbi

    constants, options = viterbi.configuration(states, bits, target[2])
    pointers = {"x_NL": "*fp32", "words_S": "*fp32", "back_NTQ": "*u8", "least_N2Q": "*i32", "codes_NT": "*i32"}
    names = viterbi._walk.arg_names
    source = triton.compiler.ASTSource(
        viterbi._walk,
        signature={n: pointers.get(n, "constexpr" if n in constants else "i32") for n in names},
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in pointers.keys() - set(viterbi.UNALIGNED)},
    )
    return triton.compile(source, target=GPUTarget(*target), options=options)


@pytest.mark.parametrize(
    ("target", "bits", "states"),
    [(target, 2, states) for target in TARGETS for states in (12, 14, 16)]
    + [(TARGETS[1], bits, states) for bits in (1, 4) for states in (14, 16)],
    ids=lambda value: str(value[1]) if isinstance(value, tuple) else None,
)
def test_compiles_without_spills(target: tuple[str, Any, int], bits: int, states: int, tmp_path: Path) -> None:
    """As launched: costs and words do stay in registers, a program fits a processor, and nothing becomes an fma."""
    kernel = compiled_for(target, bits, states)
    if target[0] == "hip":
        text = kernel.asm["amdgcn"]
        assert re.findall(r"\.vgpr_spill_count:\s*(\d+)", text) == ["0"]
        assert kernel.metadata.shared <= 64 << 10
        assert not re.search(r"v_(pk_)?(fma|fmac|mad|mac)_(legacy_)?f32", text)
        return
    assert kernel.metadata.shared <= 160 << 10
    assert "fma.rn.f32" not in kernel.asm["ptx"]
    from triton import knobs

    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin)]
    usage = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "LC_ALL": "C"})
    assert re.findall(r"STACK:(\d+)", usage.stdout) == ["0"]


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("states", [8, 12, 14, 15, 16])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_kernel_on_a_gpu(bits: int, states: int) -> None:
    for sequences, length in ((5, 256), (2, 287), (1, 16), (3, 40)):
        x_NT = gaussian(sequences, length)
        found_NT = trellis.Trellis(bits, states).walks(torch.from_numpy(x_NT).cuda())
        assert found_NT.is_cuda
        assert np.array_equal(found_NT.cpu().numpy(), by_cpu(x_NT, bits, states))


@pytest.mark.gpu
@needs_gpu
def test_chunks_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from vqcompress.kernels import viterbi

    monkeypatch.setattr(viterbi, "SCRATCH", 150 * 256 * 4096)
    x_NT = gaussian(400, 256)
    found_NT = trellis.Trellis(2, 14).walks(torch.from_numpy(x_NT).cuda())
    assert np.array_equal(found_NT[::50].cpu().numpy(), by_cpu(x_NT[::50], 2, 14))
