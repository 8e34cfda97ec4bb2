"""An artifact as a model that runs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel

from vqcompress.artifact import Artifact, Entry, tensors_of
from vqcompress.checkpoint import Checkpoint, resolve
from vqcompress.runtime.adapter import attach
from vqcompress.runtime.device import choose_device, model_dtype
from vqcompress.runtime.modules import keep_packed, swap
from vqcompress.runtime.weights import assign, finish_loading, load_config, skeleton


def load(
    path: str | Path,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    check: bool = True,
    cpu_weights: str = "auto",
) -> PreTrainedModel:
    """The compressed model, in eval mode, ready for `generate`.

    path: an artifact's directory or hub id. dtype: to compute in; float32 on a CPU and the checkpoint's own type on a
    GPU unless given. check: compare the files with their checksums first (about a second per gigabyte). cpu_weights:
    `dense` decodes every weight once, at its first use, which is fast; `packed` keeps what is stored and decodes at
    every call; `auto` is dense if that fits into memory.
    Raises VQCompressError naming what is missing or damaged.
    """
    artifact = Artifact(resolve(str(path)))
    if check:
        artifact.check_files()
    chosen = choose_device(device)
    dtype = dtype or model_dtype(artifact.config, chosen)
    files = sorted({info.file for info in artifact.tensors.values()})
    packed = chosen.type == "cpu" and keep_packed(cpu_weights, artifact.entries.values(), dtype)
    model = assemble(load_config(artifact.path), artifact.entries.values(), artifact.path, files, dtype, chosen, packed)
    if (artifact.path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(artifact.path)
    attach(model, artifact.config["quantization_config"])
    return model


def assemble(
    config: PretrainedConfig,
    entries: Iterable[Entry],
    folder: Path,
    files: list[str],
    dtype: torch.dtype,
    device: torch.device,
    packed: bool = False,
) -> PreTrainedModel:
    """The model of a config, its targets stored as the entries say, filled from the shards of a directory."""
    entries = list(entries)
    model = skeleton(config, dtype)
    swap(model, "", entries, dtype, packed)
    for file in files:
        # One shard at a time: what a merge needs (the experts of a block) lies in one shard.
        assign(model, tensors_of(folder / file), dtype)
    model.tie_weights()
    finish_loading(model, model, "", device)
    return model


def load_any(model: str, device: str = "auto", cpu_weights: str = "auto") -> PreTrainedModel:
    """The model that MODEL names, an artifact or a plain checkpoint, with the defaults of `load`."""
    path = resolve(model)
    if Artifact.is_one(path):
        return load(path, device, cpu_weights=cpu_weights)
    load_config(path)
    chosen = choose_device(device)
    dtype = model_dtype(Checkpoint(path).config, chosen)
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval().to(chosen)
