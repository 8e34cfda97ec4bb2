"""What surrounds every command: a console for people, JSON for machines, and quiet libraries."""

from __future__ import annotations

import contextlib
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vqcompress.errors import Fallback, UsageError

if TYPE_CHECKING:
    from rich.console import Console


@contextlib.contextmanager
def session(json_file: str | None = None) -> Iterator[tuple[Console, Callable[[dict[str, Any]], None]]]:
    """The console for people and the function that hands JSON to machines; libraries are quiet meanwhile.

    With `--json -` everything else, a library's stray print included, goes to stderr.
    """
    if json_file not in (None, "-") and not Path(json_file).expanduser().absolute().parent.is_dir():
        raise UsageError(f"--json {json_file}: its directory does not exist")
    stdout = sys.stdout
    with contextlib.ExitStack() as stack:
        if json_file == "-":
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        warnings.simplefilter("default", Fallback)
        _quiet()
        from vqcompress import show

        def write(result: dict[str, Any]) -> None:
            if not show.leads():
                return
            text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
            if json_file == "-":
                stdout.write(text)
            elif json_file is not None:
                Path(json_file).expanduser().write_text(text, encoding="utf-8")

        yield show.console(stderr=json_file == "-"), write


def _quiet() -> None:
    """Silence transformers. The hub's bars stay on a terminal: a download may take an hour."""
    import transformers
    from huggingface_hub.utils import enable_progress_bars

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if sys.stderr.isatty():
        enable_progress_bars()
