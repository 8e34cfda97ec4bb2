"""A Hugging Face checkpoint as files: its config, and its tensors by name without loading what nobody asked for."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vqcompress.errors import UsageError, VQCompressError, one_line
from vqcompress.methods.base import is_finite
from vqcompress.storage import hub
from vqcompress.storage.companions import companions
from vqcompress.storage.damage import damage
from vqcompress.storage.output import INDEX

SINGLE = "model.safetensors"
# What configs call the tokens of the longest row, and the config of their text.
CONTEXTS: tuple[str, ...] = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length")
CONTEXTS += ("seq_length", "n_ctx", "max_seq_length", "context_length", "max_context_length")
TEXT_CONFIGS = ("text_config", "llm_config", "language_config", "decoder", "generator")
# Bytes that are hashed at once.
PIECE = 2**22
# In the order in which transformers looks for them: weights in one file, and an index of shards.
STORED = ((SINGLE, INDEX), ("pytorch_model.bin", "pytorch_model.bin.index.json"))


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies and what it is, from a safetensors header. start: of its data, in bytes of the file."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int = 0

    @property
    def bytes(self) -> int:
        """Size of its data."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def resolve(model: str, weights: bool = True) -> Path:
    """The local directory of MODEL: a directory, the packaged `demo`, or a hub id (downloaded into the hub's cache).

    A hub id may end in `@` and a revision: a branch, a tag or a commit.
    weights: False fetches only the config and the tokenizer of a hub id.
    """
    found = hub.find(model)
    return found if isinstance(found, Path) else hub.fetch(*found, weights)


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# Buffers that old checkpoints store, and that models compute themselves; a mask may be -Inf.
COMPUTED = r"inv_freq$|masked_bias$"


def check_finite(tensors: dict[str, Tensor]) -> None:
    """VQCompressError naming the first tensor that holds NaN or Inf, and that a model reads."""
    for name, tensor in tensors.items():
        if not is_finite(tensor) and not re.search(COMPUTED, name):
            raise VQCompressError(f"the tensor {name} holds NaN or Inf: mend or fetch it, and the same command goes on")


def stored_dtype(config: dict[str, Any], otherwise: torch.dtype = torch.float32) -> torch.dtype:
    """The type that a config says its weights have; float32 for one that is not known. otherwise: if it says none."""
    name = config.get("dtype") or config.get("torch_dtype")
    return {"float16": torch.float16, "bfloat16": torch.bfloat16, "None": otherwise}.get(str(name), torch.float32)


def read_json(path: Path) -> Any:
    """The parsed file; VQCompressError naming it if it is missing or not JSON."""
    try:
        if problem := damage(path):
            raise VQCompressError(f"{path} {problem}")
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise VQCompressError(f"{path} is no valid JSON: {error}") from error


def pickled(file: Path) -> dict[str, Tensor]:
    """The tensors of a file that torch.save wrote, mapped and not read; VQCompressError if it holds anything else."""
    with file.open("rb") as stream:
        if stream.read(2) != b"PK":
            anew = f"torch.save(torch.load({str(file)!r}, weights_only=True), {str(file)!r})"
            raise VQCompressError(f"{file} is damaged, or in the format of torch before 1.6: write it anew by {anew}")
    try:
        # Without weights_only, a pickle runs any code that it contains.
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # whatever unpickling and reading of archives raise
        raise VQCompressError(f"{file} is cut short, damaged or no file of tensors: {one_line(error)}") from error
    if not isinstance(found, dict) or not all(isinstance(found[key], Tensor) and isinstance(key, str) for key in found):
        raise VQCompressError(f"{file} holds more than tensors by name; save the model's state_dict alone")
    return {name: tensor.detach() for name, tensor in found.items()}


