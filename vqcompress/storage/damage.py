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
    if file.is_symlink() and not file.exists():
        return f"is a link to nothing: {fetch}"
    if not file.exists():
        paths = (p for some in ("*", "*/*", "snapshots/*/*") for p in sorted(file.parent.glob(some)))
        names = [p.relative_to(file.parent).as_posix() for p in paths if not OWN.fullmatch(p.name)]
        # Without one of these, a directory may be a checkpoint of another kind.
        other = _other("files", names, "(?i)(^|/)({})$") if file.name in ("config.json", "model.safetensors") else ""
        return f"is missing, but {other}" if other else f"is missing: {fetch}"
    if not file.is_file():
        return "is no plain file"
    with file.open("rb") as stream:
        start = stream.read(64)
    if start.startswith(b"version https://git-lfs.github.com/spec"):
        return f"is a git-lfs pointer, not the file itself: run `git lfs pull` in {file.parent}"
    broken = file.suffix in READ and start.lstrip()[:1] in (b"", b"<")
    return f"is {'a web page, not the file itself' if start else 'empty'}: {fetch}" if broken else ""


def other_tensors(names: Iterable[str]) -> str:
    """Whose tensors these are if not those of a dense model, as the end of an error; "" if nothing shows."""
    other = _other("tensors", list(names), "{}")
    return f" ({other})" if other else ""


def _other(kind: str, names: list[str], form: str) -> str:
    """The first of the names that damage.yaml knows, and what it says, or "". form: of the whole regular expression."""
    # Help need not wait for it.
    import yaml

    table = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))[kind]
    found = (f"{n}: {what}" for key, what in table.items() for n in names if re.search(form.format(key), n))
    return next(found, "")
