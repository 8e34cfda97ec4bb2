"""The kernels of INT8 and FP8: against the operators in Triton's interpreter, compiled ahead of time, and on a GPU.

What is checked on a GPU is what is checked in the interpreter: `call` is either.
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import LINEAR_REFERENCES, gaussian, generator, inputs
from kernels import ARCHS, needs_gpu, relative_rms
from torch import Tensor

from vqcompress.methods import make
from vqcompress.methods.fp8 import reference as fp8_ref
from vqcompress.methods.int8 import reference as int8_ref

# call(kernel, function, *arguments, **what else `answer` takes) → its result, on the CPU.
Call = Callable[..., Any]
Shape = tuple[int, int]

# Tokens, outputs and inputs: ragged, in one tile, in several tiles; and split over programs, of which the last has less
# to do.
PRODUCTS = [(1, 1, 1), (3, 33, 129), (17, 130, 257), (1, 64, 1280), (3, 70, 1100)]


def answer(
    kernel: str, function: str, *arguments: Any, arch: int | None = None, config: dict[str, int] | None = None
) -> Any:
    """What a launcher answers; as if the device were of another `arch`, and with other `config` than default."""
    from vqcompress.methods.triton import launch

    module = importlib.import_module(f"vqcompress.methods.{kernel}.kernel")
    with pytest.MonkeyPatch.context() as patch:
        properties, default = launch.device_properties, module.default_config
        if arch:
            patch.setattr(launch, "device_properties", lambda device: replace(properties(device), arch=arch))
        if config:
            patch.setattr(module, "default_config", lambda *shape: {**default(*shape), **config})
        return getattr(module, function)(*arguments)


def has_interpreter() -> bool:
    """To be called in the process that is to have the interpreter."""
    import triton

    from vqcompress.methods.fp8 import kernel as fp8
    from vqcompress.methods.int8 import kernel as int8

    return not any(isinstance(k, triton.JITFunction) for k in (int8._multiply, fp8._multiply))


def on_gpu(*arguments: Any, **config: Any) -> Any:
    found = answer(*(a.cuda() if isinstance(a, Tensor) else a for a in arguments), **config)
    return tuple(f.cpu() for f in found) if isinstance(found, tuple) else found.cpu()


@pytest.fixture(scope="module")
def interpret(interpreted: Call) -> Call:
    assert interpreted(has_interpreter)
    return lambda *arguments, **config: interpreted(answer_with, arguments, config)


def answer_with(arguments: tuple[Any, ...], config: dict[str, Any]) -> Any:
    return answer(*arguments, **config)


@pytest.fixture
def call(interpret: Call) -> Call:
    return interpret


@pytest.fixture(params=["interpreter", pytest.param("gpu", marks=[pytest.mark.gpu, needs_gpu])])
def either(request: pytest.FixtureRequest) -> Call:
    return request.getfixturevalue("interpret") if request.param == "interpreter" else on_gpu


def rounded(call: Call, y_TO: Tensor, dtype: torch.dtype) -> Tensor:
    """A float32 result in the type of x; the interpreter cuts bfloat16 off instead of rounding it."""
    if dtype == torch.bfloat16 and call is not on_gpu:
        y_TO = (y_TO.view(torch.int32) & -(1 << 16)).view(torch.float32)
    return y_TO.to(dtype)


def int8_weight(*shape: int) -> tuple[Tensor, Tensor]:
    """Codes (…, O, I) and scales (…, O)."""
    codes = torch.randint(-127, 128, shape, generator=generator(), dtype=torch.int8)
    # The largest sums that there can be.
    codes[..., 0, :] = 127
    return codes, torch.rand(shape[:-1], generator=generator()) + 0.01


def fp8_weight(*shape: int) -> tuple[Tensor, Tensor]:
    """Codes (…, O, I) and scales (…, P, J)."""
    codes = fp8_ref.to_e4m3(torch.randn(shape, generator=generator()) * 100)
    tiles = (*shape[:-2], math.ceil(shape[-2] / 128), math.ceil(shape[-1] / 128))
    # Small enough for products with outliers in float16.
    return codes, (torch.rand(tiles, generator=generator()) + 0.01) * 1e-4


def activations(tokens: int, columns: int, dtype: torch.dtype) -> Tensor:
    """A loud channel, a zero row, a quiet one, and one of equal numbers; with an outlier in the one before."""
    x_TI = inputs(tokens, columns).float()
    if tokens > 2:
        x_TI[1] = 5.0
        x_TI[2, columns // 3] = -3e4
    return x_TI.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_int8_quantize(call: Call, dtype: torch.dtype) -> None:
    for tokens, columns in ((0, 5), (1, 1), (3, 257), (2, 17_000)):
        x_TI = activations(tokens, columns, dtype)
        for found, expected in zip(call("int8", "quantize", x_TI), int8_ref.int8_quantize(x_TI), strict=True):
            assert torch.equal(found.float(), expected)


def test_int8_quantize_of_numbers_that_are_not_finite_or_not_normal(call: Call) -> None:
    for columns in (40, 17_000):
        x_TI = inputs(6, columns)
        x_TI[1, 7], x_TI[2, 8], x_TI[3] = float("nan"), float("-inf"), x_TI[3] * 1e-40
        codes_TI, scale_T1 = call("int8", "quantize", x_TI)
        expected_TI, expected_T1 = int8_ref.int8_quantize(x_TI)
        torch.testing.assert_close(scale_T1, expected_T1, rtol=0, atol=0, equal_nan=True)
        finite_T = expected_T1.flatten().isfinite()
        assert finite_T.tolist() == [True, False, False, True, True, True]
        assert torch.equal(codes_TI[finite_T].float(), expected_TI[finite_T])
        _, scale_T1 = call("int8", "quantize", x_TI, torch.tensor(0.5))
        assert scale_T1.isnan().flatten().tolist() == [False, True, False, False, False, False]


def test_int8_rounds_everything_as_torch_does(either: Call) -> None:
    """What is half of a step off a code, or next to that, tells a division from a product with the reciprocal."""
    scale_T1 = torch.rand((16, 1), generator=generator()) + 0.1
    x_TI = (torch.arange(-127, 127) + 0.5) * scale_T1
    x_TI = torch.cat([x_TI, torch.nextafter(x_TI, torch.tensor(1e9)), 127 * scale_T1], 1)
    for input_scale in (None, torch.tensor(0.37)):
        codes_TI, scale_T1 = either("int8", "quantize", x_TI, input_scale)
        scale_T1 = int8_ref.int8_quantize(x_TI)[1] if input_scale is None else input_scale
        assert torch.equal(codes_TI.float(), (x_TI / scale_T1).round().clamp(-127, 127))


@pytest.mark.parametrize(
    ("dtype", "static"), [(torch.float32, False), (torch.bfloat16, False), (torch.float16, True)], ids=str
)
def test_int8_linear_is_exact(either: Call, dtype: torch.dtype, static: bool) -> None:
    for tokens, outputs, columns in PRODUCTS:
        x_TI, (codes_OI, scale_O) = activations(tokens, columns, dtype), int8_weight(outputs, columns)
        input_scale = torch.tensor(0.11) if static else None
        found_TO = either("int8", "linear", x_TI, codes_OI, scale_O, input_scale)
        expected_TO = int8_ref.int8_linear(x_TI.float(), codes_OI, scale_O, input_scale)
        assert found_TO.dtype == dtype
        assert torch.equal(found_TO, rounded(either, expected_TO, dtype))


@pytest.mark.parametrize(("dtype", "power_of_two"), [(torch.float32, False), (torch.bfloat16, True)], ids=str)
def test_fp8_quantize(either: Call, dtype: torch.dtype, power_of_two: bool) -> None:
    for tokens, columns in ((0, 5), (1, 1), (17, 257), (3, 1100)):
        x_TI = activations(tokens, columns, dtype)
        codes_TI, scale_TJ = either("fp8", "quantize", x_TI, power_of_two)
        expected_TI, expected_TJ = fp8_ref.fp8_quantize(x_TI, power_of_two)
        assert torch.equal(scale_TJ, expected_TJ)
        assert codes_TI.dtype == torch.float8_e4m3fn
        assert torch.equal(codes_TI.float(), expected_TI)
        halves_TI, _ = either("fp8", "quantize", x_TI, power_of_two, True)
        assert torch.equal(halves_TI.float(), expected_TI)


def test_fp8_rounds_everything_as_torch_does(either: Call) -> None:
    """All that lies in the middle of two codes, its neighbours, and any bits."""
    values = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middle = (values[1:] + values[:-1]) / 2
    near = [torch.nextafter(middle, torch.tensor(to)) for to in (-1e9, 1e9)]
    # 448 makes the scale 1.
    x_TI = torch.full((4, 128), 448.0)
    for row, numbers in zip(x_TI, (values, middle, *near), strict=True):
        row[: len(numbers)] = numbers
    some = torch.randint(-(1 << 31), 1 << 31, (24, 128), generator=generator()).to(torch.int32).view(torch.float32)
    x_TI = torch.cat([x_TI, -x_TI, some.nan_to_num(0.0, 0.0, 0.0), x_TI * 2.0**-120])
    for power_of_two in (False, True):
        (codes_TI, scale_TJ), expected = (
            either("fp8", "quantize", x_TI, power_of_two),
            fp8_ref.fp8_quantize(x_TI, power_of_two),
        )
        assert torch.equal(scale_TJ, expected[1])
        assert torch.equal(codes_TI.float(), expected[0])


def test_fp8_quantize_of_numbers_that_are_not_finite(call: Call) -> None:
    x_TI = inputs(4, 300)
    x_TI[1, 7], x_TI[2, 8] = float("nan"), float("-inf")
    for power_of_two in (False, True):
        for half in (False, True):
            codes_TI, scale_TJ = call("fp8", "quantize", x_TI, power_of_two, half)
            for found, expected in zip((codes_TI, scale_TJ), fp8_ref.fp8_quantize(x_TI, power_of_two), strict=True):
                torch.testing.assert_close(found.float(), expected.float(), rtol=0, atol=0, equal_nan=True)


def tolerance(call: Call, dtype: torch.dtype = torch.float32) -> float:
    """The relative RMS that rounding y takes, and that of the sums: Hopper keeps 14 bits of a sum of FP8 products."""
    return max({torch.float16: 5e-4, torch.bfloat16: 8e-3, torch.float32: 1e-6}[dtype], 5e-4 if call is on_gpu else 0)


def check_fp8_linear(
    call: Call, x_TI: Tensor, codes_OI: Tensor, scale_PJ: Tensor, power_of_two: bool, **config: Any
) -> None:
    found_TO = call("fp8", "linear", x_TI, codes_OI, scale_PJ, power_of_two, **config)
    assert found_TO.dtype == x_TI.dtype
    expected_TO = fp8_ref.fp8_linear(x_TI.float(), codes_OI, scale_PJ, power_of_two)
    assert relative_rms(found_TO, expected_TO) <= tolerance(call, x_TI.dtype)
    method = make("fp8", {"power_of_two_scales": power_of_two})
    exact_TO = LINEAR_REFERENCES["fp8"](method, x_TI, {"codes": codes_OI, "scale": scale_PJ})
    assert relative_rms(found_TO, exact_TO) <= tolerance(call, x_TI.dtype)


@pytest.mark.parametrize(("dtype", "arch"), [(torch.float32, 90), (torch.float16, 80), (torch.bfloat16, 90)], ids=str)
def test_fp8_linear(either: Call, dtype: torch.dtype, arch: int) -> None:
    # Every shape in float32; in 16 bits what is ragged and what is split.
    for n, (tokens, outputs, columns) in enumerate(PRODUCTS if dtype == torch.float32 else PRODUCTS[2:4]):
        x_TI, (codes_OI, scale_PJ) = activations(tokens, columns, dtype), fp8_weight(outputs, columns)
        check_fp8_linear(either, x_TI, codes_OI, scale_PJ, n % 2 == 1, arch=arch)


def test_products_are_split_over_the_inputs() -> None:
    """Some of those above, so that both ways are tried."""
    from vqcompress.methods.fp8 import kernel as fp8
    from vqcompress.methods.int8 import kernel as int8
    from vqcompress.methods.triton import launch

    for kernel in (int8, fp8):
        splits = [kernel.default_config(launch.DEVICES["cpu"], *product)["SPLIT"] for product in PRODUCTS]
        assert splits[:3] == [1] * 3
        assert min(splits[3:]) > 1


def test_tiles_in_groups_and_of_other_sizes(either: Call) -> None:
    x_TI, (codes_OI, scale_O), (e4m3_OI, scale_PJ) = inputs(35, 300), int8_weight(70, 300), fp8_weight(70, 300)
    for config in ({"BLOCK_T": 16, "GROUP": 4}, {"BLOCK_T": 32, "BLOCK_O": 32, "GROUP": 2, "SPLIT": 3}):
        of_int8 = {"BLOCK_I": 64, **config}
        found_TO = either("int8", "linear", x_TI, codes_OI, scale_O, config=of_int8)
        assert torch.equal(found_TO, int8_ref.int8_linear(x_TI, codes_OI, scale_O, None))
        check_fp8_linear(either, x_TI, e4m3_OI, scale_PJ, False, config=config)


def test_no_rows_and_columns_in_another_order(call: Call) -> None:
    x_TI, (codes_OI, scale_O), (e4m3_OI, scale_PJ) = inputs(40, 5).T, int8_weight(3, 40), fp8_weight(3, 40)
    assert torch.equal(
        call("int8", "linear", x_TI, codes_OI, scale_O), int8_ref.int8_linear(x_TI, codes_OI, scale_O, None)
    )
    check_fp8_linear(call, x_TI, e4m3_OI, scale_PJ, False)
    assert call("int8", "linear", x_TI[:0], codes_OI, scale_O).shape == (0, 3)
    assert call("fp8", "linear", x_TI[:0], e4m3_OI, scale_PJ, False).shape == (0, 3)


def test_nan_in_x_is_not_hidden(call: Call) -> None:
    x_TI, (codes_OI, scale_O), (e4m3_OI, scale_PJ) = inputs(3, 257), int8_weight(5, 257), fp8_weight(5, 257)
    x_TI[1, 7] = float("nan")
    found = [call("int8", "linear", x_TI, codes_OI, scale_O, scale) for scale in (None, torch.tensor(0.5))]
    found += [call("fp8", "linear", x_TI, e4m3_OI, scale_PJ, flag, arch=80) for flag in (False, True)]
    # The interpreter reads the code of NaN as 480, but the scale is NaN as well, unless it is a power of two.
    flags = (False, True) if call is on_gpu else (False,)
    found += [call("fp8", "linear", x_TI, e4m3_OI, scale_PJ, flag) for flag in flags]
    for y_TO in found:
        assert y_TO.isnan().any(1).tolist() == [False, True, False]
        assert y_TO[1].isnan().all()


# Rows of each expert: some without any, tiles that are full and not, more experts than rows.
GROUPS = [[3, 0, 17, 16, 0], [0] * 10 + [1] + [0] * 10 + [2]]


@pytest.mark.parametrize("counts", GROUPS, ids=lambda counts: f"{len(counts)}-experts")
def test_grouped(either: Call, counts: list[int]) -> None:
    experts, outputs, columns = len(counts), 70, 140
    x_SI, ends_E = inputs(sum(counts), columns), torch.tensor(counts).cumsum(0).to(torch.int32)
    codes_EOI, scale_EO = int8_weight(experts, outputs, columns)
    e4m3_EOI, scale_EPJ = fp8_weight(experts, outputs, columns)
    found_SO = either("int8", "linear", x_SI, codes_EOI, scale_EO, None, ends_E)
    parts = zip(x_SI.split(counts), codes_EOI, scale_EO, strict=True)
    assert torch.equal(found_SO, torch.cat([int8_ref.int8_linear(x, w, s, None) for x, w, s in parts]))
    flag = experts == 5
    found_SO = either("fp8", "linear", x_SI, e4m3_EOI, scale_EPJ, flag, ends_E)
    parts = zip(x_SI.split(counts), e4m3_EOI, scale_EPJ, strict=True)
    expected_SO = torch.cat([fp8_ref.fp8_linear(x, w, s, flag) for x, w, s in parts])
    assert relative_rms(found_SO, expected_SO) <= tolerance(either)
    # A row that no expert has is not written either, as one of the next expert would be.
    more_SI = torch.cat([x_SI, x_SI[:1]])
    assert either("int8", "linear", more_SI, codes_EOI, scale_EO, None, ends_E)[-1].isnan().all()
    assert either("fp8", "linear", more_SI, e4m3_EOI, scale_EPJ, False, ends_E)[-1].isnan().all()
    empty_SO = either("int8", "linear", x_SI[:0], codes_EOI, scale_EO, None, torch.zeros_like(ends_E))
    assert empty_SO.shape == (0, outputs)


def recorded(kernel: str, arch: int | str, rows: int, shape: Shape, experts: int = 0) -> list[Any]:
    """The launches of a product of bfloat16 x with a weight, each with its compiled kernel and what it takes."""
    ahead = pytest.importorskip("ahead")
    from vqcompress.methods.triton import launch

    outputs, columns = shape
    module, stack = importlib.import_module(f"vqcompress.methods.{kernel}.kernel"), (experts,) if experts else ()
    x_TI = torch.empty((rows, columns), dtype=torch.bfloat16, device="meta")
    types = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
    codes = torch.empty((*stack, outputs, columns), dtype=types[kernel], device="meta")
    tiles = (outputs,) if kernel == "int8" else (math.ceil(outputs / 128), math.ceil(columns / 128))
    scale = torch.empty((*stack, *tiles), device="meta")
    ends_E = torch.empty(experts, dtype=torch.int32, device="meta") if experts else None
    with launch.recording(arch) as calls:
        y_TO = module.linear(x_TI, codes, scale, ends_E=ends_E)
    assert y_TO.shape == (rows, outputs)
    compiled = [(c, ahead.compile_call(c, arch)) for c in calls]
    return [(c, k, ahead.resources(k)) for c, k in compiled]


# One architecture by default, the others with -m slow.
every_arch = pytest.mark.parametrize(
    "arch", [90, *(pytest.param(arch, marks=pytest.mark.slow) for arch in ARCHS if arch != 90)]
)


@pytest.mark.parametrize(("rows", "shape"), [(1, (4096, 4096)), (512, (4096, 14336))])
@every_arch
@pytest.mark.parametrize("kernel", ["int8", "fp8"])
def test_compiles_for(kernel: str, arch: int | str, rows: int, shape: Shape) -> None:
    """Nothing spills, all fits, tensor cores multiply, 16 bytes are loaded at once, every processor has work."""
    launches = recorded(kernel, arch, rows, shape)
    check_resources(launches, arch)
    names = [c.kernel.fn.__name__ for c, _, _ in launches]
    assert names == ["_quantize", "_multiply", "_finish"][: 3 if rows <= 64 else 2]
    check_division(launches[0][1])
    product, compiled, _ = launches[1]
    check_product(compiled, arch, product.config["BLOCK_T"] >= 64)
    from vqcompress.methods.triton import launch

    programs = math.prod(product.grid)
    assert programs >= (1.5 if rows <= 16 else 0.8) * launch.DEVICES[arch].processors


@every_arch
@pytest.mark.parametrize("kernel", ["int8", "fp8"])
def test_grouped_compiles_for(kernel: str, arch: int | str) -> None:
    launches = recorded(kernel, arch, 8, (1536, 2048), experts=64)
    check_resources(launches, arch)
    assert len(launches) == 2
    check_product(launches[1][1], arch, launches[1][0].config["BLOCK_T"] >= 64)


def check_resources(launches: list[Any], arch: int | str) -> None:
    from vqcompress.methods.triton import launch

    for _, _, taken in launches:
        assert taken.stack == 0
        assert taken.shared <= launch.DEVICES[arch].shared


def check_division(compiled: Any) -> None:
    """Rounded as IEEE 754 has it."""
    if "amdgcn" in compiled.asm:
        assert "v_div_fixup_f32" in compiled.asm["amdgcn"]
    else:
        assert "div.rn.f32" in compiled.asm["ptx"]
        assert not re.search(r"(div\.(full|approx)|rcp\.|\.ftz)", compiled.asm["ptx"])


def check_product(compiled: Any, arch: int | str, high: bool) -> None:
    text = compiled.asm["amdgcn" if arch == "gfx942" else "ptx"]
    multiplied = {80: "mma.sync", 90: "wgmma.mma_async" if high else "mma.sync", 100: "(tcgen05.mma|mma.sync)"}
    assert re.search(multiplied.get(arch, "v_mfma"), text)  # type: ignore[call-overload]
    wide = "(global|buffer)_load_dwordx4" if arch == "gfx942" else r"cp\.async\.cg\.shared\.global [^;]*, 0x10"
    assert re.search(wide, text)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("kernel", ["int8", "fp8"])
def test_candidates(kernel: str, arch: int | str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guess is one of them, none is there twice, and the one with the widest loads fits a program's memory."""
    import candidates

    from vqcompress.methods.triton import launch

    module, gpu = importlib.import_module(f"vqcompress.methods.{kernel}.kernel"), launch.DEVICES[arch]
    listed = {"int8": candidates.of_int8, "fp8": candidates.of_fp8}[kernel]
    for shape in ((4096, 4096), (4096, 14336), (512, 384)):
        for rows in (1, 4, 16, 40, 64, 300, 512, 4096):
            found = list(listed(gpu, rows, *shape))
            assert module.default_config(gpu, rows, *shape) in found
            assert all(found.count(config) == 1 for config in found)
    most = max(found, key=lambda s: s["num_stages"] * (s["BLOCK_T"] + s["BLOCK_O"]) * s.get("BLOCK_I", 128))
    monkeypatch.setattr(module, "default_config", lambda *shape: most)
    assert recorded(kernel, arch, 4096, (4096, 4096))[1][2].shared <= gpu.shared


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("rows", [1, 40, 4096])
def test_large_products_on_a_gpu(rows: int) -> None:
    x_TI, (codes_OI, scale_O), (e4m3_OI, scale_PJ) = inputs(rows, 4096), int8_weight(4096, 4096), fp8_weight(4096, 4096)
    # The reference too on the GPU, in float64 or exact in float32.
    there = [t.cuda() for t in (x_TI, codes_OI, scale_O, e4m3_OI, scale_PJ)]
    from vqcompress.methods.fp8 import kernel as fp8
    from vqcompress.methods.int8 import kernel as int8

    codes_TI, scale_T1 = int8_ref.int8_quantize(x_TI)
    acc_TO = (codes_TI.cuda().double() @ there[1].double().T).float()
    assert torch.equal(int8.linear(there[0], there[1], there[2]), acc_TO * (scale_T1.cuda() * there[2]))
    rounded_TI, scale_TJ = fp8_ref.fp8_quantize(x_TI)
    wide_TI = rounded_TI.double() * scale_TJ.double().repeat_interleave(128, 1)
    wide_OI = e4m3_OI.double() * scale_PJ.double().repeat_interleave(128, 0).repeat_interleave(128, 1)
    expected_TO = wide_TI.cuda() @ wide_OI.cuda().T
    first_TO = fp8.linear(there[0], there[3], there[4], False)
    assert relative_rms(first_TO, expected_TO) <= tolerance(on_gpu)
    assert torch.equal(first_TO, fp8.linear(there[0], there[3], there[4], False))


