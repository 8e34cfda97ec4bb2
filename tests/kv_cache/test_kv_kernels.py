"""Keys and values as codes: what codes and attention to them mean, and their kernels by interpreter, ahead of time, on
a GPU.

Shape legend: B rows, Q heads of queries, H of keys and values, T tokens, D channels, d of a group, G groups, E entries.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from cases import DTYPES, generator
from kernels import ARCHS, needs_gpu, relative_rms
from torch import Tensor
from vqcompress.kv_cache.coded_tokens import CodedTokens

from vqcompress.kv_cache import codes as kv

Call = Callable[..., Any]
META = torch.device("meta")


@pytest.fixture(scope="module")
def interpret(interpreted: Call) -> Call:
    return lambda *a: interpreted(by_interpreter, *a)


@dataclass(frozen=True)
class Size:
    """Of a cache. angles: rows of cosines and sines, 0 for none. one_book: for all heads and groups."""

    batch: int = 2
    heads: int = 2
    repeat: int = 1
    tokens: int = 17
    channels: int = 64
    d: int = 4
    angles: int = 0
    scaled: bool = False
    masked: bool = False
    one_book: bool = False


def drawn(size: Size, dtype: torch.dtype, device: torch.device | str = "cpu") -> tuple[list[Any], dict[str, Any]]:
    """What `attend` is given: q, codes and codebooks; mask, angles and scales by name. On `meta` without numbers."""
    draw, groups = generator(size.tokens + size.d), size.channels // size.d

    def normal(*shape: int) -> Tensor:
        return torch.empty(shape, device="meta") if device == META else torch.randn(shape, generator=draw)

    of = (size.batch, size.heads, size.tokens)
    book = (1, 1) if size.one_book else (size.heads, groups)
    codes = [(normal(*of, groups).abs() * 1e3).to(torch.int32).remainder(256).to(torch.uint8) for _ in range(2)]
    books = [normal(*book, kv.ENTRIES, size.d).half() for _ in range(2)]
    more: dict[str, Any] = {}
    if size.angles:
        angle = normal(size.angles, size.tokens, size.channels // 2) * 3
        # A factor as YaRN has it.
        more |= {"cos_BTD": 1.1 * angle.cos().repeat(1, 1, 2), "sin_BTD": 1.1 * angle.sin().repeat(1, 1, 2)}
    if size.scaled:
        more |= {"scale_k": normal(*of).abs().half(), "scale_v": normal(*of).abs().half()}
    if size.masked:
        more["mask_BT"] = normal(size.batch, size.tokens) > -0.5
    q_BQD = normal(size.batch, size.heads * size.repeat, size.channels)
    if device != META:
        # A loud channel; a row that may attend to nothing; one whose first tokens are padding.
        q_BQD[..., 5] *= 30
        if size.masked:
            more["mask_BT"][0] = False
            more["mask_BT"][-1, :3] = False
    return [q_BQD.to(dtype), codes[0], books[0], codes[1], books[1], size.channels**-0.5], more


def tokens(arguments: list[Any], start: int, end: int, more: dict[str, Any]) -> tuple[Tensor, CodedTokens, float]:
    q_BQD, *stored, scaling = arguments
    return q_BQD, CodedTokens(*stored, start, end, **more), scaling


def attend(arguments: list[Any], start: int, end: Any, more: dict[str, Any], config: Any = None) -> Any:
    """By the kernels, with the guess or other config."""
    from vqcompress.kv_cache import kernel as module
    from vqcompress.methods.triton import launch

    guess = module.default_config
    try:
        if config is not None:
            module.default_config = lambda *_: config
        assert launch.table(launch.device_properties(arguments[0].device)) == {} or config is None
        return module.attend(*tokens(arguments, start, end, more))
    finally:
        module.default_config = guess


def encode(*arguments: Any) -> Tensor:
    from vqcompress.kv_cache import kernel_encode as module

    return module.encode(*arguments)


def by_interpreter(name: str, *arguments: Any) -> Any:
    """One of the functions above; to be called in a process that has the interpreter on."""
    import triton

    from vqcompress.kv_cache import kernel as module

    assert not isinstance(module._attend_one, triton.JITFunction)
    return globals()[name](*arguments)


def on_gpu(name: str, *arguments: Any) -> Any:
    """The same with tensors that are sent to a GPU and back."""
    moved = torch.utils._pytree.tree_map_only(Tensor, lambda t: t.cuda(), list(arguments))
    return torch.utils._pytree.tree_map_only(Tensor, lambda t: t.cpu(), globals()[name](*moved))


def expected(arguments: list[Any], start: int, end: int, more: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Float64, token by token and head by head; shares no code with what it checks."""
    q_BQD, codes_k, book_k, codes_v, book_v, scaling = arguments
    (batch, heads, _, groups), (_, queries, channels) = codes_k.shape, q_BQD.shape
    out, lse = torch.zeros(q_BQD.shape, dtype=torch.float64), torch.zeros(batch, queries, dtype=torch.float64)
    books = [b.double().expand(heads, groups, -1, -1) for b in (book_k, book_v)]
    g_G, half = torch.arange(groups), channels // 2
    for b in range(batch):
        for n in range(queries):
            h, scores, values = n * heads // queries, [], []
            for t in range(start, min(end, codes_k.shape[2])):
                if "mask_BT" in more and not more["mask_BT"][b, t]:
                    continue
                k_D, v_D = (
                    books[i][h, g_G, codes[b, h, t].long()].flatten() for i, codes in enumerate((codes_k, codes_v))
                )
                if "cos_BTD" in more:
                    row = b if len(more["cos_BTD"]) > 1 else 0
                    turn = torch.complex(*(more[name][row, t, :half].double() for name in ("cos_BTD", "sin_BTD")))
                    turned = torch.complex(k_D[:half], k_D[half:]) * turn
                    k_D = torch.cat([turned.real, turned.imag])
                if "scale_k" in more:
                    k_D, v_D = k_D * more["scale_k"][b, h, t].double(), v_D * more["scale_v"][b, h, t].double()
                scores.append(q_BQD[b, n].double() @ k_D * scaling)
                values.append(v_D)
            lse[b, n] = torch.stack(scores).logsumexp(0) if scores else -torch.inf
            if scores:
                out[b, n] = torch.stack(scores).softmax(0) @ torch.stack(values)
    return out, lse


