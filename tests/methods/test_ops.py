"""The operators against float64, to the last bit where their contract says so, and against torch's own rules."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from cases import DTYPES, SHAPES, TOKENS, e4m3, encoded, gaussian, generator, inputs, power_of_two_exponent, tiles
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vqcompress.methods import make
from vqcompress.methods.fp8 import reference as fp8_ref
from vqcompress.methods.int8 import reference as int8_ref

# The finite ones from zero up: a byte below 0x7f is the rank of its value.
E4M3_VALUES = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).double()


def int8_codes(shape: tuple[int, int]) -> Tensor:
    return torch.randint(-127, 128, shape, generator=generator(), dtype=torch.int8)


def fp8_codes(shape: tuple[int, int]) -> Tensor:
    return fp8_ref.to_e4m3(gaussian(shape) * 100)


def samples(op: str) -> Sequence[tuple[object, ...]]:
    x, transposed, w, p = inputs(5, 257), inputs(257, 5).T, int8_codes((130, 257)), fp8_codes((130, 257))
    scale_O, scale_PJ = torch.rand(130, generator=generator()), torch.rand(2, 3, generator=generator())
    xs = [x, x.half(), transposed, inputs(0, 257)]
    ends_E = torch.tensor([2, 2, 5], dtype=torch.int32)
    method: Any = make("vq", {"iterations": 1, "feedback": False, "rotation": True})
    parts = method.prepare(encoded(method, gaussian((64, 48)))[1], (64, 48), packed=True)
    stored: tuple[Any, ...] = tuple(parts[n] for n in ("codes", "table", "scale", "signs"))
    stacked = (a.expand(3, *a.shape) for a in stored)
    form, rows_TI = method.form.name, inputs(5, 48)
    arguments: dict[str, Sequence[tuple[object, ...]]] = {
        "int8_quantize": [(x,) for x in xs],
        "fp8_quantize": [(x, flag) for x in xs for flag in (False, True)],
        "int8_linear": [(x, w, scale_O, s) for x in xs for s in (None, torch.tensor(0.1))]
        + [(x, w.float(), scale_O, None)],
        "fp8_linear": [(x, p, scale_PJ, flag) for x in xs for flag in (False, True)]
        + [(x, p.float(), scale_PJ, False)],
        "int8_grouped": [(x, ends_E, w.expand(3, -1, -1), scale_O.expand(3, -1)) for x in xs[:2]],
        "fp8_grouped": [(x, ends_E, p.expand(3, -1, -1), scale_PJ.expand(3, -1, -1), True) for x in xs[:2]],
        "vq_linear": [(rows_TI, *stored, form), (rows_TI, *stacked, form, ends_E)],
    }
    return arguments[op]


OPS = ["int8_quantize", "int8_linear", "int8_grouped", "fp8_quantize", "fp8_linear", "fp8_grouped"]


@pytest.mark.parametrize("op", [*OPS, "vq_linear"])
def test_opcheck(op: str) -> None:
    for arguments in samples(op):
        fp8_argument = any(isinstance(a, Tensor) and a.dtype == torch.float8_e4m3fn for a in arguments)
        # test_schema compares the arguments before and after with arithmetic that torch lacks for FP8.
        checks: tuple[str, ...] = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
        if not fp8_argument:
            checks = ("test_schema", *checks)
        torch.library.opcheck(getattr(torch.ops.vqcompress, op).default, arguments, test_utils=checks)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", TOKENS)
def test_int8_quantize(tokens: int, dtype: torch.dtype) -> None:
    x_TI = inputs(tokens, 257, dtype)
    codes_TI, scale_T1 = int8_ref.int8_quantize(x_TI)
    expected_T1 = (x_TI.double().abs().amax(1, keepdim=True) / 127).float().clamp_min(2.0**-126)
    assert torch.equal(scale_T1, expected_T1)
    # float64 division of float32 numbers, rounded to float32, is the float32 division.
    ratio_TI = (x_TI.double() / expected_T1.double()).float()
    assert torch.equal(codes_TI.double(), ratio_TI.double().round().clamp(-127, 127))


def test_int8_rounds_half_to_even() -> None:
    codes_TI, scale_T1 = int8_ref.int8_quantize(torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5]]))
    assert scale_T1.item() == 1
    assert codes_TI.tolist() == [[127, 0, 2, 2, 0, -2, -126]]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=9))
def test_quantizers_survive_every_finite_number(row: list[float]) -> None:
    x_TI = torch.tensor([row, [0.0] * len(row)])
    codes_TI, scale_T1 = int8_ref.int8_quantize(x_TI)
    assert torch.isfinite(scale_T1).all()
    assert (scale_T1 > 0).all()
    assert codes_TI.min() >= -127
    assert not codes_TI[1].any()
    error_TI = (codes_TI.double() * scale_T1.double() - x_TI.double()).abs()
    assert (error_TI <= scale_T1.double() * 0.5 * (1 + 2.0**-15)).all()
    for power_of_two in (False, True):
        codes, scale_TJ = fp8_ref.fp8_quantize(x_TI, power_of_two)
        assert torch.isfinite(scale_TJ).all()
        assert (scale_TJ > 0).all()
        assert torch.isfinite(codes.float()).all()
        assert not codes[1].float().any()


@pytest.mark.parametrize("columns", [1, 128, 257, 1024, 1025, 2500])
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("instructions", [False, True])
def test_int8_linear_is_bit_exact(
    columns: int, static: bool, instructions: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if instructions and not int8_ref.BYTE_PRODUCTS:
        pytest.skip("this CPU has no VNNI")
    monkeypatch.setattr(int8_ref, "BYTE_PRODUCTS", instructions)
    x_TI, codes_OI, scale_O = inputs(7, columns), int8_codes((33, columns)), torch.rand(33, generator=generator())
    # The largest sums that there can be.
    x_TI[1] = 5.0
    codes_OI[0] = 127
    if static:
        scale_x = torch.tensor(0.11)
        codes_TI = (x_TI / scale_x).round().clamp(-127, 127).to(torch.int64)
    else:
        int8_TI, scale_x = int8_ref.int8_quantize(x_TI)
        codes_TI = int8_TI.to(torch.int64)
    expected_TO = (codes_TI @ codes_OI.to(torch.int64).T).float() * (scale_x * scale_O)
    for weight_codes in (codes_OI, codes_OI.float()):
        for some_TI, some_TO in ((x_TI, expected_TO), (x_TI.T.clone().T, expected_TO), (x_TI[:1], expected_TO[:1])):
            found_TO = int8_ref.int8_linear(some_TI, weight_codes, scale_O, scale_x if static else None)
            assert torch.equal(found_TO, some_TO)
        # A row whose strides are a column's.
        found_TO = int8_ref.int8_linear(x_TI[1:2].T.clone().T, weight_codes, scale_O, scale_x if static else None)
        assert torch.equal(found_TO, expected_TO[1:2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 128, 257])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_fp8_quantize(columns: int, dtype: torch.dtype, power_of_two: bool) -> None:
    x_TI = inputs(5, columns, dtype)
    codes_TI, scale_TJ = fp8_ref.fp8_quantize(x_TI, power_of_two)
    assert codes_TI.dtype == torch.float8_e4m3fn
    assert scale_TJ.shape == (5, math.ceil(columns / 128))
    for j, tile in enumerate(x_TI.double().split(128, 1)):
        scale = (tile.abs().amax(1) / 448).float().clamp_min(2.0**-126)
        if power_of_two:
            scale = torch.tensor([2.0 ** power_of_two_exponent(s) for s in scale.tolist()])
        assert torch.equal(scale_TJ[:, j], scale)
        ratio = (tile / scale.double()[:, None]).float()
        assert torch.equal(codes_TI[:, 128 * j : 128 * (j + 1)].double(), e4m3(ratio.double()))


def test_e4m3_rounds_to_the_nearest_even_code() -> None:
    values, codes = E4M3_VALUES, torch.arange(0x7F)
    assert values[-1] == 448
    assert torch.equal(fp8_ref.to_e4m3(values.float()).view(torch.uint8).long(), codes)
    middle = (values[1:] + values[:-1]) / 2
    even = torch.where(codes[:-1] % 2 == 0, codes[:-1], codes[1:])
    assert torch.equal(fp8_ref.to_e4m3(middle.float()).view(torch.uint8).long(), even)
    assert torch.equal(fp8_ref.to_e4m3(-middle.float()).view(torch.uint8).long(), even + 128)
    assert torch.equal(
        fp8_ref.to_e4m3(torch.tensor([460.0, 1e30, -1e30])).float(), torch.tensor([448.0, 448.0, -448.0])
    )


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.floats(min_value=2.0**-126, max_value=2.0**126, width=32))
def test_power_of_two_ceil(scale: float) -> None:
    assert fp8_ref.power_of_two_ceil(torch.tensor([scale])).item() == 2.0 ** power_of_two_exponent(scale)


@pytest.mark.parametrize("shape", [*SHAPES, (40, 1100)], ids=str)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("power_of_two", [False, True])
def test_fp8_linear(shape: tuple[int, int], tokens: int, power_of_two: bool) -> None:
    rows, columns = shape
    x_TI, codes_OI = inputs(tokens, columns), fp8_codes(shape)
    scale_PJ = torch.rand(math.ceil(rows / 128), math.ceil(columns / 128), generator=generator()) + 0.01
    codes_TI, scale_TJ = fp8_ref.fp8_quantize(x_TI, power_of_two)
    rounded_TI = codes_TI.double() * scale_TJ.double().repeat_interleave(128, 1)[:, :columns]
    weight_OI = codes_OI.double() * tiles(scale_PJ, shape).double()
    bound_TO = 1e-6 * (rounded_TI.abs() @ weight_OI.abs().T)
    for weight_codes in (codes_OI, codes_OI.float()):
        y_TO = fp8_ref.fp8_linear(x_TI, weight_codes, scale_PJ, power_of_two)
        assert ((y_TO.double() - rounded_TI @ weight_OI.T).abs() <= bound_TO).all()


def test_nan_in_x_is_not_hidden() -> None:
    x_TI = inputs(3, 257)
    x_TI[1, 7] = float("nan")
    for input_scale in (None, torch.tensor(0.1)):
        y_TO = int8_ref.int8_linear(x_TI, int8_codes((5, 257)), torch.ones(5), input_scale)
        assert y_TO.isnan().all(1).tolist() == [False, True, False]
    for power_of_two in (False, True):
        y_TO = fp8_ref.fp8_linear(x_TI, fp8_codes((5, 257)), torch.ones(1, 3), power_of_two)
        assert y_TO.isnan().any(1).tolist() == [False, True, False]


def test_ops_can_be_compiled_as_one_graph() -> None:
    x_TI, w, p = inputs(3, 257), int8_codes((5, 257)).float(), fp8_codes((5, 257)).float()

    def both(x: Tensor) -> Tensor:
        return int8_ref.int8_linear(x, w, torch.ones(5), None) + fp8_ref.fp8_linear(x, p, torch.ones(1, 3), False)

    assert torch.equal(torch.compile(both, backend="eager", fullgraph=True)(x_TI), both(x_TI))


@pytest.mark.parametrize("power_of_two", [False, True])
def test_fp8_rounded_is_codes_times_scales(power_of_two: bool) -> None:
    loud = inputs(129, 300) * torch.logspace(-30, 30, 129)[:, None]
    for x_TI in (loud, inputs(3, 1), inputs(0, 257), torch.linspace(-448, 448, 100_000).view(-1, 50)):
        codes_TI, scale_TJ = fp8_ref.fp8_quantize(x_TI, power_of_two)
        scale_TI = scale_TJ.repeat_interleave(128, 1)[:, : x_TI.shape[1]]
        assert torch.equal(fp8_ref.fp8_rounded(x_TI, power_of_two), codes_TI.float() * scale_TI)
