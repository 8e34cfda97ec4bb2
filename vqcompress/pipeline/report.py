"""What a run did, as JSON: the content of report.json."""

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
from vqcompress.methods import PackedTensors
from vqcompress.methods.vq.codebook import entry_uses
from vqcompress.model.device import peak_device_bytes, peak_rss_bytes
from vqcompress.pipeline.plan import Plan
from vqcompress.storage.artifact import STAGED, Entry
from vqcompress.storage.checkpoint import Checkpoint
from vqcompress.storage.recipe import setting
from vqcompress.storage.targets import Block, kind
from vqcompress.storage.writer import Writer


class CodebookUses:
    """How often the entries of codebooks are used by the weights of a block, each codebook in its place.

    Places: the path of shared parts, a target with its own, or the settings whose table ships with the package.
    """

    def __init__(self, block: Block):
        self.block = block
        self.sums: dict[tuple[str, bool], Tensor] = {}

    def add(self, entry: Entry, parts: PackedTensors, common: PackedTensors) -> None:
        """Count the codes of a target. parts: its own; common: those that it shares."""
        own, uses_RK = "codebook" in parts, entry_uses(entry.method, parts, entry.target.shape)
        place = entry.target.name if own else entry.shared or f"{self.block.name}: {setting(entry.method)}"
        if uses_RK is not None:
            self.sums[place, own] = self.sums.get((place, own), 0) + uses_RK

    def report(self) -> dict[str, Any]:
        """JSON by place: entries, the share of uses that the first 1/8, 1/4 and 1/2 take; counts unless a target's."""
        found = {}
        for (place, own), uses_RK in self.sums.items():
            count = uses_RK.shape[1]
            firsts = [uses_RK[:, : -(-count // part)].sum().item() / uses_RK.sum().item() for part in (8, 4, 2)]
            every = {} if own else {"counts": uses_RK.tolist()}
            found[place] = {"entries": count, "hottest": [round(share, 4) for share in firsts], **every}
        return found


def _kept(plan: Plan) -> dict[str, str]:
    """The weights that the recipe keeps → that it does; names of blocks and experts have a * for their number."""
    compressed = {target.name for target in plan.targets}
    every = Counter(kind(target.name) for block in plan.blocks for target in block.targets)
    some = Counter(kind(t.name) for block in plan.blocks for t in block.targets if t.name not in compressed)
    return {f"{name}.weight": f"the recipe keeps {count} of {every[name]}" for name, count in some.items()}


def run_report(
    model: str,
    plan: Plan,
    source: Checkpoint,
    writer: Writer,
    rows: Tensor | None,
    texts: list[str],
    seed: int,
    learned: float | None,
) -> dict[str, Any]:
    """The report of a run, JSON; docs/artifact.md lists every key.

    learned: the seconds that codebooks of keys and values took, if any were learned.
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
    after |= {"(codebooks of keys and values)": learned} if learned is not None else {}
    sources = [record["source"] for record in shards.values()]
    files = [record["file"] for record in shards.values()] + list(writer.extra_files)
    return {
        "recipe": named(plan.recipe.name),
        "rotation": plan.recipe.rotation,
        "model": named(model),
        "base_model": None if model == "demo" or os.path.exists(os.path.expanduser(model)) else model.partition("@")[0],
        "revision": source.revision,
        "seed": seed,
        "target_bits": plan.target_bits,
        "bits_per_weight": mean(targets, "bits_per_weight") if targets else None,
        "weights_quantized": weights,
        "source_bytes": source.bytes,
        "artifact_bytes": sum((writer.out / name).stat().st_size for name in files),
        "seconds": writer.seconds,
        "seconds_before": writer.seconds_before,
        "peak_rss_bytes": peak_rss_bytes(),
        "peak_device_bytes": peak_device_bytes(),
        "calibration": None
        if rows is None
        else {"samples": rows.shape[0], "seqlen": rows.shape[1], "texts": [named(text) for text in texts]},
        "inputs": writer.inputs | {"weights": hashlib.sha256("".join(sources).encode()).hexdigest()},
        "versions": {
            "vqcompress": vqcompress.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "kv_cache": plan.recipe.cache.model_dump(mode="json") if plan.recipe.cache else None,
        "left_dense": plan.left_dense | _kept(plan),
        "settings": [{"setting": name, "targets": len(sizes), "weights": sum(sizes)} for name, sizes in chosen.items()],
        "codebooks": {place: uses for r in shards.values() for place, uses in r.get("codebooks", {}).items()},
        "experts": {place: tokens for r in shards.values() for place, tokens in r.get("experts", {}).items()},
        "uncalibrated": [name for name in unseen if plan.rules[name].needs],
        "blocks": {name: record["seconds"] for name, record in shards.items()} | after,
        "peaks": {name: record["peaks"] for name, record in shards.items() if "peaks" in record},
        "targets": targets,
    }
