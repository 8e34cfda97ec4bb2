"""Writes an artifact shard by shard, so that a kill at any moment loses nothing that was committed."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save, save_file

from vqcompress.errors import VQCompressError
from vqcompress.methods import PackedTensors
from vqcompress.storage.artifact import (
    FORMAT_VERSION,
    JOURNAL,
    OURS,
    RECIPE,
    SHARD,
    STAGED,
    SUMS,
    Artifact,
    checksum_lines,
    read_sums,
    tensors_of,
)
from vqcompress.storage.checkpoint import INDEX, Checkpoint, read_json, sha256


@contextmanager
def undisturbed() -> Iterator[None]:
    """Ctrl-C inside counts only at the end, so that what was begun to be committed is."""
    before = signal.getsignal(signal.SIGINT)
    if before is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        signal.raise_signal(signal.SIGINT)


class Shards:
    """Writes shards into a directory, each so that it is whole or absent. Several processes may, each its own."""

    def __init__(self, out: Path):
        self.out = out

    def write_shard(self, number: int, count: int, tensors: PackedTensors) -> dict[str, Any]:
        """Write shard `number` of `count`; returns its `file` and `sha256`."""
        file = SHARD.format(number, count)
        partial = self.out / f"{file}.partial"
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        try:
            save_file({k: t.contiguous() for k, t in tensors.items()}, partial, metadata={"format": "pt"})
            # safetensors makes files that only their owner may read.
            partial.chmod(0o644)
            with ThreadPoolExecutor(1) as aside, partial.open("rb+") as stream:
                # The processor hashes while the disk writes.
                hashed = aside.submit(sha256, partial)
                os.fsync(stream.fileno())
                digest = hashed.result()
            partial.replace(self.out / file)
            self._sync_directory()
        except (OSError, SafetensorError) as error:
            raise self._explain(error, size) from error
        return {"file": file, "sha256": digest}

    def write(self, name: str, data: bytes) -> None:
        """Write a file of the directory, so that it is there as before or whole."""
        partial = self.out / f"{name}.partial"
        try:
            with partial.open("wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            partial.replace(self.out / name)
            self._sync_directory()
        except OSError as error:
            raise self._explain(error, len(data)) from error

    def _sync_directory(self) -> None:
        handle = os.open(self.out, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def _explain(self, error: Exception, needed: int) -> VQCompressError:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error)
        if full:
            for partial in self.out.glob("*.partial"):
                partial.unlink(missing_ok=True)
            free = shutil.disk_usage(self.out).free
            kept = ", the finished blocks are kept" if (self.out / JOURNAL).is_file() else ""
            return VQCompressError(
                f"no space left in {self.out}: the next file needs {needed} bytes and {free} are free;"
                f" make room and give the same command again{kept}"
            )
        return VQCompressError(f"cannot write to {self.out}: {error}")


def refresh_sums(path: Path, names: Iterable[str]) -> None:
    """Take what these files of a finished artifact hold now, or that they are gone, into its SHA256SUMS if it has one.

    To be called by whoever rewrites a report, after the last one.
    """
    if not (path / SUMS).exists():
        return
    sums = read_sums(path)
    for name in names:
        sums.pop(name, None)
        if (path / name).is_file():
            sums[name] = sha256(path / name)
    Shards(path).write(SUMS, checksum_lines(sums).encode())


def clear(out: Path, listed: Collection[str], kept: Collection[str | None] = ()) -> None:
    """Delete what vqcompress wrote into a directory, the config first: shards, the listed files, and halves of them."""
    for path in sorted(out.iterdir(), key=lambda path: path.name != "config.json"):
        ours = OURS.fullmatch(path.name) or path.name.removesuffix(".partial") in listed
        if ours and path.is_file() and path.name not in kept:
            path.unlink()


class Writer(Shards):
    """Commits shards one by one into a directory, with a journal, and makes it an artifact at the end.

    inputs: names → fingerprints of all that determines the bytes, but for the weights: source_of gives that of a block.
    A directory with a journal of the same inputs is continued: `done` then holds the records of the blocks that are on
    disk, `measured` what was noted, `before` the seconds that it took. Weights of blocks that are not done yet may have
    been mended meanwhile. A context manager: the directory is locked against other processes until it is left. start:
    of this run, by time.perf_counter.
    """

    def __init__(
        self, out: Path, inputs: dict[str, str], source_of: Callable[[str], str], overwrite: bool, start: float
    ):
        super().__init__(out)
        self.start, self.before = start, 0.0
        self.inputs, self.source_of = inputs, source_of
        # Files that are no shards, by name: their checksums.
        self.beside: dict[str, str] = {}
        self.done: dict[str, dict[str, Any]] = {}
        self.measured: dict[str, dict[str, list[float]]] = {}
        if out.is_file():
            raise VQCompressError(f"{out} is a file, not a directory to write an artifact to")
        # A run that is killed in its very first write leaves only this.
        if out.is_dir() and any(path.name != f"{JOURNAL}.partial" for path in out.iterdir()):
            self._continue_or_clear(overwrite)
        listed = read_sums(out) if (out / SUMS).exists() else {}
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise VQCompressError(f"cannot make the directory {out}: {error}") from error
        self._lock = os.open(out, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise VQCompressError(f"another process is writing to {out}") from error
        try:
            self._write_journal()
            # From here on the directory holds an unfinished run of these inputs, whatever it held before.
            clear(out, listed, {record.get("file") for record in self.done.values()})
            # Only now: a kill before it leaves the list of what is still to be deleted.
            (out / SUMS).unlink(missing_ok=True)
        except BaseException:
            os.close(self._lock)
            raise

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        os.close(self._lock)
        # The first record is of what lies outside of the blocks.
        if isinstance(error, KeyboardInterrupt) and len(self.done) > 1:
            error.args = ("the finished blocks are kept, the same command again continues after them",)

    def _continue_or_clear(self, overwrite: bool) -> None:
        """Find the blocks that an earlier run of the same inputs left; VQCompressError if this is another directory."""
        if (self.out / JOURNAL).is_file():
            try:
                differing = self._read_journal()
            except VQCompressError:
                if not overwrite:
                    raise
                self.done, self.measured, differing = {}, {}, ["damaged journal"]
            if not differing:
                return
            holds = f"an unfinished run with another {', '.join(differing)}"
        elif Artifact.is_one(self.out) and (self.out / SUMS).exists():
            holds = "a finished artifact"
        else:
            # Nobody knows which of the files could be spared.
            raise VQCompressError(f"{self.out} holds something else than what quantize wrote; choose another directory")
        if not overwrite:
            raise VQCompressError(f"{self.out} already holds {holds}; choose another directory or give --overwrite")

    def _read_journal(self) -> list[str]:
        """The inputs in which an earlier run differs; if there are none, `done` holds its blocks that are intact."""
        earlier = read_json(self.out / JOURNAL)
        try:
            differing = sorted(name for name, value in self.inputs.items() if earlier["inputs"].get(name) != value)
            if "seed" in differing and "calibration" in differing:
                # Rows are drawn by the seed, so those of the same text differ too.
                differing.remove("calibration")
            if earlier["format_version"] != FORMAT_VERSION:
                differing.append("format version")
            if not differing:
                self.measured = {name: dict(record) for name, record in earlier.get("measured", {}).items()}
            blocks = earlier["blocks"] if not differing else {}
            if any(Path(record.get("file", "x")).name != record.get("file", "x") for record in blocks.values()):
                raise ValueError("a record names a file outside of the directory")
            # A kill may have left one shard that has taken in what is staged while its record has not.
            staged = blocks.get(STAGED, {})
            unsure = 1 if "file" in staged and self._intact(staged) else 0
            for name, record in blocks.items():
                # A record of what was staged that names no file says that it is in its place.
                settled = name == STAGED and "file" not in record
                if not settled and not self._intact(record):
                    unsure -= 1
                    if unsure < 0 or name == STAGED or not (self.out / Path(record["file"]).name).is_file():
                        # What follows was made from this block's output, so it is made again too.
                        break
                if name != STAGED and record["source"] != self.source_of(name):
                    self.done, self.measured = {}, {}
                    return [f"checkpoint: {name} has changed"]
                self.done[name] = record
            self.before = float(earlier.get("seconds", 0.0)) if not differing else 0.0
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise VQCompressError(f"{self.out / JOURNAL} is damaged; give --overwrite to start anew") from error
        return differing

    def _intact(self, record: dict[str, Any]) -> bool:
        file = self.out / Path(record["file"]).name
        return file.is_file() and sha256(file) == record["sha256"]

    @property
    def seconds(self) -> float:
        """What this run has taken, and those before that it continues."""
        return round(self.before + time.perf_counter() - self.start, 3)

    def _write_journal(self) -> None:
        journal = {"format_version": FORMAT_VERSION, "inputs": self.inputs, "blocks": self.done}
        self.write(
            JOURNAL, json.dumps(journal | {"measured": self.measured, "seconds": self.seconds}, indent=1).encode()
        )

    def note(self, name: str, record: dict[str, list[float]]) -> None:
        """Keep what was measured of a block, so that a run that is cut off need not measure it again."""
        self.measured[name] = record
        self._write_journal()

    def commit(self, name: str, number: int, count: int, tensors: PackedTensors, record: dict[str, Any]) -> None:
        """Write a shard, then journal it. name: the block's. number of count: the shard's place. record: JSON kept."""
        self.journal(name, self.write_shard(number, count, tensors) | record)

    def journal(self, name: str, record: dict[str, Any]) -> None:
        """Keep the record of a block whose shard is written."""
        self.done[name] = record
        self._write_journal()

    def stage(self, tensors: PackedTensors, seconds: float) -> None:
        """Keep new values for tensors of the shards, as a file of its own; `settle` puts them in their places."""
        self.commit(STAGED, 0, 0, tensors, {"targets": [], "seconds": seconds})

    def write_beside(self, name: str, tensors: PackedTensors) -> None:
        """Write tensors that belong to no shard; `finish` lists them. Nothing is kept of it in the journal."""
        self.write(name, save({k: t.contiguous() for k, t in tensors.items()}, metadata={"format": "pt"}))
        self.beside[name] = sha256(self.out / name)

    @undisturbed()
    def settle(self) -> None:
        """Put what was staged, if anything, into the shards; done again after a kill: nothing else reads them then."""
        if STAGED not in self.done or "file" not in self.done[STAGED]:
            return
        staged = tensors_of(self.out / self.done[STAGED]["file"])
        for name, record in list(self.done.items()):
            shard = tensors_of(self.out / record["file"]) if name != STAGED else {}
            if shard.keys() & staged.keys():
                # Whatever of the two is found after a kill is right.
                number, count = (int(n) for n in re.findall(r"\d{5}", record["file"]))
                update = {k: staged.get(k, tensor) for k, tensor in shard.items()}
                self.commit(
                    name, number, count, update, {k: v for k, v in record.items() if k not in ("file", "sha256")}
                )
        # The record stays: it says that nothing is to be distilled again.
        file = self.out / self.done[STAGED]["file"]
        self.done[STAGED] = {"targets": [], "seconds": self.done[STAGED]["seconds"]}
        self._write_journal()
        file.unlink()

    def finish(self, config: dict[str, Any], companions: list[Path], told: dict[str, bytes], recipe: str = "") -> None:
        """Write everything beside the shards, the config last, and drop the journal. recipe: the choice, if any.

        told: files that say what was done, see `documents`.
        """
        sums = {record["file"]: record["sha256"] for name, record in self.done.items() if name != STAGED}
        weight_map = {name: file for file in sums for name in Checkpoint.header(self.out / file)}
        total = sum((self.out / file).stat().st_size for file in sums)
        sums |= self.beside
        index = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1, sort_keys=True)
        files = {path.name: path.read_bytes() for path in companions} | {INDEX: index.encode(), **told}
        files |= {RECIPE: recipe.encode()} if recipe else {}
        files["config.json"] = json.dumps(config, indent=2).encode()
        sums |= {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
        # First, since it says which files are ours.
        for name, data in {SUMS: checksum_lines(sums).encode(), **files}.items():
            self.write(name, data)
        (self.out / JOURNAL).unlink()
