"""The kernels around a product with rotated weights, and those of searches: by interpreter, ahead of time, on a GPU.

Shape legend: T rows, I columns, O outputs, S partial sums, N vectors, d their length, K entries.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import DTYPES, gaussian, generator, inputs
from kernels import ARCHS, needs_gpu, relative_rms
from torch import Tensor

from vqcompress.methods.hadamard import hadamard
from vqcompress.methods.packing import pack
from vqcompress.methods.triton import launch
from vqcompress.methods.vq import learned

Call = Callable[..., Any]
# The relative error of rounding to each type, and that of sums in float32. The interpreter cuts off what bfloat16 does
# not hold, instead of rounding.
ERROR = {torch.float32: 5e-7, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7}


def rotate(x_TI: Tensor, signs_1B: Tensor, setting: int | None = None) -> Tensor:
    """By the kernel; with one of the candidates as config, counted from 0, instead of the default."""
    import candidates

    from vqcompress.methods.triton import rotate as kernel_rotate

    gpu = launch.device_properties(x_TI.device)
    config = None if setting is None else list(candidates.of_rotate(gpu, x_TI.shape[1]))[setting]
    with candidates.trying("rotate", config):
        return kernel_rotate.rotate(x_TI, signs_1B)


def finish(*arguments: Any) -> Tensor:
    from vqcompress.methods.triton import rotate as kernel_rotate

    return kernel_rotate.finish(*arguments)


def best(x_Nd: Tensor, book_Kd: Tensor, beam: int) -> tuple[Tensor, Tensor]:
    from vqcompress.methods.vq import kernel_nearest

    return kernel_nearest.best(x_Nd, book_Kd, beam)


def beam_search(x_Nd: Tensor, books_RKd: Tensor, beam: int) -> Tensor:
    return learned.nearest(x_Nd, books_RKd, beam, kernel=True)


def on_gpu(function: Call, *arguments: Any) -> Any:
    """The function's result with tensors that are sent to a GPU and back."""
    found = function(*(a.cuda() if isinstance(a, Tensor) else a for a in arguments))
    return tuple(t.cpu() for t in found) if isinstance(found, tuple) else found.cpu()


def random_signs(columns: int) -> Tensor:
    """Float64 (I,) of ±1."""
    return 1.0 - 2.0 * torch.randint(0, 2, (columns,), generator=generator(columns)).double()


def packed(signs_I: Tensor) -> Tensor:
    return pack((signs_I[None] < 0).int(), 1)


def check_rotate(call: Call, shape: tuple[int, int], dtype: torch.dtype, setting: int | None = None) -> None:
    """With a loud channel, a row of zeros and a quiet row."""
    x_TI, signs_I = inputs(*shape, dtype), random_signs(shape[1])
    expected_TI = hadamard(x_TI.double() * signs_I)
    y_TI = call(rotate, x_TI, packed(signs_I), setting)
    assert (y_TI.dtype, y_TI.shape) == (dtype, shape)
    for y_I, expected_I in zip(y_TI, expected_TI, strict=True):
        assert relative_rms(y_I, expected_I) <= ERROR[dtype]


def check_finish(call: Call, sums: int, shape: tuple[int, int], rotated: bool, dtype: torch.dtype) -> None:
    """With a scale that has both signs."""
    partial_STO = torch.randn((sums, *shape), generator=generator(sums))
    scale_O = gaussian((1, shape[1]), 1)[0].bfloat16()
    sum_TO = partial_STO.double().sum(0)
    y_TO = call(finish, partial_STO, scale_O, dtype, rotated)
    assert (y_TO.dtype, y_TO.shape) == (dtype, shape)
    assert relative_rms(y_TO, (hadamard(sum_TO) if rotated else sum_TO) * scale_O.double()) <= ERROR[dtype]


def check_best(call: Call, vectors: int, count: int, length: int, beam: int) -> None:
    """As near as the nearest, to float32; equal to torch where sums are exact and ties are common."""
    x_Nd, book_Kd = gaussian((vectors, length), 3), gaussian((count, length), 4)
    if vectors > 1:
        x_Nd[0], x_Nd[1, 0] = 0, -3e4
    code_Nb, score_Nb = call(best, x_Nd, book_Kd, beam)
    exact_NK = book_Kd.double().square().sum(1) / 2 - x_Nd.double() @ book_Kd.double().T
    bound_N1 = 1e-6 * (1 + book_Kd.abs().max() ** 2 + x_Nd.abs().amax(1, keepdim=True)).double() * length
    assert code_Nb.dtype == torch.int32
    assert (exact_NK.gather(1, code_Nb.long()) - exact_NK.sort(1).values[:, :beam] <= bound_N1).all()
    assert ((score_Nb - exact_NK.gather(1, code_Nb.long())).abs() <= bound_N1).all()
    assert all(len(set(row)) == beam for row in code_Nb.tolist())

    x_Nd, book_Kd = (x_Nd * 2).round().clamp(-8, 8) / 2, book_Kd.round()
    code_Nb, score_Nb = call(best, x_Nd, book_Kd, beam)
    exact_NK = book_Kd.square().sum(1) / 2 - x_Nd @ book_Kd.T
    order_Nb = exact_NK.argsort(dim=1, stable=True)[:, :beam]
    assert torch.equal(code_Nb.long(), order_Nb)
    assert torch.equal(score_Nb, exact_NK.gather(1, order_Nb))


