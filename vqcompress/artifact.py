"""The compressed artifact: a directory in Hugging Face layout, written so that a kill at any moment loses nothing.

    config.json                        the model's own, with a `quantization_config` that names every compressed weight
    model-00001-of-0000N.safetensors   what lies outside of the blocks, then one shard per block
    model.safetensors.index.json       tensor → shard
    SHA256SUMS                         of every file above and of the tokenizer's (`sha256sum -c` reads it)
    report.json, README.md             what was done, and how to load it
    recipe.yaml                        if the settings were chosen for a budget of bits: the choice, as a recipe
    journal.json                       only while a run is unfinished: its inputs, what was measured to choose
                                       settings by, and the blocks that are on disk

A compressed weight `X.weight` is stored as `X.weight_PART`; parts that the targets of a block share lie under
`BLOCK.shared_parts.K.PART`. `config.json` is written last: a directory without it is no artifact.
The first compressed weight also has a marker under its own name, text in a shape that no weight has: transformers,
if it was not told of the format, would skip what it does not know and load a model with random weights. A wrong shape
stops it, and a tensor whose name says what to do stands in the report that it prints.
"""

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
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from vqcompress import methods
from vqcompress.checkpoint import COMPANIONS, INDEX, Checkpoint, read_json, sha256
from vqcompress.errors import VQCompressError
from vqcompress.methods import Layout, Method, Parts, layout_bits
from vqcompress.targets import Target

QUANT_METHOD = "vqcompress"
FORMAT_VERSION = 1
JOURNAL = "journal.json"
SUMS = "SHA256SUMS"
RECIPE = "recipe.yaml"
SHARD = "model-{:05d}-of-{:05d}.safetensors"
SMOOTHING = "smoothing"
STAGED = "(staged)"
OURS = re.compile(r"(model-\d{5}-of-\d{5}\.safetensors(\.partial)?|[\w.-]+\.json\.partial)")
HOW_TO_LOAD = "import vqcompress first; then AutoModelForCausalLM.from_pretrained, or vqcompress.load"
# Stands in the list of unexpected tensors that transformers then prints.
HINT = "import_vqcompress_before_loading_this_model"
MARKER = torch.tensor(list(f"vqcompress: {HOW_TO_LOAD}".encode()), dtype=torch.uint8)


@dataclass(frozen=True)
class Entry:
    """How one target is stored. smoothed: the input is divided by a stored vector at run time.

    shared: the path under which the parts lie that it shares with other targets of its block, or None.
    """

    target: Target
    method: Method
    smoothed: bool = False
    shared: str | None = None

    def layout(self) -> Layout:
        """Type and shape of the parts that are the target's own, the smoothing vector included."""
        layout = dict(self.method.layout(self.target.shape))
        if self.smoothed:
            layout[SMOOTHING] = (torch.float32, (self.target.shape[1],))
        return layout

    def decode(self, parts: Parts) -> Tensor:
        """The float32 (O, I) weight that the parts stand for, smoothing undone. `parts` includes the shared ones."""
        own = dict(parts)
        smoothing = own.pop(SMOOTHING, None)
        weight = self.method.decode(own, self.target.shape)
        return weight if smoothing is None else weight / smoothing


def part_name(weight_name: str, part: str) -> str:
    """The stored name of a part of the weight with that name in the checkpoint."""
    return f"{weight_name}_{part}"


def quantization_config(entries: list[Entry], version: str) -> dict[str, Any]:
    """The JSON that tells a loader, without the recipe, how every target is stored."""
    described = [entry.method.describe() for entry in entries]
    distinct = [d for i, d in enumerate(described) if d not in described[:i]]
    return {
        "quant_method": QUANT_METHOD,
        "format_version": FORMAT_VERSION,
        "vqcompress_version": version,
        "how_to_load": HOW_TO_LOAD,
        "methods": distinct,
        "targets": {
            entry.target.name: {
                "method": distinct.index(entry.method.describe()),
                "shape": list(entry.target.shape),
                "bias": entry.target.bias,
                "smoothed": entry.smoothed,
                "shared": entry.shared,
            }
            for entry in entries
        },
    }