def check_attend(
    call: Call,
    size: Size,
    dtype: torch.dtype,
    span: tuple[int, int] | None = None,
    config: Any = None,
    bound: float = 5e-6,
) -> None:
    """Near what is expected, finite, and zero where no token is attended to."""
    start, end = span or (0, size.tokens)
    arguments, more = drawn(size, dtype)
    out_BQD, lse_BQ = call("attend", arguments, start, end, more, config)
    expected_BQD, expected_BQ = expected(arguments, start, end, more)
    assert out_BQD.dtype == lse_BQ.dtype == torch.float32
    assert torch.equal(lse_BQ.isneginf(), expected_BQ.isneginf())
    assert (out_BQD[lse_BQ.isneginf()] == 0).all()
    there = ~lse_BQ.isneginf()
    assert relative_rms(out_BQD[there], expected_BQD[there]) <= bound
    assert ((lse_BQ - expected_BQ)[there].abs() <= bound * (1 + expected_BQ[there].abs())).all()


def check_encode(call: Call, size: Size, dtype: torch.dtype) -> None:
    """The codes of the reference, but where float32 cannot tell which entry is nearer; from a transposed x."""
    arguments, more = drawn(size, dtype)
    draw = generator(3)
    x_BHTD = torch.randn(size.batch, size.tokens, size.heads, size.channels, generator=draw).to(dtype).transpose(1, 2)
    x_BHTD[..., 1] *= 100
    book, codes_BHTG, angles = arguments[2], arguments[1], list(more.values())[:2]
    plain = kv.apply_rope(x_BHTD, *angles, inverse=True) if angles else x_BHTD.float()
    found = call("encode", x_BHTD, book, *angles)
    assert (found.dtype, found.shape) == (torch.uint8, codes_BHTG.shape)
    other = found != kv.encode(plain, book)
    assert other.float().mean() < 1e-3
    x_BHTGd = plain.double().unflatten(-1, (-1, size.d))
    errors = [
        (x_BHTGd - kv.decode(c, book).unflatten(-1, (-1, size.d))).norm(dim=-1) for c in (found, kv.encode(plain, book))
    ]
    assert ((errors[0] - errors[1]).abs() <= 1e-5 * (1 + x_BHTGd.norm(dim=-1)))[other].all()
    if not angles:
        # Sums are exact and ties are common.
        x_BHTD, book = (x_BHTD.float() * 2).round().clamp(-8, 8) / 2, book.float().round().half()
        assert torch.equal(call("encode", x_BHTD, book), kv.encode(x_BHTD, book))


