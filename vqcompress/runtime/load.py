"""Loads an artifact or a plain checkpoint as a transformers model, and its KV cache."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from vqcompress.errors import UsageError, VQCompressError
from vqcompress.kv_cache.cache import KVCacheSpec, make_config, use_kv_cache
from vqcompress.model.device import check_fits, choose_device, model_dtype
from vqcompress.model.weights import Names, auto_class, check_headers, load_config, skeleton
from vqcompress.storage.artifact import KV_CACHE, Artifact, cache_settings, open_dense, tensors_of
from vqcompress.storage.checkpoint import STORED, Checkpoint, resolve
from vqcompress.storage.published import PublishedCheckpoint
from vqcompress.storage.recipe import cache_config
from vqcompress.storage.recipe_files import AS_STORED
from vqcompress.storage.trust import reason, trusted, trusting


def load(
    path: str | Path,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    check: bool = True,
    cpu_weights: str = "auto",
    kv_cache: str | bool = False,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The model in eval mode, by `AutoModelForCausalLM.from_pretrained`, or `AutoModelForImageTextToText` where the
    former does not know a model with a tower.

    path: the directory or hub id of an artifact or of a plain checkpoint. dtype: of the arithmetic; by default float32
    on a CPU and the checkpoint's own type on a GPU. check: compare an artifact's files with their checksums first,
    which takes about a second per gigabyte. cpu_weights: `dense` decodes every weight at its first use, `packed`
    decodes it at every call, `auto` is dense if the decoded weights fit into memory. kv_cache: `generate` stores keys
    and values in few bits, as the artifact says (True or `artifact`) or as a recipe with a `cache` says.
    trust_remote_code: allow Python code that comes with the model.
    VQCompressError names the file, tensor or option that is missing or damaged.
    """
    folder, target = resolve(str(path)), choose_device(device)
    source = Artifact(folder) if Artifact.is_one(folder) else open_dense(folder)
    with trusting(trust_remote_code):
        config = load_config(folder)
        if isinstance(source, Artifact):
            settings = {"cpu_weights": cpu_weights if target.type == "cpu" else "dense", "check": check}
            config.quantization_config = source.config["quantization_config"] | settings
        computed = dtype or model_dtype(source.config, target)
        options: Any = {"dtype": computed, "ignore_mismatched_sizes": True, "output_loading_info": True}
        try:
            pickled = any(file.suffix == ".bin" for file in source.files)
            indexed = any((folder / name).exists() for name in STORED[pickled])
            foreign = isinstance(source, PublishedCheckpoint) or not (indexed or isinstance(source, Artifact))
            if source.tensors and foreign:
                # transformers decodes some of these formats wrongly, and does not say so; and shards need an index.
                needed, advice = source.numbers * computed.itemsize, "evaluate it block by block, or compress it first"
                check_fits(needed, torch.device("cpu"), f"loading {folder}", advice)
                empty, slices = skeleton(config, computed), {name: _Slice(source, name) for name in source.tensors}
                loaded: Any = type(empty).from_pretrained(None, config=empty.config, state_dict=slices, **options)
                if (folder / GENERATION_CONFIG_NAME).is_file():
                    # transformers reads it only together with the weights.
                    loaded[0].generation_config = GenerationConfig.from_pretrained(folder)
            else:
                # Of two kinds of files the one that `source` reads.
                options |= {"trust_remote_code": trusted(), "use_safetensors": not pickled}
                loaded = auto_class(config).from_pretrained(folder, config=config, **options)
        except VQCompressError:
            raise
        except Exception as error:  # loaders of models raise every type of error
            raise VQCompressError(f"transformers cannot load {folder}: {reason(error)}") from error
    model, report = loaded
    if not isinstance(source, Artifact):
        check_headers(model, Names(model, source.tensors), source.tensors)
    for problem in ("missing", "mismatched"):
        if found := sorted(report[f"{problem}_keys"], key=str):
            raise VQCompressError(f"{folder} does not fit its config.json: {problem} tensor {found[0]}")
    model = model.eval().requires_grad_(False).to(target)
    if kv_cache:
        use_kv_cache(model, kv_cache_config(model, folder, AS_STORED if kv_cache is True else str(kv_cache)))
    return model


DECODING = Lock()


@dataclass(frozen=True)
class _Slice:
    """A tensor that transformers reads when it comes to it, and puts into the type of its parameter, as it does with
    slices of safetensors files: no second copy of the weights is in memory, and one tensor is decoded at a time."""

    source: Checkpoint
    name: str

    def __getitem__(self, key: Any) -> Tensor:
        with DECODING:  # transformers reads in several threads
            return self.source.read([self.name])[self.name][key]


def kv_cache_config(model: PreTrainedModel, path: Path, recipe: str) -> KVCacheSpec:
    """The settings and codebooks of a KV cache: of a recipe, or of the artifact at `path` if recipe is `artifact`.

    UsageError if the cache needs codebooks that the artifact does not have.
    """
    stored = cache_settings(Checkpoint(path).config, str(path))
    wanted = stored if recipe == AS_STORED else cache_config(recipe).model_dump(mode="json")
    if wanted is None:
        raise UsageError(f"{path} stores no settings of a KV cache; name a recipe that has some, such as kv-fp8")
    if wanted["codebook"] != "learned":
        return make_config(model, wanted)
    if stored is None or any(stored[key] != wanted[key] for key in ("codebook", "bits", "keys")):
        raise UsageError(f"{path} has no codebooks for --kv-cache {recipe}: run `quantize` with it, or take kv-fp8")
    return make_config(model, {**wanted, "before": stored["before"]}, tensors_of(path / KV_CACHE))
