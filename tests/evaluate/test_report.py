"""What a run tells people: report.html and README.md agree with report.json, and evaluations are added to all three."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from huggingface_hub import ModelCard
from typer.testing import CliRunner

from vqcompress.cli.main import app
from vqcompress.evaluate.model_card import add_evaluation, documents, model_card
from vqcompress.evaluate.report_html import report_page
from vqcompress.evaluate.verify import verify
from vqcompress.evaluate.wording import shrunk
from vqcompress.storage.artifact import SUMS

Make = Callable[..., Path]
ALWAYS = {"error", "time", "settings", "dense", "inputs"}


def parsed(page: str) -> ElementTree.Element:
    """A page as a browser would read it, if it is well-formed and asks for nothing from elsewhere."""
    root = ElementTree.fromstring(page.removeprefix("<!DOCTYPE html>"))
    ids = [e.attrib["id"] for e in root.iter() if "id" in e.attrib]
    assert len(ids) == len(set(ids))
    for element in root.iter():
        name = element.tag.rpartition("}")[2]
        assert name not in {"script", "iframe", "img", "image", "object", "embed", "base"}
        assert not [key for key in element.attrib if key.startswith("on") or key == "src"]
        links = [value for key, value in element.attrib.items() if key.rpartition("}")[2] == "href"]
        assert all(link == "data:," or link[1:] in ids for link in links)
        assert name != "figure" or (element.get("role") == "img" and element.get("aria-label"))
    assert "@import" not in page
    assert {address in ids for address in re.findall(r"url\(#?(.*?)\)", page)} <= {True}
    return root


def words(element: ElementTree.Element) -> str:
    return " ".join(" ".join(element.itertext()).split())


def charts_of(element: ElementTree.Element) -> list[ElementTree.Element]:
    return [e for e in element.iter() if e.tag.endswith("}svg")]


def sections(root: ElementTree.Element) -> dict[str, ElementTree.Element]:
    return {e.attrib["id"]: e for e in root.iter() if e.tag.endswith("}section")}


def cells(element: ElementTree.Element) -> list[list[str]]:
    """The rows of all tables in an element."""
    rows = [e for e in element.iter() if e.tag.endswith("}tr")]
    return [[words(cell) for cell in row] for row in rows]


def report_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())


@pytest.mark.parametrize(
    ("recipe", "family", "more"),
    [
        ("mixed", "llama", {"codebooks", "outliers"}),
        ("smoothquant-int8", "mixtral", {"outliers", "experts"}),
    ],
)
def test_the_page_has_what_the_report_has(recipe: str, family: str, more: set[str], quantized: Make) -> None:
    folder = quantized(recipe, family)
    root, report = parsed((folder / "report.html").read_text()), report_of(folder)
    found = sections(root)
    assert found.keys() == ALWAYS | more
    assert all(charts_of(found[name]) for name in more | {"error", "time"})
    by_kind = {row[0]: row for row in cells(found["error"]) if len(row) == 9}
    for row in report["targets"]:
        local = re.sub(r"\.\d+\.", ".*.", row["name"].split(".", 3)[-1])
        assert row["method"] in by_kind[local][1].split(", ")
    worst = max(report["targets"], key=lambda row: row["relative_error"])
    assert worst["name"] in [row[8] for row in by_kind.values()]
    counts = [int(row[3].replace(",", "")) for row in by_kind.values() if row[0] != "weight"]
    assert sum(counts) == report["weights_quantized"]
    assert dict(row for row in cells(found["dense"]) if row[0] != "weight") == report["left_dense"]
    text = words(root)
    assert f"{report['bits_per_weight']:.3f}" in text
    assert report["inputs"]["weights"] in text
    assert report["versions"]["torch"] in text
    for told in (words(found["settings"]), (folder / "README.md").read_text()):
        assert report["calibration"]["texts"][0] in told
    assert report_page(report) == (folder / "report.html").read_text()


def test_a_size_that_grew_is_not_called_smaller() -> None:
    assert (shrunk(4.6e6, 1.5e6), shrunk(4.6e6, 5.0e6)) == ("3.07 times smaller", "1.09 times larger")


def test_smoothing_says_how_far_the_largest_channel_stands_out(quantized: Make) -> None:
    notes = [row["smoothing"] for row in report_of(quantized("smoothquant-int8", "mixtral"))["targets"]]
    assert any(notes)
    for note in filter(None, notes):
        before, after = note["outlier"]
        assert min(before, after) >= 1
        assert (before == after) == (note["alpha"] is None)


def test_a_hostile_name_is_only_words(quantized: Make) -> None:
    hostile = "</title><script>alert('1')</script>\"&$x_$"
    report = report_of(quantized("mixed")) | {"base_model": hostile, "left_dense": {hostile: hostile}}
    report["targets"][0] |= {"name": f"model.layers.0.{hostile}"}
    told = documents(report, hostile)
    root = parsed(told["report.html"].decode())
    assert hostile in words(sections(root)["dense"])
    assert ModelCard(told["README.md"].decode(), ignore_metadata_errors=True).data.base_model == hostile


def test_a_run_without_a_compressed_weight_has_a_page(quantized: Make) -> None:
    cache = {"bits": 4, "codebook": "learned", "window": 32, "sinks": 4}
    nothing = {"targets": [], "settings": [], "weights_quantized": 0, "bits_per_weight": None, "codebooks": {}}
    report = report_of(quantized("mixed")) | nothing | {"kv_cache": cache}
    root = parsed(report_page(report))
    assert sections(root).keys() == ALWAYS - {"error"}
    assert "4 bits" in words(root)
    assert "| matrices |" not in model_card(report, "out")


def test_what_the_recipe_keeps_is_listed(quantized: Make) -> None:
    assert "model.layers.*.self_attn.o_proj.weight" in report_of(quantized("mixed"))["left_dense"]


def test_the_card_has_metadata_that_the_hub_takes(quantized: Make) -> None:
    folder = quantized("mixed")
    data = ModelCard.load(folder / "README.md").data.to_dict()
    assert (data["library_name"], data["pipeline_tag"]) == ("vqcompress", "text-generation")
    assert not {"base_model", "model-index"} & data.keys()
    report = report_of(folder) | {"base_model": "someone/model", "recipe": "/a/b: [c].yaml"}
    front = yaml.safe_load(model_card(report, "out").split("---\n")[1])
    assert (front["base_model"], front["base_model_relation"]) == ("someone/model", "quantized")
    assert front["tags"][2] == "b: [c].yaml"


@pytest.mark.slow
def test_the_card_shows_what_works(
    quantized: Make, toy: Make, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(quantized("mixed"), tmp_path / """it's "a" model"""))
    card = model_card(report_of(folder), folder.name)
    python = card.split("```python\n")[1].split("```")[0]
    shell = card.split("shell:\n\n```\n")[1].split("```")[0]
    done = subprocess.run([sys.executable, "-c", python], cwd=folder.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("The first thing to know is")
    monkeypatch.chdir(folder.parent)
    for line in shell.strip().splitlines():
        # The card names the model without its directory, and leaves the text to the reader.
        line = line.replace("FILE", f"{text} --seqlen 32 --windows 1").replace(toy().name, str(toy()))
        result = CliRunner().invoke(app, shlex.split(line)[1:])
        assert result.exit_code == 0, (line, result.output)


@pytest.fixture
def evaluated(quantized: Make, toy: Make, text: Path, tmp_path: Path) -> Callable[..., Any]:
    """evaluated(*options) → the result of `eval perplexity --report` on a copy of an artifact."""
    copy = shutil.copytree(quantized("mixed"), tmp_path / "copy")

    def run(*options: str) -> Any:
        words = ["eval", "perplexity", str(copy), "--text", str(text), "--seqlen", "32", *options, "--report"]
        return CliRunner().invoke(app, words)

    return run


def test_evaluations_are_kept_side_by_side(evaluated: Callable[..., Any], toy: Make, tmp_path: Path) -> None:
    folder, baseline = tmp_path / "copy", ["--baseline", str(toy())]
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert evaluated("--windows", "2", *baseline).exit_code == 0
    assert evaluated("--windows", "3").exit_code == 0
    # The same once more, and what was known of the baseline stays.
    assert evaluated("--windows", "2").exit_code == 0
    report = report_of(folder)
    first, second = report["evaluations"]
    assert (first["windows"], second["windows"]) == (2, 3)
    assert first["text"] == "text.txt"
    assert first["baseline"]["model"] == toy().name
    assert "ratio" not in second
    card, page = (folder / "README.md").read_text(), parsed((folder / "report.html").read_text())
    rows = [row for row in cells(sections(page)["quality"]) if row[0] == "text.txt"]
    assert rows[0][1:6] == [
        f"{first['perplexity']:.3f}", f"{first['ratio']:.4f}", f"{first['kl_divergence']['mean']:.5f}",
        f"{100 * first['top1_agreement']:.2f} %", f"{first['baseline']['perplexity']:.3f}",
    ]  # fmt: skip
    assert rows[1][1:6] == [f"{second['perplexity']:.3f}", "-", "-", "-", "-"]
    assert all(f"| {' | '.join(row)} |" in card for row in rows)
    results = ModelCard.load(folder / "README.md").data.eval_results
    assert [result.metric_value for result in results] == [round(e["perplexity"], 4) for e in (first, second)]
    assert documents(report, "copy") == {n: (folder / n).read_bytes() for n in documents(report, "copy")}
    changed = {p.name for p in folder.iterdir() if p.read_bytes() != before.get(p.name)}
    assert changed - {SUMS} == {"report.json", "report.html", "README.md"}
    verify(str(folder))
    assert add_evaluation(str(folder), first | {"device": "cuda"}) == ["report.json", "report.html", "README.md"]
    assert [each["device"] for each in report_of(folder)["evaluations"]] == ["cpu", "cpu", "cuda"]
    # The tile has the figure with a plain cache if there is one.
    coded = first | {"kv_cache": "kv-fp8", "perplexity": 1.25}
    for found, figure in (([coded, second], f"{second['perplexity']:.3f}"), ([coded], "1.250")):
        root = parsed(documents(report | {"evaluations": found}, "copy")["report.html"].decode())
        assert figure in words(next(e for e in root.iter() if e.get("class") == "tiles"))


def test_a_card_that_was_edited_stays(evaluated: Callable[..., Any], tmp_path: Path) -> None:
    card = tmp_path / "copy" / "README.md"
    card.write_text("Mine.")
    assert "README.md" not in evaluated("--windows", "1").stdout
    assert card.read_text() == "Mine."
    card.unlink()
    assert evaluated("--windows", "1").exit_code == 0
    assert card.exists()
    assert len(report_of(card.parent)["evaluations"]) == 1
    verify(str(card.parent))


def test_a_report_that_cannot_be_added_to_is_refused_first(toy: Make, text: Path) -> None:
    for model in (str(toy()), "someone/model", "demo"):
        result = CliRunner().invoke(app, ["eval", "perplexity", model, "--text", str(text), "--report"])
        assert result.exit_code == 2
        assert model in result.stderr.splitlines()[-1]


def test_a_damaged_report_is_a_named_error(evaluated: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "copy" / "report.json").write_text('{"targets": []}')
    result = evaluated("--windows", "1")
    assert result.exit_code == 1
    assert "report.json" in result.stderr.splitlines()[-1]
    (tmp_path / "copy" / "report.json").unlink()
    assert evaluated("--windows", "1").exit_code == 2
