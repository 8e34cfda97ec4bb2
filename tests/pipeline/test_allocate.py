"""A budget of bits: it is kept, more of it never does more damage, and the choice is a recipe like any other."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kills import Killed, contents
from processes import Processes
from typer.testing import CliRunner

from vqcompress.cli.main import app
from vqcompress.errors import UsageError, VQCompressError
from vqcompress.evaluate.verify import verify
from vqcompress.pipeline.bit_allocation import choose
from vqcompress.pipeline.quantize import QuantizeOptions, dry_run, quantize
from vqcompress.storage import recipe as recipes
from vqcompress.storage.artifact import JOURNAL, RECIPE, SUMS

CANDIDATES = """
candidates:
  - {method: vq, d: 4, bits: 4, scope: target, iterations: 1, codebook_updates: 0}
  - {method: vq, d: 2, bits: 4, scope: block, iterations: 1, codebook_updates: 0}
  - {method: vq, d: 1, bits: 4, scope: target, iterations: 1, codebook_updates: 0, damping: 0.02}
  - {method: fp8}
"""

Problem = tuple[np.ndarray, np.ndarray]


@pytest.fixture(scope="module")
def candidates(recipe_file: Callable[[str], str]) -> str:
    """Quick ones; one has a shared codebook, one needs no statistics."""
    return recipe_file(CANDIDATES)


@pytest.fixture(scope="module")
def job(toy: Callable[..., Path], candidates: str, text: Path) -> Callable[..., dict[str, Any]]:
    """Quantize a toy within a budget; any option can be replaced. dies: the event and block at which it is killed."""

    def run(out: Path, dies: tuple[str, int] | None = None, **changes: Any) -> dict[str, Any]:
        def progress(event: str, facts: dict[str, Any]) -> None:
            if (event, facts.get("index")) == dies:
                raise Killed

        options: dict[str, Any] = {"model": str(toy()), "recipe": candidates, "texts": [str(text)], "samples": 4}
        return quantize(
            QuantizeOptions(**{**options, "out": out, "seqlen": 32, "target_bits": 3.5, **changes}), progress
        )

    return run


@pytest.fixture(scope="module")
def straight(toy: Callable[..., Path], candidates: str, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact at 3.5 bits, made by the command line; do not write into it."""
    out = tmp_path_factory.mktemp("straight") / "out"
    words = ["quantize", str(toy()), "-o", str(out), "--recipe", candidates, "--target-bits", "3.5"]
    words += ["--calibration", str(text), "--samples", "4", "--seqlen", "32", "--device", "cpu"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.stderr
    assert "model.layers.1" in result.stderr
    return out


def optimum(bits_TK: np.ndarray, error_TK: np.ndarray, budget: float) -> float:
    rows = range(len(bits_TK))
    every = itertools.product(range(bits_TK.shape[1]), repeat=len(bits_TK))
    return min(
        sum(error_TK[t, k] for t, k in zip(rows, picks, strict=True))
        for picks in every
        if sum(bits_TK[t, k] for t, k in zip(rows, picks, strict=True)) <= budget
    )


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    shape = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    size = shape[0] * shape[1]
    bits = draw(st.lists(st.integers(1, 40), min_size=size, max_size=size))
    errors = draw(st.lists(st.integers(0, 1000), min_size=size, max_size=size))
    return np.array(bits, dtype=float).reshape(shape), np.array(errors, dtype=float).reshape(shape)


@settings(max_examples=100, deadline=None)
@given(problem=problems(), share=st.floats(0, 1))
def test_a_choice_is_within_the_budget_and_near_the_best(problem: Problem, share: float) -> None:
    bits_TK, error_TK = problem
    least, most = bits_TK.min(1).sum(), bits_TK.max(1).sum()
    budget = least + share * (most - least)
    picks = np.array(choose(bits_TK, error_TK, budget))
    all_T = np.arange(len(bits_TK))
    assert bits_TK[all_T, picks].sum() <= budget
    # The bound of the relaxation: at most one step short of the optimum.
    step = (error_TK.max(1) - error_TK.min(1)).max()
    best = optimum(bits_TK, error_TK, budget)
    assert best <= error_TK[all_T, picks].sum() <= best + step
    if share == 1:
        assert error_TK[all_T, picks].sum() == error_TK.min(1).sum()


@settings(max_examples=40, deadline=None)
@given(problem=problems())
def test_more_budget_never_gives_a_larger_error(problem: Problem) -> None:
    bits_TK, error_TK = problem
    budgets = np.arange(bits_TK.min(1).sum(), bits_TK.max(1).sum() + 1)
    found = [error_TK[np.arange(len(bits_TK)), choose(bits_TK, error_TK, b)].sum() for b in budgets]
    assert found == sorted(found, reverse=True)


def test_equal_targets_are_served_in_their_order() -> None:
    assert choose(np.array([[1.0, 2.0]] * 4), np.array([[8.0, 1.0]] * 4), 6.0) == [1, 1, 0, 0]


def test_the_choice_is_a_recipe_that_gives_the_same_bytes(
    straight: Path, job: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    report = json.loads((straight / "report.json").read_text())
    assert report["target_bits"] == 3.5
    assert 3.2 < report["bits_per_weight"] <= 3.5
    assert sum(row["targets"] for row in report["settings"]) == 14
    assert len(report["settings"]) > 1
    verify(str(straight))
    assert RECIPE in (straight / SUMS).read_text()
    again = job(tmp_path / "again", recipe=str(straight / RECIPE), target_bits=None)
    assert again["target_bits"] is None
    assert contents(tmp_path / "again") == {n: d for n, d in contents(straight).items() if n != RECIPE}


@pytest.mark.parametrize("event", ["measure", "block"])
def test_a_killed_run_keeps_its_measurements_and_ends_in_the_same_bytes(
    event: str, straight: Path, job: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    with pytest.raises(Killed):
        job(tmp_path / "out", dies=(event, 1))
    measured = json.loads((tmp_path / "out" / JOURNAL).read_text())["measured"]
    assert len(measured) == (1 if event == "measure" else 2)
    # By target the damage of each candidate: it falls with bits, also to what needs no statistics.
    damage = np.array([row for block in measured.values() for row in block.values()])
    assert damage.shape == (7 * len(measured), 4)
    assert (damage[:, 0] > damage[:, 2]).all()
    assert (damage[:, 2] > damage[:, 3]).all()
    assert (damage[:, 3] > 0).all()
    with pytest.raises(VQCompressError, match="target bits"):
        job(tmp_path / "out", target_bits=3)
    job(tmp_path / "out")
    assert contents(tmp_path / "out") == contents(straight)


@pytest.mark.slow
def test_threads_do_not_matter(straight: Path, job: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3 - min(before, 2))
    try:
        job(tmp_path / "out")
    finally:
        torch.set_num_threads(before)
    assert contents(tmp_path / "out") == contents(straight)


@pytest.mark.slow
def test_budgets_are_kept_and_the_largest_is_used(job: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    bits = [job(tmp_path / str(b), target_bits=b)["bits_per_weight"] for b in (2.2, 6)]
    assert bits[0] <= 2.2 < 5 < bits[1] <= 6


@pytest.mark.slow
def test_a_run_killed_at_any_write_ends_in_the_same_bytes(
    straight: Path, toy: Callable[..., Path], candidates: str, text: Path, tmp_path: Path, processes: Processes
) -> None:
    script = f"""
import os, signal, sys
from pathlib import Path
from vqcompress.pipeline.quantize import QuantizeOptions, quantize
left, sync = int(sys.argv[1]), os.fsync
def mortal(handle):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    sync(handle)
os.fsync = mortal
out = Path({str(tmp_path / "out")!r})
quantize(QuantizeOptions({str(toy())!r}, out, {candidates!r}, [{str(text)!r}], 4, 32, target_bits=3.5))
"""
    # The journal takes two syncs: 4 dies in the note of the first block, 7 later in that of the second, and so on.
    statuses = [processes.python(script, limit).returncode for limit in (4, 5, 9, 0)]
    assert statuses == [-9, -9, -9, 0]
    assert contents(tmp_path / "out") == contents(straight)


def test_the_plan_shows_the_budget_and_the_candidates(toy: Callable[..., Path], candidates: str) -> None:
    found = {bits: dry_run(QuantizeOptions(str(toy()), None, candidates, target_bits=bits)) for bits in (2, 6)}
    assert all(facts["bits_per_weight"] == facts["target_bits"] == bits for bits, facts in found.items())
    assert len(found[2]["candidates"]) == 4
    assert {row["bits_per_weight"] for row in found[2]["targets"]} == {None}
    more = found[6]["artifact_bytes"] - found[2]["artifact_bytes"]
    assert more == pytest.approx(4 / 8 * found[2]["weights_quantized"], abs=2)
    shown = CliRunner().invoke(app, ["plan", str(toy()), "--recipe", candidates, "--target-bits", "3"])
    assert "fp8: 8.0" in shown.stdout


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], "--recipe"),
        (["--kv-cache", "kv-vq-2bit"], "--recipe kv-vq-2bit"),
        (["--recipe", "fp8-tile", "--kv-cache", "artifact"], "'artifact'"),
        (["--recipe", "mixed"], "--target-bits"),
        (["--recipe", "vq-2bit", "--target-bits", "2.5"], "vq-2bit"),
        (["--target-bits", "1.4"], "--target-bits"),
        (["--target-bits", "nan"], "--target-bits"),
    ],
)
def test_a_recipe_and_a_budget_that_do_not_fit_are_refused(
    words: list[str], named: str, toy: Callable[..., Path]
) -> None:
    result = CliRunner().invoke(app, ["plan", str(toy()), *words])
    assert result.exit_code == 2
    assert named in result.stderr