def parse_entries(config: dict[str, Any], where: str) -> list[Entry]:
    """The entries of a `quantization_config`; VQCompressError naming what is wrong."""
    if config.get("quant_method") != QUANT_METHOD:
        raise VQCompressError(f"{where} is no vqcompress artifact (quant_method: {config.get('quant_method')!r})")
    if config.get("format_version") != FORMAT_VERSION:
        raise VQCompressError(
            f"{where} has format version {config.get('format_version')!r}; this vqcompress reads {FORMAT_VERSION}"
        )
    try:
        settings = [methods.from_description(d) for d in config["methods"]]
        entries = [_entry(name, stored, settings) for name, stored in config["targets"].items()]
        if not entries:
            raise ValueError("it names no target")
        return entries
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise VQCompressError(f"the quantization_config of {where} is damaged: {error!r}") from error


def _entry(name: str, stored: dict[str, Any], settings: list[Method]) -> Entry:
    """The entry of a target; KeyError, TypeError or ValueError if its JSON is not what `quantization_config` writes."""
    number, shared = stored["method"], stored["shared"]
    if type(number) is not int or not 0 <= number < len(settings):
        raise ValueError(f"{name}: method {number!r} is not one of the {len(settings)}")
    if (shared is None) == bool(settings[number].shared_layout()):
        raise ValueError(f"{name}: shared is {shared!r}, which {settings[number].name} does not store")
    if shared is not None:
        block = re.fullmatch(r"(.+)\.shared_parts\.\d+", shared)
        if not block or not name.startswith(block[1] + "."):
            raise ValueError(f"{name}: shared parts at {shared!r} do not belong to its block")
    target = Target(name, _shape(stored["shape"]), bool(stored["bias"]))
    return Entry(target, settings[number], bool(stored["smoothed"]), shared)


def _shape(value: object) -> tuple[int, int]:
    if not (isinstance(value, list) and len(value) == 2 and all(type(n) is int and 0 < n < 2**31 for n in value)):
        raise ValueError(f"shape {value!r} is not two positive numbers")
    return value[0], value[1]


def stored_bits(entries: Iterable[Entry]) -> dict[str, float]:
    """Target → bits stored in its place, its share (by weights) of its block's shared parts included."""
    entries = list(entries)
    sharing: Counter[str] = Counter()
    for entry in entries:
        sharing[entry.shared or ""] += entry.target.weights
    return {
        entry.target.name: layout_bits(entry.layout())
        + layout_bits(entry.method.shared_layout()) * entry.target.weights / sharing[entry.shared or ""]
        for entry in entries
    }


def checksum_lines(sums: dict[str, str]) -> str:
    """File name → digest as the text that `sha256sum -c` reads, sorted by name."""
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))


