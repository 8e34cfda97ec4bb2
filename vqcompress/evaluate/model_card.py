"""The files of an artifact that tell what was done: report.json for machines, report.html and README.md for people."""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from rich.filesize import decimal as size

from vqcompress.errors import UsageError, VQCompressError, one_line
from vqcompress.evaluate.read_report import mean, read_report
from vqcompress.evaluate.report_html import report_page
from vqcompress.evaluate.wording import (
    LOAD,
    cache_line,
    calibration_line,
    evaluation_table,
    names_of,
    protocol_line,
    shell_commands,
)
from vqcompress.storage.artifact import SUMS, Artifact, read_sums
from vqcompress.storage.checkpoint import sha256
from vqcompress.storage.writer import Shards, refresh_sums

CARD = Path(__file__).parent / "templates" / "README.md.j2"
# A new evaluation replaces an earlier one that agrees in all of these.
PROTOCOL = ("text", "tokens_sha256", "windows", "seqlen", "stride", "bos", "kv_cache", "device")


def documents(report: dict[str, Any], here: str) -> dict[str, bytes]:
    """File name → content, all made from the report. here: the name of the artifact's directory."""
    return {
        "report.json": json.dumps(report, indent=1).encode(),
        "report.html": report_page(report, here).encode(),
        "README.md": model_card(report, here).encode(errors="replace"),
    }


def check_writable(model: str) -> None:
    """UsageError unless MODEL is the directory of an artifact with a report, to which an evaluation can be added."""
    path = Path(os.path.expanduser(model))
    if not (path.is_dir() and Artifact.is_one(path)):
        raise UsageError(f"--report: {model} is not the directory of an artifact; leave --report out")
    if not read_report(path):
        raise UsageError(f"--report: {path} has no report.json to add to; leave --report out")
    if not os.access(path, os.W_OK):
        raise UsageError(f"--report: {path} cannot be written to; leave --report out")


def add_evaluation(model: str, found: dict[str, Any]) -> list[str]:
    """Add a result of `eval perplexity` to the report of an artifact's directory; returns the files rewritten.

    A README.md that somebody has edited is left alone. An earlier result by the same protocol is replaced; its
    comparison with a baseline stays if the new result has none.
    """
    path = Path(os.path.expanduser(model)).resolve()
    lock = os.open(path, os.O_RDONLY)
    try:
        # Of two evaluations that end at once, neither may lose the other's result.
        fcntl.flock(lock, fcntl.LOCK_EX)
        report = read_report(path)
        kept = {tuple(each[key] for key in PROTOCOL): each for each in report.get("evaluations", [])}
        key = tuple(found[key] for key in PROTOCOL)
        kept[key] = kept.get(key, {}) | found
        files = documents(report | {"evaluations": list(kept.values())}, path.name)
        card, sums = path / "README.md", read_sums(path) if (path / SUMS).exists() else {}
        if card.exists() and sha256(card) != sums.get(card.name):
            del files[card.name]
        for name, data in files.items():
            Shards(path).write(name, data)
        refresh_sums(path, files)
        return list(files)
    except (KeyError, TypeError, AttributeError) as error:
        raise VQCompressError(f"{path / 'report.json'} is damaged: {one_line(error)}") from error
    finally:
        os.close(lock)


def model_card(report: dict[str, Any], here: str) -> str:
    """The README.md of an artifact. here: the name of its directory."""
    base, recipe = names_of(report)
    title = f"{Path(base).name} · {recipe}"
    hub: dict[str, Any] = {"base_model": base, "base_model_relation": "quantized"} if report["base_model"] else {}
    found = report.get("evaluations", [])
    data = ModelCardData(
        library_name="vqcompress",
        pipeline_tag="text-generation",
        tags=["vqcompress", "quantized", recipe],
        model_name=title if found else None,
        eval_results=[_eval_result(each) for each in found] or None,
        **hub,
    )
    card = ModelCard.from_template(
        data,
        template_str=CARD.read_text(encoding="utf-8"),
        report=report,
        title=title,
        base=base,
        recipe=recipe,
        source=size(report["source_bytes"]),
        artifact=size(report["artifact_bytes"]),
        cache=cache_line(report["kv_cache"]) if report["kv_cache"] else "",
        here=repr(here),
        load=LOAD.format(here=here),
        shell=shell_commands(report, here),
        tables=[rows for rows in (_by_method(report["targets"]), evaluation_table(found)) if rows],
        calibration=calibration_line(report["calibration"]),
    )
    return str(card)


def _eval_result(found: dict[str, Any]) -> EvalResult:
    """A result of `eval perplexity` as the hub shows it."""
    return EvalResult(
        task_type="text-generation",
        dataset_type=found["text"],
        dataset_name=found["text"],
        metric_type="perplexity",
        metric_name=f"perplexity ({protocol_line(found)})",
        metric_value=round(found["perplexity"], 4),
    )


def _by_method(targets: list[dict[str, Any]]) -> list[list[str]]:
    """A table of bits and errors by method, its titles first; empty without targets."""
    by_method: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in targets:
        by_method[row["method"]].append(row)
    lines = [["method", "weights", "bits per weight", "mean relative error"]] if targets else []
    for method, rows in by_method.items():
        means = f"{mean(rows, 'bits_per_weight'):.3f}", f"{mean(rows, 'relative_error'):.2e}"
        lines.append([method, f"{sum(math.prod(row['shape']) for row in rows):,}", *means])
    return lines
