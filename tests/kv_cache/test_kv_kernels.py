"""Attention to keys and values as codes: its reference and its kernel by interpreter, ahead of time, on a GPU.

Shape legend: B rows, Q heads of queries, H of keys and values, T tokens, D channels, d of a group, G groups, E entries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from cases import generator
from kernels import ARCHS, needs_gpu, relative_rms
from torch import Tensor

from vqcompress.kv_cache import codes as kv

Call = Callable[..., Any]
META = torch.device("meta")


@dataclass(frozen=True)
class Size:
    """Of a cache. angles: rows of cosines and sines, 0 for none. span: tokens that are attended to, all if None."""

    batch: int = 2
    heads: int = 2
    repeat: int = 1
    tokens: int = 17
    channels: int = 64
    d: int = 4
    angles: int = 0
    span: tuple[int, int] | None = None


def drawn(size: Size, dtype: torch.dtype, device: torch.device | str = "cpu") -> list[Any]:
    """The arguments of `attend`. On `meta` without numbers."""
    draw, groups = generator(size.tokens + size.d), size.channels // size.d

    def normal(*shape: int) -> Tensor:
        return torch.empty(shape, device="meta") if device == META else torch.randn(shape, generator=draw)

    codes, books, angles = list[Tensor](), list[Tensor](), list[Tensor]()
    for _ in range(2):
        code = (normal(size.batch, size.heads, size.tokens, groups).abs() * 1e3).to(torch.int32).remainder(256)
        codes.append(code.to(torch.uint8))
        books.append(normal(size.heads, groups, kv.ENTRIES, size.d).half())
    if size.angles:
        angle = normal(size.angles, size.tokens, size.channels // 2) * 3
        # A factor as YaRN has it.
        angles = [1.1 * angle.cos().repeat(1, 1, 2), 1.1 * angle.sin().repeat(1, 1, 2)]
    q_BQD = normal(size.batch, size.heads * size.repeat, size.channels)
    if device != META:
        # A loud channel.
        q_BQD[..., 5] *= 30
    return [q_BQD.to(dtype), codes, books, angles, *(size.span or (0, size.tokens)), size.channels**-0.5]


def attend(arguments: list[Any], config: Any = None) -> Any:
    """By the kernel, with its default config or another."""
    from vqcompress.kv_cache import kernel

    with pytest.MonkeyPatch.context() as patch:
        if config is not None:
            patch.setattr(kernel, "default_config", lambda *_: config)
        return kernel.attend(*arguments)


def on_gpu(arguments: list[Any]) -> Any:
    moved = torch.utils._pytree.tree_map_only(Tensor, lambda t: t.cuda(), arguments)
    return torch.utils._pytree.tree_map_only(Tensor, lambda t: t.cpu(), attend(moved))


def expected(arguments: list[Any]) -> tuple[Tensor, Tensor]:
    """Float64, token by token and head by head; shares no code with what it checks."""
    q_BQD, (codes_k, codes_v), (book_k, book_v), angles, start, end, scaling = arguments
    (batch, heads, _, groups), (_, queries, channels) = codes_k.shape, q_BQD.shape
    out, lse = torch.zeros(q_BQD.shape, dtype=torch.float64), torch.zeros(batch, queries, dtype=torch.float64)
    g_G, half = torch.arange(groups), channels // 2
    for b in range(batch):
        for n in range(queries):
            h, scores, values = n * heads // queries, [], []
            for t in range(start, end):
                k_D = book_k.double()[h, g_G, codes_k[b, h, t].long()].flatten()
                if angles:
                    cos_BTD, sin_BTD = angles
                    row = b if len(cos_BTD) > 1 else 0
                    turn = torch.complex(cos_BTD[row, t, :half].double(), sin_BTD[row, t, :half].double())
                    turned = torch.complex(k_D[:half], k_D[half:]) * turn
                    k_D = torch.cat([turned.real, turned.imag])
                scores.append(q_BQD[b, n].double() @ k_D * scaling)
                values.append(book_v.double()[h, g_G, codes_v[b, h, t].long()].flatten())
            lse[b, n] = torch.stack(scores).logsumexp(0) if scores else -torch.inf
            if scores:
                out[b, n] = torch.stack(scores).softmax(0) @ torch.stack(values)
    return out, lse


def check(call: Call, size: Size, dtype: torch.dtype, bound: float) -> None:
    """Near the expected values, finite, and zero where no token is attended to."""
    arguments = drawn(size, dtype)
    (out_BQD, lse_BQ), (expected_BQD, expected_BQ) = call(arguments), expected(arguments)
    assert out_BQD.dtype == lse_BQ.dtype == torch.float32
    assert torch.equal(lse_BQ.isneginf(), expected_BQ.isneginf())
    assert (out_BQD[lse_BQ.isneginf()] == 0).all()
    there = ~lse_BQ.isneginf()
    assert relative_rms(out_BQD[there], expected_BQD[there]) <= bound
    assert ((lse_BQ - expected_BQ)[there].abs() <= bound * (1 + expected_BQ[there].abs())).all()


SIZES = [
    (Size(tokens=1), torch.bfloat16),
    (Size(tokens=3, repeat=4, d=8, angles=2), torch.float16),
    (Size(channels=128, d=8, span=(2, 15)), torch.float32),
    (Size(tokens=65, batch=1, d=2, channels=96, angles=1, span=(5, 65)), torch.bfloat16),
    (Size(tokens=3, batch=1, repeat=17, heads=1, channels=256), torch.float16),
    (Size(tokens=3, span=(3, 1)), torch.float32),
]


@pytest.mark.parametrize(("size", "dtype"), SIZES, ids=str)
def test_the_reference(size: Size, dtype: torch.dtype) -> None:
    check(lambda arguments: kv.attend(*arguments), size, dtype, 2e-6)


@pytest.mark.parametrize(("size", "dtype"), SIZES, ids=str)
def test_attend(interpreted: Call, size: Size, dtype: torch.dtype) -> None:
    check(lambda arguments: interpreted(attend, arguments), size, dtype, 5e-6)


def test_slices_are_merged(interpreted: Call) -> None:
    """Some of them are empty."""
    config = {"C": 16, "num_warps": 4, "SPLIT": 5}
    size = Size(tokens=50, repeat=2, heads=1, batch=1, angles=1, span=(1, 49))
    check(lambda arguments: interpreted(attend, arguments, config), size, torch.bfloat16, 5e-6)


def test_the_operator_is_sound() -> None:
    torch.library.opcheck(kv.attend, tuple(drawn(Size(tokens=9, angles=1, span=(1, 7)), torch.float32)))


REAL = [
    Size(1, 32, 1, 32768, 128),
    Size(1, 8, 4, 32768, 128, angles=1),
    Size(1, 32, 1, 32768, 128, 2, angles=1),
    Size(8, 8, 4, 4096, 128, 8, angles=1),
    Size(1, 4, 2, 32768, 256, 4, angles=1),
    Size(1, 32, 1, 32768, 96, angles=1),
]


@pytest.mark.parametrize(
    ("arch", "sizes"), [(90, REAL[1:2]), *(pytest.param(arch, REAL, marks=pytest.mark.slow) for arch in ARCHS)]
)
def test_compiles_without_spills(arch: int | str, sizes: list[Size]) -> None:
    pytest.importorskip("triton")
    import ahead

    from vqcompress.methods.triton import launch

    for size in sizes:
        with launch.recording(arch) as calls:
            attend(drawn(size, torch.bfloat16, META))
        for call in calls:
            compiled = ahead.compile_call(call, arch)
            found, name = ahead.resources(compiled), call.kernel.__name__
            assert found.stack == 0, (name, size)
            assert found.shared <= launch.DEVICES[arch].shared // 2, (name, size)
            assert arch == "gfx942" or ("mma" in compiled.asm["ptx"]) == (name == "_attend"), size


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(
    ("size", "dtype"),
    [*SIZES[:2], (Size(8, 8, 4, 700, 128, span=(4, 650)), torch.bfloat16), (Size(1, 32, 1, 900, 128), torch.float16)],
    ids=str,
)
def test_attend_on_a_gpu(size: Size, dtype: torch.dtype) -> None:
    check(on_gpu, size, dtype, 2e-3)
