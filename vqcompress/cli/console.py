"""Shared by all commands: the console, errors in one line, JSON output and quiet libraries."""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import re
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperCommand, TyperGroup

import vqcompress
from vqcompress.errors import Fallback, Notice, UsageError, VQCompressError

if TYPE_CHECKING:
    from rich.console import Console

# What is printed in place of a symbol where the stream's encoding lacks it; of any other character a question mark.
PLAIN = {"→": "->", "×": "x", "±": "+-", "…": "...", "–": "-", "−": "-", "•": "*", "─": "-", "━": "-"}
# In `Context.meta`: whether errors show a traceback.
DEBUG = "vqcompress.debug"


def leads() -> bool:
    """Whether this is the main process of those that `torchrun` started."""
    return os.environ.get("RANK", "0") == "0"


def took() -> float:
    """Seconds since the start of the process, imports included."""
    return round(time.perf_counter() - vqcompress.STARTED, 3)


def degrade_symbols() -> None:
    """Let stdout and stderr print what their encoding lacks in another way, where they would raise an error."""
    codecs.register_error("vqcompress", lambda error: (_plain(error), error.end))  # type: ignore[attr-defined]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="vqcompress")


def _plain(error: Any) -> str:
    return "".join(PLAIN.get(symbol, "?") for symbol in error.object[error.start : error.end])


def console(stderr: bool = False) -> Console:
    """A rich console. Off a terminal lines are not wrapped, and tables may be 160 columns wide."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    plain: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False}
    if not stream.isatty():
        plain |= {"soft_wrap": True, "width": 160}
    return Console(file=stream, quiet=not leads(), **plain)


class _PlainFlags:
    """Shows no type beside flags in `--help`, since they take no value."""

    def get_params(self, ctx: Any) -> list[Any]:
        """The parameters, `--help` included."""
        parameters: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for parameter in parameters:
            if getattr(parameter, "is_flag", False):
                parameter.metavar = ""
        return parameters


class Command(_PlainFlags, TyperCommand):
    """A command."""


class Commands(_PlainFlags, TyperGroup):
    """A group of commands. An exception of one becomes a line on stderr and an exit code."""

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        """Run the chosen command."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as pressed:
            code, text = 130, f"interrupted: {pressed}" if str(pressed) else "interrupted"
        except Exception as error:
            if hasattr(error, "exit_code") or isinstance(error, BrokenPipeError):
                # Typer prints its usage errors, and exits quietly when the reader closed the pipe.
                raise
            if ctx.meta.get(DEBUG):
                traceback.print_exc(file=sys.stderr)
            code, text = 2 if isinstance(error, UsageError) else 1, f"error: {_explain(error)}"
        print(text, file=sys.stderr)
        raise typer.Exit(code)


def _explain(error: Exception) -> str:
    """An error in one line."""
    kind, text = type(error).__name__, " ".join(str(error).split())
    if isinstance(error, VQCompressError):
        return text
    if kind in ("OutOfMemoryError", "MemoryError") or re.search("(Cannot|can't) allocate memory", text):
        # torch and safetensors raise a RuntimeError with this text.
        return f"out of memory; reduce --seqlen, --samples or --batch, or give --states disk ({text})"
    if isinstance(error, OSError):
        return f"{error.strerror}: {error.filename}" if error.strerror and error.filename else text
    return f"internal error: {kind}: {text} (give --debug for the traceback)"


@contextlib.contextmanager
def session(json_file: Path | None = None) -> Iterator[Callable[..., None]]:
    """A function that shows a result: show(table, result, …) writes the JSON and calls table(console, result, …).

    Libraries are quiet inside. With `--json -` everything but the JSON goes to stderr.
    """
    stdout, to_stdout = sys.stdout, str(json_file) == "-"

    def show(table: Callable[..., None], result: dict[str, Any], *more: Any) -> None:
        from vqcompress.evaluate.read_report import to_json

        text = to_json(result) + "\n"
        if leads() and to_stdout:
            stdout.write(text)
        elif leads() and json_file is not None:
            json_file.write_text(text, encoding="utf-8")
        table(console(), result, *more)

    with contextlib.redirect_stdout(sys.stderr if to_stdout else stdout), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("default", Fallback)
        warnings.simplefilter("always", Notice)
        warnings.showwarning = lambda message, *more: print(f"warning: {message}", file=sys.stderr) if leads() else None
        with console(stderr=True).status("loading torch and transformers"):
            import transformers
            from huggingface_hub.utils import enable_progress_bars
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        if sys.stderr.isatty():
            # Downloads from the hub keep their bars.
            enable_progress_bars()
        yield show
