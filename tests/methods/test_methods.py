"""Laws of every method: what is stored, what it decodes to, and what it multiplies to."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from cases import (
    DTYPES,
    ERROR_BOUNDS,
    LINEAR_REFERENCES,
    METHOD_CASES,
    SHAPES,
    TOKENS,
    WEIGHTS,
    Shape,
    encoded,
    gaussian,
    generator,
    inputs,
    is_bounded,
    statistics,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vqcompress.methods import METHODS, Layout, Method, PackedTensors, from_description, layout_bits, make
from vqcompress.methods.statistics import Statistics

every_method = pytest.mark.parametrize("method", [m for _, m in METHOD_CASES], ids=[name for name, _ in METHOD_CASES])


def layout_of(parts: PackedTensors) -> Layout:
    return {name: (part.dtype, tuple(part.shape)) for name, part in parts.items()}


def shape_of(weight_OI: Tensor) -> Shape:
    return weight_OI.shape[0], weight_OI.shape[1]


def same_bytes(first: PackedTensors, second: PackedTensors) -> bool:
    def raw(parts: PackedTensors) -> dict[str, bytes]:
        return {name: bytes(part.reshape(-1).view(torch.uint8).tolist()) for name, part in parts.items()}

    return raw(first) == raw(second)


def assert_laws_of_storage(method: Method, weight_OI: Tensor) -> None:
    """Stored as laid out, in range, decoded to a finite weight within the method's bound."""
    shape = shape_of(weight_OI)
    before = weight_OI.clone()
    stored, parts = encoded(method, weight_OI)
    assert torch.equal(weight_OI, before), "encode changed its argument"
    assert layout_of(stored) == method.layout(shape)
    assert all(part.is_contiguous() for part in stored.values())
    method.check(parts, shape)
    decoded_OI = method.decode(parts, shape)
    assert decoded_OI.dtype == torch.float32
    assert decoded_OI.shape == shape
    assert torch.isfinite(decoded_OI).all()
    if is_bounded(method):
        error_OI = (decoded_OI.double() - weight_OI.double()).abs()
        excess = (error_OI - ERROR_BOUNDS[method.name](method, weight_OI, parts)).max().item()
        assert excess <= 0, f"beyond the stated bound by {excess}"
    if not weight_OI.any():
        assert not decoded_OI.any()


@every_method
def test_storage(method: Method) -> None:
    for shape in SHAPES:
        assert_laws_of_storage(method, gaussian(shape))
    for kind in WEIGHTS:
        assert_laws_of_storage(method, WEIGHTS[kind]((40, 131)))


@pytest.mark.parametrize("method", [m for _, m in METHOD_CASES if is_bounded(m)], ids=str)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(rows=st.integers(1, 140), columns=st.integers(1, 140), exponent=st.integers(-45, 4), seed=st.integers(0, 99))
def test_storage_of_any_weight(method: Method, rows: int, columns: int, exponent: int, seed: int) -> None:
    assert_laws_of_storage(method, gaussian((rows, columns), seed) * 10.0**exponent)


@every_method
def test_same_seed_same_bytes_for_any_strides(method: Method) -> None:
    weight_OI = gaussian((64, 128))
    again = weight_OI.T.contiguous().T
    assert same_bytes(encoded(method, weight_OI, seed=7)[1], encoded(method, again, seed=7)[1])


@every_method
@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_refuses_weights_that_are_not_finite(method: Method, bad: float) -> None:
    weight_OI = gaussian((64, 128))
    known = statistics(128)
    shared = method.fit_shared([weight_OI], [known], generator()) if method.shared_layout() else {}
    weight_OI[3, 5] = bad
    with pytest.raises(ValueError, match=r"(?i)nan|inf|finite"):
        method.encode(weight_OI, known, generator(), shared)


