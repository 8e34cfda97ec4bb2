"""What is wrong with a checkpoint that was fetched by halves or is of another kind, and how to mend it. No torch."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from pathlib import Path

# Files that a program reads: empty ones, and pages of a web server under their names, are no such files.
READ = (".json", ".safetensors", ".bin", ".model", ".tiktoken")
# Names of weights that are read, and so no sign of another kind; and where such signs are.
OWN = re.compile(r"(pytorch_)?model(-\d+-of-\d+)?\.(safetensors|bin)")
SIGNS = ("*", "*/*.gguf", "*/*.onnx", "*/*.distcp", "[!.]*/config.json", "snapshots/*/config.json")


def damage(file: Path) -> str:
    """What is wrong with a file, and what to do, as the rest of a sentence; "" if nothing shows from outside."""
    fetch = f"fetch it (`hf download REPO --local-dir {shlex.quote(str(file.parent))}`)"
    if not file.exists():
        paths = (p.relative_to(file.parent).as_posix() for some in SIGNS for p in sorted(file.parent.glob(some)))
        other = other_kind(file.name, [path for path in paths if not OWN.fullmatch(path)])
        # Both: what lies there may be of another kind, or have nothing to do with it.
        return f"is {'a link to nothing' if file.is_symlink() else 'missing'}{f'{other}; or' if other else ':'} {fetch}"
    if not file.is_file():
        return "is no plain file"
    with file.open("rb") as stream:
        start = stream.read(64)
    if start.startswith(b"version https://git-lfs.github.com/spec"):
        return f"is a git-lfs pointer, not the file itself: run `git lfs pull` in {file.parent}"
    broken = file.suffix in READ and start.lstrip()[:1] in (b"", b"<")
    return f"is {'a web page, not the file itself' if start else 'empty'}: {fetch}" if broken else ""


def other_kind(table: str, names: Iterable[str], beside: str = "") -> str:
    """The first of the names that a table of damage.yaml knows, and what it says, as the end of a sentence; "" if none.

    table: its name; one that is not there knows no names. beside: a tensor, to look only at names of its module.
    """
    # Help need not wait for it.
    import yaml

    known = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8")).get(table, {}).items()
    given = [name for name in names if name.startswith(beside[: beside.rfind(".") + 1])]
    return next((f" ({n}: {what})" for key, what in known for n in given if re.search(key, n, re.I)), "")
