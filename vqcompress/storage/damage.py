"""What is wrong with a checkpoint that was fetched by halves or is of another kind, and how to mend it. No torch."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from pathlib import Path

# Files that a program reads: empty ones, and pages of a web server under their names, are no such files.
READ = (".json", ".safetensors", ".bin", ".model", ".tiktoken")
# Names of weights that are read, and so no sign of another kind.
OWN = re.compile(r"(pytorch_)?model(-\d+-of-\d+)?\.(safetensors|bin)")


def damage(file: Path) -> str:
    """What is wrong with a file, and what to do, as the rest of a sentence; "" if nothing shows from outside."""
    fetch = f"fetch it (`hf download REPO --local-dir {shlex.quote(str(file.parent))}`)"
    if not file.exists():
        paths = (p for some in ("*", "*/*", "snapshots/*/*") for p in sorted(file.parent.glob(some)))
        names = [p.relative_to(file.parent).as_posix() for p in paths if not OWN.fullmatch(p.name)]
        # Without one of these, a directory may be a checkpoint of another kind.
        other = other_kind("files", names) if file.name in ("config.json", "model.safetensors") else ""
        return f"is {'a link to nothing' if file.is_symlink() else 'missing'}{other or f': {fetch}'}"
    if not file.is_file():
        return "is no plain file"
    with file.open("rb") as stream:
        start = stream.read(64)
    if start.startswith(b"version https://git-lfs.github.com/spec"):
        return f"is a git-lfs pointer, not the file itself: run `git lfs pull` in {file.parent}"
    broken = file.suffix in READ and start.lstrip()[:1] in (b"", b"<")
    return f"is {'a web page, not the file itself' if start else 'empty'}: {fetch}" if broken else ""


def other_kind(table: str, names: Iterable[str]) -> str:
    """The first of the names that damage.yaml knows, and what it says, as the end of a sentence; "" if it knows none.

    table: `files` or `tensors`.
    """
    # Help need not wait for it.
    import yaml

    known, given = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))[table], list(names)
    return next((f" ({n}: {what})" for key, what in known.items() for n in given if re.search(key, n, re.I)), "")
