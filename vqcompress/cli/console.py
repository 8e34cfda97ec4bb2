"""Shared by all commands: the console, errors in one line, JSON output and quiet libraries."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import typer
from typer.core import TyperGroup

from vqcompress.cli.options import DEBUG
from vqcompress.errors import Fallback, UsageError, VQCompressError
from vqcompress.storage.hub import check_text, check_upload, find, push
from vqcompress.storage.recipe_files import AS_STORED, packaged, recipe_file

if TYPE_CHECKING:
    from rich.console import Console

BEGINS = "the same command again starts from the beginning"


def leads() -> bool:
    """Whether this is the main process of those that `torchrun` started."""
    return os.environ.get("RANK", "0") == "0"


def console(stderr: bool = False, everyone: bool = False) -> Console:
    """A rich console. Off a terminal lines are not wrapped, and tables may be 160 columns wide."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    plain: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False}
    if not stream.isatty():
        plain |= {"soft_wrap": True, "width": 160}
    return Console(file=stream, quiet=not (everyone or leads()), **plain)


class Commands(TyperGroup):
    """Turns an exception of a command into one line on stderr and an exit code.

    began: time.perf_counter() at the start of the process if `main` passed it, else of the command.
    """

    began = 0.0

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        """Run the chosen command."""
        Commands.began = ctx.obj or time.perf_counter()
        try:
            return super().invoke(ctx)
        except (typer.Abort, BrokenPipeError):
            # Typer exits quietly, also when the reader closed the pipe.
            raise
        except KeyboardInterrupt as pressed:
            hint = "the same command again does the rest" if ctx.invoked_subcommand == "quantize" else BEGINS
            console(stderr=True, everyone=True).print(f"interrupted: {str(pressed) or hint}")
            raise typer.Exit(130) from None
        except Exception as error:
            if hasattr(error, "exit_code"):
                # An exit or a usage error of typer, which prints it.
                raise
            _fail(error, bool(ctx.meta.get(DEBUG)))


def _fail(error: Exception, debug: bool) -> NoReturn:
    """Explain an error in one line and exit."""
    if debug:
        traceback.print_exc(file=sys.stderr)
    kind, words = type(error).__name__, " ".join(str(error).split())
    if isinstance(error, VQCompressError):
        text = words
    elif kind in ("OutOfMemoryError", "MemoryError") or re.search("(Cannot|can't) allocate memory", words):
        # torch and safetensors raise a RuntimeError with this text.
        text = f"out of memory; reduce --seqlen, --samples or --batch, or give --states disk ({words})"
    elif isinstance(error, OSError):
        text = f"{error.strerror}: {error.filename}" if error.strerror and error.filename else words
    else:
        text = f"internal error: {kind}: {words} (give --debug for the traceback)"
    console(stderr=True, everyone=True).print(f"error: {text}")
    raise typer.Exit(2 if isinstance(error, UsageError) else 1) from error


def output_file(option: str, name: str | Path) -> Path:
    """The path of an output file; UsageError before any work if it cannot be written."""
    path = Path(os.path.expanduser(name)).absolute()
    if path.is_dir():
        raise UsageError(f"{option} {name}: is a directory, not a file")
    if not path.parent.is_dir():
        raise UsageError(f"{option} {name}: the directory does not exist")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UsageError(f"{option} {name}: permission denied")
    return path


def check_free(out: Path, overwrite: bool) -> None:
    """VQCompressError if OUT holds a finished artifact and --overwrite is not given."""
    config = out / "config.json"
    unfinished = overwrite or not config.is_file() or (out / "journal.json").exists()
    if not unfinished and '"quant_method": "vqcompress"' in config.read_text(errors="replace"):
        raise VQCompressError(f"{out} already holds a finished artifact; choose another directory or give --overwrite")


def took() -> float:
    """Seconds since the command began, imports included."""
    return round(time.perf_counter() - Commands.began, 3)


@contextlib.contextmanager
def session(
    models: Iterable[str | None],
    json_file: str | None = None,
    recipes: Iterable[str | None] = (),
    texts: Iterable[str] | None = None,
) -> Iterator[tuple[Console, Callable[[dict[str, Any]], None]]]:
    """The console and a function that writes the result as JSON; libraries are quiet inside.

    With `--json -` everything but the JSON goes to stderr. models, recipes and texts are the inputs of the command: a
    missing one is an error before the slow imports.
    """
    named = list(filter(None, models))
    for model in named:
        find(model)
    for recipe in filter(None, recipes):
        if recipe != AS_STORED:
            recipe_file(recipe, packaged())
    for text in texts or ():
        check_text(text)
    file = output_file("--json", json_file) if json_file is not None and json_file != "-" else None
    stdout = sys.stdout
    with contextlib.ExitStack() as stack:
        if json_file == "-":
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        warnings.simplefilter("default", Fallback)
        if leads():
            # Printed now because the imports take seconds.
            print(f"reading {', '.join(named)}", file=sys.stderr, flush=True)
        _quiet()

        def write(result: dict[str, Any]) -> None:
            if not leads():
                return
            text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
            if json_file == "-":
                stdout.write(text)
            elif file is not None:
                file.write_text(text, encoding="utf-8")

        yield console(stderr=json_file == "-"), write


@contextlib.contextmanager
def uploading(repo: str | None, private: bool) -> Iterator[Callable[[Path, Console], None]]:
    """A function that uploads a finished directory to `repo`, if given. Permission is checked first."""
    if private and repo is None:
        raise UsageError("--private needs --push-to-hub REPO")
    if repo is not None and leads():
        check_upload(repo)

    def upload(folder: Path, console: Console) -> None:
        if repo is not None and leads():
            console.print(f"pushed  {push(folder, repo, private)}")

    yield upload


def _quiet() -> None:
    """Silence transformers, but keep the download bars of the hub on a terminal."""
    import transformers
    from huggingface_hub.utils import enable_progress_bars

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if sys.stderr.isatty():
        enable_progress_bars()
