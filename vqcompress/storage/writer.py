"""Writes an artifact shard by shard. A run that is killed resumes at the last committed block."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file

from vqcompress.errors import VQCompressError
from vqcompress.methods import PackedTensors
from vqcompress.storage.artifact import DRAFT, OURS, RECIPE, STAGED, checksum_lines, read_sums, tensors_of
from vqcompress.storage.checkpoint import Checkpoint, read_json, sha256
from vqcompress.storage.distributed import ALONE, ProcessGroup
from vqcompress.storage.locks import locked
from vqcompress.storage.output import INDEX, JOURNAL, SUMS, check_output

# A file name, its tensors, and the JSON to journal about it.
Shard = tuple[str, PackedTensors, dict[str, Any]]


class Shards:
    """Writes files into a directory atomically: a file is complete or absent. Processes may write different files."""

    def __init__(self, out: Path):
        self.out = out

    def write_shard(self, file: str, tensors: PackedTensors) -> dict[str, Any]:
        """Write tensors to a file; returns its name as `file` and its `sha256`."""
        with self._replacing(file) as partial:
            save_file({k: t.contiguous() for k, t in tensors.items()}, partial, metadata={"format": "pt"})
            # safetensors creates files with mode 600.
            partial.chmod(0o644)
        return {"file": file, "sha256": sha256(self.out / file)}

    def write(self, name: str, data: bytes) -> None:
        """Write a file, or replace it."""
        with self._replacing(name) as partial:
            partial.write_bytes(data)

    def copy(self, name: str, path: Path) -> None:
        """Write a file with what another one holds, or replace it, piece by piece."""
        with self._replacing(name) as partial:
            shutil.copyfile(path, partial)

    @contextlib.contextmanager
    def _replacing(self, name: str) -> Iterator[Path]:
        """The path to write to; what is written takes the place of `name` when it is safe on the disk."""
        partial = self.out / f"{name}.partial"
        try:
            partial.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            _sync(partial)
            partial.replace(self.out / name)
            _sync(partial.parent)
        except (OSError, SafetensorError) as error:
            # On a full disk, half a shard takes up room that the next attempt needs.
            partial.unlink(missing_ok=True)
            raise VQCompressError(f"cannot write {self.out / name}: {error}") from error


def _sync(path: Path) -> None:
    """Wait until a file or directory is on the disk; Windows cannot."""
    if os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def refresh_sums(path: Path, names: Collection[str]) -> None:
    """Update the checksums of these files, which may be gone, in an artifact's SHA256SUMS; no-op without one.

    Call it once after the last rewritten report.
    """
    if (path / SUMS).exists():
        sums = {name: digest for name, digest in read_sums(path).items() if name not in names}
        sums |= {name: sha256(path / name) for name in names if (path / name).is_file()}
        Shards(path).write(SUMS, checksum_lines(sums).encode())


def clear(out: Path, listed: Collection[str], kept: Collection[str | None] = ()) -> None:
    """Delete the files of an artifact, partial ones too: shards and those that SHA256SUMS lists, the config first.

    listed: names in SHA256SUMS. kept: names to leave in place. Other files are left alone.
    """
    for path in sorted(out.rglob("*"), key=lambda path: path != out / "config.json"):
        name = path.relative_to(out).as_posix()
        ours = OURS.fullmatch(name) or name.removesuffix(".partial") in listed
        if ours and path.is_file() and name not in kept:
            path.unlink()
            with contextlib.suppress(OSError):
                # Directories that hold nothing else; `out` still holds the file that says it is ours.
                os.removedirs(path.parent)


class Writer(Shards):
    """Commits shards one by one into a directory, with a journal, and makes it an artifact at the end.

    A directory whose journal has the same inputs is continued. Each rank writes its shards, rank 0 the journal and
    all other files. Every process of `group` makes the same calls; the directory must be visible to all. A context
    manager: the directory is locked against other runs until it exits.

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
        self._lock = contextlib.ExitStack()
        if group.is_main:
            self._lock_directory()
            try:
                self._open(overwrite)
            except BaseException:
                self._lock.close()
                raise
        self.done, self.measured = group.broadcast(0, (self.done, self.measured))

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._lock.close()
        # The first record holds the weights outside of the blocks.
        if isinstance(error, KeyboardInterrupt) and len(self.done) > 1:
            error.args = ("finished blocks are kept; give the same command again to continue",)

    def _lock_directory(self) -> None:
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            self._lock.enter_context(locked(self.out, wait=False))
        except BlockingIOError as error:
            raise VQCompressError(f"another process is writing to {self.out}") from error
        except OSError as error:
            raise VQCompressError(f"cannot make the directory {self.out}: {error.strerror}") from error

    def _open(self, overwrite: bool) -> None:
        """Load what an earlier run has done, and delete files that do not belong to this one."""
        check_output(self.out, overwrite, JOURNAL)
        holds = self._resume() if (self.out / JOURNAL).is_file() else ""
        if holds and not overwrite:
            raise VQCompressError(f"{self.out} already holds {holds}; choose another directory or give --overwrite")
        listed = read_sums(self.out) if (self.out / SUMS).exists() else {}
        # From here on the directory holds an unfinished run of these inputs, whatever it held before.
        self._write_journal()
        clear(self.out, listed, {record.get("file") for record in self.done.values()})
        # Last: if the run is killed before this, the list says what is still to be deleted.
        (self.out / SUMS).unlink(missing_ok=True)

    def _resume(self) -> str:
        """Load the finished blocks of an earlier run; returns why it cannot be continued, or an empty string."""
        try:
            journal = read_json(self.out / JOURNAL)
            if others := [name for name, value in self.inputs.items() if journal["inputs"].get(name) != value]:
                return f"an unfinished run with another {', '.join(others)}"
            blocks = journal["blocks"]
            # Later blocks were made from the output of a shard that is missing or damaged.
            intact = dict(itertools.takewhile(lambda item: self._is_intact(item[1]), blocks.items()))
            sources = {name: record["source"] for name, record in intact.items() if name != STAGED}
            measured, seconds = journal["measured"], journal["seconds"]
        except (VQCompressError, LookupError, TypeError, AttributeError) as error:
            return f"a damaged {JOURNAL} ({error})"
        if changed := [name for name, source in sources.items() if source != self.source_of(name)]:
            return f"an unfinished run with another checkpoint: {changed[0]} has changed"
        if STAGED in blocks and len(intact) < len(blocks):
            # Shards before it may hold staged values, so later blocks cannot be made again as they were.
            intact = {}
        self.done, self.measured, self.seconds_before = intact, measured, seconds
        return ""

    def _is_intact(self, record: dict[str, Any]) -> bool:
        """Whether the file of a record, if it has one, is on disk as it was written."""
        file = self.out / record.get("file", "")
        return "file" not in record or (file.is_file() and sha256(file) == record["sha256"])

    @property
    def seconds(self) -> float:
        """Duration of this run and of the earlier ones that it continues."""
        return round(self.seconds_before + time.perf_counter() - self.began, 3)

    def lap(self) -> float:
        """Seconds since the last call, or since the run began."""
        before, self._lap_began = self._lap_began, time.perf_counter()
        return self._lap_began - before

    def _write_journal(self) -> None:
        if self.group.is_main:
            journal = {"inputs": self.inputs, "blocks": self.done, "measured": self.measured, "seconds": self.seconds}
            self.write(JOURNAL, json.dumps(journal, indent=1).encode())

    def save_measured(self, name: str, figures: dict[str, list[float]]) -> None:
        """Journal the figures measured of a block, so that a resumed run does not measure it again."""
        self.measured[name] = figures
        self._write_journal()

    def commit(self, shards: dict[str, Shard]) -> None:
        """Write the shards of every process, then journal them; if several have the same, the lowest rank writes it.

        shards: by the name of the block. file, sha256 and the seconds since the last `lap` are added to their JSON.
        """
        earlier = [name for names in self.group.all_gather(list(shards))[: self.group.rank] for name in names]
        written = {
            name: self.write_shard(file, tensors) | record
            for name, (file, tensors, record) in shards.items()
            if name not in earlier
        }
        records = [item for each in self.group.all_gather(written) for item in each.items()]
        seconds = self.lap()
        for name, record in records:
            self.done[name] = record | {"seconds": round(seconds / len(records), 3)}
        self._write_journal()

    def apply_staged(self) -> None:
        """Replace drafts by shards with the staged values, if any; a run that was killed in between does the rest."""
        staged = self.done.get(STAGED, {})
        if self.group.is_main and "file" in staged:
            values = tensors_of(self.out / staged["file"])
            for name, record in list(self.done.items()):
                if record["file"].startswith(DRAFT):
                    tensors = tensors_of(self.out / record["file"])
                    tensors |= {key: value for key, value in values.items() if key in tensors}
                    shard = self.write_shard(record["file"].removeprefix(DRAFT), tensors)
                    self._journal_instead(name, record | shard)
            # The record stays without a file: the model is distilled already.
            self._journal_instead(STAGED, {"targets": [], "seconds": staged["seconds"]})
        self.done = self.group.broadcast(0, self.done)

    def _journal_instead(self, name: str, record: dict[str, Any]) -> None:
        """Replace a record in the journal, then delete the file of the old one."""
        old, self.done[name] = self.done[name], record
        self._write_journal()
        (self.out / old["file"]).unlink()

    def write_extra(self, name: str, tensors: PackedTensors) -> None:
        """Write tensors that belong to no shard; `finish` lists the file in SHA256SUMS. Rank 0 only; not journaled."""
        self.extra_files[name] = self.write_shard(name, tensors)["sha256"]

    def finish(
        self, config: dict[str, Any], companions: dict[str, Path], reports: dict[str, bytes], recipe: str
    ) -> None:
        """Write all files but the shards, the config last, and delete the journal.

        companions: files of the source to copy, by name. reports: name → content. recipe: text of recipe.yaml, or "".
        """
        sums = {record["file"]: record["sha256"] for name, record in self.done.items() if name != STAGED}
        weight_map = {name: file for file in sums for name in Checkpoint.header(self.out / file)}
        total = sum((self.out / file).stat().st_size for file in sums)
        index = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1, sort_keys=True)
        files = {INDEX: index.encode(), **reports} | ({RECIPE: recipe.encode()} if recipe else {})
        files["config.json"] = json.dumps(config, indent=2).encode()
        sums |= self.extra_files | {name: sha256(path) for name, path in companions.items()}
        sums |= {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
        # The checksums come first, since they say which files are ours.
        self.write(SUMS, checksum_lines(sums).encode())
        for name, path in companions.items():
            self.copy(name, path)
        for name, data in files.items():
            self.write(name, data)
        (self.out / JOURNAL).unlink()
