"""Whether a command may write into a directory, and the files by which it knows its own. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vqcompress.errors import VQCompressError

QUANT_METHOD = "vqcompress"
# The file that `quantize` writes first, and the one that `export` writes first.
JOURNAL, INDEX = "journal.json", "model.safetensors.index.json"
SUMS = "SHA256SUMS"
# Stands in the index of an export, beside a list of its other files: --overwrite deletes only files of an export.
WRITER = "vqcompress export"


def check_output(out: Path, overwrite: bool, first: str) -> None:
    """VQCompressError unless a command may write into a directory: it is new or empty, or has what the command left.

    first: the file that the command writes first. What it left unfinished is free, a result only with `overwrite`.
    """
    if out.exists() and not out.is_dir():
        raise VQCompressError(f"cannot make the directory {out}: a file has that name")
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if first == JOURNAL:
        settings = part_of(out / "config.json", "quantization_config")
        begun, finished = JOURNAL in names, SUMS in names and settings.get("quant_method") == QUANT_METHOD
    else:
        finished = part_of(out / INDEX, "metadata").get("written_by") == WRITER
        begun = finished and "config.json" not in names
    # Killed during its very first write, a command leaves only a part of that file.
    if not (begun or finished) and names - {f"{first}.partial"}:
        raise VQCompressError(f"{out} holds files of another origin; choose another directory")
    if finished and not begun and not overwrite:
        raise VQCompressError(f"{out} already holds a result; choose another directory or give --overwrite")


def part_of(path: Path, key: str) -> dict[str, Any]:
    """The object under a key of a JSON file; an empty one if there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8")).get(key)
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
