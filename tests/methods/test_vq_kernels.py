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
from vqcompress.methods.triton import launch
from vqcompress.methods.vq import reference
from vqcompress.methods.vq.format import Format
from vqcompress.methods.vq.packing import unpack

SHORT = {"iterations": 1, "codebook_updates": 0}
# Options of `vq` for every way of decoding, with sizes that its streams allow.
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
SLOW, OTHERS = pytest.mark.slow, ("learned 2x4", "trellis 3")
RAGGED = ("learned d 3, 5 bits", "learned 2x4", "trellis 3")
WIDE = ("learned", "learned 2x8", "trellis 2", "trellis 4")
# RAGGED: also with shapes that no tile divides. WIDE: with loads of 16 bytes of codes.
every_format = pytest.mark.parametrize("name", FORMATS)


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
    """In the interpreter: relative error of every way of multiplying by the values alone."""
    import candidates

    from vqcompress.methods.vq.kernel_dequantize import dequantize
    from vqcompress.methods.vq.kernel_gemm import gemm
    from vqcompress.methods.vq.kernel_gemm import name as gemm_name
    from vqcompress.methods.vq.kernel_gemv import default_config, gemv, lut_gemv
    from vqcompress.methods.vq.kernel_gemv import name as gemv_name

    form, parts = stored(name, shape)
    codes, table, x_TI = parts["codes"], parts["table"], inputs(rows, shape[1])
    want_TO = x_TI.double() @ reference.values(codes, table, form, shape).double().T
    read, gpu = (x_TI, codes, table, shape[0], form), launch.DEVICES["cpu"]
    found = {
        "gemm": gemm(*read).sum(0),
        "dequantize": x_TI.float() @ dequantize(codes, table, shape, form, torch.float32).T,
    }
    with candidates.trying(gemm_name(form, 0, 4), candidates.of_gemm(gpu, max(1, rows), shape, form)[-1]):
        found["gemm, other config"] = gemm(*read).sum(0)
    with candidates.trying(f"vq.dequantize.{form.name}", candidates.of_dequantize(form)[-1]):
        found["dequantize, other config"] = x_TI @ dequantize(codes, table, shape, form, torch.float32).T
    if rows == 1:
        found["gemv"] = gemv(*read).sum(0)
        other = default_config(gpu, shape, form) | {"SPLIT": 1} | ({"HOT": 8} if form.by_rows else {})
        with candidates.trying(gemv_name(form, 4), other):
            found["gemv, one slice, hot entries"] = gemv(*read).sum(0)
    if form.by_rows:
        found["lut"] = lut_gemv(*read).sum(0)
    return {way: relative_rms(y_TO, want_TO) for way, y_TO in found.items()}


def whole(name: str, shape: tuple[int, int], rows: int, dtype: torch.dtype) -> float:
    """In the interpreter: relative error of the product with rotation and scales."""
    form, parts = stored(name, shape)
    x_TI = inputs(rows, shape[1], dtype)
    found_TO = reference.on_gpu(x_TI, parts["codes"], parts["table"], parts["scale"], parts.get("signs"), form)
    assert (found_TO.dtype, found_TO.shape) == (dtype, (rows, shape[0]))
    return relative_rms(found_TO, expected(x_TI, form, parts))


def grouped(name: str, shape: tuple[int, int], counts: tuple[int, ...]) -> float:
    """In the interpreter: relative error of the rows of all experts; one row more belongs to none."""
    stacks = [stored(name, shape, seed) for seed in range(len(counts))]
    form, parts = stacks[0][0], {n: torch.stack([p[n] for _, p in stacks]) for n in stacks[0][1]}
    ends_E = torch.tensor(counts).cumsum(0).int()
    x_SI = inputs(sum(counts) + 1, shape[1])
    stacked = parts["codes"], parts["table"], parts["scale"], parts.get("signs")
    found_SO = reference.grouped_on_gpu(x_SI, ends_E, *stacked, form)
    rows = [slice(end - count, end) for end, count in zip(ends_E.tolist(), counts, strict=True)]
    want_SO = torch.cat([expected(x_SI[own], form, p) for own, (_, p) in zip(rows, stacks, strict=True)])
    return relative_rms(found_SO[: len(want_SO)], want_SO)


@pytest.mark.parametrize(
    ("name", "shape", "rows"), [*((n, (64, 96), 1) for n in FORMATS), *((n, (288, 41), 3) for n in RAGGED)], ids=str
)
def test_every_way_multiplies_by_the_values(
    interpreted: Callable[..., Any], name: str, shape: tuple[int, int], rows: int
) -> None:
    for way, difference in interpreted(differences, name, shape, rows).items():
        assert difference < 1e-6, way


@pytest.mark.parametrize(("name", "rows"), [("learned", 0), ("learned", 33), ("trellis 2", 17)])
def test_no_rows_and_many(interpreted: Callable[..., Any], name: str, rows: int) -> None:
    for way, difference in interpreted(differences, name, (64, 48), rows).items():
        assert difference < 1e-6, way


@pytest.mark.parametrize("name", ["learned", "learned d 3, 5 bits", "trellis 2", "trellis 4"])
def test_with_rotation_and_scales(interpreted: Callable[..., Any], name: str) -> None:
    # Sums are float32; x H on the way in and the result are rounded to the type of x.
    for dtype, rows, tolerance in ((torch.float32, 1, 2e-6), (torch.float16, 3, 2e-3), (torch.bfloat16, 1, 1e-2)):
        assert interpreted(whole, name, (96, 64), rows, dtype) < tolerance


