"""The content of report.json: the facts about a run."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from typing import Any

import torch
import transformers
from torch import Tensor

import vqcompress
from vqcompress.evaluate.read_report import mean, named
from vqcompress.model.device import peak_device_bytes, peak_rss_bytes
from vqcompress.pipeline.options import QuantizeOptions
from vqcompress.pipeline.plan import Plan
from vqcompress.storage.artifact import STAGED
from vqcompress.storage.checkpoint import Checkpoint
from vqcompress.storage.recipe import setting
from vqcompress.storage.targets import kind
from vqcompress.storage.writer import Writer

VERSIONS = {module.__name__: str(module.__version__) for module in (vqcompress, torch, transformers)}


def codebook_facts(uses_RK: Tensor, shared: bool) -> dict[str, Any]:
    """JSON for a codebook: entries K of a stage, the share of uses that the first 1/8, 1/4 and 1/2 take, and `counts`.

    uses_RK: number of uses of each entry. shared: only then are the counts listed.
    """
    count, total = uses_RK.shape[1], uses_RK.sum()
    hottest = [round((uses_RK[:, : -(-count // part)].sum() / total).item(), 4) for part in (8, 4, 2)]
    return {"entries": count, "hottest": hottest} | ({"counts": uses_RK.tolist()} if shared else {})


def _kept(plan: Plan) -> dict[str, str]:
    """Kind of weight → how many of it the recipe keeps; in a kind, numbers of blocks and experts are a *."""
    compressed = {target.name for target in plan.targets}
    every = Counter(kind(target.name) for block in plan.blocks for target in block.targets)
    some = Counter(kind(t.name) for block in plan.blocks for t in block.targets if t.name not in compressed)
    return {f"{name}.weight": f"the recipe keeps {count} of {every[name]}" for name, count in some.items()}


def run_report(
    options: QuantizeOptions,
    plan: Plan,
    source: Checkpoint,
    writer: Writer,
    calibration: dict[str, Any] | None,
    cache_seconds: float | None,
) -> dict[str, Any]:
    """The report of a run, JSON; docs/artifact.md lists every key.

    calibration: facts about its rows, see `calibration_rows`. cache_seconds: the time that codebooks of keys and values
    took, if any were learned.
    bits_per_weight: all bits stored in place of the compressed weights ÷ the number of those weights; None of none.
    """
    shards = {name: record for name, record in writer.done.items() if name != STAGED}
    targets = [row for record in shards.values() for row in record["targets"]]
    weights = sum(row["shape"][0] * row["shape"][1] for row in targets)
    unseen = (row["name"] for row in targets if row["tokens"] == 0 and not row["borrowed"])
    chosen: dict[str, list[int]] = {}
    for target in plan.targets:
        chosen.setdefault(setting(plan.rules[target.name].method), []).append(target.weights)
    after = {"(distillation)": writer.done[STAGED]["seconds"]} if STAGED in writer.done else {}
    after |= {"(codebooks of keys and values)": cache_seconds} if cache_seconds is not None else {}
    model = options.model
    is_local = model == "demo" or os.path.exists(os.path.expanduser(model))
    sources = [record["source"] for record in shards.values()]
    files = [record["file"] for record in shards.values()] + list(writer.extra_files)
    return {
        "recipe": named(plan.recipe.name),
        "rotation": plan.recipe.rotation,
        "model": named(model),
        "base_model": None if is_local else model.partition("@")[0],
        "revision": source.revision,
        "source_format": source.format,
        "seed": options.seed,
        "target_bits": plan.target_bits,
        "bits_per_weight": mean(targets, "bits_per_weight") if targets else None,
        "weights_quantized": weights,
        "source_bytes": source.bytes,
        "artifact_bytes": sum((writer.out / name).stat().st_size for name in files),
        "seconds": writer.seconds,
        "peak_rss_bytes": peak_rss_bytes(),
        "peak_device_bytes": peak_device_bytes(),
        "calibration": calibration,
        "inputs": writer.inputs | {"weights": hashlib.sha256("".join(sources).encode()).hexdigest()},
        "versions": VERSIONS,
        "kv_cache": plan.recipe.cache.model_dump(mode="json") if plan.recipe.cache else None,
        "draft_layers": plan.drafts,
        "left_dense": plan.left_dense | _kept(plan),
        "settings": [{"setting": name, "targets": len(sizes), "weights": sum(sizes)} for name, sizes in chosen.items()],
        "codebooks": {place: uses for r in shards.values() for place, uses in r.get("codebooks", {}).items()},
        "experts": {place: tokens for r in shards.values() for place, tokens in r.get("experts", {}).items()},
        "uncalibrated": [name for name in unseen if plan.rules[name].needs],
        "blocks": {name: record["seconds"] for name, record in shards.items()} | after,
        "targets": targets,
    }