SIZES = [
    (Size(tokens=1), torch.bfloat16, None),
    (Size(tokens=3, repeat=4, d=8, angles=2), torch.float16, None),
    (Size(tokens=17, channels=128, d=8, scaled=True, masked=True), torch.float32, (2, 15)),
    (Size(tokens=17, repeat=4, d=2, channels=128, one_book=True, masked=True), torch.bfloat16, None),
    (Size(tokens=65, batch=1, channels=96, angles=1), torch.float32, (5, 65)),
    (Size(tokens=65, repeat=4, heads=1, scaled=True, angles=2, masked=True), torch.bfloat16, (0, 50)),
    (Size(tokens=3, batch=1, repeat=17, heads=1, channels=256, scaled=True), torch.float16, None),
    (Size(tokens=3), torch.float32, (3, 1)),
    (Size(tokens=0), torch.float32, (0, 0)),
]
# (d, rows of angles, type of x)
CODED = [(2, 2, torch.float16), (4, 0, torch.bfloat16), (8, 1, torch.float32)]
SETTINGS = [{"M": m, "TABLES": t, "C": 16, "num_warps": 4, "SPLIT": 3} for m, t in ((1, 0), (1, 1), (16, 0))]


@pytest.mark.parametrize(("size", "dtype", "span"), SIZES, ids=str)
def test_the_reference_of_attention(size: Size, dtype: torch.dtype, span: tuple[int, int] | None) -> None:
    check_attend(
        lambda _, a, start, end, more, __: kv.attend(*tokens(a, start, end, more)), size, dtype, span, bound=2e-6
    )


@pytest.mark.parametrize(("size", "dtype", "span"), SIZES, ids=str)
def test_attend(interpret: Call, size: Size, dtype: torch.dtype, span: tuple[int, int] | None) -> None:
    check_attend(interpret, size, dtype, span)


