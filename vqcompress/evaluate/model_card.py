"""The files of an artifact that tell what was done: report.json for machines, report.html and README.md for people."""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import yaml
from rich.filesize import decimal as size

from vqcompress.errors import UsageError, VQCompressError, first_line
from vqcompress.evaluate.read_report import cache_line, calibration_line, mean, read_report
from vqcompress.evaluate.report_html import LOAD, evaluations, names_of, report_page, shell
from vqcompress.storage.artifact import SUMS, Artifact, read_sums
from vqcompress.storage.checkpoint import sha256
from vqcompress.storage.writer import Shards, refresh_sums, undisturbed

CARD = """---
{metadata}---

# {title}

`{base}` compressed by vqcompress {version} with the recipe `{recipe}`:
{bits}{source} → {artifact} in all.{cache} [report.html](report.html) shows sizes, errors, time and settings.

{warning}

```python
{load}
```

`vqcompress.load({here!r})` also checks the files first, and computes in float32 on a CPU unless told otherwise. From a
shell:

```
{shell}
```
{tables}
Calibration: {calibration}. Seed {seed}. `report.json` has a row per weight; `SHA256SUMS` has the checksums.
"""
COMPRESSED = """**Import `vqcompress` before you load this model.** Its weights are stored compressed; transformers
alone cannot read them and stops with a size mismatch."""
DENSE = """The weights are dense, and transformers alone loads them right. What is coded is the cache of keys and
values, which takes `vqcompress`."""
# What tells one evaluation from another: the same text by the same protocol replaces what was there.
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


@undisturbed()
def add_evaluation(model: str, found: dict[str, Any]) -> list[str]:
    """Add a result of `eval perplexity` to the report of an artifact's directory, and to what is made from it.

    Returns the names of the files that have it now: a README.md that somebody has edited stays as it is. An earlier
    result by the same protocol is replaced, but for what was compared with a baseline if this was not.
    """
    path = Path(os.path.expanduser(model)).resolve()
    lock = os.open(path, os.O_RDONLY)
    try:
        # Two evaluations may end at once, and each keeps the other's.
        fcntl.flock(lock, fcntl.LOCK_EX)
        report = read_report(path)
        kept = {tuple(each[key] for key in PROTOCOL): each for each in report.get("evaluations", [])}
        key = tuple(found[key] for key in PROTOCOL)
        kept[key] = kept.get(key, {}) | found
        told = documents(report | {"evaluations": list(kept.values())}, path.name)
        card, sums = path / "README.md", read_sums(path) if (path / SUMS).exists() else {}
        if card.exists() and sha256(card) != sums.get(card.name):
            del told[card.name]
        for name, data in told.items():
            Shards(path).write(name, data)
        refresh_sums(path, told)
        return list(told)
    except (KeyError, TypeError, AttributeError) as error:
        raise VQCompressError(
            f"{path / 'report.json'} is damaged or of another version: {first_line(error)}"
        ) from error
    finally:
        os.close(lock)


def model_card(report: dict[str, Any], here: str) -> str:
    """The README.md of an artifact."""
    base, recipe = names_of(report)
    metadata = {"library_name": "vqcompress", "pipeline_tag": "text-generation"}
    # The hub takes no other names than its own.
    metadata |= {"base_model": base, "base_model_relation": "quantized"} if report["base_model"] else {}
    tags = ["vqcompress", "quantized", recipe]
    bits, cache = report["bits_per_weight"], report["kv_cache"]
    turned_on = "`--kv-cache` or `vqcompress.load(…, kv_cache=True)` turns it on"
    return CARD.format(
        metadata=yaml.safe_dump(metadata | {"tags": tags}, sort_keys=False, allow_unicode=True),
        base=base,
        title=f"{Path(base).name} · {recipe}",
        version=report["versions"]["vqcompress"],
        recipe=recipe,
        bits="" if bits is None else f"{bits:.3f} bits per quantized weight, ",
        cache=f" Cache: {cache_line(cache)}; {turned_on}." if cache else "",
        warning=DENSE if bits is None else COMPRESSED,
        source=size(report["source_bytes"]),
        artifact=size(report["artifact_bytes"]),
        here=here,
        shell=shell(report, here),
        load=LOAD.format(here=here),
        tables=_by_method(report["targets"]) + _table(evaluations(report.get("evaluations", []))),
        calibration=calibration_line(report["calibration"]),
        seed=report["seed"],
    )


def _by_method(targets: list[dict[str, Any]]) -> str:
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in targets:
        found[row["method"]].append(row)
    head = ["method", "weights", "bits per weight", "mean relative error"]
    lines = []
    for method, rows in found.items():
        means = f"{mean(rows, 'bits_per_weight'):.3f}", f"{mean(rows, 'relative_error'):.2e}"
        lines.append([method, f"{sum(math.prod(row['shape']) for row in rows):,}", *means])
    return _table([head, *lines] if lines else [])


def _table(rows: list[list[str]]) -> str:
    """A table of Markdown, its head first, with the empty line before it; nothing for no rows."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    cells[1:1] = [["---"] * len(row) for row in rows[:1]]
    return "\n" * bool(rows) + "".join(f"| {' | '.join(row)} |\n" for row in cells)