def check_beam_search(call: Call, vectors: int, size: tuple[int, int, int], beam: int) -> None:
    """The codes of the search that looks at every score, where stages are as fine as they are in practice."""
    stages, count, length = size
    books_RKd = gaussian((stages * count, length), 6).view(size) * 0.4 ** torch.arange(stages).view(-1, 1, 1)
    x_Nd = gaussian((vectors, length), 7)
    code_NR = call(beam_search, x_Nd, books_RKd, beam)
    assert torch.equal(code_NR, learned.nearest(x_Nd, books_RKd, beam, kernel=False))


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        # Blocks of 1, 256, 32 and 4096, and such that take several programs.
        ((0, 64), torch.float32),
        ((3, 17), torch.float32),
        ((3, 768), torch.bfloat16),
        ((3, 96), torch.float16),
        ((1, 4096), torch.float32),
        ((2, 11008), torch.float32),
    ],
    ids=str,
)
def test_rotate(interpreted: Call, shape: tuple[int, int], dtype: torch.dtype) -> None:
    check_rotate(interpreted, shape, dtype)


@pytest.mark.parametrize("shape", [(2, 96), pytest.param((3, 4096), marks=pytest.mark.slow)], ids=str)
def test_rotate_with_other_settings(interpreted: Call, shape: tuple[int, int]) -> None:
    """Of candidates that differ in more than warps."""
    import candidates

    sizes = [s["SIZE"] for s in candidates.of_rotate(launch.DEVICES["cpu"], shape[1])]
    assert len(set(sizes)) > 3
    for size in set(sizes):
        check_rotate(interpreted, shape, torch.float32, sizes.index(size))


@pytest.mark.parametrize(
    ("sums", "shape", "dtype", "rotated"),
    [
        (1, (0, 8), torch.float32, True),
        (1, (1, 4096), torch.bfloat16, True),
        (3, (17, 17), torch.float32, True),
        (9, (3, 96), torch.float32, True),
        (5, (1, 768), torch.float16, False),
        (3, (17, 17), torch.float32, False),
        pytest.param(2, (1, 32768), torch.float32, True, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_finish(interpreted: Call, sums: int, shape: tuple[int, int], dtype: torch.dtype, rotated: bool) -> None:
    check_finish(interpreted, sums, shape, rotated, dtype)


@pytest.mark.parametrize(
    ("vectors", "count", "length", "beam"), [(0, 5, 2, 2), (3, 5, 3, 5), (9, 300, 16, 1), (9, 300, 4, 3)]
)
def test_best(interpreted: Call, vectors: int, count: int, length: int, beam: int) -> None:
    check_best(interpreted, vectors, count, length, beam)


@pytest.mark.parametrize(
    ("vectors", "size", "beam"), [(0, (2, 8, 4), 2), (1, (2, 5, 3), 8), (20, (2, 64, 4), 4), (9, (4, 3, 2), 8)]
)
def test_beam_search(interpreted: Call, vectors: int, size: tuple[int, int, int], beam: int) -> None:
    check_beam_search(interpreted, vectors, size, beam)


@pytest.mark.parametrize("arch", [90, *(pytest.param(arch, marks=pytest.mark.slow) for arch in ARCHS if arch != 90)])
def test_compiles_without_spills(arch: int | str) -> None:
    """For shapes of decoding, prefill and quantization: loads of 16 bytes, and no TF32 in a search."""
    pytest.importorskip("triton")
    import ahead

    from vqcompress.methods.triton import rotate as kernel_rotate
    from vqcompress.methods.vq import kernel_nearest

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    bf16 = torch.bfloat16
    with launch.recording(arch) as calls:
        for rows, columns, dtype in ((1, 4096, bf16), (512, 11008, torch.float16)):
            kernel_rotate.rotate(empty(rows, columns, dtype=dtype), empty(1, columns // 8, dtype=torch.uint8))
        kernel_rotate.finish(empty(8, 1, 4096), empty(4096, dtype=bf16), bf16, True)
        kernel_rotate.finish(empty(4, 512, 11008), empty(11008, dtype=bf16), torch.float16, False)
        kernel_nearest.best(empty(4096, 8), empty(1 << 16, 8), 1)
        kernel_nearest.best(empty(1 << 20, 16), empty(4096, 16), 8)
    for call in calls:
        compiled = ahead.compile_call(call, arch)
        used, text = ahead.resources(compiled), compiled.asm["amdgcn" if arch == "gfx942" else "ptx"]
        assert used.stack == 0
        assert used.shared <= launch.DEVICES[arch].shared
        assert not re.search("mma|mfma", text)
        if call.kernel.__name__ == "_transform":
            wide = r"ld\.global\.v4\.b32|ld\.global\.v8\.b32|global_load_dwordx4|buffer_load_dwordx4"
            assert re.search(wide, text)


@pytest.mark.gpu
@needs_gpu
def test_rotate_and_finish_on_a_gpu() -> None:
    import candidates

    for shape in ((1, 14336), (129, 28672), (3, 96), (1, 32768)):
        for dtype in DTYPES:
            check_rotate(on_gpu, shape, dtype)
            for rotated in (True, False):
                check_finish(on_gpu, 3, shape, rotated, dtype)
    for shape in ((17, 11008), (3, 32768)):
        gpu = launch.device_properties(torch.device("cuda", 0))
        for setting in range(len(list(candidates.of_rotate(gpu, shape[1])))):
            check_rotate(on_gpu, shape, torch.float32, setting)


@pytest.mark.gpu
@needs_gpu
def test_searches_on_a_gpu() -> None:
    for count, length in ((5, 3), (256, 8), (1 << 16, 8)):
        for beam in (1, 4):
            check_best(on_gpu, 1000, count, length, beam)
    for vectors, size, beam in ((20, (2, 64, 4), 4), (2000, (2, 256, 8), 8)):
        check_beam_search(on_gpu, vectors, size, beam)