@pytest.mark.gpu
@needs_gpu
def test_offsets_beyond_31_bits_on_a_gpu() -> None:
    from vqcompress.methods.fp8 import kernel as fp8
    from vqcompress.methods.int8 import kernel as int8

    outputs, columns = 70_000, 32_768
    x_TI = inputs(1, columns).cuda()
    codes_OI = torch.randint(-127, 128, (outputs, columns), dtype=torch.int8, device="cuda")
    scale_O = torch.rand(outputs, device="cuda")
    last_TO = int8.linear(x_TI, codes_OI[-64:], scale_O[-64:])
    assert torch.equal(int8.linear(x_TI, codes_OI, scale_O)[:, -64:], last_TO)
    e4m3_OI = (codes_OI & 0x77).view(torch.float8_e4m3fn)
    scale_PJ = torch.rand((math.ceil(outputs / 128), columns // 128), device="cuda")
    # 70,000 is 112 more than a multiple of 128.
    last_TO = fp8.linear(x_TI, e4m3_OI[-112:], scale_PJ[-1:], False)
    assert relative_rms(fp8.linear(x_TI, e4m3_OI, scale_PJ, False)[:, -112:], last_TO) <= 1e-4


@pytest.mark.gpu
@needs_gpu
def test_products_can_be_captured_on_a_gpu() -> None:
    """A graph of one row, which is split over programs, answers anew for new numbers in x."""
    from vqcompress.methods.fp8 import kernel as fp8
    from vqcompress.methods.int8 import kernel as int8

    x_TI = inputs(1, 4096, torch.bfloat16).cuda()
    codes_OI, scale_O = (t.cuda() for t in int8_weight(4096, 4096))
    e4m3_OI, scale_PJ = (t.cuda() for t in fp8_weight(4096, 4096))
    ends_E = torch.tensor([0, 1], dtype=torch.int32, device="cuda")

    def products() -> list[Tensor]:
        both = int8.linear(x_TI, codes_OI, scale_O), fp8.linear(x_TI, e4m3_OI, scale_PJ, False)
        return [*both, int8.linear(x_TI, codes_OI.view(2, 2048, 4096), scale_O.view(2, 2048), None, ends_E)]

    products()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = products()
    x_TI.copy_(gaussian((1, 4096), 7))
    graph.replay()
    for found, expected in zip(captured, products(), strict=True):
        assert torch.equal(found, expected)
