"""What tests of interrupted runs share. As a script: runs killed before every third write, and then resumed."""

from __future__ import annotations

import hashlib
import os
import signal
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vqcompress.storage.artifact import SUMS

# Files that hold times, and the checksums of those; the inputs determine all others.
TIMED = {"report.json", "report.html", "README.md", SUMS}


class Killed(BaseException):
    """Stands for a kill where the process of the tests must live on."""


def contents(folder: Path) -> dict[str, str]:
    """SHA-256 by name, of the files that the inputs determine."""
    return {path.name: _sha256(path) for path in sorted(folder.iterdir()) if path.name not in TIMED}


def sums(folder: Path) -> dict[str, str]:
    """SHA-256 by name, of the shards and the config."""
    files = [path for path in folder.iterdir() if path.suffix == ".safetensors" or path.name == "config.json"]
    return {path.name: _sha256(path) for path in files}


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def dies_at(limit: int, job: Callable[[], Any]) -> bool:
    """Run a job in a fork that dies of SIGKILL before its limit-th change of the directory; whether it came to that.

    A file that was written but not synced loses its second half first, as after a power cut.
    """
    if child := os.fork():
        status = os.waitpid(child, 0)[1]
        assert status in (0, signal.SIGKILL), status
        return status != 0
    calls = 0

    def mortal(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(first: Any, *rest: Any, **more: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == limit:
                if isinstance(first, int) and stat.S_ISREG(os.fstat(first).st_mode):
                    os.truncate(f"/proc/self/fd/{first}", os.fstat(first).st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            return function(first, *rest, **more)

        return call

    patched: Any = Path
    os.fsync, patched.replace, patched.unlink = mortal(os.fsync), mortal(Path.replace), mortal(Path.unlink)
    try:
        job()
        os._exit(0)
    except BaseException as error:
        print(f"limit {limit}: {error!r}", flush=True)
        os._exit(3)


def main(model: str, recipe: str, text: str, folder: str) -> None:
    """Fill folder/N with a run that was killed at its N-th write and resumed, the last with one that was not."""
    import torch

    from vqcompress.errors import VQCompressError
    from vqcompress.pipeline.quantize import QuantizeOptions, quantize
    from vqcompress.storage.artifact import JOURNAL, Artifact

    def job(out: Path) -> None:
        quantize(QuantizeOptions(model, out, recipe, [text], samples=2, seqlen=16))

    torch.set_num_threads(1)
    # What each fork would load anew.
    job(Path(folder) / "000")
    for limit in range(1, 300, 3):
        out = Path(folder) / f"{limit:03d}"
        if not dies_at(limit, lambda out=out: job(out)):  # type: ignore[misc]
            return
        try:
            Artifact(out)
        except VQCompressError:
            assert not dies_at(0, lambda out=out: job(out))  # type: ignore[misc]
        else:
            # It looks finished, so it must be: at most the journal is still there.
            (out / JOURNAL).unlink(missing_ok=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
