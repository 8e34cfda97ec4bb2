"""Errors that the command line prints as one line. Any other exception is a bug."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from textwrap import shorten


class VQCompressError(Exception):
    """A failure (exit code 1). The message names the file, tensor or option, and says what to do."""


class Fallback(UserWarning):
    """Something works, but more slowly or less safely; the message says how and why."""


class Notice(UserWarning):
    """What a user should know about a run that goes on."""


class UsageError(VQCompressError):
    """A wrong option or recipe (exit code 2)."""


def one_line(error: BaseException) -> str:
    """The message of a library's error as one line of at most 300 characters; its type if it has no message."""
    # The message of a KeyError is the key alone.
    message = f"it has no {error}" if isinstance(error, KeyError) else str(error)
    return shorten(message.strip() or type(error).__name__, 300, break_on_hyphens=False, placeholder=" …")


def explain_value(given: str, message: str) -> str:
    """What is wrong with a value, from pydantic's message: 'bits=3 must be 2, 4 or 8'."""
    reason = message.removeprefix("Value error, ")
    # Files have lists and mappings where Python has tuples and classes.
    reason = re.sub(r"valid dictionary( or .* of \w+)?", "mapping", reason).replace("valid tuple", "list")
    return f"{given} must be{reason[15:]}" if reason.startswith("Input should be") else f"{given}: {reason}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """' Did you mean X?' with the most similar known name, or the list of known names if none is similar."""
    names = sorted(known)
    near = nearest(str(name), names)
    return f" Did you mean '{near}'?" if near else f" Known: {', '.join(names) or 'none'}."


def nearest(name: str, known: Iterable[str], cutoff: float = 0.5) -> str | None:
    """The most similar known name; None if no similarity (0 to 1) reaches the cutoff."""
    return next(iter(difflib.get_close_matches(name, known, n=1, cutoff=cutoff)), None)
