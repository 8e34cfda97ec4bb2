"""Checkpoints that are not in transformers' dense layout: what they are, and what to do. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from vqcompress.storage.damage import damage

# What is read, and no sign of another layout.
OWN = re.compile(r"(pytorch_)?model(-\d+-of-\d+)?\.(safetensors|bin)")


def _first(kind: str, names: list[str], form: str) -> str | None:
    """The first of the names that foreign.yaml knows, and what it says."""
    table: dict[str, Any] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    found = ((name, what) for key, what in table[kind].items() for name in names if re.search(form.format(key), name))
    return next((f"{name}: {what}" for name, what in found), None)


def instead_of(file: Path) -> str:
    """What a directory that lacks a file has instead, and what to do, as a sentence."""
    paths = (path for some in ("*", "*/*", "snapshots/*/*") for path in sorted(file.parent.glob(some)))
    names = [path.relative_to(file.parent).as_posix() for path in paths if not OWN.fullmatch(path.name)]
    other = _first("files", names, "(?i)(^|/)({})$")
    return f"{file} is missing, but {other}" if other else f"{file} {damage(file)}"


def other_tensors(names: Iterable[str]) -> str:
    """Whose tensors these are if not those of a dense model, as the end of an error; "" if nothing shows."""
    other = _first("tensors", list(names), "{}")
    return f" ({other})" if other else ""
