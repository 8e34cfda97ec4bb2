"""What a run did, as JSON: the content of report.json, and of what is written for people from it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from vqcompress.errors import VQCompressError
from vqcompress.storage.checkpoint import read_json


def cache_line(settings: dict[str, Any]) -> str:
    """How keys and values are kept, for people."""
    kept = f"the newest {settings['window']} and the first {settings['sinks']} tokens as they are"
    return f"keys and values in {settings['bits']} bits, {settings['codebook']}, {kept}"


def calibration_line(rows: dict[str, Any] | None) -> str:
    """What a recipe was calibrated on, for people."""
    if rows is None:
        return "none"
    # Reports of earlier versions do not name the texts.
    texts = f" of {', '.join(rows['texts']) or 'the built-in text'}" if "texts" in rows else ""
    return f"{rows['samples']} rows of {rows['seqlen']} tokens{texts}"


def named(place: str) -> str:
    """A text or a model for a report: of a local file or directory the name, for others do not have its place."""
    path = Path(os.path.expanduser(place))
    return path.absolute().name if path.exists() else place


def duration(seconds: float) -> str:
    """Seconds for people: 0.8 s, 42 s, 3 min 20 s, 2 h 5 min."""
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def shrunk(before: float, after: float) -> str:
    """How a size has changed, for people: 3.03 times smaller."""
    larger = after > before
    return f"{max(before, after) / max(min(before, after), 1):.2f} times {'larger' if larger else 'smaller'}"


def mean(rows: list[dict[str, Any]], key: str) -> float | None:
    """The mean of a figure of some targets, each by its number of weights; None if it is not known of all."""
    counts, values = [row["shape"][0] * row["shape"][1] for row in rows], [row[key] for row in rows]
    return None if None in values else sum(v * n for v, n in zip(values, counts, strict=True)) / sum(counts)


def read_report(folder: Path) -> dict[str, Any]:
    """The report in a directory, empty if there is none; VQCompressError if the file is something else."""
    file = folder / "report.json"
    if not file.is_file():
        return {}
    report = read_json(file)
    rows = report.get("targets", []) if isinstance(report, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "name" in row for row in rows):
        raise VQCompressError(f"{file} is not a report of vqcompress; delete it to go on without it")
    return dict(report)
