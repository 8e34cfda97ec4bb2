"""What is wrong with a file that was fetched by halves, and how to fetch it whole. Imports no torch."""

from __future__ import annotations

import shlex
from pathlib import Path

# Files that a program reads: empty ones, and pages of a web server under their names, are no such files.
READ = (".json", ".safetensors", ".bin", ".model", ".tiktoken")


def damage(file: Path) -> str:
    """What is wrong with a file, and what to do, as the rest of a sentence; "" if nothing shows from outside."""
    fetch = f"fetch it (`hf download REPO --local-dir {shlex.quote(str(file.parent))}`)"
    if not file.exists():
        return f"is {'a link to nothing' if file.is_symlink() else 'missing'}: {fetch}"
    if not file.is_file():
        return "is no plain file"
    with file.open("rb") as stream:
        start = stream.read(64)
    if start.startswith(b"version https://git-lfs.github.com/spec"):
        return f"is a git-lfs pointer, not the file itself: run `git lfs pull` in {file.parent}"
    broken = file.suffix in READ and start.lstrip()[:1] in (b"", b"<")
    return f"is {'a web page, not the file itself' if start else 'empty'}: {fetch}" if broken else ""
