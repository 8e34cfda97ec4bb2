"""The kernels around a product with rotated weights, and those of searches: by interpreter, ahead of time, on a GPU.

Shape legend: T rows, I columns, O outputs, S partial sums, N vectors, d their length, K entries.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import DTYPES, gaussian, generator, inputs
from kernels import ARCHS, needs_gpu, relative_rms
from torch import Tensor

from vqcompress.methods.hadamard import hadamard
from vqcompress.methods.vq import learned
from vqcompress.methods.vq.packing import pack

Call = Callable[..., Any]
# The relative error of rounding to each type, and that of sums in float32. The interpreter cuts off what bfloat16 does
# not hold, instead of rounding.
ERROR = {torch.float32: 5e-7, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7}
# (T, I): blocks of 1, 2, 32, 256 and 4096, and such that take several programs.
SHAPES = [(0, 64), (1, 1), (3, 17), (3, 768), (1, 4096), (2, 11008)]


def _interpreted(kernel: Any) -> None:
    import triton

    assert not isinstance(kernel, triton.JITFunction)


def rotate(x_TI: Tensor, signs_1B: Tensor, setting: int | None = None) -> Tensor:
    """By the kernel; with one of the candidates as config, counted from 0, instead of the guess."""
    import candidates

    from vqcompress.methods.triton import launch
    from vqcompress.methods.vq import kernel_rotate as module

    before = module.default_config
    try:
        if setting is not None:
            tried = list(candidates.of_rotate(launch.device_properties(x_TI.device), x_TI.shape[1]))
            module.default_config = lambda *_: tried[setting]
        return module.rotate(x_TI, signs_1B)
    finally:
        module.default_config = before


def finish(*arguments: Any) -> Tensor:
    from vqcompress.methods.vq import kernel_rotate as module

    return module.finish(*arguments)


def best(x_Nd: Tensor, book_Kd: Tensor, beam: int) -> tuple[Tensor, Tensor]:
    from vqcompress.methods.vq import kernel_nearest as module

    return module.best(x_Nd, book_Kd, beam)


def beam_search(x_Nd: Tensor, books_RKd: Tensor, beam: int) -> Tensor:
    return learned.nearest(x_Nd, books_RKd, beam, kernel=True)


def by_interpreter(name: str, *arguments: Any) -> Any:
    """One of the functions above; to be called in a process that has the interpreter on."""
    from vqcompress.methods.vq import kernel_nearest as search
    from vqcompress.methods.vq import kernel_rotate as rotation

    _interpreted(search._best)
    _interpreted(rotation._rotate)
    return globals()[name](*arguments)


def on_gpu(name: str, *arguments: Any) -> Any:
    """The same with tensors that are sent to a GPU and back."""
    there = (a.cuda() if isinstance(a, Tensor) else a for a in arguments)
    found = globals()[name](*there)
    tensors = found if isinstance(found, tuple) else (found,)
    assert all(t.is_cuda for t in tensors)
    return tuple(t.cpu() for t in tensors) if isinstance(found, tuple) else found.cpu()


def random_signs(columns: int) -> Tensor:
    """Float64 (I,) of ±1, as many of either as it happens."""
    return 1.0 - 2.0 * torch.randint(0, 2, (columns,), generator=generator(columns)).double()


def packed(signs_I: Tensor) -> Tensor:
    return pack((signs_I[None] < 0).int(), 1)


def check_rotate(call: Call, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """With a loud channel, a row of zeros and a quiet row."""
    x_TI, signs_I = inputs(*shape, dtype), random_signs(shape[1])
    expected_TI = hadamard(x_TI.double() * signs_I)
    y_TI = call("rotate", x_TI, packed(signs_I))
    assert y_TI.dtype == dtype
    assert y_TI.shape == shape
    for y_I, expected_I in zip(y_TI, expected_TI, strict=True):
        assert relative_rms(y_I, expected_I) <= ERROR[dtype]
    if call is on_gpu:
        assert torch.equal(call("rotate", x_TI.float(), packed(signs_I)).to(dtype), y_TI)


def check_finish(call: Call, sums: int, shape: tuple[int, int], rotated: bool, dtype: torch.dtype) -> None:
    """With a scale that has both signs, in the type of y."""
    partial_STO = gaussian((sums, *shape), sums)  # type: ignore[arg-type]
    scale_O = gaussian((1, shape[1]), 1)[0].bfloat16()
    sum_TO = partial_STO.double().sum(0)
    y_TO = call("finish", partial_STO, scale_O, dtype, rotated)
    assert y_TO.dtype == dtype
    assert y_TO.shape == shape
    assert relative_rms(y_TO, (hadamard(sum_TO) if rotated else sum_TO) * scale_O.double()) <= ERROR[dtype]
    if call is on_gpu:
        exact_TO = call("finish", partial_STO, scale_O, torch.float32, rotated)
        assert relative_rms(y_TO, exact_TO.to(dtype)) <= 5e-4


def check_best(call: Call, vectors: int, count: int, length: int, beam: int) -> None:
    """As near as the nearest, to float32; equal to torch where sums are exact and ties are common."""
    x_Nd, book_Kd = gaussian((vectors, length), 3), gaussian((count, length), 4)
    if vectors > 1:
        x_Nd[0], x_Nd[1, 0] = 0, -3e4
    code_Nb, score_Nb = call("best", x_Nd, book_Kd, beam)
    exact_NK = book_Kd.double().square().sum(1) / 2 - x_Nd.double() @ book_Kd.double().T
    bound_N1 = 1e-6 * (1 + book_Kd.abs().max() ** 2 + x_Nd.abs().amax(1, keepdim=True)).double() * length
    assert code_Nb.dtype == torch.int32
    assert (exact_NK.gather(1, code_Nb.long()) - exact_NK.sort(1).values[:, :beam] <= bound_N1).all()
    assert ((score_Nb - exact_NK.gather(1, code_Nb.long())).abs() <= bound_N1).all()
    assert all(len(set(row)) == beam for row in code_Nb.tolist())

    x_Nd, book_Kd = (x_Nd * 2).round().clamp(-8, 8) / 2, book_Kd.round()
    code_Nb, score_Nb = call("best", x_Nd, book_Kd, beam)
    if vectors:
        assert torch.equal(code_Nb[:, :1].long(), learned.nearest(x_Nd, book_Kd[None], 1))
    exact_NK = book_Kd.square().sum(1) / 2 - x_Nd @ book_Kd.T
    order_Nb = exact_NK.argsort(dim=1, stable=True)[:, :beam]
    assert torch.equal(code_Nb.long(), order_Nb)
    assert torch.equal(score_Nb, exact_NK.gather(1, order_Nb))


def check_beam_search(call: Call, vectors: int, size: tuple[int, int, int], beam: int) -> None:
    """The codes of the search that looks at every score, where stages are as fine as they are in practice."""
    stages, count, length = size
    books_RKd = gaussian((stages * count, length), 6).view(size) * 0.4 ** torch.arange(stages).view(-1, 1, 1)
    x_Nd = gaussian((vectors, length), 7)
    code_NR = call("beam_search", x_Nd, books_RKd, beam)
    assert (code_NR.shape, code_NR.dtype) == ((vectors, stages), torch.int64)
    assert torch.equal(code_NR, learned.nearest(x_Nd, books_RKd, beam, kernel=False))


BEAMS = [
    (0, (2, 8, 4), 2),
    (1, (2, 5, 3), 8),
    (20, (2, 64, 8), 1),
    (20, (2, 64, 4), 4),
    (9, (4, 3, 2), 8),
]


@pytest.mark.parametrize(
    ("shape", "dtype"), [*((s, torch.float32) for s in SHAPES), *(((3, 96), dtype) for dtype in DTYPES[:2])], ids=str
)
def test_rotate(interpreted: Call, shape: tuple[int, int], dtype: torch.dtype) -> None:
    check_rotate(lambda *a: interpreted(by_interpreter, *a), shape, dtype)


@pytest.mark.parametrize("shape", [(2, 96), pytest.param((3, 4096), marks=pytest.mark.slow)], ids=str)
def test_rotate_with_other_settings(interpreted: Call, shape: tuple[int, int]) -> None:
    """Of candidates that differ in more than warps."""
    import candidates

    from vqcompress.methods.triton import launch

    x_TI, signs_I = inputs(*shape), random_signs(shape[1])
    sizes = [s["SIZE"] for s in candidates.of_rotate(launch.DEVICES["cpu"], shape[1])]
    assert len(set(sizes)) > 3
    for size in set(sizes):
        y_TI = interpreted(by_interpreter, "rotate", x_TI, packed(signs_I), sizes.index(size))
        assert relative_rms(y_TI, hadamard(x_TI.double() * signs_I)) <= ERROR[torch.float32]


@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize(
    ("sums", "shape", "dtype"),
    [
        (1, (0, 8), torch.float32),
        (1, (1, 4096), torch.bfloat16),
        (3, (17, 17), torch.float32),
        (9, (3, 96), torch.float32),
        pytest.param(2, (1, 32768), torch.float32, marks=pytest.mark.slow),
        (5, (1, 768), torch.float16),
    ],
    ids=str,
)
def test_finish(interpreted: Call, sums: int, shape: tuple[int, int], dtype: torch.dtype, rotated: bool) -> None:
    check_finish(lambda *a: interpreted(by_interpreter, *a), sums, shape, rotated, dtype)


@pytest.mark.parametrize(
    ("vectors", "count", "length", "beam"),
    [(0, 5, 2, 2), (1, 1, 1, 1), (3, 5, 3, 5), (17, 300, 8, 1), (9, 700, 16, 1), (9, 300, 4, 3)],
)
def test_best(interpreted: Call, vectors: int, count: int, length: int, beam: int) -> None:
    check_best(lambda *a: interpreted(by_interpreter, *a), vectors, count, length, beam)


@pytest.mark.parametrize(("vectors", "size", "beam"), BEAMS)
def test_beam_search(interpreted: Call, vectors: int, size: tuple[int, int, int], beam: int) -> None:
    check_beam_search(lambda *a: interpreted(by_interpreter, *a), vectors, size, beam)


def test_a_beam_search_is_cut_into_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """No temporary is larger than was said, and the codes are the same."""
    x_Nd, books_RKd = gaussian((50, 4), 1), gaussian((32, 4), 2).view(2, 16, 4)
    expected_NR, largest = learned.nearest(x_Nd, books_RKd, 3), []
    monkeypatch.setattr(learned, "CHUNK", 200)
    addmm = torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda *a, **k: largest.append((y := addmm(*a, **k)).numel()) or y)
    assert torch.equal(learned.nearest(x_Nd, books_RKd, 3), expected_NR)
    assert 0 < max(largest) <= 200


def test_what_does_not_fit_is_refused() -> None:
    pytest.importorskip("triton")
    from vqcompress.methods.vq import kernel_nearest as search
    from vqcompress.methods.vq import kernel_rotate as rotation

    x_TI = torch.ones(2, 9)
    with pytest.raises(ValueError, match=r"signs are torch.uint8 \(1, 1\)"):
        rotation.rotate(x_TI, torch.zeros(1, 1, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"scale is \(8,\); 9 outputs"):
        rotation.finish(x_TI[None], torch.ones(8), torch.float16, True)
    with pytest.raises(ValueError, match="2 of 9, 4 of 8, 1"):
        search.best(x_TI, torch.ones(4, 8), 1)
    with pytest.raises(ValueError, match="2 of 9, 4 of 9, 5"):
        search.best(x_TI, torch.ones(4, 9), 5)


def _recorded(arch: int | str) -> Iterator[tuple[str, Any]]:
    """What is launched for shapes of decoding, of prefill and of quantization."""
    from vqcompress.methods.triton import launch
    from vqcompress.methods.vq import kernel_nearest as search
    from vqcompress.methods.vq import kernel_rotate as rotation

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    bf16 = torch.bfloat16
    with launch.recording(arch) as calls:
        for rows, columns, dtype in ((1, 4096, bf16), (512, 11008, torch.float16), (1, 32768, torch.float32)):
            rotation.rotate(empty(rows, columns, dtype=dtype), empty(1, columns // 8, dtype=torch.uint8))
        rotation.finish(empty(8, 1, 4096), empty(4096, dtype=bf16), bf16, True)
        rotation.finish(empty(1, 4096, 14336), empty(14336, dtype=bf16), bf16, True)
        rotation.finish(empty(4, 512, 11008), empty(11008, dtype=bf16), torch.float16, False)
        search.best(empty(4096, 8), empty(1 << 16, 8), 1)
        search.best(empty(1 << 20, 1), empty(64, 1), 1)
        search.best(empty(1 << 20, 16), empty(4096, 16), 8)
        nothing = empty(0, 64)
        rotation.rotate(nothing, empty(1, 8, dtype=torch.uint8))
        rotation.finish(nothing[None], empty(64), bf16, True)
        search.best(nothing[:, :8], empty(4, 8), 1)
    assert len(calls) == 9
    for call in calls:
        yield call.kernel.__name__, call


@pytest.mark.parametrize("arch", [90, *(pytest.param(arch, marks=pytest.mark.slow) for arch in ARCHS if arch != 90)])
def test_compiles_without_spills(arch: int | str) -> None:
    """For each device: loads of 16 bytes, no TF32 in a search, no fused operation where the CPU has none."""
    pytest.importorskip("triton")
    import ahead

    from vqcompress.methods.triton import launch

    for name, call in _recorded(arch):
        compiled = ahead.compile_call(call, arch)
        found = ahead.resources(compiled)
        text = compiled.asm["amdgcn" if arch == "gfx942" else "ptx"]
        assert found.stack == 0, name
        assert found.shared <= launch.DEVICES[arch].shared, name
        assert not re.search("mma|mfma", text), name
        if name in ("_rotate", "_finish"):
            assert re.search(
                r"ld\.global\.v4\.b32|ld\.global\.v8\.b32|global_load_dwordx4|buffer_load_dwordx4", text
            ), name


@pytest.mark.gpu
@needs_gpu
def test_rotate_on_a_gpu() -> None:
    for shape in ((1, 14336), (129, 28672), (3, 96), (1, 32768)):
        for dtype in DTYPES:
            check_rotate(on_gpu, shape, dtype)


@pytest.mark.gpu
@needs_gpu
def test_all_settings_on_a_gpu() -> None:
    import candidates

    from vqcompress.methods.triton import launch

    for shape in ((17, 11008), (3, 32768)):
        x_TI, signs_I = inputs(*shape), random_signs(shape[1])
        tried = list(candidates.of_rotate(launch.device_properties(torch.device("cuda", 0)), shape[1]))
        for setting in range(len(tried)):
            y_TI = on_gpu("rotate", x_TI, packed(signs_I), setting)
            assert relative_rms(y_TI, hadamard(x_TI.double() * signs_I)) <= ERROR[torch.float32], tried[setting]


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("rotated", [True, False])
def test_finish_on_a_gpu(rotated: bool) -> None:
    for sums, shape in ((8, (1, 4096)), (3, (129, 11008)), (1, (17, 17))):
        for dtype in DTYPES:
            check_finish(on_gpu, sums, shape, rotated, dtype)


@pytest.mark.gpu
@needs_gpu
def test_best_on_a_gpu() -> None:
    for count, length in ((5, 3), (256, 8), (1 << 16, 8)):
        for beam in (1, 4):
            check_best(on_gpu, 1000, count, length, beam)


@pytest.mark.gpu
@needs_gpu
def test_beam_search_on_a_gpu() -> None:
    for vectors, size, beam in (BEAMS[3], (2000, (2, 256, 8), 8)):
        check_beam_search(on_gpu, vectors, size, beam)
