"""Whether Python code that comes with a checkpoint may be run: off unless the user asks for it. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from textwrap import shorten

_TRUSTED = ContextVar("trusted", default=False)


def trusted() -> bool:
    """What to pass to transformers as trust_remote_code."""
    return _TRUSTED.get()


@contextmanager
def trusting(trust: bool = True) -> Iterator[None]:
    """Let code of checkpoints run meanwhile, if `trust` says so; False changes nothing."""
    token = _TRUSTED.set(trust or trusted())
    try:
        yield
    finally:
        _TRUSTED.reset(token)


def reason(error: Exception) -> str:
    """What transformers raised, as one line of at most 300 characters; of code that may not run, what lets it."""
    words = " ".join(str(error).split())
    if "trust_remote_code" in words and not trusted():
        return "it needs Python code of its own; read that, and give --trust-remote-code if you trust it"
    return shorten(words, 300, break_on_hyphens=False, placeholder=" …")
