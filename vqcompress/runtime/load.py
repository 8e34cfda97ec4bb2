"""An artifact as a model that runs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel

from vqcompress.errors import UsageError, VQCompressError
from vqcompress.kv_cache.cache import KVCacheSpec, make_config, use_kv_cache
from vqcompress.model.device import choose_device, model_dtype
from vqcompress.model.linear import keep_packed, replace_linears
from vqcompress.model.weights import Names, assign, check_headers, finish_loading, load_config, skeleton
from vqcompress.runtime.hf_quantizer import attach
from vqcompress.storage.artifact import KV_CACHE, Artifact, Entry, cache_settings, tensors_of
from vqcompress.storage.checkpoint import Checkpoint, resolve
from vqcompress.storage.recipe import cache_config
from vqcompress.storage.recipe_files import AS_STORED
from vqcompress.storage.trust import trusted, trusting


def load(
    path: str | Path,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    check: bool = True,
    cpu_weights: str = "auto",
    kv_cache: str | bool = False,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The compressed model, in eval mode, ready for `generate`.

    path: an artifact's directory or hub id. dtype: to compute in; float32 on a CPU and the checkpoint's own type on a
    GPU unless given. check: compare the files with their checksums first (about a second per gigabyte). cpu_weights:
    `dense` decodes every weight once, at its first use, which is fast; `packed` keeps what is stored and decodes at
    every call; `auto` is dense if that fits into memory. kv_cache: `generate` keeps keys and values as codes, as the
    artifact says (True, or `artifact`) or a recipe with a `cache`, such as kv-vq-4bit. trust_remote_code: run Python
    code that comes with the model.
    Raises VQCompressError naming what is missing or damaged.
    """
    artifact = Artifact(resolve(str(path)))
    if check:
        artifact.check_files()
    chosen = choose_device(device)
    dtype = dtype or model_dtype(artifact.config, chosen)
    files, entries = sorted({info.file for info in artifact.tensors.values()}), artifact.entries.values()
    packed = chosen.type == "cpu" and keep_packed(cpu_weights, entries, dtype)
    with trusting(trust_remote_code):
        model = build_model(load_config(artifact.path), entries, artifact.path, files, dtype, chosen, packed)
    model.generation_config = generation_config(artifact.path) or model.generation_config
    if entries:
        attach(model, artifact.config["quantization_config"])
    if kv_cache:
        use_kv_cache(model, kv_cache_config(model, artifact.path, AS_STORED if kv_cache is True else str(kv_cache)))
    return model


def kv_cache_config(model: PreTrainedModel, path: Path, recipe: str) -> KVCacheSpec:
    """The cache config of a recipe, or of the artifact at `path` if the recipe is `artifact`.

    UsageError where the codebooks that this takes are not there.
    """
    stored = cache_settings(Checkpoint(path).config, str(path))
    wanted = stored if recipe == AS_STORED else cache_config(recipe).model_dump(mode="json")
    if wanted is None:
        raise UsageError(f"{path} says nothing of its cache; name a recipe that does, such as kv-fp8")
    if wanted["codebook"] != "learned":
        return make_config(model, wanted)
    anew = f"give --kv-cache {recipe} to quantize"
    if stored is None or stored["codebook"] != "learned":
        hint = f"{anew}, or take kv-fp8, which needs no data"
        raise UsageError(f"{path} holds no codebooks for a cache of {wanted['bits']} bits: {hint}")
    if differing := [key for key in ("bits", "keys") if stored[key] != wanted[key]]:
        has, asked = (", ".join(f"{key}: {knobs[key]}" for key in differing) for knobs in (stored, wanted))
        raise UsageError(f"{path} holds codebooks for {has}, not {asked}: take --kv-cache {AS_STORED}, or {anew}")
    if not (path / KV_CACHE).is_file():
        raise VQCompressError(f"{path / KV_CACHE} is missing")
    return make_config(model, {**wanted, "before": stored.get("before")}, tensors_of(path / KV_CACHE))


def build_model(
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
    replace_linears(model, "", entries, dtype, packed)
    stored = {name: info for file in files for name, info in Checkpoint.header(folder / file).items()}
    check_headers(model, Names(model, stored), stored)
    for file in files:
        # One shard at a time: what a merge needs (the experts of a block) lies in one shard.
        assign(model, tensors_of(folder / file), dtype)
    model.tie_weights()
    finish_loading(model, model, "", device)
    return model


def generation_config(path: Path) -> GenerationConfig | None:
    """What a directory says of generating, if anything; VQCompressError if transformers cannot read it."""
    if not (path / "generation_config.json").is_file():
        return None
    try:
        found = GenerationConfig.from_pretrained(path)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            ids = getattr(found, name)
            each = [number for number in (ids if isinstance(ids, list) else [ids]) if number is not None]
            if not all(type(number) is int and abs(number) < 2**31 for number in each):
                raise ValueError(f"{name} is {str(ids)[:40]}, no number of a token")
        for name in ("do_sample", "use_cache", "output_attentions", "output_hidden_states", "return_dict_in_generate"):
            if (flag := getattr(found, name)) not in (None, True, False):
                raise ValueError(f"{name} is {str(flag)[:40]}, neither true nor false")
    except Exception as error:  # its validation has as many errors as it has fields
        reason = " ".join(str(error).split())[:300]
        raise VQCompressError(f"transformers cannot read {path / 'generation_config.json'}: {reason}") from error
    return found


def load_any(model: str, device: str = "auto", cpu_weights: str = "auto") -> PreTrainedModel:
    """The model that MODEL names, an artifact or a plain checkpoint, with the defaults of `load`."""
    path = resolve(model)
    if Artifact.is_one(path):
        return load(path, device, cpu_weights=cpu_weights)
    stated, chosen = Checkpoint(path).config, choose_device(device)
    load_config(path)
    dtype = model_dtype(stated, chosen)
    safely = {"use_safetensors": True, "trust_remote_code": trusted()}
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **safely).eval().to(chosen)