class Artifact(Checkpoint):
    """A finished artifact on disk: a checkpoint, and how its targets are stored. entries: by target name."""

    def __init__(self, path: Path):
        if not (path / "config.json").is_file() and (path / JOURNAL).is_file():
            raise VQCompressError(f"{path} holds an unfinished run; give its quantize command again to finish it")
        super().__init__(path)
        config = self.config.get("quantization_config")
        if not isinstance(config, dict):
            raise VQCompressError(f"{path} is a plain checkpoint, not an artifact (no quantization_config)")
        self.entries = {entry.target.name: entry for entry in parse_entries(config, str(path))}

    @staticmethod
    def is_one(path: Path) -> bool:
        """Whether the directory says of itself that it is an artifact, finished or not."""
        if not (path / "config.json").is_file():
            return (path / JOURNAL).is_file()
        config = read_json(path / "config.json")
        config = config.get("quantization_config") if isinstance(config, dict) else None
        return isinstance(config, dict) and config.get("quant_method") == QUANT_METHOD

    def check_files(self) -> None:
        """Compare every file with SHA256SUMS; VQCompressError naming the first that differs or is missing.

        What transformers' `save_pretrained` wrote has neither checksums nor a report, and nothing to compare with.
        """
        if not (self.path / SUMS).exists() and not (self.path / "report.json").exists():
            return
        try:
            text = (self.path / SUMS).read_bytes().decode("ascii")
        except (OSError, UnicodeDecodeError) as error:
            raise VQCompressError(f"{self.path / SUMS} is missing or damaged") from error
        listed = {name: digest for digest, name in re.findall(r"([0-9a-f]{64})  ([\w.-]+)\n", text, re.ASCII)}
        if text != checksum_lines(listed):
            raise VQCompressError(f"{self.path / SUMS} is damaged")
        for name, digest in listed.items():
            if not (self.path / name).is_file():
                raise VQCompressError(f"{self.path / name} is missing")
            if sha256(self.path / name) != digest:
                raise VQCompressError(f"{self.path / name} is damaged: its SHA-256 is not the one in {SUMS}")
        needed = {"config.json", INDEX, *(info.file for info in self.tensors.values())}
        if missing := sorted(needed - listed.keys()):
            raise VQCompressError(f"{self.path / SUMS} does not list {missing[0]}")


