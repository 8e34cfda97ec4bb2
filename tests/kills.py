"""What tests of interrupted runs share: an exception that stands for a kill, and checksums to compare artifacts by."""

from __future__ import annotations

import hashlib
from pathlib import Path

from vqcompress.storage.artifact import SUMS

# Files that hold times, and the checksums of those; the inputs determine all others.
TIMED = {"report.json", "report.html", "README.md", SUMS}


class Killed(BaseException):
    """Stands for a kill where the process of the tests must live on."""


def contents(folder: Path) -> dict[str, str]:
    """SHA-256 by name, of the files that the inputs determine."""
    return {path.name: _sha256(path) for path in sorted(folder.iterdir()) if path.name not in TIMED}


def sums(folder: Path) -> dict[str, str]:
    """SHA-256 by name, of the shards and the config."""
    files = [path for path in folder.iterdir() if path.suffix == ".safetensors" or path.name == "config.json"]
    return {path.name: _sha256(path) for path in files}


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
