"""A Hugging Face checkpoint as files: its config, and its tensors by name without loading what nobody asked for."""

from __future__ import annotations

import hashlib
import json
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

from vqcompress.errors import UsageError, VQCompressError
from vqcompress.methods.base import is_finite
from vqcompress.storage import hub

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Bytes that are hashed at once.
PIECE = 2**22
# What a checkpoint may carry beside its weights, and an artifact takes along.
COMPANIONS = re.compile(
    r"(generation_config\.json|tokenizer.*|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt"
    r"|spiece\.model|.*\.py|sentencepiece.*\.model|chat_template\.(jinja|json)|preprocessor_config\.json|LICENSE.*|NOTICE.*)"
)


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


def check_finite(tensors: dict[str, Tensor]) -> None:
    """VQCompressError naming the first tensor that holds NaN or Inf."""
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise VQCompressError(f"the tensor {name} holds NaN or Inf")


def stored_dtype(config: dict[str, Any]) -> torch.dtype:
    """The type that a config says its weights have; float32 if it says none that is known."""
    name = config.get("dtype") or config.get("torch_dtype")
    return {"float16": torch.float16, "bfloat16": torch.bfloat16}.get(str(name), torch.float32)


def read_json(path: Path) -> Any:
    """The parsed file; VQCompressError naming it if it is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise VQCompressError(f"{path} is missing or no valid JSON: {error}") from error


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
        for file in self._files():
            found = self.header(path / file)
            if twice := sorted(found.keys() & self.tensors.keys()):
                raise VQCompressError(f"{twice[0]} is in {self.tensors[twice[0]].file} and in {file} of {path}")
            self.tensors |= found

    def _files(self) -> list[str]:
        # Before an index, as transformers has it: both load the same.
        if (self.path / SINGLE).is_file():
            return [SINGLE]
        if (self.path / INDEX).is_file():
            try:
                files = sorted(set(read_json(self.path / INDEX)["weight_map"].values()))
                outside = [file for file in files if Path(file).name != file]
            except (TypeError, KeyError, AttributeError) as error:
                raise VQCompressError(f"{self.path / INDEX} has no weight_map of names to files") from error
            if outside:
                raise VQCompressError(f"{self.path / INDEX} names a file outside of its directory: {outside[0]!r}")
            # An index alone, as `resolve(weights=False)` fetches it, is enough to plan.
            return files if any((self.path / file).exists() for file in files) else []
        if list(self.path.glob("*.bin")):
            raise VQCompressError(f"{self.path} holds only .bin (pickle) weights; convert them to safetensors first")
        return []

    @staticmethod
    def header(file: Path) -> dict[str, TensorInfo]:
        """The tensors of a safetensors file, without reading them; VQCompressError naming a missing or damaged file."""
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
            raise VQCompressError(f"{file} is missing, damaged or not safetensors: {error}") from error
        return tensors

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors, on the CPU in their stored type."""
        found = {}
        for file, wanted in self._by_file(names).items():
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

    def row_length(self, tokens: int | None) -> int:
        """The tokens of a row or window: as given, else 2,048, or the model's context if that is less.

        UsageError for rows longer than the context: what a model computes there says nothing about it.
        """
        context = self.config.get("max_position_embeddings") or self.config.get("n_positions") or tokens or 2048
        if tokens and tokens > context:
            raise UsageError(f"--seqlen {tokens} is more than the model's context of {context} tokens")
        return min(2048, context) if tokens is None else tokens

    def companions(self) -> list[Path]:
        """The tokenizer's and similar files beside the weights."""
        return sorted(p for p in self.path.iterdir() if p.is_file() and COMPANIONS.fullmatch(p.name))

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
            with (self.path / file).open("rb") as stream:
                for name in sorted(wanted):
                    info = source.tensors[name]
                    digest.update(f"{name} {info.bytes} ".encode())
                    stream.seek(info.start)
                    for start in range(0, info.bytes, PIECE):
                        digest.update(stream.read(min(PIECE, info.bytes - start)))
        return digest.hexdigest()
