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
from vqcompress.pipeline import bit_allocation as allocate
from vqcompress.pipeline import block as compress
from vqcompress.pipeline.bit_allocation import choose
from vqcompress.pipeline.quantize import QuantizeOptions, dry_run, quantize
from vqcompress.storage import artifact
from vqcompress.storage import recipe as recipes
from vqcompress.storage.writer import Writer

CANDIDATES = """
description: quick ones, one of them with a shared codebook, one without statistics
candidates:
  - {method: vq, d: 4, bits: 4, scope: target, iterations: 1, codebook_updates: 0}
  - {method: vq, d: 2, bits: 4, scope: block, iterations: 1, codebook_updates: 0}
  - {method: vq, d: 1, bits: 4, scope: target, iterations: 1, codebook_updates: 0, damping: 0.02}
  - {method: fp8}
"""

Job = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def candidates(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("candidates") / "quick.yaml"
    path.write_text(CANDIDATES)
    return str(path)


@pytest.fixture(scope="session")
def job(toy: Callable[..., Path], candidates: str, text: Path) -> Job:
    """Quantize a toy within a budget; any argument of `quantize` can be replaced."""

    def run(out: Path, **changes: Any) -> dict[str, Any]:
        arguments: dict[str, Any] = {"model": str(toy()), "recipe": candidates, "texts": [str(text)]}
        return quantize(
            QuantizeOptions(**{**arguments, "out": out, "samples": 4, "seqlen": 32, "target_bits": 3.5, **changes})
        )

    return run


@pytest.fixture(scope="session")
def straight(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact at 3.5 bits; do not write into it."""
    out = tmp_path_factory.mktemp("straight") / "out"
    job(out)
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
def problems(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    shape = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    size = shape[0] * shape[1]
    bits = draw(st.lists(st.integers(1, 40), min_size=size, max_size=size))
    errors = draw(st.lists(st.integers(0, 1000), min_size=size, max_size=size))
    return np.array(bits, dtype=float).reshape(shape), np.array(errors, dtype=float).reshape(shape)


@settings(max_examples=150, deadline=None)
@given(problem=problems(), share=st.floats(0, 1))
def test_a_choice_is_within_the_budget_and_near_the_best(problem: tuple[np.ndarray, np.ndarray], share: float) -> None:
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


@settings(max_examples=100, deadline=None)
@given(problem=problems())
def test_more_budget_never_gives_a_larger_error(problem: tuple[np.ndarray, np.ndarray]) -> None:
    bits_TK, error_TK = problem
    budgets = np.arange(bits_TK.min(1).sum(), bits_TK.max(1).sum() + 1)
    found = [error_TK[np.arange(len(bits_TK)), choose(bits_TK, error_TK, b)].sum() for b in budgets]
    assert found == sorted(found, reverse=True)


def test_equal_targets_are_served_in_their_order() -> None:
    assert choose(np.array([[1.0, 2.0]] * 4), np.array([[8.0, 1.0]] * 4), 6.0) == [1, 1, 0, 0]


def test_the_choice_is_a_recipe_that_gives_the_same_bytes(straight: Path, job: Job, tmp_path: Path) -> None:
    report = json.loads((straight / "report.json").read_text())
    assert report["target_bits"] == 3.5
    assert 3.2 < report["bits_per_weight"] <= 3.5
    assert sum(row["targets"] for row in report["settings"]) == 14
    assert len(report["settings"]) > 1
    verify(str(straight))
    assert "recipe.yaml" in (straight / artifact.SUMS).read_text()
    again = job(tmp_path / "again", recipe=str(straight / "recipe.yaml"), target_bits=None)
    assert again["target_bits"] is None
    only_here = {artifact.SUMS, "recipe.yaml"}
    kept = {name: digest for name, digest in contents(straight).items() if name not in only_here}
    assert {name: digest for name, digest in contents(tmp_path / "again").items() if name not in only_here} == kept


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.slow
def test_threads_do_not_matter(threads: int, straight: Path, job: Job, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        job(tmp_path / "out")
    finally:
        torch.set_num_threads(before)
    assert contents(tmp_path / "out") == contents(straight)


@pytest.mark.slow
def test_budgets_are_kept_and_the_dearest_is_the_best(job: Job, tmp_path: Path) -> None:
    bits = [job(tmp_path / str(b), target_bits=b)["bits_per_weight"] for b in (2.2, 6)]
    assert bits[0] <= 2.2 < 5 < bits[1] <= 6


def test_damage_falls_with_bits_and_is_that_of_one_weight_alone(job: Job, tmp_path: Path) -> None:
    noted: dict[str, dict[str, list[float]]] = {}
    keep = Writer.save_measured

    def note(into: Writer, name: str, record: dict[str, list[float]]) -> None:
        noted[name] = record
        keep(into, name, record)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Writer, "save_measured", note)
        job(tmp_path / "out")
    damage = np.array([row for record in noted.values() for row in record.values()])
    assert damage.shape == (14, 4)
    assert (damage[:, 0] > damage[:, 2]).all()
    assert (damage[:, 2] > damage[:, 3]).all()
    assert (damage[:, 3] > 0).all()


@pytest.mark.parametrize("moment", ["measuring", "encoding"])
def test_a_killed_run_measures_nothing_twice_and_ends_in_the_same_bytes(
    moment: str, straight: Path, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, name, kill_at = {"measuring": (allocate, "study", 2), "encoding": (compress, "study", 2)}[moment]
    calls: list[int] = []
    study = compress.study

    def mortal(stream: Any, plan: Any, index: int, *rest: Any) -> Any:
        calls.append(index)
        if len(calls) == kill_at:
            raise Killed
        return study(stream, plan, index, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, mortal)
        with pytest.raises(Killed):
            job(tmp_path / "out")
    assert calls == [0, 1]
    calls.clear()
    kill_at = 0
    with pytest.raises(VQCompressError, match="another target bits"):
        job(tmp_path / "out", target_bits=3)
    with monkeypatch.context() as patch:
        patch.setattr(allocate, "study", mortal)
        job(tmp_path / "out")
    assert calls == ([1] if moment == "measuring" else [])
    assert contents(tmp_path / "out") == contents(straight)


@pytest.mark.slow
def test_a_kill_at_any_moment_loses_nothing(
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


def test_the_plan_shows_the_budget_and_what_there_is_to_choose(
    toy: Callable[..., Path], candidates: str, text: Path
) -> None:
    facts = dry_run(QuantizeOptions(str(toy()), None, candidates, [str(text)], target_bits=3))
    assert facts["bits_per_weight"] == facts["target_bits"] == 3
    assert len(facts["candidates"]) == 4
    assert {row["bits_per_weight"] for row in facts["targets"]} == {None}
    small, large = (
        dry_run(QuantizeOptions(str(toy()), None, candidates, [str(text)], target_bits=b))["artifact_bytes"]
        for b in (2, 6)
    )
    assert large - small == pytest.approx(4 / 8 * facts["weights_quantized"], abs=2)
    words = ["--calibration", str(text)]
    shown = CliRunner().invoke(app, ["plan", str(toy()), *words, "--recipe", candidates, "--target-bits", "3"])
    assert "choice  fp8: 8.0" in shown.stdout


def test_the_command_line(toy: Callable[..., Path], candidates: str, text: Path, tmp_path: Path) -> None:
    words = ["quantize", str(toy()), "-o", str(tmp_path / "out"), "--recipe", candidates, "--target-bits", "3"]
    words += ["--calibration", str(text), "--samples", "4", "--seqlen", "32", "--device", "cpu"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.stderr
    assert "model.layers.1" in result.stderr
    assert "setting" in result.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "--recipe is missing"),
        (["--kv-cache", "kv-vq-2bit"], "--recipe is missing (see `vqcompress recipes`); --recipe kv-vq-2bit codes the"),
        (["--recipe", "kv-vq-4bit", "--kv-cache", "kv-vq-2bit"], "in two ways; leave one of them out"),
        (["--recipe", "fp8-tile", "--kv-cache", "artifact"], "no recipe 'artifact'."),
        (["--recipe", "mixed"], "add --target-bits"),
        (["--recipe", "vq-2bit", "--target-bits", "2.5"], "a list 'candidates', such as mixed"),
        (["--target-bits", "1.4"], "1.4 must be from 1.5 to 6"),
        (["--target-bits", "6.1"], "6.1 must be from 1.5 to 6"),
        (["--target-bits", "nan"], "nan must be from 1.5 to 6"),
    ],
)
def test_what_does_not_fit_together_is_refused(words: list[str], said: str, toy: Callable[..., Path]) -> None:
    result = CliRunner().invoke(app, ["plan", str(toy()), *words])
    assert result.exit_code == 2
    assert said in result.stderr


def test_too_little_is_refused_with_the_least_there_is(toy: Callable[..., Path], job: Job, tmp_path: Path) -> None:
    dear = tmp_path / "dear.yaml"
    dear.write_text("candidates:\n  - {method: vq, codebook: trellis, bits: 3}\n")
    with pytest.raises(UsageError, match=r"1\.5 is too little: .* needs 3\.\d\d\d here"):
        dry_run(QuantizeOptions(str(toy()), None, str(dear), target_bits=1.5))
    with pytest.raises(UsageError, match="too little"):
        job(tmp_path / "out", recipe=str(dear), target_bits=1.5)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("candidates: []", "at least one candidate"),
        ("candidates: 3", "at least one candidate"),
        ("rules: []\ncandidates: []", "both 'rules' and 'candidates'"),
        ("candidates: [3]", "a candidate is a mapping with 'method'"),
        ("candidates: [{match: '*', method: int8}]", "nothing else"),
        ("candidates: [{method: int8, smoothing: {alpha: 0.5}}]", "nothing else"),
        ("candidates: [{method: int8}, {method: in8}]", "rule 2.*Did you mean 'int8'"),
    ],
)
def test_a_broken_list_of_candidates_is_refused(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        recipes.parse(text, "test")


def test_a_candidate_that_compresses_nothing_is_refused(toy: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "keep.yaml").write_text("candidates: [{method: fp8}, {method: keep}]")
    with pytest.raises(UsageError, match="compresses nothing"):
        dry_run(QuantizeOptions(str(toy()), None, str(tmp_path / "keep.yaml"), target_bits=3))


def test_a_dumped_recipe_is_read_as_what_it_was() -> None:
    for name in ("mixed-fp8-vq3", "smoothquant-int8", "vq-2bit"):
        recipe = recipes.load(name)
        assert recipes.parse(recipes.dump(recipe), name) == recipe