class Checkpoint:
    """The config and the tensors of a directory in Hugging Face layout.

    path: the directory. config: the parsed config.json. tensors: name → TensorInfo, empty if there are no weights
    (then only planning is possible). format: how another tool has compressed the files, None if they are dense.
    straight: whether `read` gives transposed weights as (O, I).
    """

    format: str | None = None
    straight = False

    def __init__(self, path: Path):
        self.path = path
        self.config: dict[str, Any] = read_json(path / "config.json")
        if not isinstance(self.config, dict):
            raise VQCompressError(f"{path / 'config.json'} is not a JSON object")
        self.tensors: dict[str, TensorInfo] = {}
        for file in self.expected():
            found = self.header(path / file) if os.path.lexists(path / file) else {}
            if twice := sorted(found.keys() & self.tensors.keys()):
                raise VQCompressError(f"{twice[0]} is in {self.tensors[twice[0]].file} and in {file} of {path}")
            self.tensors |= found

    def expected(self) -> list[str]:
        """The files that hold the tensors, or should; VQCompressError if some are missing, but not all."""
        for single, index in STORED:
            # Before an index, as transformers has it: both load the same. A dead link is found, and then named.
            if os.path.lexists(self.path / single):
                return [single]
            if os.path.lexists(self.path / index):
                return self._indexed(index)
            if shards := self._unindexed(single):
                return shards
        return [SINGLE]

    def _indexed(self, index: str) -> list[str]:
        """The shards that an index names."""
        try:
            files = sorted(set(read_json(self.path / index)["weight_map"].values()))
            outside = [file for file in files if Path(file).name != file or not self._is_inside(self.path / file)]
        except (TypeError, KeyError, AttributeError) as error:
            raise VQCompressError(f"{self.path / index} has no weight_map of names to files: fetch it again") from error
        if outside:
            raise VQCompressError(f"{self.path / index} names a file outside of its directory: {outside[0]!r}")
        return self._complete(files)

    def _is_inside(self, file: Path) -> bool:
        """Whether a file lies in the directory, links followed, or among the blobs of the hub's cache it is part of."""
        folder = Path(os.path.realpath(self.path))
        blobs = [folder.parent.parent / "blobs"] if folder.parent.name == "snapshots" else []
        return os.path.dirname(os.path.realpath(file)) in {os.path.realpath(f) for f in (folder, *blobs)}

    def _unindexed(self, single: str) -> list[str]:
        """The shards of a directory that has lost their index."""
        stem, _, kind = single.rpartition(".")
        shards = (re.fullmatch(rf"{stem}-\d+-of-(\d+)\.{kind}", path.name) for path in self.path.iterdir())
        counts = sorted({shard[1] for shard in shards if shard})
        names = [f"{stem}-{i:0{len(n)}}-of-{n}.{kind}" for n in counts for i in range(1, int(n) + 1)]
        return self._complete(names)

    def _complete(self, shards: list[str]) -> list[str]:
        """The shards, VQCompressError if one is missing, unless all are: that is enough to plan."""
        missing = [shard for shard in shards if not os.path.lexists(self.path / shard)]
        if 0 < len(missing) < len(shards):
            some = f"{len(missing)} of {len(shards)} shards are missing"
            raise VQCompressError(f"{some}: {self.path / missing[0]} {damage(self.path / missing[0])}")
        return shards

    @staticmethod
    def header(file: Path) -> dict[str, TensorInfo]:
        """The tensors of a file of weights, without reading them; VQCompressError naming a missing or damaged file."""
        if problem := damage(file):
            raise VQCompressError(f"{file} {problem}")
        if file.suffix == ".bin":
            return {name: TensorInfo(file.name, t.dtype, tuple(t.shape)) for name, t in pickled(file).items()}
        tensors = {}
        try:
            with file.open("rb") as stream, safe_open(file, framework="pt") as handle:
                # The length of the header, the header, and the tensors without gaps.
                start = 8 + int.from_bytes(stream.read(8), "little")
                for name in handle.offset_keys():
                    view = handle.get_slice(name)
                    shape = tuple(view.get_shape())
                    # No rows of the tensor, to learn its type; a scalar has none.
                    dtype = (view[:0] if shape else handle.get_tensor(name)).dtype
                    tensors[name] = TensorInfo(file.name, dtype, shape, start)
                    start += tensors[name].bytes
        except (SafetensorError, OSError) as error:
            raise VQCompressError(f"{file} is cut short or no safetensors file: {error}; fetch it again") from error
        return tensors

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors, on the CPU in their stored type."""
        found: dict[str, Tensor] = {}
        for file, wanted in self._by_file(names).items():
            if file.endswith(".bin"):
                mapped = pickled(self.path / file)
                found |= {name: mapped[name].clone(memory_format=torch.contiguous_format) for name in wanted}
                continue
            # Opened anew each time: a mapping that stayed open would count every page ever read as our memory.
            with safe_open(self.path / file, framework="pt") as handle:
                for name in wanted:
                    found[name] = handle.get_tensor(name)
        return found

    def tiles(self, name: str) -> dict[str, Tensor] | None:
        """`codes` and `scale` of a weight whose files hold it in FP8, as the method `fp8` stores it; else None."""
        return None

    def holders(self, names: Iterable[str]) -> tuple[Checkpoint, set[str]]:
        """The checkpoint of the files themselves, and the names in it of what these tensors are made of."""
        return self, set(names)

    def _by_file(self, names: Iterable[str]) -> dict[str, list[str]]:
        by_file: dict[str, list[str]] = defaultdict(list)
        for name in names:
            if name not in self.tensors:
                raise VQCompressError(f"{self.path} has no tensor {name}")
            by_file[self.tensors[name].file].append(name)
        return by_file

    @property
    def revision(self) -> str | None:
        """The commit that the directory is a snapshot of, if it lies in the hub's cache."""
        cached = self.path.parent.name == "snapshots" and re.fullmatch("[0-9a-f]{40}", self.path.name)
        return self.path.name if cached else None

    @property
    def files(self) -> list[Path]:
        """The files of its tensors."""
        return [self.path / name for name in sorted({info.file for info in self.tensors.values()})]

    @property
    def bytes(self) -> int:
        """Size of all tensors."""
        return sum(info.bytes for info in self.tensors.values())

    @property
    def numbers(self) -> int:
        """How many numbers all tensors hold."""
        return sum(torch.Size(info.shape).numel() for info in self.tensors.values())

    @property
    def context(self) -> int | None:
        """The most tokens that the model reads at once, None if its config does not say."""
        # Of a model with towers, that of its text.
        parts = [*(self.config.get(name) for name in TEXT_CONFIGS), self.config]
        named = (part.get(name) for part in parts if isinstance(part, dict) for name in CONTEXTS)
        return next((n for n in named if isinstance(n, int) and n > 0), None)

    def row_length(self, tokens: int | None) -> int:
        """The tokens of a row or window: as given, else 2,048, or the model's context if that is less.

        UsageError for rows longer than the context: what a model computes there says nothing about it.
        """
        context = self.context or tokens or 2048
        if tokens and tokens > context:
            raise UsageError(f"--seqlen {tokens} is more than the model's context of {context} tokens")
        return min(2048, context) if tokens is None else tokens

    def companions(self) -> tuple[dict[str, Path], list[str]]:
        """The files that an artifact takes along, by name, and the names of those that it leaves out."""
        taken, left = companions(self.path)
        own = {info.file for info in self.tensors.values()} | {name for names in STORED for name in names}
        return taken, [name for name in left if name not in own]

    def fingerprint(self) -> str:
        """A SHA-256 over the config and what the headers say, without a look at the weights."""
        source, names = self.holders(self.tensors)
        headers = {name: (source.tensors[name].dtype, source.tensors[name].shape) for name in names}
        words = json.dumps(self.config, sort_keys=True), repr(sorted(headers.items()))
        return hashlib.sha256("".join(words).encode()).hexdigest()

    def digest(self, names: Iterable[str]) -> str:
        """An XXH3-128 over tensors as they are stored. Ten times as fast as SHA-256, and nobody gains by forging."""
        digest, (source, names) = xxhash.xxh3_128(), self.holders(names)
        for file, wanted in sorted(source._by_file(names).items()):
            mapped = pickled(source.path / file) if file.endswith(".bin") else {}
            with (self.path / file).open("rb") as stream:
                for name in sorted(wanted):
                    info = source.tensors[name]
                    digest.update(f"{name} {info.bytes} ".encode())
                    if mapped:
                        digest.update(mapped[name].contiguous().reshape(-1).view(torch.uint8).numpy().data)
                        continue
                    stream.seek(info.start)
                    for start in range(0, info.bytes, PIECE):
                        digest.update(stream.read(min(PIECE, info.bytes - start)))
        return digest.hexdigest()


class DerivedCheckpoint(Checkpoint):
    """Another checkpoint whose tensors are read in another form; subclasses say in which.

    Its facts are the other's: bytes on disk, and a fingerprint, which tells all that the other one's files say.
    """

    def __init__(self, source: Checkpoint):
        self._source = source
        self.path, self.config, self.format = source.path, source.config, source.format
        self.tensors = dict(source.tensors)

    @property
    def bytes(self) -> int:
        """Size of the tensors as they are stored."""
        return self._source.bytes

    def holders(self, names: Iterable[str]) -> tuple[Checkpoint, set[str]]:
        """The checkpoint of the files, and the names in it of what these tensors are made of."""
        return self._source.holders({part for name in names for part in self._made_of(name)})

    def _made_of(self, name: str) -> Iterable[str]:
        """The names in the other checkpoint of what a tensor is made of."""
        return [name]

    def fingerprint(self) -> str:
        """That of the other checkpoint."""
        return self._source.fingerprint()
