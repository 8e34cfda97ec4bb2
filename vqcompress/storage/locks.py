"""Locks between processes, as far as the system and the file system have them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vqcompress.errors import Fallback

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[None]:
    """Keep other processes from locking a file or directory meanwhile.

    BlockingIOError if another process has locked it, unless `wait`. Where there are no locks, a warning says so.
    """
    if fcntl is None:
        yield
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise
        except OSError as error:  # ENOLCK, ENOTSUP, or NFS that locks no directory
            text = f"{path} lies where nothing can be locked ({error.strerror}): start only one run there at a time"
            warnings.warn(text, Fallback, stacklevel=2)
        yield
    finally:
        os.close(handle)
