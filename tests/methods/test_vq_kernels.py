"""The kernels of vector quantization: against float64 in Triton's interpreter, and compiled ahead of time for GPUs."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import encoded, gaussian, inputs
from kernels import ARCHS, needs_gpu, relative_rms
from torch import Tensor

from vqcompress.methods import make
from vqcompress.methods.hadamard import hadamard
from vqcompress.methods.packing import unpack
from vqcompress.methods.triton import launch
from vqcompress.methods.vq import base, reference
from vqcompress.methods.vq.format import Format

SHORT = {"iterations": 1, "codebook_updates": 0}
# Options of `vq` for every way of decoding.
FORMATS: dict[str, dict[str, Any]] = {
    "learned": {"d": 4, "bits": 8, **SHORT},
    "learned d 3, 5 bits": {"d": 3, "bits": 5, "rotation": True, **SHORT},
    "learned 10 bits": {"d": 5, "bits": 10, **SHORT},
    "learned 2x4": {"d": 8, "bits": 4, "stages": 2, "scope": "target", **SHORT},
    "learned 2x8": {"d": 8, "bits": 8, "stages": 2, "beam": 2, **SHORT},
    "trellis 1": {"codebook": "trellis", "bits": 1, "state_bits": 9},
    "trellis 2": {"codebook": "trellis", "state_bits": 8},
    "trellis 3": {"codebook": "trellis", "bits": 3, "state_bits": 9},
    "trellis 4": {"codebook": "trellis", "bits": 4, "state_bits": 8, "rotation": False},
}
SLOW = pytest.mark.slow
# Also with shapes that no tile divides.
RAGGED = ("learned d 3, 5 bits", "trellis 3")
# With loads of 16 bytes of codes.
WIDE = ("learned", "learned 2x8", "trellis 2", "trellis 4")


def stored(name: str, shape: tuple[int, int], seed: int = 0) -> tuple[Format, dict[str, Any]]:
    """The format of a weight and what the operator reads of it."""
    method: Any = make("vq", {**FORMATS[name], "feedback": False})
    _, parts = encoded(method, gaussian(shape, seed), seed)
    return method.form, method.prepare(parts, shape, torch.float32, packed=True)


def expected(x_TI: Tensor, form: Format, parts: dict[str, Any]) -> Tensor:
    """x Wᵀ in float64."""
    shape = len(parts["scale"]), x_TI.shape[1]
    value_OI = reference.values(parts["codes"], parts["table"], form, shape).double()
    x, rotated = x_TI.double(), parts.get("signs") is not None
    if rotated:
        x = hadamard(x * (1.0 - 2.0 * unpack(parts["signs"], 1, shape[1])))
    y_TO = x @ value_OI.T
    return (hadamard(y_TO) if rotated else y_TO) * parts["scale"].double()


def differences(name: str, shape: tuple[int, int], rows: int) -> dict[str, float]:
    """In the interpreter: relative error of every way of multiplying by the values alone, with two configs each."""
    import candidates

    from vqcompress.methods.vq import kernel_multiply
    from vqcompress.methods.vq.kernel_dequantize import dequantize

    form, parts = stored(name, shape)
    codes, table, x_TI, gpu = parts["codes"], parts["table"], inputs(rows, shape[1]), launch.DEVICES["cpu"]
    other = candidates.of_multiply(gpu, max(1, rows), shape, form, 0, 4)[-1] | {"SPLIT": 1}
    if rows == 1 and form.by_rows:
        other["HOT"] = 8
    found = {}
    for kind, config, written in (("default", None, None), ("other", other, candidates.of_dequantize(form)[-1])):
        with (
            candidates.trying(kernel_multiply.name(form, rows, 0, 4), config),
            candidates.trying(f"vq.dequantize.{form.name}", written),
        ):
            found[f"{kind}, fused"] = kernel_multiply.multiply(x_TI, codes, table, shape[0], form).sum(0)
            found[f"{kind}, dequantize"] = x_TI @ dequantize(codes, table, shape, form, torch.float32).T
    want_TO = x_TI.double() @ reference.values(codes, table, form, shape).double().T
    return {way: relative_rms(y_TO, want_TO) for way, y_TO in found.items()}


def whole(name: str, shape: tuple[int, int], rows: int, dtype: torch.dtype) -> float:
    """In the interpreter: relative error of the product with rotation and scales."""
    form, parts = stored(name, shape)
    x_TI = inputs(rows, shape[1], dtype)
    found_TO = reference.on_gpu(x_TI, *base.stored(parts), form.name)
    assert (found_TO.dtype, found_TO.shape) == (dtype, (rows, shape[0]))
    return relative_rms(found_TO, expected(x_TI, form, parts))


def grouped(name: str, shape: tuple[int, int], counts: tuple[int, ...]) -> float:
    """In the interpreter: relative error of the rows of all experts; one row more belongs to none."""
    stacks = [stored(name, shape, seed) for seed in range(len(counts))]
    form, parts = stacks[0][0], {n: torch.stack([p[n] for _, p in stacks]) for n in stacks[0][1]}
    ends_E = torch.tensor(counts).cumsum(0).int()
    x_SI = inputs(sum(counts) + 1, shape[1])
    found_SO = reference.on_gpu(x_SI, *base.stored(parts), form.name, ends_E)
    rows = [slice(end - count, end) for end, count in zip(ends_E.tolist(), counts, strict=True)]
    want_SO = torch.cat([expected(x_SI[own], form, p) for own, (_, p) in zip(rows, stacks, strict=True)])
    return relative_rms(found_SO[: len(want_SO)], want_SO)


@pytest.mark.parametrize(
    ("name", "shape", "rows"),
    [
        *((n, (64, 96), 1) for n in FORMATS),
        *((n, (288, 41), 3) for n in RAGGED),
        ("learned", (64, 48), 0),
        ("learned", (64, 48), 33),
        ("trellis 2", (64, 48), 17),
    ],
    ids=str,
)
def test_every_way_multiplies_by_the_values(
    interpreted: Callable[..., Any], name: str, shape: tuple[int, int], rows: int
) -> None:
    for way, difference in interpreted(differences, name, shape, rows).items():
        assert difference < 1e-6, way


@pytest.mark.parametrize("name", ["learned d 3, 5 bits", "trellis 2", "trellis 4"])
def test_with_rotation_and_scales(interpreted: Callable[..., Any], name: str) -> None:
    # Sums are float32; x H on the way in and the result are rounded to the type of x.
    for dtype, rows, tolerance in ((torch.float32, 1, 2e-6), (torch.float16, 3, 2e-3), (torch.bfloat16, 1, 1e-2)):
        assert interpreted(whole, name, (96, 64), rows, dtype) < tolerance


@pytest.mark.parametrize("name", ["learned 2x4", "trellis 2"])
def test_experts_in_one_launch(interpreted: Callable[..., Any], name: str) -> None:
    assert interpreted(grouped, name, (64, 48), (3, 0, 17)) < 2e-6


def meta_parts(name: str, shape: tuple[int, int], experts: int = 0) -> tuple[Format, dict[str, Any]]:
    """The format of a weight as in models and what the operator reads of it, without memory."""
    method: Any = make("vq", FORMATS[name] | ({"state_bits": 14} if "trellis" in name else {}))
    layout = method.layout(shape) | method.shared_layout()
    meta = {part: torch.empty(size, dtype=dtype, device="meta") for part, (dtype, size) in layout.items()}
    parts = method.prepare(meta, shape, torch.bfloat16, packed=True)
    return method.form, {n: p.expand(experts, *p.shape) for n, p in parts.items()} if experts else parts


def meta_rows(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty((rows, columns), dtype=dtype, device="meta")


def check_compiled(call: Any, arch: int | str) -> Any:
    """A launch compiled ahead of time; it must fit the device and spill two registers of a thread at most."""
    import ahead

    kernel = ahead.compile_call(call, arch)
    used = ahead.resources(kernel)
    assert used.stack <= 8
    assert used.shared <= launch.DEVICES[arch].shared
    return kernel


def products_of(name: str, arch: int | str, x_TI: Tensor, outputs: int) -> list[Any]:
    """The launches of a product on a device that is not here, without the rotation."""
    form, parts = meta_parts(name, (outputs, x_TI.shape[1]))
    with launch.recording(arch) as calls:
        reference.on_gpu(x_TI, *base.stored(parts), form.name)
    return [call for call in calls if call.kernel.__name__ != "_transform"]


def compiles(name: str, arch: int | str) -> None:
    """As launched for one row, for some, and for many: the kernel that is chosen, wide loads, matrix units."""
    for rows, regime in ((1, "_gemv"), (16, "_gemm"), (64, "_gemm"), (512, "_dequantize")):
        (call,) = products_of(name, arch, meta_rows(rows, 4096), 4096)
        assert call.kernel.__name__ == regime
        kernel = check_compiled(call, arch)
        text = kernel.asm["amdgcn" if arch == "gfx942" else "ptx"]
        if rows == 16:
            assert ("mfma" if arch == "gfx942" else "mma") in text
        if rows == 1 and arch == 90 and name in WIDE:
            # Loads of codes are predicated, those of entries are not: 16 bytes of codes at once.
            assert re.search(r"@%p\d+ ld\.global\S*\.(v4\.b32|b128)", text)
        if rows == 1 and arch == 90 and "trellis" in name:
            assert "dp4a" in text


@pytest.mark.parametrize(
    ("name", "arch"),
    [
        ("learned", 90),
        ("trellis 2", "gfx942"),
        *(
            pytest.param(name, arch, marks=SLOW)
            for name in FORMATS
            for arch in ARCHS
            if (name, arch) not in (("learned", 90), ("trellis 2", "gfx942"))
        ),
    ],
)
def test_compiles_without_spills(name: str, arch: int | str) -> None:
    pytest.importorskip("triton")
    compiles(name, arch)


@SLOW
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", ["learned", "learned d 3, 5 bits", "trellis 2"])
def test_rarer_launches_compile_without_spills(name: str, arch: int | str) -> None:
    """float32, experts with few rows and many, the hot entries of a codebook kept by the program."""
    pytest.importorskip("triton")
    import candidates

    from vqcompress.methods.vq import kernel_multiply

    calls = [c for n in (1, 17, 129) for c in products_of(name, arch, meta_rows(n, 4096, torch.float32), 4096)]
    form, parts = meta_parts(name, (4096, 4096))
    if name == "learned" and arch == 90:
        default = kernel_multiply.default_config(launch.DEVICES[90], 1, (4096, 4096), form, 0, 2)
        for hot in (32, 1 << form.bits):
            with candidates.trying(kernel_multiply.name(form, 1, 0, 2), default | {"HOT": hot}):
                calls += products_of(name, arch, meta_rows(1, 4096), 4096)
    _, parts = meta_parts(name, (2048, 4096), experts=64)
    ends_E = torch.empty(64, dtype=torch.int32, device="meta")
    with launch.recording(arch) as grouped_calls:
        for rows, dtype in ((8, torch.bfloat16), (8192, torch.bfloat16), (512, torch.float32)):
            x_SI = meta_rows(rows, 4096, dtype)
            kernel_multiply.multiply(x_SI, parts["codes"], parts["table"], 2048, form, ends_E)
    for call in calls + grouped_calls:
        check_compiled(call, arch)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", FORMATS)
def test_on_a_gpu(name: str) -> None:
    for shape in ((288, 41), (1024, 2048)):
        form, parts = stored(name, shape)
        there = base.stored({part: tensor.cuda() for part, tensor in parts.items()})
        for dtype, tolerance in ((torch.float32, 2e-5), (torch.float16, 3e-3), (torch.bfloat16, 2e-2)):
            for rows in (1, 17, 129):
                x_TI = inputs(rows, shape[1], dtype)
                want_TO = expected(x_TI, form, parts)
                for route in ("fused", "dequantize"):
                    found_TO = reference.on_gpu(x_TI.cuda(), *there, form.name, None, route)
                    assert relative_rms(found_TO.cpu(), want_TO) < tolerance, (shape, dtype, rows, route)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", ["learned", "trellis 2"])
def test_a_graph_of_it_on_a_gpu(name: str) -> None:
    form, parts = stored(name, (256, 512))
    there = base.stored({part: tensor.cuda() for part, tensor in parts.items()})
    x_TI = inputs(1, 512, torch.bfloat16).cuda()
    want_TO = reference.vq_linear(x_TI, *there, form.name)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found_TO = reference.vq_linear(x_TI, *there, form.name)
    graph.replay()
    assert torch.equal(found_TO, want_TO)
