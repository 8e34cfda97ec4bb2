"""Laws of vector quantization: what it stores, how well, and that no odd weight or Hessian breaks it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from vqcompress.methods import from_description, make
from vqcompress.methods.base import PackedTensors, layout_bits
from vqcompress.methods.feedback import HessianFactor, factorize_hessian, ldlq
from vqcompress.methods.statistics import Statistics
from vqcompress.methods.vq.base import VectorQuantizer
from vqcompress.methods.vq.codebook import Codebook, entry_uses
from vqcompress.methods.vq.learned import CodebookSearch, nearest, sum_entries
from vqcompress.methods.vq.scales import ldlq_problem
from vqcompress.methods.vq.trellis import Trellis

QUICK = {"iterations": 4, "codebook_updates": 1}
# One of each family of words, small and quick.
FAMILIES = {
    "learned": {**QUICK},
    "learned, rotated": {"rotation": True, **QUICK},
    "trellis": {"codebook": "trellis", "state_bits": 8},
    "trellis, unrotated": {"codebook": "trellis", "bits": 3, "state_bits": 9, "rotation": False},
}
each_family = pytest.mark.parametrize("knobs", FAMILIES.values(), ids=FAMILIES)


def vq(options: dict[str, Any]) -> VectorQuantizer:
    method = make("vq", options)
    assert isinstance(method, VectorQuantizer)
    return method


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn((rows, columns), generator=seeded(seed))


def hessian_of(x_TI: Tensor) -> Statistics:
    hessian_II = x_TI.T @ x_TI / len(x_TI)
    return Statistics(tokens=len(x_TI), hessian_II=hessian_II, sumsq_I=hessian_II.diagonal().clone())


def correlated(columns: int) -> Statistics:
    """Inputs that share a few directions, with channels of different size."""
    mix_II = gaussian(columns, columns, 5) * torch.logspace(0, -2, columns)[:, None]
    return hessian_of(gaussian(4 * columns, columns, 6) @ mix_II)


def encode(method: VectorQuantizer, weight_OI: Tensor, statistics: Statistics, seed: int = 0) -> PackedTensors:
    """All parts, checked against the layouts."""
    shape = (weight_OI.shape[0], weight_OI.shape[1])
    shared = method.fit_shared([weight_OI], [statistics], seeded(seed))
    stored = method.encode(weight_OI, statistics, seeded(seed + 1), shared)
    for parts, layout in ((shared, method.shared_layout()), (stored, method.layout(shape))):
        assert {name: (part.dtype, tuple(part.shape)) for name, part in parts.items()} == layout
    method.check(stored | shared, shape)
    return stored | shared


def relative_error(weight_OI: Tensor, decoded_OI: Tensor) -> float:
    return float((weight_OI - decoded_OI).square().sum() / weight_OI.square().sum())


def decode(method: VectorQuantizer, parts: PackedTensors, weight_OI: Tensor) -> Tensor:
    decoded_OI = method.decode(parts, (weight_OI.shape[0], weight_OI.shape[1]))
    assert decoded_OI.dtype == torch.float32
    assert decoded_OI.shape == weight_OI.shape
    assert torch.isfinite(decoded_OI).all()
    return decoded_OI


def proxy_error(statistics: Statistics, weight_OI: Tensor, method: VectorQuantizer) -> float:
    """Of the output, relative."""
    error = statistics.proxy_error(weight_OI, decode(method, encode(method, weight_OI, statistics), weight_OI))
    assert error is not None
    return error


@pytest.mark.parametrize(
    ("knobs", "bound"),
    [
        # The rate-distortion limit of a Gaussian is 4**-bits: 0.0625, 0.0156, 0.0039.
        ({"d": 4, "bits": 8}, 0.10),
        ({"d": 2, "bits": 6}, 0.031),
        ({"d": 8, "bits": 5, "stages": 3, "iterations": 6, "codebook_updates": 1}, 0.125),
        ({"codebook": "trellis", "bits": 1, "state_bits": 12}, 0.295),
        ({"codebook": "trellis", "state_bits": 12}, 0.077),
        ({"codebook": "trellis", "bits": 3, "state_bits": 10}, 0.022),
    ],
)
def test_error_on_a_gaussian(knobs: dict[str, Any], bound: float) -> None:
    method = vq({**knobs, "feedback": False})
    weight_OI = gaussian(256, 128) * 0.02
    assert relative_error(weight_OI, decode(method, encode(method, weight_OI, Statistics()), weight_OI)) < bound


def test_two_bits_are_two_bits() -> None:
    method = Codebook()
    layouts = [method.layout((256, 256)) for _ in range(6)] + [method.shared_layout()]
    assert sum(map(layout_bits, layouts)) / (6 * 256 * 256) <= 2.1


def test_wider_entries_matter_at_high_rates() -> None:
    weight_OI = gaussian(64, 128)
    errors = []
    for entry_bits in (8, 16):
        method = Codebook(d=1, bits=9, entry_bits=entry_bits, feedback=False, scope="target", **QUICK)
        errors.append(relative_error(weight_OI, decode(method, encode(method, weight_OI, Statistics()), weight_OI)))
    assert errors[1] < errors[0] / 2


@pytest.mark.parametrize(
    "knobs", [{"scope": "target", "stages": 2, "bits": 4, **QUICK}, {"codebook": "trellis", "state_bits": 8}], ids=str
)
def test_same_seed_same_bytes_whatever_the_threads(knobs: dict[str, Any]) -> None:
    method = vq(knobs)
    # More rows than one trellis path, so that threads share them.
    weight_OI, statistics = gaussian(600, 48), correlated(48)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(encode(method, weight_OI, statistics))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(part, results[0][name]) for name, part in results[1].items())
    assert not torch.equal(encode(method, weight_OI, statistics, seed=9)["codes"], results[0]["codes"])


@pytest.mark.parametrize(
    ("knob", "low", "high"),
    [
        ("feedback", False, True),
        ("iterations", 0, 20),
        ("codebook_updates", 0, 4),
        ("beam", 1, 8),
        ("activation_order", False, True),
    ],
)
def test_effort_lowers_the_error(knob: str, low: Any, high: Any) -> None:
    weight_OI, statistics = gaussian(256, 64), correlated(64)
    errors = []
    for value in (low, high):
        method = Codebook(d=4, bits=4, stages=2, **{"iterations": 5, "codebook_updates": 0, "beam": 4} | {knob: value})
        errors.append(proxy_error(statistics, weight_OI, method))
    assert errors[1] < errors[0]


def odd_weights() -> dict[str, Tensor]:
    outlier_OI = gaussian(9, 33) * 0.02
    outlier_OI[3, 7] = -3e4
    mixed_OI = gaussian(9, 33) * torch.logspace(-36, 30, 9)[:, None]
    mixed_OI[4] = 0
    return {
        "zero": torch.zeros(5, 12),
        "constant": torch.full((5, 12), -0.3),
        "single number": torch.tensor([[3.0]]),
        "ragged": gaussian(7, 131),
        "fewer columns than d": gaussian(6, 3),
        "outlier": outlier_OI,
        "all magnitudes": mixed_OI,
        "smallest": torch.full((2, 8), 1e-45),
    }


@pytest.mark.parametrize(
    "knobs",
    [*FAMILIES.values(), {"d": 5, "bits": 3, "stages": 2, "scope": "target", "feedback": False, **QUICK}],
    ids=str,
)
def test_odd_weights(knobs: dict[str, Any]) -> None:
    for name, weight_OI in odd_weights().items():
        method, statistics = vq(knobs), hessian_of(gaussian(64, weight_OI.shape[1], 1))
        decoded_OI = decode(method, encode(method, weight_OI, statistics), weight_OI)
        zero_O = (weight_OI == 0).all(1)
        assert torch.equal(decoded_OI[zero_O], weight_OI[zero_O]), name
        size = weight_OI.abs().max().double().clamp(min=1e-300)
        gap_OI, unit_OI = (weight_OI.double() - decoded_OI.double()) / size, weight_OI.double() / size
        if method.rotation:
            # A rotation keeps the sum of squares, not the largest number.
            assert gap_OI.square().sum() <= unit_OI.square().sum(), name
        else:
            assert gap_OI.abs().max() <= 1, name


def odd_statistics(columns: int) -> dict[str, Statistics]:
    dead_TI = gaussian(100, columns, 1)
    dead_TI[:, ::3] = 0
    loud_TI = gaussian(100, columns, 1)
    loud_TI[:, 5] *= 1e4
    huge = hessian_of(gaussian(100, columns, 1))
    assert huge.hessian_II is not None
    return {
        "dead channels": hessian_of(dead_TI),
        "loud channel": hessian_of(loud_TI),
        "zero": hessian_of(torch.zeros(4, columns)),
        "rank one": hessian_of(gaussian(1, columns, 1)),
        "equal channels": hessian_of(torch.ones(4, columns)),
        "slightly indefinite": Statistics(hessian_II=torch.eye(columns) - 0.5 * torch.ones(columns, columns)),
        "tiny": Statistics(hessian_II=huge.hessian_II * 1e-38),
        "huge": Statistics(hessian_II=huge.hessian_II * 1e36),
        "only the diagonal": Statistics(sumsq_I=torch.rand(columns, generator=seeded())),
        "none": Statistics(),
    }


@each_family
def test_odd_statistics(knobs: dict[str, Any]) -> None:
    weight_OI, method = gaussian(64, 24), vq(knobs)
    for name, statistics in odd_statistics(24).items():
        decoded_OI = decode(method, encode(method, weight_OI, statistics), weight_OI)
        assert relative_error(weight_OI, decoded_OI) < 0.5, name
        if name == "dead channels" and not method.rotation:
            assert relative_error(weight_OI[:, ::3], decoded_OI[:, ::3]) < 0.5


def test_what_is_not_finite_is_refused() -> None:
    method = Codebook(**QUICK)
    shared = method.fit_shared([gaussian(4, 8)], [Statistics()], seeded())
    for value in (math.nan, math.inf, -math.inf):
        weight_OI = gaussian(4, 8)
        weight_OI[2, 3] = value
        for refused in (method, Codebook(scope="target", **QUICK)):
            with pytest.raises(ValueError, match="weight"):
                refused.encode(weight_OI, Statistics(), seeded(), shared)
    with pytest.raises(ValueError, match="statistics"):
        method.encode(gaussian(4, 8), Statistics(hessian_II=torch.full((8, 8), math.inf)), seeded(), shared)


def test_block_shares_one_codebook() -> None:
    method = Codebook(bits=5, **QUICK)
    weights = [gaussian(32, 64, 1), 1e-3 * gaussian(16, 30, 2)]
    statistics = [correlated(64), Statistics()]
    shared = method.fit_shared(weights, statistics, seeded())
    assert set(shared) == {"codebook", "step"} == set(method.shared_layout())
    for weight_OI, known in zip(weights, statistics, strict=True):
        stored = method.encode(weight_OI, known, seeded(), shared)
        assert set(stored) == {"codes", "scale"}
        assert relative_error(weight_OI, decode(method, stored | shared, weight_OI)) < 0.6
    alone = Codebook(scope="target", bits=5, **QUICK)
    assert alone.shared_layout() == {}
    assert alone.fit_shared(weights, statistics, seeded()) == {}


def test_entries_are_sorted_by_use() -> None:
    method = Codebook(bits=4, feedback=False, scope="target", training_vectors=10**6)
    weight_OI = gaussian(64, 64).sign() * gaussian(64, 64).square()
    uses_RK = entry_uses(method, encode(method, weight_OI, Statistics()), (64, 64))
    assert uses_RK is not None
    # The integers of the codebook are rounded after the sort, which moves a few vectors.
    assert (uses_RK[0].diff() <= 0.02 * uses_RK.sum()).all()
    assert uses_RK[0, 0] > uses_RK[0, -1]


@pytest.mark.parametrize("knobs", [{"d": 3, "bits": 5}, {"d": 4, "bits": 3, "stages": 2, "scope": "target"}])
def test_counts_are_of_the_stored_codes(knobs: dict[str, Any]) -> None:
    method = Codebook(**knobs, **QUICK)
    parts = encode(method, gaussian(21, 50), correlated(50))
    counts_RK = entry_uses(method, parts, (21, 50))
    assert counts_RK is not None
    assert counts_RK.shape == (method.stages, 1 << method.bits)
    assert (counts_RK.sum(1) == 21 * -(-50 // method.d)).all()
    # By another way: the mean of the weight is that of its entries.
    parts = {**parts, "scale": torch.ones_like(parts["scale"])}
    book_RKd = parts["codebook"].float() * parts["step"][:, None, None]
    whole_OJ = method.decode(parts, (21, -(-50 // method.d) * method.d))
    torch.testing.assert_close(whole_OJ.sum(), (counts_RK[..., None] * book_RKd).sum(), rtol=1e-4, atol=1e-3)


def test_check_names_the_tensor() -> None:
    method = Codebook(d=3, bits=3, scope="target", **QUICK)
    parts = encode(method, gaussian(4, 8), Statistics())
    for name in ("scale", "step"):
        with pytest.raises(ValueError, match=name):
            method.check(parts | {name: torch.full_like(parts[name], math.nan)}, (4, 8))


@pytest.mark.parametrize("beam", [1, 3, 64])
def test_nearest_against_all_sums(beam: int) -> None:
    codebooks_RKd = torch.randn((2, 8, 3), generator=seeded(1))
    target_Nd = gaussian(50, 3, 2)
    sums_Nd = (codebooks_RKd[0][:, None] + codebooks_RKd[1]).flatten(0, 1)
    best_N = torch.cdist(target_Nd, sums_Nd).amin(1)
    codes_NR = nearest(target_Nd, codebooks_RKd, beam)
    found_N = (target_Nd - sum_entries(codes_NR[:, None], codebooks_RKd)).norm(dim=1)
    assert (found_N >= best_N - 1e-5).all()
    if beam == 64:
        torch.testing.assert_close(found_N, best_N)


def naive_feedback(weight_OI: Tensor, factor: HessianFactor, codebook_Kd: Tensor) -> Tensor:
    """The codes by the textbook's inverse (GPTQ's, d columns at a time): error / R_gg pushed to all later columns."""
    hessian_JJ = factor.factor_JJ.double() @ factor.factor_JJ.double().T
    weight_OJ, d = weight_OI.double().clone(), factor.d
    codes = []
    for at in range(0, weight_OJ.shape[1], d):
        inverse_JJ = torch.linalg.inv(hessian_JJ[at:, at:])
        cost_dd = torch.linalg.inv(inverse_JJ[:d, :d])
        gap_OKd = weight_OJ[:, None, at : at + d] - codebook_Kd.double()
        code_O = torch.einsum("okd,de,oke->ok", gap_OKd, cost_dd, gap_OKd).argmin(1)
        error_Od = weight_OJ[:, at : at + d] - codebook_Kd[code_O].double()
        weight_OJ[:, at:] -= error_Od @ cost_dd @ inverse_JJ[:d]
        codes.append(code_O)
    return torch.stack(codes, 1)


def test_error_feedback_is_that_of_the_inverse_hessian() -> None:
    # More columns than a span, so that both ways of carrying the error are used.
    weight_OI = gaussian(6, 160)
    factor = factorize_hessian(correlated(160), weight_OI, d=4, feedback=True, damping=0.01)
    codebook_Kd = gaussian(16, 4, 3)
    problem = ldlq_problem(weight_OI, factor)
    codes, value_OJ = ldlq(problem.unit_OJ, problem.factor, CodebookSearch(codebook_Kd[None], 1))
    codes_OGR = torch.stack(codes, 1)
    torch.testing.assert_close(value_OJ, sum_entries(codes_OGR, codebook_Kd[None]))
    assert (codes_OGR[..., 0] == naive_feedback(problem.unit_OJ, factor, codebook_Kd)).float().mean() > 0.99


@each_family
def test_what_is_stored_decodes_to_what_was_chosen(knobs: dict[str, Any]) -> None:
    """299 rows: more than one trellis path, and a group of columns that is cut."""
    method, weight_OI, statistics = vq(knobs), gaussian(299, 48), correlated(48)
    error = proxy_error(statistics, weight_OI, method)
    blind_OI = decode(method, encode(method, weight_OI, Statistics()), weight_OI)
    assert error < 0.7 * float(statistics.proxy_error(weight_OI, blind_OI) or 0)


def test_rotation_spreads_outliers() -> None:
    weight_OI = gaussian(128, 128) * 0.02
    weight_OI[:, 5] *= 40
    weight_OI[7] *= 40
    errors = []
    for rotation in (False, True):
        method = Trellis(state_bits=8, rotation=rotation, feedback=False)
        errors.append(relative_error(weight_OI, decode(method, encode(method, weight_OI, Statistics()), weight_OI)))
    assert errors[1] < 0.11 < errors[0]


def test_weights_of_one_input_are_rotated_by_the_same_signs() -> None:
    method = Trellis(state_bits=8)
    weights = [gaussian(32, 64, 1), gaussian(48, 64, 2)]
    for seed, same in ((5, True), (None, False)):
        signs = [method.encode(w, Statistics(seed=seed), seeded(i))["signs"] for i, w in enumerate(weights)]
        assert torch.equal(*signs) == same


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"codebook": "trellis", "bits": 6}, "bits"),
        ({"codebook": "trellis", "d": 1}, "d"),
        ({"codebook": "trellis", "codebook_updates": 2}, "codebook_updates"),
        ({"state_bits": 12}, "state_bits"),
        ({"bits": 20}, "bits"),
        ({"codebook": "lattice"}, "lattice"),
        ({"codebook": ["trellis"]}, "codebook"),
    ],
    ids=str,
)
def test_unknown_options_and_values_are_refused_by_name(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        make("vq", options)


def test_the_codebook_chooses_the_method() -> None:
    method = make("vq", {"codebook": "trellis"})
    assert isinstance(method, Trellis)
    assert from_description(method.describe()) == method
    assert isinstance(make("vq", {}), Codebook)
