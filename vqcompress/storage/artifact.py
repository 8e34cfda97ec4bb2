"""The compressed artifact: a directory in Hugging Face layout, written so that a kill at any moment loses nothing.

    config.json                        the model's own, with a `quantization_config` that names every compressed weight
    model-00001-of-0000N.safetensors   what lies outside of the blocks, then one shard per block
    model.safetensors.index.json       tensor → shard
    SHA256SUMS                         of every other file (`sha256sum -c` reads it)
    report.json, .html, README.md      what was done, and how to load it
    kv_cache.safetensors               codebooks of keys and values, if they were calibrated
    recipe.yaml                        if the settings were chosen for a budget of bits: the choice, as a recipe
    journal.json                       only while a run is unfinished: its inputs, what was measured to choose
                                       settings by, and the blocks that are on disk

A compressed weight `X.weight` is stored as `X.weight_PART`; parts that the targets of a block share lie under
`BLOCK.shared_parts.K.PART`. `config.json` is written last: a directory without it is no artifact.
The first compressed weight also has a marker under its own name, text in a shape that no weight has: transformers,
if it was not told of the format, would skip what it does not know and load a model with random weights. A wrong shape
stops it, and a tensor whose name says what to do stands in the report that it prints. An artifact of dense weights,
whose recipe codes only the cache, has neither.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, NonNegativeInt, PositiveInt
from torch import Tensor

from vqcompress import methods
from vqcompress.errors import VQCompressError, one_line
from vqcompress.methods import Layout, Method, PackedTensors, layout_bits
from vqcompress.storage.checkpoint import Checkpoint, resolve, sha256
from vqcompress.storage.companions import is_safe
from vqcompress.storage.damage import damage
from vqcompress.storage.output import INDEX, JOURNAL, QUANT_METHOD, SUMS, part_of
from vqcompress.storage.published import PublishedCheckpoint, quantization_settings, without_settings
from vqcompress.storage.recipe import KVCacheConfig
from vqcompress.storage.targets import Target

FORMAT_VERSION = 1
RECIPE = "recipe.yaml"
# What a run says of itself, to people and machines; whoever rewrites one calls `writer.refresh_sums`.
REPORTS = ("report.json", "report.html", "README.md")
SHARD = "model-{:05d}-of-{:05d}.safetensors"
# Begins the name of a shard that distillation will change, until the new values are in it.
DRAFT = "draft-"
SMOOTHING = "smoothing"
# The record in the journal, and the file, of the tensors that distillation has changed.
STAGED, STAGED_FILE = "(staged)", "staged.safetensors"
KV_CACHE = "kv_cache.safetensors"
# Files of tensors, whole or half; the last is what safetensors writes before it gives a file its name.
OURS = re.compile(r"((draft-)?model-\d{5}-of-\d{5}|kv_cache|staged)\.safetensors(\.partial)?|\.tmp\w{6}")
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

    def decode(self, parts: PackedTensors) -> Tensor:
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


class _StoredTarget(BaseModel):
    """A target as `quantization_config` describes it."""

    method: NonNegativeInt
    shape: tuple[PositiveInt, PositiveInt]
    bias: bool
    smoothed: bool
    shared: str | None


def parse_entries(config: dict[str, Any], where: str) -> list[Entry]:
    """The entries of a `quantization_config`; VQCompressError naming `where` and what is wrong."""
    if (config.get("quant_method"), config.get("format_version")) != (QUANT_METHOD, FORMAT_VERSION):
        found = f"quant_method {config.get('quant_method')!r}, format_version {config.get('format_version')!r}"
        raise VQCompressError(f"{where} is no vqcompress artifact of format version {FORMAT_VERSION} ({found})")
    try:
        settings = [methods.from_description(description) for description in config["methods"]]
        entries = []
        for name, described in config["targets"].items():
            stored = _StoredTarget.model_validate(described)
            target = Target(name, stored.shape, stored.bias)
            entries.append(Entry(target, settings[stored.method], stored.smoothed, stored.shared))
        sharing: dict[str, Method] = {}
        for entry in entries:
            # Codes of one method would be looked up in the codebook of another, maybe beyond its end.
            if entry.shared and sharing.setdefault(entry.shared, entry.method) != entry.method:
                raise ValueError(f"{entry.target.name}: another method shares the parts at {entry.shared!r}")
        return entries
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise VQCompressError(f"the quantization_config of {where} is damaged: {one_line(error)}") from error


class StoredCache(KVCacheConfig):
    """How an artifact keeps keys and values. before: per layer, whether keys were learned without rotary embedding."""

    before: list[bool] | None = None


def cache_settings(config: dict[str, Any], where: str) -> dict[str, Any] | None:
    """How an artifact keeps keys and values, by its config.json: the fields of StoredCache; None if it does not say."""
    stored = (config.get("quantization_config") or {}).get("kv_cache")
    if stored is None:
        return None
    try:
        settings = StoredCache.model_validate(stored)
        if (settings.codebook == "learned") != (settings.before is not None):
            raise ValueError("'before' goes with learned codebooks")
    except ValueError as error:
        raise VQCompressError(f"the kv_cache of {where} is damaged: {one_line(error)}") from error
    return settings.model_dump(mode="json", exclude_none=True)


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


def read_sums(path: Path) -> dict[str, str]:
    """File name → digest of a directory's SHA256SUMS; VQCompressError unless it is as `checksum_lines` writes it."""
    text = (path / SUMS).read_bytes().decode(errors="replace") if (path / SUMS).is_file() else ""
    listed = {name: digest for digest, name in re.findall(r"([0-9a-f]{64})  (.+)\n", text) if is_safe(name)}
    if not listed or text != checksum_lines(listed):
        raise VQCompressError(f"{path / SUMS} is missing or damaged")
    return listed


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
        self.cache = cache_settings(self.config, str(path))

    @property
    def files(self) -> list[Path]:
        """The files of its tensors, and of the codebooks of a cache."""
        return [*super().files, *self.path.glob(KV_CACHE)]

    @staticmethod
    def is_one(path: Path) -> bool:
        """Whether the directory says of itself that it is an artifact, finished or not."""
        if not (path / "config.json").is_file():
            return (path / JOURNAL).is_file()
        return part_of(path / "config.json", "quantization_config").get("quant_method") == QUANT_METHOD

    def check_files(self, reports: bool = False) -> bool:
        """Compare files with SHA256SUMS; VQCompressError naming the first that differs, is missing or is not listed.

        reports: also those that only people read. Returns whether there are checksums: an artifact that transformers'
        `save_pretrained` wrote has neither them nor a report.
        """
        # A program that loads a model by its hub id downloads only what it reads.
        partial = self.path.parent.name == "snapshots"
        if not any((self.path / name).exists() for name in (SUMS, "report.json")[: 2 - partial]):
            return False
        listed = read_sums(self.path)
        needed = {"config.json", INDEX, *(info.file for info in self.tensors.values())}
        if missing := sorted(needed - listed.keys()):
            raise VQCompressError(f"{self.path / SUMS} does not list {missing[0]}")
        for name, digest in listed.items():
            file = self.path / name
            if partial and name not in needed and not file.exists():
                continue
            if (reports or name not in REPORTS) and not (file.is_file() and sha256(file) == digest):
                raise VQCompressError(f"{file} is missing or damaged: its SHA-256 is not the one in {SUMS}")
        return True


