"""Writes an artifact shard by shard. A run that is killed resumes at the last committed block."""

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
from vqcompress.storage.distributed import ALONE, ProcessGroup


@contextmanager
def undisturbed() -> Iterator[None]:
    """Delay Ctrl-C until the block under `with` is done, so that a commit is not cut off."""
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
    """Writes files into a directory atomically: a file is complete or absent. Processes may write different shards."""

    def __init__(self, out: Path):
        self.out = out

    def write_shard(self, number: int, count: int, tensors: PackedTensors) -> dict[str, Any]:
        """Write shard `number` of `count`; returns its `file` and `sha256`."""
        file = SHARD.format(number, count)
        partial = self.out / f"{file}.partial"
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        try:
            save_file({k: t.contiguous() for k, t in tensors.items()}, partial, metadata={"format": "pt"})
            # safetensors creates files with mode 600.
            partial.chmod(0o644)
            with ThreadPoolExecutor(1) as pool, partial.open("rb+") as stream:
                # Hash on the CPU while the disk writes.
                hashed = pool.submit(sha256, partial)
                os.fsync(stream.fileno())
                digest = hashed.result()
            partial.replace(self.out / file)
            self._sync_directory()
        except (OSError, SafetensorError) as error:
            raise self._explain(error, size) from error
        return {"file": file, "sha256": digest}

    def write(self, name: str, data: bytes) -> None:
        """Replace a file of the directory atomically."""
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
    """Update the checksums of these files, which may be gone, in an artifact's SHA256SUMS; no-op without one.

    Call it once after the last rewritten report.
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
    """Delete the files of an artifact, partial ones too: shards and those that SHA256SUMS lists, the config first.

    listed: names in SHA256SUMS. kept: names to leave in place. Other files are left alone.
    """
    for path in sorted(out.iterdir(), key=lambda path: path.name != "config.json"):
        ours = OURS.fullmatch(path.name) or path.name.removesuffix(".partial") in listed
        if ours and path.is_file() and path.name not in kept:
            path.unlink()


class Writer(Shards):
    """Commits shards one by one into a directory, with a journal, and makes it an artifact at the end.

    A directory whose journal has the same inputs is continued. Rank 0 writes and the others keep the same state, so
    every process of `group` makes the same calls; the directory must be visible to all. A context manager: the
    directory is locked against other runs until it exits.

    done: block name → record of a shard on disk. measured: block name → figures saved by `save_measured`.
    extra_files: name → SHA-256 of files written by `write_extra`.
    """

    def __init__(
        self,
        out: Path,
        inputs: dict[str, str],
        source_of: Callable[[str], str],
        overwrite: bool,
        began: float,
        group: ProcessGroup = ALONE,
    ):
        """Open or continue a run.

        inputs: name → fingerprint of everything that determines the bytes, except the weights. source_of: returns the
        fingerprint of a block's weights. overwrite: replace a run of other inputs or an artifact. began: time of
        time.perf_counter() at the start of the run.
        """
        super().__init__(out)
        self.group, self.inputs, self.source_of = group, inputs, source_of
        self.began, self.seconds_before, self._lap_began = began, 0.0, began
        self.extra_files: dict[str, str] = {}
        self.done: dict[str, dict[str, Any]] = {}
        self.measured: dict[str, dict[str, list[float]]] = {}
        if group.is_main:
            self._open(overwrite)
        self.done, self.measured = group.broadcast(0, (self.done, self.measured))

    def _open(self, overwrite: bool) -> None:
        """Lock the directory, read its journal, and delete files that do not belong to the run."""
        if self.out.is_file():
            raise VQCompressError(f"{self.out} is a file, not a directory to write an artifact to")
        # A run killed during its very first write leaves only a partial journal.
        if self.out.is_dir() and any(path.name != f"{JOURNAL}.partial" for path in self.out.iterdir()):
            self._continue_or_clear(overwrite)
        listed = read_sums(self.out) if (self.out / SUMS).exists() else {}
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise VQCompressError(f"cannot make the directory {self.out}: {error}") from error
        self._lock = os.open(self.out, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise VQCompressError(f"another process is writing to {self.out}") from error
        try:
            # From here on the directory holds an unfinished run of these inputs, whatever it held before.
            self._write_journal()
            clear(self.out, listed, {record.get("file") for record in self.done.values()})
            # Last: if the run is killed before this, the list says what is still to be deleted.
            (self.out / SUMS).unlink(missing_ok=True)
        except BaseException:
            os.close(self._lock)
            raise

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not self.group.is_main:
            return
        os.close(self._lock)
        # The first record holds the weights outside of the blocks.
        if isinstance(error, KeyboardInterrupt) and len(self.done) > 1:
            error.args = ("finished blocks are kept; give the same command again to continue",)

    def _continue_or_clear(self, overwrite: bool) -> None:
        """Load the blocks of an earlier run with the same inputs; VQCompressError if the directory may not be used."""
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
            # There is no list of our files, so none may be deleted.
            raise VQCompressError(f"{self.out} holds files that quantize did not write; choose another directory")
        if not overwrite:
            raise VQCompressError(f"{self.out} already holds {holds}; choose another directory or give --overwrite")

    def _read_journal(self) -> list[str]:
        """The names of inputs in which the earlier run differs; if none, its intact blocks are now in `done`."""
        journal = read_json(self.out / JOURNAL)
        try:
            if differing := self._differing_inputs(journal):
                return differing
            intact = self._intact_blocks(journal["blocks"])
            for name, record in intact.items():
                if name != STAGED and record["source"] != self.source_of(name):
                    return [f"checkpoint: {name} has changed"]
            self.done = intact
            self.measured = {name: dict(figures) for name, figures in journal["measured"].items()}
            self.seconds_before = float(journal["seconds"])
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise VQCompressError(f"{self.out / JOURNAL} is damaged; give --overwrite to start anew") from error
        return []

    def _differing_inputs(self, journal: dict[str, Any]) -> list[str]:
        differing = sorted(name for name, value in self.inputs.items() if journal["inputs"].get(name) != value)
        if "seed" in differing and "calibration" in differing:
            # The seed draws the rows, so another seed alone changes them too.
            differing.remove("calibration")
        return differing + (["format version"] if journal["format_version"] != FORMAT_VERSION else [])

    def _intact_blocks(self, blocks: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """The records up to the first shard that is missing or damaged: later blocks were made from its output."""
        if any(Path(record.get("file", "x")).name != record.get("file", "x") for record in blocks.values()):
            raise ValueError("a record names a file outside of the directory")
        staged = blocks.get(STAGED, {})
        intact = {}
        for name, record in blocks.items():
            applied = name == STAGED and "file" not in record
            # The shard being rewritten may hold the staged values while its record does not say so yet.
            rewriting = name == staged.get("applying") and (self.out / record["file"]).is_file()
            if not (applied or rewriting or self._matches(record)):
                break
            intact[name] = record
        if STAGED not in intact and ("applying" in staged or "file" not in staged) and staged:
            # Earlier shards hold staged values already, so later blocks cannot be made again as they were.
            return {}
        return intact

    def _matches(self, record: dict[str, Any]) -> bool:
        file = self.out / record["file"]
        return file.is_file() and sha256(file) == record["sha256"]

    @property
    def seconds(self) -> float:
        """Duration of this run and of the earlier ones that it continues."""
        return round(self.seconds_before + time.perf_counter() - self.began, 3)

    def lap(self) -> float:
        """Seconds since the last call, or since the run began."""
        before, self._lap_began = self._lap_began, time.perf_counter()
        return round(self._lap_began - before, 3)

    def _write_journal(self) -> None:
        if self.group.is_main:
            journal = {"format_version": FORMAT_VERSION, "inputs": self.inputs, "blocks": self.done}
            journal |= {"measured": self.measured, "seconds": self.seconds}
            self.write(JOURNAL, json.dumps(journal, indent=1).encode())

    def save_measured(self, name: str, figures: dict[str, list[float]]) -> None:
        """Journal the figures measured of a block, so that a resumed run does not measure it again."""
        self.measured[name] = figures
        self._write_journal()

    @undisturbed()
    def commit(self, name: str, number: int, count: int, tensors: PackedTensors, record: dict[str, Any]) -> None:
        """Write shard `number` of `count` from tensors that all processes have, then journal its record.

        name: the block's. record: JSON to keep; file, sha256 and the seconds since the last `lap` are added.
        """
        record = self.write_shard(number, count, tensors) | record if self.group.is_main else {}
        self._journal(name, self.group.broadcast(0, record), self.lap())

    @undisturbed()
    def commit_all(self, blocks: dict[str, tuple[int, int, PackedTensors, dict[str, Any]]]) -> None:
        """Write the shards of every process; if several have the same block, the lowest rank writes it.

        blocks: name → number, count, tensors and record as for `commit`.
        """
        earlier = [name for names in self.group.all_gather(list(blocks))[: self.group.rank] for name in names]
        written = {
            name: self.write_shard(number, count, tensors) | record
            for name, (number, count, tensors, record) in blocks.items()
            if name not in earlier
        }
        records = [item for each in self.group.all_gather(written) for item in each.items()]
        seconds = self.lap()
        for name, record in records:
            self._journal(name, record, seconds / len(records))

    def _journal(self, name: str, record: dict[str, Any], seconds: float) -> None:
        self.done[name] = record | {"seconds": round(seconds, 3)}
        self._write_journal()

    def stage(self, tensors: PackedTensors) -> None:
        """Write new values of tensors to a file of their own, from which `apply_staged` puts them into the shards."""
        self.commit(STAGED, 0, 0, tensors, {"targets": []})

    @undisturbed()
    def apply_staged(self) -> None:
        """Put the staged values, if any, into the shards; a run that was killed in between does it again."""
        staged = self.done.get(STAGED, {})
        if self.group.is_main and "file" in staged:
            self._apply(tensors_of(self.out / staged["file"]))
            # The record stays without a file: the model is distilled already.
            self.done[STAGED] = {"targets": [], "seconds": staged["seconds"]}
            self._write_journal()
            (self.out / staged["file"]).unlink()
        self.done = self.group.broadcast(0, self.done)

    def _apply(self, staged: PackedTensors) -> None:
        for name, record in list(self.done.items()):
            shard = tensors_of(self.out / record["file"]) if name != STAGED else {}
            if not shard.keys() & staged.keys():
                continue
            self.done[STAGED]["applying"] = name
            self._write_journal()
            number, count = (int(n) for n in re.findall(r"\d{5}", record["file"]))
            self.done[name] = record | self.write_shard(number, count, {k: staged.get(k, t) for k, t in shard.items()})
            self._write_journal()

    def write_extra(self, name: str, tensors: PackedTensors) -> None:
        """Write tensors that belong to no shard; `finish` lists the file in SHA256SUMS. It is not journaled."""
        if self.group.is_main:
            self.write(name, save({k: t.contiguous() for k, t in tensors.items()}, metadata={"format": "pt"}))
            self.extra_files[name] = sha256(self.out / name)

    def finish(self, config: dict[str, Any], companions: list[Path], reports: dict[str, bytes], recipe: str) -> None:
        """Write all files but the shards, the config last, and delete the journal.

        companions: files of the source to copy. reports: name → content. recipe: text of recipe.yaml, or empty.
        """
        if not self.group.is_main:
            return
        sums = {record["file"]: record["sha256"] for name, record in self.done.items() if name != STAGED}
        weight_map = {name: file for file in sums for name in Checkpoint.header(self.out / file)}
        total = sum((self.out / file).stat().st_size for file in sums)
        sums |= self.extra_files
        index = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1, sort_keys=True)
        files = {path.name: path.read_bytes() for path in companions} | {INDEX: index.encode(), **reports}
        files |= {RECIPE: recipe.encode()} if recipe else {}
        files["config.json"] = json.dumps(config, indent=2).encode()
        sums |= {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
        # The checksums come first, since they say which files are ours.
        for name, data in {SUMS: checksum_lines(sums).encode(), **files}.items():
            self.write(name, data)
        (self.out / JOURNAL).unlink()
