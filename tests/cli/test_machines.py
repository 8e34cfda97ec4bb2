"""Machines as people have them: no locks, no home, no cache, ASCII streams, containers, and figures beyond float64."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from commands import call, line
from rich.console import Console
from toys import rewritten

from vqcompress.cli.progress import QuantizeProgress
from vqcompress.cli.tables import inspected
from vqcompress.errors import UsageError
from vqcompress.evaluate.inspect import inspect
from vqcompress.export import verify as export_verify
from vqcompress.export.verify import Reader
from vqcompress.methods.vq import viterbi_numba
from vqcompress.model.device import cgroup_bytes
from vqcompress.storage import recipe

# The command line with ASCII streams and without the modules that Windows lacks.
POOR = """
import sys
import psutil
sys.modules["fcntl"] = sys.modules["resource"] = None
for stream in (sys.stdout, sys.stderr):
    stream.reconfigure(encoding="ascii", errors="strict")
from vqcompress.cli.main import main
main()
"""
# As in a package and a home that cannot be written to; root may write everywhere.
NOWHERE = """
import os, sys
os.environ["HOME"] = os.environ["XDG_CACHE_HOME"] = "/dev/null"
sys.path.insert(0, sys.argv[1])
import numpy as np
from viterbi_numba import paths
print(paths(np.zeros((1, 8), np.float32), np.zeros(16, np.float32), 4, 1, 4).shape)
"""


def test_no_locks_no_resource_and_ascii_streams(toy: Any, processes: Any, tmp_path: Path) -> None:
    model, out = toy(), tmp_path / "ö"
    done = processes.python(POOR, "quantize", model, "-o", out, "--recipe", "fp8-tile", "--json", "-")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["recipe"] == "fp8-tile"
    assert "->" in done.stderr
    assert processes.python(POOR, "verify", out).returncode == 0
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "vqcompress", "quantize", "--help"]
    help_ = subprocess.run(command, capture_output=True, env=environment, check=False)
    assert help_.returncode == 0
    assert b"--recipe" in help_.stdout


def test_a_trellis_is_searched_where_nothing_can_be_cached(processes: Any, tmp_path: Path) -> None:
    (tmp_path / "__pycache__").touch()
    shutil.copy(viterbi_numba.__file__, tmp_path)
    done = processes.python(NOWHERE, tmp_path)
    assert done.stdout == "(1, 8)\n", done.stderr
    assert done.stderr == ""


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EBADF, errno.EWOULDBLOCK])
def test_a_file_system_without_locks(number: int, toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*words: Any) -> None:
        raise OSError(number, os.strerror(number))

    model = toy()
    monkeypatch.setattr(fcntl, "flock", flock)
    result = call("quantize", model, "-o", tmp_path / "out", "--recipe", "fp8-tile")
    assert str(tmp_path / "out") in result.stderr
    # Only where another process holds a lock is there nothing to do.
    assert result.exit_code == (1 if number == errno.EWOULDBLOCK else 0)


@pytest.mark.parametrize(
    "files", [("memory.max", "memory.current", ""), ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")]
)
def test_page_cache_is_no_used_memory(files: tuple[str, str, str], tmp_path: Path) -> None:
    limit, used, prefix = files
    assert cgroup_bytes(tmp_path) is None
    (tmp_path / limit).write_text("1000\n")
    (tmp_path / used).write_text("900\n")
    (tmp_path / "memory.stat").write_text(f"active_file 5\n{prefix}inactive_file 700\n")
    assert cgroup_bytes(tmp_path) == 800
    (tmp_path / limit).write_text("max\n")
    assert cgroup_bytes(tmp_path) is None


def test_a_perplexity_beyond_float64(toy: Any, text: Path, tmp_path: Path) -> None:
    model = rewritten(toy(), tmp_path / "m", lambda t: t.update({"lm_head.weight": t["lm_head.weight"] * 1e6}))
    out, few = tmp_path / "found.json", ["--seqlen", "16", "--windows", "2", "--text", text]
    assert call("quantize", model, "-o", tmp_path / "out", "--recipe", "fp8-tile").exit_code == 0
    for _ in range(2):
        # The second adds to a report that holds such a figure.
        options = ["--baseline", toy(), *few, "--report", "--json", out]
        assert call("eval", "perplexity", tmp_path / "out", *options).exit_code == 0
    found = json.loads(out.read_text(), parse_constant=pytest.fail)
    assert (found["perplexity"], found["ratio"]) == ("inf", "inf")
    assert found["nll_per_token"] > 709
    assert json.loads((tmp_path / "out" / "report.json").read_text(), parse_constant=pytest.fail)
    # A model that is named twice is shown once.
    page = tmp_path / "page.html"
    assert call("compare", model, tmp_path / "out", model, *few, "--json", out, "--html", page).exit_code == 0
    assert [row["perplexity"] for row in json.loads(out.read_text())["models"]] == ["inf", "inf"]


def test_a_plan_writes_nothing(toy: Any) -> None:
    def state() -> list[tuple[str, int]]:
        return sorted((str(p), p.stat().st_mtime_ns) for p in [toy(), *toy().rglob("*")])

    before = state()
    assert call("plan", toy(), "--recipe", "vq-2bit").exit_code == 0
    assert state() == before


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("rulez: [{method: int8}]", "'rules'"),
        ("rules: [{method: int8}]\ntuning: {distil_epochs: 3}", "'distill_epochs'"),
        ("rules: [{method: int8, smoothing: {alfa: 1}}]", "'alpha'"),
        ("rules: [{method: vq, bits: 99}]", "bits=99"),
        ("cache: {bits: 3}", "cache.bits=3"),
        ("rules: 3", "rules=3"),
    ],
)
def test_recipes_are_refused_in_words_of_recipes(text: str, named: str) -> None:
    with pytest.raises(UsageError) as refused:
        recipe.parse(text, "mine.yaml")
    assert named in str(refused.value)
    assert "Input should" not in str(refused.value)
    assert "argument" not in str(refused.value)


def test_names_stay_whole_in_80_columns(quantized: Any, capsys: pytest.CaptureFixture[str]) -> None:
    facts = inspect(str(quantized("vq-small")))
    inspected(Console(width=80), facts)
    lines = capsys.readouterr().out.splitlines()
    assert all(any(row["name"].split("layers.")[1] + " " in line for line in lines) for row in facts["targets"])


def test_progress_counts_the_blocks_of_other_processes() -> None:
    rows = [{"name": "a", "shape": (2, 2), "bits_per_weight": 2.0, "relative_error": 0.1}]
    with QuantizeProgress() as progress:
        progress.weights = {"a": 4, "b": 4}
        progress.reset(progress.id, total=8)
        progress("done", {"index": 0, "count": 2, "name": "x", "record": {"targets": rows, "seconds": 1.0}})
        assert progress.tasks[0].completed == 4


def test_a_reader_that_is_missing_is_named_first() -> None:
    with pytest.raises(UsageError, match="no-such-reader"):
        Reader("no-such-reader[cpu]>=1.1").check_installed()
    Reader().check_installed()


def test_an_export_that_does_not_verify_does_not_load(
    quantized: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_verify, "READ", "raise SystemExit('no such reader {setup}{trusted}')")
    result = call("export", quantized("int8-plain"), "--format", "dense", "-o", tmp_path / "out", "--verify")
    assert result.exit_code == 1
    assert "no such reader" in line(result)
    assert not (tmp_path / "out" / "config.json").exists()
    assert call("export", quantized("int8-plain"), "--format", "dense", "-o", tmp_path / "out").exit_code == 0
