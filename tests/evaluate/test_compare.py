"""Several models on one text get the figures that each has alone."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from test_report import cells, charts_of, parsed
from test_report import words as words_of
from typer.testing import CliRunner

from vqcompress.cli import tables as show
from vqcompress.cli.main import app
from vqcompress.errors import VQCompressError
from vqcompress.evaluate.compare import _original, compare
from vqcompress.evaluate.inspect import inspect
from vqcompress.evaluate.perplexity import perplexity
from vqcompress.evaluate.report_html import comparison_page

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def artifacts(quantized: Make) -> list[str]:
    return [str(quantized(recipe)) for recipe in ("vq-small", "smoothquant-int8")]


def test_each_model_has_the_figures_it_has_alone(
    artifacts: list[str], toy: Make, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Reports name a local model without its place.
    monkeypatch.chdir(toy().parent)
    found = compare(artifacts, str(text), seqlen=32, limit=3)
    assert found.keys() == {"text", "protocol", "baseline", "seconds", "models"}
    assert (found["text"], found["baseline"]) == (text.name, toy().name)
    assert [row["model"] for row in found["models"]] == [toy().name, artifacts[1], artifacts[0]]
    for row in found["models"][1:]:
        alone = perplexity(row["model"], str(text), seqlen=32, limit=3, baseline=str(toy()))
        assert {key: row[key] for key in ("perplexity", "ratio", "kl_divergence", "top1_agreement")} == {
            key: alone[key] for key in ("perplexity", "ratio", "kl_divergence", "top1_agreement")
        }
        assert found["models"][0]["perplexity"] == alone["baseline"]["perplexity"]
        assert {key: alone[key] for key in found["protocol"]} == found["protocol"]
        facts = inspect(row["model"])
        assert row["bits_per_weight"] == pytest.approx(facts["bits_per_weight"])
        assert row["bytes"] == facts["artifact_bytes"]
    original = found["models"][0]
    assert (original["bits_per_weight"], original["ratio"], original["kl_divergence"]["mean"]) == (32, 1, 0)
    assert original["bytes"] == (toy() / "model.safetensors").stat().st_size


def test_the_one_model_that_is_no_artifact_is_the_original(artifacts: list[str], toy: Make) -> None:
    other = str(toy("llama", seed=1))
    assert _original([*artifacts, other]) == other
    # Two dense checkpoints, or none beside it, leave the original unclear.
    assert _original([*artifacts, other, str(toy())]) is None
    assert _original([other]) is None


def test_without_an_original_there_is_no_divergence(artifacts: list[str], text: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(artifacts[0], tmp_path / "copy")
    report = json.loads((copy / "report.json").read_text())
    (copy / "report.json").write_text(json.dumps(report | {"model": "another"}))
    words = ["compare", artifacts[1], str(copy), "--text", str(text), "--seqlen", "32", "--windows", "1"]
    result = CliRunner().invoke(app, [*words, "--json", str(tmp_path / "found.json")])
    assert result.exit_code == 0, result.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["baseline"] is None
    assert all(row["kl_divergence"] is row["ratio"] is row["top1_agreement"] is None for row in found["models"])


def test_models_of_other_tokens_do_not_compare(artifacts: list[str], toy: Make, text: Path) -> None:
    with pytest.raises(VQCompressError, match=re.escape(artifacts[0])):
        compare([artifacts[0], str(toy("llama", vocab=300))], str(text), seqlen=32, limit=1)


@pytest.mark.parametrize("named", ["org/name", "org/name@v1", "/nowhere", None])
def test_nothing_is_downloaded_since_a_report_names_it(
    named: object, artifacts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(repo: str, local_files_only: bool = False, **_: Any) -> str:
        assert local_files_only
        raise LookupError

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    copy = shutil.copytree(artifacts[0], tmp_path / "copy")
    report = json.loads((copy / "report.json").read_text())
    (copy / "report.json").write_text(json.dumps(report | {"model": named}))
    assert _original([str(copy)]) is None


def test_page_and_terminal_have_the_figures(artifacts: list[str], toy: Make, text: Path, tmp_path: Path) -> None:
    words = ["compare", *artifacts, "--baseline", str(toy()), "--text", str(text), "--seqlen", "32", "--windows", "2"]
    page, file = tmp_path / "compared.html", tmp_path / "found.json"
    result = CliRunner().invoke(app, [*words, "--html", str(page), "--json", str(file)])
    assert result.exit_code == 0, result.stderr
    found = json.loads(file.read_text())
    assert page.read_text() == comparison_page(found)
    root = parsed(page.read_text())
    rows = cells(root)[1:]
    assert [row[0] for row in rows] == [row["model"] for row in found["models"]]
    assert [float(row[3]) for row in rows] == [pytest.approx(row["perplexity"], abs=1e-3) for row in found["models"]]
    assert ["(original)" in words_of(chart) for chart in charts_of(root)] == [True] * 3
    assert all(f"{row['bits_per_weight']:.3f}" in result.stdout for row in found["models"])
    # One model with a broken perplexity does not spoil the page of the others.
    for value in (float("nan"), float("inf")):
        found["models"][-1] |= {"perplexity": value, "kl_divergence": dict.fromkeys(("mean", "p99", "max"), value)}
        assert len(list(parsed(comparison_page(found)).iter())) > 100
        show.compared(Console(file=io.StringIO(), width=80), found)


def test_a_page_whose_place_does_not_exist_is_wrong_usage(artifacts: list[str], text: Path) -> None:
    words = ["compare", *artifacts, "--text", str(text), "--html", "/nowhere/at/all.html"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2
    assert "--html /nowhere/at/all.html" in result.stderr
