"""Checkpoints that other tools have compressed, read as if they were dense."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from vqcompress.errors import VQCompressError
from vqcompress.storage.checkpoint import Checkpoint, DerivedCheckpoint, TensorInfo, stored_dtype
from vqcompress.storage.decoders import FORMATS

# Scales of activations, keys and values: they round what flows through a layer, and are no part of its weight.
RUN_TIME = re.compile(r"[._](input|output|activation|[qkv]|kv)_(global_)?(scale(_inv)?|zero_point)$")


def quantization_settings(config: dict[str, Any], where: str) -> dict[str, Any] | None:
    """The `quantization_config` of a config.json or of its `text_config`; None if it is missing, null or empty."""
    for part in (config, config.get("text_config")):
        settings = part.get("quantization_config") if isinstance(part, dict) else None
        if settings is not None and not isinstance(settings, dict):
            raise VQCompressError(f"the quantization_config of {where} is no mapping: {settings!r:.60}")
        if settings:
            return settings
    return None


def without_settings(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json without the `quantization_config`, nested ones included."""
    kept = {key: value for key, value in config.items() if key != "quantization_config"}
    return {k: without_settings(v) if k == "text_config" and isinstance(v, dict) else v for k, v in kept.items()}


class PublishedCheckpoint(DerivedCheckpoint):
    """The dense form of a checkpoint in one of the `FORMATS`; VQCompressError naming a method that is not read.

    Weights are decoded when they are read, in float32 unless 16 bits hold them exactly. `tensors` gives the 16-bit
    type in which those that stay dense are stored: by the config, else bfloat16. format: the name of the compression.
    """

    def __init__(self, source: Checkpoint, settings: dict[str, Any]):
        method = str(settings.get("quant_method", "a tool that config.json does not name"))
        if method not in FORMATS:
            known = ", ".join(FORMATS)
            raise VQCompressError(
                f"{source.path} is quantized already, by {method}, which is not read (read are {known});"
                " start from its dense weights"
            )
        super().__init__(source)
        self.format, self._settings = str(settings.get("format") or method), settings
        self._stored = FORMATS[method](source, settings)
        self.config = without_settings(source.config)
        parts = {name for stored in self._stored.values() for name in stored.parts.values()}
        dense = {n: i for n, i in source.tensors.items() if n not in parts and not RUN_TIME.search(n)}
        for name, info in dense.items():
            if info.dtype.itemsize == 1 and info.dtype.is_floating_point:
                raise VQCompressError(f"{name} is stored as {info.dtype}, and no scale lies beside it")
        dtype = stored_dtype(self.config, torch.bfloat16)
        self.tensors = dense | {
            name: TensorInfo(source.tensors[next(iter(s.parts.values()))].file, dtype, s.shape)
            for name, s in self._stored.items()
        }

    def check_decoder(self) -> None:
        """VQCompressError if a package that decodes the format is not installed."""
        if self._settings.get("quant_method") == "compressed-tensors" and find_spec("compressed_tensors") is None:
            needed = "pip install compressed-tensors"
            raise VQCompressError(f"{self.path} is in a format of compressed-tensors, which decodes it: {needed}")

    def _on_disk(self, name: str) -> dict[str, str]:
        """Part → name on disk of what a tensor is made of; a dense one is made of itself."""
        return self._stored[name].parts if name in self._stored else {"": name}

    def _made_of(self, name: str) -> Iterable[str]:
        return self._on_disk(name).values()

    def _parts(self, names: Iterable[str]) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Each name with its parts as they are stored."""
        wanted = {name: self._on_disk(name) for name in names}
        tensors = self._source.read({name for parts in wanted.values() for name in parts.values()})
        for name, parts in wanted.items():
            yield name, {part: tensors[on_disk] for part, on_disk in parts.items()}

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors, decoded, on the CPU."""
        return {n: self._stored[n].decode(p) if n in self._stored else p[""] for n, p in self._parts(names)}

    def tiles(self, name: str) -> dict[str, Tensor] | None:
        """The E4M3 codes and float32 scales of a weight that is stored in 128×128 tiles."""
        if name not in self._stored or not self._stored[name].tiles:
            return None
        codes, scale, *_ = next(self._parts([name]))[1].values()
        return {"codes": codes, "scale": scale.float()}
