"""Failures that one line explains. Anything else that escapes is a bug and shows its traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from textwrap import shorten


class VQCompressError(Exception):
    """What went wrong, naming the tensor or the setting, its value, and what to do (exit code 1)."""


class Fallback(UserWarning):
    """A weight is multiplied another way than by its kernel; says which way and why."""


class UsageError(VQCompressError):
    """The words of the command or of a recipe are off (exit code 2)."""


def one_line(error: BaseException) -> str:
    """The message of a library's error as one line of at most 300 characters; its type if it has no message."""
    # The message of a KeyError is the key alone.
    message = f"it has no {error}" if isinstance(error, KeyError) else str(error)
    return shorten(message.strip() or type(error).__name__, 300, break_on_hyphens=False, placeholder=" …")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """' Did you mean X?' with the nearest known name, else the list of all of them."""
    names = sorted(known)
    near = nearest(str(name), names)
    return f" Did you mean '{near}'?" if near else f" Known: {', '.join(names) or 'none'}."


def nearest(name: str, known: Iterable[str], cutoff: float = 0.5) -> str | None:
    """The known name that is most like this one, if any is at least so like it (0 to 1)."""
    return next(iter(difflib.get_close_matches(name, known, n=1, cutoff=cutoff)), None)
