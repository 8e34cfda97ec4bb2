"""What all commands have in common: one line for an error, a console, JSON, and libraries that keep quiet."""

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

from vqcompress.errors import Fallback, UsageError, VQCompressError
from vqcompress.hub import check_text, check_upload, find, push
from vqcompress.options import DEBUG
from vqcompress.packaged import packaged, recipe_file

if TYPE_CHECKING:
    from rich.console import Console

CONTINUES = "the finished blocks are kept, the same command again continues after them"
BEGINS = "the same command again starts from the beginning"


def leads() -> bool:
    """Whether this process speaks for all that `torchrun` started together."""
    return os.environ.get("RANK", "0") == "0"


class Commands(TyperGroup):
    """Turns whatever a command raises into one line on stderr and an exit code.

    began: when its process began, by time.perf_counter, if `main` says so; else when the command did.
    """

    began = 0.0

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        """Run the chosen command."""
        Commands.began = ctx.obj or time.perf_counter()
        try:
            return super().invoke(ctx)
        except (typer.Abort, BrokenPipeError):
            # Typer ends quietly; the reader of a pipe had enough.
            raise
        except KeyboardInterrupt:
            hint = CONTINUES if ctx.invoked_subcommand == "quantize" else BEGINS
            print(f"interrupted: {hint}", file=sys.stderr)
            raise typer.Exit(130) from None
        except Exception as error:
            if hasattr(error, "exit_code"):
                # Typer's own: an exit, or wrong usage that it explains itself.
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
        # torch and safetensors say so in words of their own.
        text = f"out of memory; a smaller --seqlen, --samples or --batch, or --states disk, needs less ({words})"
    elif isinstance(error, OSError):
        text = f"{error.strerror}: {error.filename}" if error.strerror and error.filename else words
    else:
        text = f"internal error: {kind}: {words} (give --debug for the traceback)"
    print(f"error: {text}", file=sys.stderr)
    raise typer.Exit(2 if isinstance(error, UsageError) else 1) from error


def check_free(out: Path, overwrite: bool) -> None:
    """VQCompressError if OUT holds a finished artifact that is not to be replaced."""
    config = out / "config.json"
    unfinished = overwrite or not config.is_file() or (out / "journal.json").exists()
    if not unfinished and '"quant_method": "vqcompress"' in config.read_text(errors="replace"):
        raise VQCompressError(f"{out} already holds a finished artifact; choose another directory or give --overwrite")


def took() -> float:
    """Seconds since the command began, imports and all."""
    return round(time.perf_counter() - Commands.began, 3)


@contextlib.contextmanager
def session(
    models: Iterable[str | None],
    json_file: str | None = None,
    recipes: Iterable[str | None] = (),
    texts: Iterable[str] | None = None,
) -> Iterator[tuple[Console, Callable[[dict[str, Any]], None]]]:
    """The console for people and the function that hands JSON to machines; libraries are quiet meanwhile.

    With `--json -` everything else, a library's stray print included, goes to stderr. models, recipes, texts: what the
    command will read; a name of nothing is an error before anything heavy is imported.
    """
    named = list(filter(None, models))
    for model in named:
        find(model)
    for recipe in filter(None, recipes):
        recipe_file(recipe, packaged())
    for text in texts or ():
        check_text(text)
    if json_file not in (None, "-") and not Path(json_file).expanduser().absolute().parent.is_dir():
        raise UsageError(f"--json {json_file}: its directory does not exist")
    stdout = sys.stdout
    with contextlib.ExitStack() as stack:
        if json_file == "-":
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        warnings.simplefilter("default", Fallback)
        if leads():
            # The imports take seconds.
            print(f"reading {', '.join(named)}", file=sys.stderr, flush=True)
        _quiet()
        from vqcompress import show

        def write(result: dict[str, Any]) -> None:
            if not leads():
                return
            text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
            if json_file == "-":
                stdout.write(text)
            elif json_file is not None:
                Path(json_file).expanduser().write_text(text, encoding="utf-8")

        console = show.console(stderr=json_file == "-")
        console.quiet = not leads()
        yield console, write


@contextlib.contextmanager
def uploading(repo: str | None, private: bool) -> Iterator[Callable[[Path, Console], None]]:
    """A function that uploads a finished directory, once it is known that this user may; without `repo` it does not."""
    if private and repo is None:
        raise UsageError("--private needs --push-to-hub REPO")
    if repo is not None and leads():
        check_upload(repo)

    def upload(folder: Path, console: Console) -> None:
        if repo is not None and leads():
            console.print(f"pushed  {push(folder, repo, private)}", soft_wrap=True)

    yield upload


def _quiet() -> None:
    """Silence transformers. The hub's bars stay on a terminal: a download may take an hour."""
    import transformers
    from huggingface_hub.utils import enable_progress_bars

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if sys.stderr.isatty():
        enable_progress_bars()