@contextmanager
def undisturbed() -> Iterator[None]:
    """Ctrl-C inside counts only at the end, so that what was begun to be committed is."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt


class Shards:
    """Writes shards into a directory, each so that it is whole or absent. Several processes may, each its own."""

    def __init__(self, out: Path):
        self.out = out

    def write_shard(self, number: int, count: int, tensors: Parts) -> dict[str, Any]:
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
                digest = aside.submit(sha256, partial)
                os.fsync(stream.fileno())
            partial.replace(self.out / file)
            self._sync_directory()
        except (OSError, SafetensorError) as error:
            raise self._explain(error, size) from error
        return {"file": file, "sha256": digest.result()}

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
            return VQCompressError(
                f"no space left in {self.out}: the next file needs {needed} bytes and {free} are free;"
                " make room and give the same command again, the finished blocks are kept"
            )
        return VQCompressError(f"cannot write to {self.out}: {error}")


class Writer(Shards):
    """Commits shards one by one into a directory, with a journal, and makes it an artifact at the end.

    inputs: names → fingerprints of all that determines the bytes, but for the weights: source_of gives that of a block.
    A directory with a journal of the same inputs is continued: `done` then holds the records of the blocks that are on
    disk, `measured` what was noted. Weights of blocks that are not done yet may have been mended meanwhile. A context
    manager: the directory is locked against other processes until it is left.
    """

    def __init__(self, out: Path, inputs: dict[str, str], source_of: Callable[[str], str], overwrite: bool):
        super().__init__(out)
        self.inputs, self.source_of = inputs, source_of
        self.done: dict[str, dict[str, Any]] = {}
        self.measured: dict[str, dict[str, list[float]]] = {}
        if out.is_file():
            raise VQCompressError(f"{out} is a file, not a directory to write an artifact to")
        ours = (out / JOURNAL).is_file() or (out.is_dir() and Artifact.is_one(out))
        # A run that is killed in its very first write leaves only this.
        if out.is_dir() and any(path.name != f"{JOURNAL}.partial" for path in out.iterdir()):
            self._continue_or_clear(overwrite)
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
            for name in ("config.json", INDEX, SUMS):
                (out / name).unlink(missing_ok=True)
            kept = {record.get("file") for record in self.done.values()}
            for path in out.iterdir():
                beside = path.name == RECIPE or COMPANIONS.fullmatch(path.name)
                stale = OURS.fullmatch(path.name) or (ours and beside)
                if stale and path.is_file() and path.name not in kept:
                    path.unlink()
        except BaseException:
            os.close(self._lock)
            raise

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._lock)

    def _continue_or_clear(self, overwrite: bool) -> None:
        """Find the blocks that an earlier run of the same inputs left; VQCompressError if this is another directory."""
        holds = "something else"
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
        elif Artifact.is_one(self.out):
            holds = "a finished artifact"
        elif (self.out / "config.json").exists() or any(self.out.glob("*.safetensors")):
            raise VQCompressError(f"{self.out} holds a model that vqcompress did not write; choose another directory")
        if not overwrite:
            raise VQCompressError(f"{self.out} already holds {holds}; choose another directory or give --overwrite")

    def _read_journal(self) -> list[str]:
        """The inputs in which an earlier run differs; if there are none, `done` holds its blocks that are intact."""
        earlier = read_json(self.out / JOURNAL)
        try:
            differing = sorted(name for name, value in self.inputs.items() if earlier["inputs"].get(name) != value)
            if earlier["format_version"] != FORMAT_VERSION:
                differing.append("format version")
            if not differing:
                self.measured = {name: dict(record) for name, record in earlier.get("measured", {}).items()}
            blocks = earlier["blocks"] if not differing else {}
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
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise VQCompressError(f"{self.out / JOURNAL} is damaged; give --overwrite to start anew") from error
        return differing

    def _intact(self, record: dict[str, Any]) -> bool:
        file = self.out / Path(record["file"]).name
        return file.is_file() and sha256(file) == record["sha256"]

    def _write_journal(self) -> None:
        journal = {"format_version": FORMAT_VERSION, "inputs": self.inputs, "blocks": self.done}
        self._write(JOURNAL, json.dumps(journal | {"measured": self.measured}, indent=1).encode())

    def note(self, name: str, record: dict[str, list[float]]) -> None:
        """Keep what was measured of a block, so that a run that is cut off need not measure it again."""
        self.measured[name] = record
        self._write_journal()

    def _write(self, name: str, data: bytes) -> None:
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

    def commit(self, name: str, number: int, count: int, tensors: Parts, record: dict[str, Any]) -> None:
        """Write a shard, then journal it. name: the block's. number of count: the shard's place. record: JSON kept."""
        self.journal(name, self.write_shard(number, count, tensors) | record)

    def journal(self, name: str, record: dict[str, Any]) -> None:
        """Keep the record of a block whose shard is written."""
        self.done[name] = record
        self._write_journal()

    def stage(self, tensors: Parts) -> None:
        """Keep new values for tensors of the shards, as a file of its own; `settle` puts them in their places."""
        self.commit(STAGED, 0, 0, tensors, {"targets": [], "seconds": 0.0})

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
        self.done[STAGED] = {"targets": [], "seconds": 0.0}
        self._write_journal()
        file.unlink()

    def finish(
        self, config: dict[str, Any], companions: list[Path], report: dict[str, Any], card: str, recipe: str = ""
    ) -> None:
        """Write everything beside the shards, the config last, and drop the journal. recipe: the choice, if any."""
        sums = {record["file"]: record["sha256"] for name, record in self.done.items() if name != STAGED}
        weight_map = {name: file for file in sums for name in Checkpoint.header(self.out / file)}
        total = sum((self.out / file).stat().st_size for file in sums)
        index = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1, sort_keys=True)
        files = {path.name: path.read_bytes() for path in companions} | {INDEX: index.encode()}
        files |= {RECIPE: recipe.encode()} if recipe else {}
        last = json.dumps(config, indent=2).encode()
        for name, data in files.items():
            self._write(name, data)
        for name, data in {**files, "config.json": last}.items():
            sums[name] = hashlib.sha256(data).hexdigest()
        self._write("report.json", json.dumps(report, indent=1).encode())
        self._write("README.md", card.encode())
        self._write(SUMS, checksum_lines(sums).encode())
        self._write("config.json", last)
        (self.out / JOURNAL).unlink()


def tensors_of(path: Path) -> dict[str, Tensor]:
    """All tensors of one shard."""
    from safetensors.torch import load_file

    return load_file(path)