def tensors_of(path: Path) -> dict[str, Tensor]:
    """All tensors of one file; VQCompressError naming it if it is damaged."""
    from safetensors.torch import load_file

    # Looks at the header first, and has words for what is wrong with it.
    Checkpoint.header(path)
    return load_file(path)


def open_dense(path: Path, weights: bool = True) -> Checkpoint:
    """The checkpoint of a directory, decoded if another tool has compressed it; VQCompressError if that is not read.

    weights: whether they will be read.
    """
    source = Checkpoint(path)
    settings = quantization_settings(source.config, str(path))
    if settings is None:
        source.config = without_settings(source.config)
        return source
    published = PublishedCheckpoint(source, settings)
    if weights:
        published.check_decoder()
    return published


def open_checkpoint(model: str, weights: bool = True) -> Checkpoint:
    """The dense checkpoint that MODEL names; VQCompressError if it is an artifact already or has no weights."""
    path = resolve(model, weights)
    if Artifact.is_one(path):
        raise VQCompressError(f"{model} is a vqcompress artifact already; quantize the original checkpoint")
    source = open_dense(path, weights)
    if weights and not source.tensors:
        file = path / source.expected()[0]
        raise VQCompressError(f"{file} {damage(file) or 'holds no tensors'}; `vqcompress plan` needs only config.json")
    return source