@pytest.mark.parametrize("config", SETTINGS, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_every_way_to_attend(interpret: Call, config: dict[str, int], masked: bool) -> None:
    """In several slices, some of them empty, and some tiles with nothing to attend to."""
    angles = int(masked and not config["TABLES"])
    size = Size(tokens=50, repeat=2, heads=1, batch=1, angles=angles, masked=masked, scaled=masked)
    check_attend(interpret, size, torch.bfloat16, (1, 49), config)


@pytest.mark.parametrize(("d", "angles", "dtype"), CODED, ids=str)
def test_encode(interpret: Call, d: int, angles: int, dtype: torch.dtype) -> None:
    check_encode(interpret, Size(tokens=9, d=d, angles=angles), dtype)


def test_the_operators() -> None:
    """What a cache calls: the same as the reference, and sound for torch.compile."""
    size = Size(tokens=9, angles=1, masked=True, scaled=True)
    arguments, more = drawn(size, torch.float32)
    q_BQD, coded, scaling = tokens(arguments, 1, 7, more)
    flat = q_BQD, coded[:4], coded[6:], coded.start, coded.end, scaling
    found = torch.ops.vqcompress.kv_attend(*flat)
    for ours, reference in zip(found, kv.attend(q_BQD, coded, scaling), strict=True):
        torch.testing.assert_close(ours, reference, atol=2e-6, rtol=2e-6)
    torch.library.opcheck(kv.kv_attend, flat)
    x_BHTD = torch.randn(2, 2, 3, 64, generator=generator(1))
    angles = [more[name][:, 2:5] for name in ("cos_BTD", "sin_BTD")]
    codes_BHTG = torch.ops.vqcompress.kv_encode(x_BHTD, arguments[2], *angles)
    assert torch.equal(codes_BHTG, kv.encode(kv.apply_rope(x_BHTD, *angles, inverse=True), arguments[2]))
    torch.library.opcheck(kv.kv_encode, (x_BHTD, arguments[2], *angles))


def test_what_does_not_fit_is_refused() -> None:
    pytest.importorskip("triton")
    arguments, more = drawn(Size(tokens=5, angles=1, masked=True), torch.float32)
    for change, message in (
        ({"mask_BT": more["mask_BT"][:, :3]}, r"mask is \(2, 3\); beside codes_k it must be \(2, 5\)"),
        ({"cos_BTD": more["cos_BTD"][:, :3]}, r"they must be \(1 or 2, 5, 64\)"),
        ({"scale_v": torch.ones(2, 2, 4)}, r"scale_v is \(2, 2, 4\)"),
    ):
        with pytest.raises(ValueError, match=message):
            attend(arguments, 0, 5, more | change)
    with pytest.raises(ValueError, match="3 queries of 64 do not fit 2 heads of 16 codes of 4"):
        attend([arguments[0][:, :1].expand(2, 3, 64), *arguments[1:]], 0, 5, more)
    with pytest.raises(ValueError, match="codebooks are"):
        encode(torch.ones(2, 3, 1, 64), arguments[2])


REAL = [
    Size(1, 32, 1, 32768, 128),
    Size(1, 32, 1, 32768, 128, angles=1),
    Size(8, 32, 1, 4096, 128, 8, masked=True, scaled=True),
    Size(1, 8, 4, 32768, 128, angles=1),
    Size(8, 8, 4, 32768, 128, 2, angles=1, masked=True, scaled=True),
    Size(8, 8, 4, 32768, 128, 8, masked=True, scaled=True, one_book=True),
    Size(1, 4, 2, 32768, 256, 4, angles=1, scaled=True),
    Size(1, 32, 1, 32768, 96, angles=1),
]


def _recorded(arch: int | str, sizes: list[Size]) -> Iterator[tuple[Size | int, Any]]:
    """What is launched for real sizes."""
    from vqcompress.methods.triton import launch

    for size in sizes:
        for dtype in (torch.bfloat16, torch.float32) if size.d == 4 and sizes is REAL else (torch.bfloat16,):
            arguments, more = drawn(size, dtype, META)
            with launch.recording(arch) as calls:
                attend(arguments, 4, 30000, more)
            yield from ((size, call) for call in calls)
    for tokens in (1, 4096):
        arguments, more = drawn(Size(1, 32, 1, tokens, 128, angles=1), torch.bfloat16, META)
        with launch.recording(arch) as calls:
            encode(torch.empty(1, 32, tokens, 128, dtype=torch.bfloat16, device=META), arguments[2], *more.values())
        yield tokens, calls[0]


def test_compiles_without_spills() -> None:
    check_compiled(90, [REAL[1], REAL[3]])


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_every_size_compiles_without_spills(arch: int | str) -> None:
    check_compiled(arch, REAL)


def check_compiled(arch: int | str, sizes: list[Size]) -> None:
    """For each device; with one query of a program the loop over tiles has no barrier, and entries come in one load."""
    version = tuple(map(int, pytest.importorskip("triton").__version__.split(".")[:2]))
    import ahead

    from vqcompress.methods.triton import launch

    for what, call in _recorded(arch, sizes):
        compiled = ahead.compile_call(call, arch)
        found, name = ahead.resources(compiled), call.kernel.__name__
        assert found.stack == 0, (name, what)
        assert found.shared <= launch.DEVICES[arch].shared // 2, (name, what)
        if not name.startswith("_attend") or arch == "gfx942":
            continue
        text = compiled.asm["ptx"]
        assert ("mma" in text) == (name == "_attend_group"), what
        if call.config["SHAPE"][0] > 2:
            assert re.search(r"ld\.global\.v2\.b(16|32)|ld\.global\.v4\.b(16|32)|ld\.global\.b64", text), what
        # Older Tritons give lanes to other numbers than those that they load.
        if name == "_attend_one" and version >= (3, 9):
            jumps = re.finditer(r"\bbra(?:\.uni)?\s+(\$L__BB0_\d+);", text)
            loops = [text[text.index(f"{j[1]}:") : j.start()] for j in jumps if text.index(f"{j[1]}:") < j.start()]
            assert len(loops) == 1, what
            assert "bar.sync" not in loops[0], what


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(
    ("size", "dtype", "span"),
    [
        *SIZES[1:4],
        (Size(8, 8, 4, 700, 128, masked=True), torch.bfloat16, (4, 650)),
        (Size(1, 32, 1, 900, 128), DTYPES[1], None),
    ],
    ids=str,
)
def test_attend_on_a_gpu(size: Size, dtype: torch.dtype, span: tuple[int, int] | None) -> None:
    check_attend(on_gpu, size, dtype, span, bound=1e-5 if dtype == torch.float32 or size.repeat == 1 else 2e-3)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("config", SETTINGS, ids=str)
def test_every_way_on_a_gpu(config: dict[str, int]) -> None:
    size = Size(tokens=200, repeat=4, masked=True, scaled=True)
    check_attend(on_gpu, size, torch.bfloat16, (1, 199), config, bound=1e-5 if config["M"] == 1 else 2e-3)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(("d", "angles", "dtype"), CODED, ids=str)
def test_encode_on_a_gpu(d: int, angles: int, dtype: torch.dtype) -> None:
    for tokens in (3, 1000):
        check_encode(on_gpu, Size(tokens=tokens, d=d, angles=angles, channels=128), dtype)