def test_too_small_a_budget_is_refused_before_anything_is_written(
    toy: Callable[..., Path], job: Callable[..., dict[str, Any]], recipe_file: Callable[[str], str], tmp_path: Path
) -> None:
    large = recipe_file("candidates:\n  - {method: vq, codebook: trellis, bits: 3}\n")
    with pytest.raises(UsageError, match="--target-bits"):
        job(tmp_path / "out", recipe=large, target_bits=1.5)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("candidates: []", "test"),
        ("candidates: 3", "test"),
        ("rules: []\ncandidates: []", "'rules'"),
        ("candidates: [3]", r"candidates\.0=3"),
        ("candidates: [{method: int8, smoothing: {alpha: 0.5}}]", "test"),
        ("candidates: [{method: int8}, {method: in8}]", r"candidates\.1.*in8"),
    ],
)
def test_a_broken_list_of_candidates_is_refused(text: str, named: str) -> None:
    with pytest.raises(UsageError, match=named):
        recipes.parse(text, "test")


def test_a_candidate_that_compresses_nothing_is_refused(
    toy: Callable[..., Path], recipe_file: Callable[[str], str]
) -> None:
    file = recipe_file("candidates: [{method: fp8}, {method: keep}]")
    with pytest.raises(UsageError, match=Path(file).stem):
        dry_run(QuantizeOptions(str(toy()), None, file, target_bits=3))


def test_a_dumped_recipe_is_read_as_the_same() -> None:
    for name in ("mixed-fp8-vq3", "smoothquant-int8", "vq-2bit"):
        recipe = recipes.load(name)
        assert recipes.parse(recipes.dump(recipe), name) == recipe
