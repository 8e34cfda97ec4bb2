"""Commands of the command line, run in the process of a test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from vqcompress.cli.main import app


def call(*words: str | Path) -> Any:
    """The result of a command, run in this process."""
    return CliRunner().invoke(app, [str(word) for word in words], prog_name="vqcompress")


def line(result: Any) -> str:
    """The one line that a failure wrote to stderr."""
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    return lines[0]