@every_method
def test_check_refuses_floats_that_are_not_finite(method: Method) -> None:
    _, parts = encoded(method, gaussian((64, 128)))
    for name, part in parts.items():
        if part.is_floating_point():
            broken = torch.cat([part.flatten()[1:].float(), torch.tensor([float("nan")])])
            with pytest.raises(ValueError, match=name):
                method.check({**parts, name: broken.to(part.dtype).view(part.shape)}, (64, 128))


def linear_reference(method: Method, x_TI: Tensor, parts: PackedTensors, shape: Shape) -> Tensor:
    if method.name in LINEAR_REFERENCES:
        return LINEAR_REFERENCES[method.name](method, x_TI, parts)
    return x_TI.double() @ method.decode(parts, shape).double().T


def assert_linear(method: Method, weight_OI: Tensor, *xs: Tensor) -> None:
    """Each output within float32 (or the type of x) rounding of the reference, relative to its largest possible sum."""
    shape = shape_of(weight_OI)
    _, parts = encoded(method, weight_OI)
    before = {name: part.clone() for name, part in parts.items()}
    for x_TI in xs:
        y_TO = method.linear(x_TI, method.prepare(parts, shape, x_TI.dtype), shape)
        assert y_TO.dtype == x_TI.dtype
        assert y_TO.shape == (x_TI.shape[0], shape[0])
        expected_TO = linear_reference(method, x_TI, parts, shape)
        size_TO = x_TI.double().abs() @ method.decode(parts, shape).double().abs().T
        # A 16-bit x is multiplied by a weight in its own type where the method has no op, so both roundings count.
        relative = 1e-5 if x_TI.dtype == torch.float32 else 4 * torch.finfo(x_TI.dtype).eps
        excess_TO = (y_TO.double() - expected_TO).abs() - relative * size_TO - torch.finfo(x_TI.dtype).tiny
        assert (excess_TO <= 0).all(), f"{len(x_TI)} {x_TI.dtype}: off by {excess_TO.max()} more than rounding explains"
    assert same_bytes(parts, before), "the stored parts changed"


@every_method
def test_linear(method: Method) -> None:
    for shape in SHAPES:
        assert_linear(method, gaussian(shape), *(inputs(tokens, shape[1]) for tokens in TOKENS))
    assert_linear(method, gaussian((40, 131)) * 0.1, *(inputs(5, 131, dtype) for dtype in DTYPES))
    for kind in ("outlier", "zeros", "one_row_zero"):
        assert_linear(method, WEIGHTS[kind]((40, 131)), inputs(5, 131))


@every_method
def test_zero_rows_of_x_give_zero(method: Method) -> None:
    _, parts = encoded(method, gaussian((64, 128)))
    x_TI = inputs(5, 128)
    x_TI[2] = 0
    y_TO = method.linear(x_TI, method.prepare(parts, (64, 128)), (64, 128))
    assert not y_TO[[0, 2]].any()
    assert torch.isfinite(y_TO).all()


@every_method
def test_description_round_trip(method: Method) -> None:
    description = method.describe()
    again = from_description(json.loads(json.dumps(description)))
    assert again == method
    assert again.describe() == description
    with pytest.raises(ValueError, match=rf"{method.name} .*version 99"):
        from_description({**description, "version": 99})


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.model_fields])
def test_unknown_options_give_the_nearest_name(name: str) -> None:
    option = next(iter(METHODS[name].model_fields))
    with pytest.raises(ValueError, match=rf"^{name} .*'{option}z'.*'{option}'"):
        make(name, {option + "z": 1})
    with pytest.raises(ValueError, match=rf"^no method '{name}9'.*'{name}'"):
        make(name + "9", {})


def test_a_value_out_of_range_is_one_clear_line() -> None:
    with pytest.raises(ValueError, match="activations='per_row'") as caught:
        make("int8", {"activations": "per_row"})
    assert "\n" not in str(caught.value)


