"""report.json of an artifact: reading it, and figures computed from its rows."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from vqcompress.errors import VQCompressError
from vqcompress.storage.checkpoint import read_json


def named(source: str) -> str:
    """A text or model as a report names it: of a local file or directory its name only, since others lack the path."""
    path = Path(os.path.expanduser(source))
    return path.absolute().name if path.exists() else source


def to_json(value: Any) -> str:
    """JSON text in ASCII, since names of files may hold what UTF-8 cannot encode.

    Numbers that JSON does not have, such as a perplexity beyond float64, are strings: inf, -inf, nan.
    """

    def valid(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: valid(each) for key, each in value.items()}
        if isinstance(value, (list, tuple)):
            return [valid(each) for each in value]
        return str(value) if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(valid(value), indent=1, allow_nan=False)


def mean(rows: list[dict[str, Any]], key: str) -> float | None:
    """The mean of a figure over targets, weighted by their sizes; None if one of them lacks it."""
    counts, values = [row["shape"][0] * row["shape"][1] for row in rows], [row[key] for row in rows]
    return None if None in values else sum(v * n for v, n in zip(values, counts, strict=True)) / sum(counts)


def read_report(folder: Path) -> dict[str, Any]:
    """The report of a directory, {} if it has none; VQCompressError if report.json is something else."""
    file = folder / "report.json"
    report = read_json(file) if file.is_file() else {}
    rows = report.get("targets", []) if isinstance(report, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "name" in row for row in rows):
        raise VQCompressError(f"{file} is not a report of vqcompress; delete it to go on without it")
    return dict(report)