@pytest.mark.parametrize("name", ["learned", "trellis 2", *(pytest.param(n, marks=SLOW) for n in OTHERS)])
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
    """A launch compiled ahead of time; it must fit the device and spill nothing."""
    import ahead

    kernel = ahead.compile_call(call, arch)
    used = ahead.resources(kernel)
    assert used.stack == 0
    assert used.shared <= launch.DEVICES[arch].shared
    return kernel


def products_of(name: str, arch: int | str, x_TI: Tensor, outputs: int) -> list[Any]:
    """The launches of a product on a device that is not here, without the rotation."""
    form, parts = meta_parts(name, (outputs, x_TI.shape[1]))
    with launch.recording(arch) as calls:
        reference.on_gpu(x_TI, parts["codes"], parts["table"], parts["scale"], parts.get("signs"), form)
    return [call for call in calls if not call.kernel.__module__.endswith("rotate")]


def compiles(name: str, arch: int | str) -> None:
    """As launched for one row, for some, and for many: the path that is taken, wide loads, matrix units."""
    for rows, regime in ((1, "gemv"), (16, "gemm"), (64, "gemm"), (512, "dequantize")):
        (call,) = products_of(name, arch, meta_rows(rows, 4096), 4096)
        assert call.kernel.__module__.endswith(f"kernel_{regime}")
        kernel = check_compiled(call, arch)
        text = kernel.asm["amdgcn" if arch == "gfx942" else "ptx"]
        if rows == 16:
            assert ("mfma" if arch == "gfx942" else "mma") in text
        if rows == 1 and arch == 90 and name in WIDE:
            # Loads of codes are predicated, those of entries are not: 16 bytes of codes at once.
            assert re.search(r"@%p\d+ ld\.global\S*\.(v4\.b32|b128)", text)
        if rows == 1 and arch == 90 and "trellis" in name:
            assert "dp4a" in text


@pytest.mark.parametrize("name", ["learned", "trellis 2"])
def test_compiles_without_spills(name: str) -> None:
    pytest.importorskip("triton")
    compiles(name, 90)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@every_format
def test_every_format_compiles_for_every_gpu(name: str, arch: int | str) -> None:
    pytest.importorskip("triton")
    compiles(name, arch)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", ["learned", "learned d 3, 5 bits", "trellis 2"])
def test_rarer_launches_compile_without_spills(name: str, arch: int | str) -> None:
    """float32, experts with few rows and many, look-ups, the hot entries of a codebook kept by the program."""
    triton = pytest.importorskip("triton")
    import candidates

    from vqcompress.methods.vq import kernel_gemm as gemm
    from vqcompress.methods.vq import kernel_gemv as gemv

    for rows in (1, 17, 129):
        for call in products_of(name, arch, meta_rows(rows, 4096, torch.float32), 4096):
            check_compiled(call, arch)
    form, parts = meta_parts(name, (4096, 4096))
    read = parts["codes"], parts["table"], 4096, form
    with launch.recording(arch) as calls:
        if form.by_rows and form.d != 3 and arch == 90:
            default = gemv.default_config(launch.DEVICES[90], (4096, 4096), form)
            for hot in (32, 1 << form.bits):
                with candidates.trying(gemv.name(form), default | {"HOT": hot}):
                    gemv.gemv(meta_rows(1, 4096), *read)
        # Triton 3.6 itself breaks off on this one for AMD; `tune.py` passes over what does not compile.
        if form.by_rows and not (arch == "gfx942" and form.d == 3 and triton.__version__ < "3.9"):
            gemv.lut_gemv(meta_rows(1, 4096), *read)
        _, parts = meta_parts(name, (2048, 4096), experts=64)
        ends_E = torch.empty(64, dtype=torch.int32, device="meta")
        for rows, dtype in ((8, torch.bfloat16), (8192, torch.bfloat16), (512, torch.float32)):
            gemm.gemm(meta_rows(rows, 4096, dtype), parts["codes"], parts["table"], 2048, form, ends_E)
    for call in calls:
        check_compiled(call, arch)


@pytest.mark.gpu
@needs_gpu
@every_format
def test_on_a_gpu(name: str) -> None:
    for shape in ((288, 41), (1024, 2048)):
        form, parts = stored(name, shape)
        on_gpu = {part: tensor.cuda() for part, tensor in parts.items()}
        for dtype, tolerance in ((torch.float32, 2e-5), (torch.float16, 3e-3), (torch.bfloat16, 2e-2)):
            for rows in (1, 17, 129):
                x_TI = inputs(rows, shape[1], dtype)
                want_TO = expected(x_TI, form, parts)
                for way in ("fused", "dequantize", "lut_gemv") if form.by_rows else ("fused", "dequantize"):
                    read = on_gpu["codes"], on_gpu["table"], on_gpu["scale"], on_gpu.get("signs")
                    found_TO = reference.on_gpu(x_TI.cuda(), *read, form, way)
                    assert relative_rms(found_TO.cpu(), want_TO) < tolerance, (shape, dtype, rows, way)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", ["learned", "trellis 2"])
def test_a_graph_of_it_on_a_gpu(name: str) -> None:
    form, parts = stored(name, (256, 512))
    codes, table, scale, signs = (parts[n].cuda() if n in parts else None for n in ("codes", "table", "scale", "signs"))
    x_TI = inputs(1, 512, torch.bfloat16).cuda()
    options = form.family, form.d, form.bits, form.depth
    want_TO = reference.vq_linear(x_TI, codes, table, scale, signs, *options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found_TO = reference.vq_linear(x_TI, codes, table, scale, signs, *options)
    graph.replay()
    assert torch.equal(found_TO, want_TO)