def test_only_static_activations_need_calibration() -> None:
    assert make("int8", {"activations": "per_tensor"}).needs == {"absmax"}
    assert not make("int8", {}).needs | make("fp8", {}).needs | make("keep", {}).needs
    static = make("int8", {"activations": "per_tensor"})
    known = statistics(128)
    assert known.absmax_I is not None
    parts = static.encode(gaussian((64, 128)), known, generator())
    assert parts["input_scale"].item() == (known.absmax_I.max() / 127).item()
    for nothing in (Statistics(), Statistics(tokens=0, absmax_I=torch.zeros(128))):
        with pytest.raises(ValueError, match="per_tensor"):
            static.encode(gaussian((64, 128)), nothing, generator())


def test_check_names_codes_and_scales_out_of_range() -> None:
    int8, fp8, ue8m0 = make("int8", {}), make("fp8", {}), make("fp8", {"power_of_two_scales": True})
    parts = encoded(int8, gaussian((64, 128)))[1]
    with pytest.raises(ValueError, match="codes holds -128"):
        int8.check({**parts, "codes": torch.full((64, 128), -128, dtype=torch.int8)}, (64, 128))
    for scale in (torch.zeros(64), -parts["scale"]):
        with pytest.raises(ValueError, match="scale"):
            int8.check({**parts, "scale": scale}, (64, 128))
    parts = encoded(fp8, gaussian((64, 128)))[1]
    with pytest.raises(ValueError, match="scale"):
        fp8.check({**parts, "scale": torch.zeros(1, 1)}, (64, 128))
    with pytest.raises(ValueError, match="scale"):
        ue8m0.check({**parts, "scale": torch.full((1, 1), 0.75)}, (64, 128))


def test_layout_bits_counts_every_part() -> None:
    assert layout_bits(make("fp8", {}).layout((130, 257))) == 8 * 130 * 257 + 32 * 2 * 3


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_feedback_lowers_the_error_of_the_output(name: str) -> None:
    known, weight_OI = statistics(192), gaussian((130, 192))
    assert known.hessian_II is not None
    correlated_II = known.hessian_II + 5.0
    known = replace(known, hessian_II=correlated_II)
    errors = []
    for feedback in (False, True):
        method = make(name, {"feedback": feedback})
        parts = method.encode(weight_OI, known, generator())
        errors.append(known.proxy_error(weight_OI, method.decode(parts, (130, 192))))
    assert errors[1] < 0.7 * errors[0]
    assert make(name, {"feedback": True}).needs == {"hessian"}


def test_a_rotation_spreads_a_loud_channel() -> None:
    x_TI, weight_OI = inputs(100, 192)[1:-1], gaussian((64, 192))
    exact_TO = x_TI @ weight_OI.T
    errors = []
    for rotation in (False, True):
        method = make("int8", {"rotation": rotation})
        parts = encoded(method, weight_OI)[1]
        errors.append((method.linear(x_TI, method.prepare(parts, (64, 192)), (64, 192)) - exact_TO).norm())
    assert errors[1] < 0.5 * errors[0]
    with pytest.raises(ValueError, match="per_token"):
        make("int8", {"rotation": True, "activations": "per_tensor"})


def test_rotated_experts_have_signs_of_their_own() -> None:
    method, shape = make("int8", {"rotation": True}), (64, 192)
    experts = [encoded(method, gaussian(shape, e), seed=e)[1] for e in range(3)]
    assert not torch.equal(experts[0]["signs"], experts[1]["signs"])
    stacked = {name: torch.stack([parts[name] for parts in experts]) for name in experts[0]}
    x_SI, ends = inputs(12, 192), [4, 4, 12]
    y_SO = method.grouped(x_SI, torch.tensor(ends, dtype=torch.int32), stacked, shape)
    own = [method.linear(x_SI[a:b], parts, shape) for a, b, parts in zip([0, *ends], ends, experts, strict=False)]
    assert torch.equal(y_SO, torch.cat(own))
