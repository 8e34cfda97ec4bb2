"""Whether Python code that comes with a checkpoint may be run: off unless the user asks for it. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from vqcompress.errors import one_line

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
    """The message of an error of transformers in one line; for code that may not run, the option that allows it."""
    if "trust_remote_code" in str(error) and not trusted():
        return "it needs Python code of its own; read that, and give --trust-remote-code if you trust it"
    return one_line(error)
