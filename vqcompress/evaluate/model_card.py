"""The files of an artifact that tell what was done: report.json for machines, report.html and README.md for people."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from vqcompress.errors import UsageError, VQCompressError, one_line
from vqcompress.evaluate.read_report import read_report, to_json
from vqcompress.evaluate.report_html import render, report_page
from vqcompress.evaluate.wording import names_of, protocol_line
from vqcompress.storage.artifact import Artifact, read_sums
from vqcompress.storage.checkpoint import sha256
from vqcompress.storage.locks import locked
from vqcompress.storage.output import SUMS
from vqcompress.storage.writer import Shards, refresh_sums

# A new evaluation replaces an earlier one that agrees in all of these.
PROTOCOL = ("text", "tokens_sha256", "windows", "seqlen", "stride", "bos", "kv_cache", "device")


def documents(report: dict[str, Any], here: str) -> dict[str, bytes]:
    """File name → content, all made from the report. here: the name of the artifact's directory."""
    return {
        "report.json": to_json(report).encode(),
        "report.html": report_page(report).encode(errors="replace"),
        "README.md": model_card(report, here).encode(errors="replace"),
    }


def model_card(report: dict[str, Any], here: str) -> str:
    """The README.md of an artifact. here: the name of its directory."""
    base, recipe = names_of(report)
    title = f"{Path(base).name} · {recipe}"
    hub: dict[str, Any] = {"base_model": base, "base_model_relation": "quantized"} if report["base_model"] else {}
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=found["text"],
            dataset_name=found["text"],
            metric_type="perplexity",
            metric_name=f"perplexity ({protocol_line(found)})",
            metric_value=round(float(found["perplexity"]), 4),
        )
        for found in report.get("evaluations", [])
    ]
    data = ModelCardData(
        library_name="vqcompress",
        pipeline_tag="text-generation",
        tags=["vqcompress", "quantized", recipe],
        model_name=title if results else None,
        eval_results=results or None,
        **hub,
    )
    return render("README.md.j2", report=report, card_data=data, title=title, names=(base, recipe), here=here)


def check_writable(model: str) -> None:
    """UsageError unless MODEL is the directory of an artifact with a report, to which an evaluation can be added."""
    path = Path(os.path.expanduser(model))
    if not (path.is_dir() and Artifact.is_one(path) and read_report(path)):
        raise UsageError(f"--report: {model} is not the directory of an artifact with a report.json")


def add_evaluation(model: str, found: dict[str, Any]) -> list[str]:
    """Add a result of `eval perplexity` to the report of an artifact's directory; returns the files rewritten.

    A README.md that somebody has edited is left alone. An earlier result by the same protocol is replaced; its
    comparison with a baseline stays if the new result has none.
    """
    path = Path(os.path.expanduser(model)).resolve()
    # Of two evaluations that end at once, neither may lose the other's result.
    with locked(path / "config.json"):
        report = read_report(path)
        try:
            kept = {tuple(each[key] for key in PROTOCOL): each for each in report.get("evaluations", [])}
            key = tuple(found[key] for key in PROTOCOL)
            kept[key] = kept.get(key, {}) | found
            files = documents(report | {"evaluations": list(kept.values())}, path.name)
        except (KeyError, TypeError, AttributeError) as error:
            raise VQCompressError(f"{path / 'report.json'} is damaged: {one_line(error)}") from error
        card, sums = path / "README.md", read_sums(path) if (path / SUMS).exists() else {}
        if card.exists() and sha256(card) != sums.get(card.name):
            del files[card.name]
        for name, data in files.items():
            Shards(path).write(name, data)
        refresh_sums(path, files)
        return list(files)
