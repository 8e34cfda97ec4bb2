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
# Three times the index of 70,000 experts' matrices.
MAX_JSON_BYTES = 100 * 2**20
# What an index may call a shard.
SHARD_NAME = re.compile(r"[\w.+ -]{1,200}\.safetensors", re.ASCII)
# Numbers of a config that are no sizes; those that say how many modules a model has; and how large either may be,
# unless the file holds more numbers or tensors.
NO_SIZE = re.compile(r"theta|base|seed|param|length|token")
COUNTS = re.compile(r"(?!max_)(\w+_)?(layers?|blocks?|experts?|depths?)")
# An expert may be a row of an embedding (Doge).
MAX_SIZE, MAX_EXPERTS, MAX_COUNT = 2**24, 2**14, 1000
# Bytes that are hashed at once.
PIECE = 2**22
# What a checkpoint may carry beside its weights, and an artifact takes along.
COMPANIONS = re.compile(
    r"(generation_config\.json|tokenizer.*|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt"
    r"|spiece\.model|.*\.py|sentencepiece.*\.model|chat_template\.(jinja|json)|preprocessor_config\.json|LICENSE.*|NOTICE.*)"
)
# Files that tell what a directory without a config.json is.
NO_CHECKPOINT = {
    "model_index.json": "it is a diffusion pipeline, and vqcompress compresses causal language models",
    "adapter_config.json": "it is an adapter (LoRA); merge it into its model first, with merge_and_unload() of peft",
}
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


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
    if isinstance(found, Path):
        return found
    try:
        return hub.fetch(*found, weights)
    except VQCompressError as error:
        raise VQCompressError(f"no such directory: {model}{hub.similar(model)}, and as a hub id: {error}") from error


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
    """The parsed file; a VQCompressError naming it if it is missing, too large or not JSON."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise VQCompressError(f"{path} is larger than {MAX_JSON_BYTES} bytes, too large for a JSON file of a model")
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise VQCompressError(f"{path} is missing") from error
    except OSError as error:
        raise VQCompressError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise VQCompressError(f"{path} is not valid JSON: {error}") from error


def check_sizes(config: object, where: str, tensors: int, numbers: int, key: str = "") -> None:
    """VQCompressError for a size in a config, however deep, that the tensors of its file cannot have.

    tensors, numbers: that the file holds. A model is built without memory for its weights, but a hundred million
    layers, or a table of a trillion positions, would never be done.
    """
    if isinstance(config, dict):
        for name, value in config.items():
            if name != "quantization_config":
                check_sizes(value, where, tensors, numbers, name)
    elif isinstance(config, list):
        for value in config:
            check_sizes(value, where, tensors, numbers, key)
    elif isinstance(config, int) and not NO_SIZE.search(key):
        floor = MAX_EXPERTS if "expert" in key else MAX_COUNT
        most = max(floor, tensors) if COUNTS.fullmatch(key) else max(MAX_SIZE, numbers)
        if config > most:
            held = f"its file holds {tensors} tensors of {numbers} numbers"
            raise VQCompressError(f"{where}: {key} is {str(config)[:40]}, but {held}")


class Checkpoint:
    """The config and the tensors of a directory in Hugging Face layout.

    path: the directory. config: the parsed config.json. tensors: name → TensorInfo, empty if there are no weights
    (then only planning is possible).
    """

    def __init__(self, path: Path):
        self.path = path
        if not (path / "config.json").is_file():
            others = (why for file, why in NO_CHECKPOINT.items() if (path / file).is_file())
            why = next(others, "it is not a Hugging Face checkpoint")
            raise VQCompressError(f"{path} has no config.json: {why}")
        self.config: dict[str, Any] = read_json(path / "config.json")
        if not isinstance(self.config, dict):
            raise VQCompressError(f"{path / 'config.json'} is not a JSON object")
        self.tensors: dict[str, TensorInfo] = {}
        for file in self._files():
            found = self.header(path / file)
            if twice := sorted(found.keys() & self.tensors.keys()):
                raise VQCompressError(f"{twice[0]} is in {self.tensors[twice[0]].file} and in {file} of {path}")
            self.tensors |= found
        numbers = sum(torch.Size(info.shape).numel() for info in self.tensors.values())
        check_sizes(self.config, str(path / "config.json"), len(self.tensors), numbers)

    def _files(self) -> list[str]:
        # Before an index, as transformers has it: both load the same.
        if (self.path / SINGLE).is_file():
            return [SINGLE]
        if (self.path / INDEX).is_file():
            index = read_json(self.path / INDEX)
            weight_map = index.get("weight_map") if isinstance(index, dict) else None
            if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
                raise VQCompressError(f"{self.path / INDEX} has no weight_map of names to files")
            files = sorted(set(weight_map.values()))
            for file in files:
                if Path(file).name != file:
                    raise VQCompressError(f"{self.path / INDEX} names a file outside of its directory: {file!r}")
                if not SHARD_NAME.fullmatch(file):
                    raise VQCompressError(f"{self.path / INDEX} names a file that is not safetensors: {file[:300]!r}")
            # An index alone, as `resolve(weights=False)` fetches it, is enough to plan.
            return files if any((self.path / file).exists() for file in files) else []
        if list(self.path.glob("*.bin")):
            raise VQCompressError(f"{self.path} holds only .bin (pickle) weights; convert them to safetensors first")
        return []

    @staticmethod
    def header(file: Path) -> dict[str, TensorInfo]:
        """What a safetensors file holds; VQCompressError naming the file if it is missing or damaged."""
        tensors = {}
        try:
            with file.open("rb") as stream, safe_open(file, framework="pt") as handle:
                # The length of the header, the header, and the tensors without gaps.
                start = 8 + int.from_bytes(stream.read(8), "little")
                for name in handle.offset_keys():
                    view = handle.get_slice(name)
                    dtype = view.get_dtype()
                    if dtype not in DTYPES:
                        raise VQCompressError(f"{name} in {file} has the unsupported type {dtype}")
                    tensors[name] = TensorInfo(file.name, DTYPES[dtype], tuple(view.get_shape()), start)
                    start += tensors[name].bytes
        except FileNotFoundError as error:
            raise VQCompressError(f"{file} is missing") from error
        except (SafetensorError, OSError) as error:
            raise VQCompressError(f"{file} is damaged or not safetensors: {error}") from error
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
    def default_seqlen(self) -> int:
        """Tokens of a row or window unless the user says otherwise: 2,048, or the model's context if that is less."""
        return min(2048, self.context or 2048)

    @property
    def context(self) -> int | None:
        """The most tokens that the model was made for, if its config says."""
        stated = self.config.get("max_position_embeddings") or self.config.get("n_positions")
        return stated if isinstance(stated, int) and stated > 0 else None

    def check_length(self, tokens: int) -> None:
        """UsageError for rows that are longer than the context: what a model does there says nothing about it."""
        if self.context and tokens > self.context:
            raise UsageError(f"--seqlen {tokens} is more than the model's context of {self.context} tokens")

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
