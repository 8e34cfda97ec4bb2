"""What a run did, for machines (report.json) and for people (the model card)."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import vqcompress
from vqcompress.artifact import STAGED, Entry
from vqcompress.checkpoint import Checkpoint
from vqcompress.methods import Parts
from vqcompress.plan import Plan
from vqcompress.recipe import setting
from vqcompress.runtime.device import peak_device_bytes, peak_rss_bytes
from vqcompress.targets import Block
from vqcompress.writer import Writer

CARD = """---
library_name: vqcompress
base_model: {origin}
tags: [vqcompress, quantized, {recipe}]
---

# {title}

`{base}` compressed by [vqcompress](https://pypi.org/project/vqcompress/) {version} with the recipe `{recipe}`:
{bits}{source} → {artifact} in all.{cache}
{warning}

```python
import vqcompress  # registers the format with transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{here}")
tokenizer = AutoTokenizer.from_pretrained("{here}")
inputs = tokenizer("The first thing to know is", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))
```

`vqcompress.load("{here}")` also checks the files first, and computes in float32 on a CPU unless told otherwise. From a
shell:

```
vqcompress generate {here} --prompt "The first thing to know is"
vqcompress eval perplexity {here} --text FILE --baseline {base}
vqcompress verify {here}
```
{rows}
Calibration: {calibration}. Seed {seed}. `report.json` has a row per weight; `SHA256SUMS` has the checksums.
"""
COMPRESSED = """
**Import `vqcompress` before you load this model.** Its weights are stored compressed; transformers alone cannot read
them and stops with a size mismatch."""
DENSE = """
The weights are dense, and transformers alone loads them right. What is coded is the cache of keys and values, which
takes `vqcompress`."""
TABLE = """
| method | weights | bits per weight | mean relative error |
| --- | --- | --- | --- |
"""


def cache_line(settings: dict[str, Any]) -> str:
    """How keys and values are kept, for people."""
    kept = f"the newest {settings['window']} and the first {settings['sinks']} tokens as they are"
    return f"keys and values in {settings['bits']} bits, {settings['codebook']}, {kept}"


class Uses:
    """How often the entries of codebooks are used by the weights of a block, each codebook in its place.

    Places: the path of shared parts, a target with its own, or the settings whose table ships with the package.
    """

    def __init__(self, block: Block):
        self.block = block
        self.sums: dict[tuple[str, bool], Tensor] = {}

    def add(self, entry: Entry, parts: Parts, common: Parts) -> None:
        """Count the codes of a target. parts: its own; common: those that it shares."""
        own, uses_RK = "codebook" in parts, entry.method.counts(parts | common, entry.target.shape)
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


def size(count: float) -> str:
    """A number of bytes for people: 1.5 GB."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def run_report(
    model: str,
    plan: Plan,
    source: Checkpoint,
    writer: Writer,
    rows: Tensor | None,
    seed: int,
    seconds: float,
) -> dict[str, Any]:
    """The report of a run, JSON; docs/artifact.md lists every key.

    bits_per_weight: all bits stored in place of the compressed weights ÷ the number of those weights; None of none.
    """
    shards = {name: record for name, record in writer.done.items() if name != STAGED}
    targets = [row for record in shards.values() for row in record["targets"]]
    weights = sum(row["shape"][0] * row["shape"][1] for row in targets)
    bits = sum(row["bits_per_weight"] * row["shape"][0] * row["shape"][1] for row in targets)
    asked = {target.name: plan.rules[target.name].needs for target in plan.targets}
    chosen: dict[str, list[int]] = {}
    for target in plan.targets:
        chosen.setdefault(setting(plan.rules[target.name].method), []).append(target.weights)
    sources = [record["source"] for record in shards.values()]
    files = [record["file"] for record in shards.values()] + list(writer.beside)
    return {
        "recipe": plan.recipe.name,
        "rotation": plan.recipe.rotation,
        "model": model,
        "revision": source.revision,
        "seed": seed,
        "target_bits": plan.target_bits,
        "bits_per_weight": bits / weights if weights else None,
        "weights_quantized": weights,
        "source_bytes": source.bytes,
        "artifact_bytes": sum((writer.out / name).stat().st_size for name in files),
        "seconds": round(seconds, 3),
        "peak_rss_bytes": peak_rss_bytes(),
        "peak_device_bytes": peak_device_bytes(),
        "calibration": None if rows is None else {"samples": rows.shape[0], "seqlen": rows.shape[1]},
        "inputs": writer.inputs | {"weights": hashlib.sha256("".join(sources).encode()).hexdigest()},
        "versions": {
            "vqcompress": vqcompress.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "kv_cache": plan.recipe.cache.model_dump(mode="json") if plan.recipe.cache else None,
        "left_dense": plan.left_dense,
        "settings": [{"setting": name, "targets": len(sizes), "weights": sum(sizes)} for name, sizes in chosen.items()],
        "codebooks": {place: uses for r in shards.values() for place, uses in r.get("codebooks", {}).items()},
        "experts": {place: tokens for r in shards.values() for place, tokens in r.get("experts", {}).items()},
        "uncalibrated": [row["name"] for row in targets if asked[row["name"]] and not row["tokens"] | row["borrowed"]],
        "blocks": {name: record["seconds"] for name, record in shards.items()},
        "targets": targets,
    }


def model_card(model: str, report: dict[str, Any], out: Path) -> str:
    """The README.md of an artifact. A local path is shown by its last part only: it means nothing to others."""
    base = model if not Path(model).is_absolute() else Path(model).name
    by_method: dict[str, list[dict[str, Any]]] = {}
    for row in report["targets"]:
        by_method.setdefault(row["method"], []).append(row)
    lines = []
    for method, rows in by_method.items():
        counts = [r["shape"][0] * r["shape"][1] for r in rows]
        bits = sum(r["bits_per_weight"] * n for r, n in zip(rows, counts, strict=True)) / sum(counts)
        error = sum(r["relative_error"] * n for r, n in zip(rows, counts, strict=True)) / sum(counts)
        lines.append(f"| {method} | {sum(counts):,} | {bits:.3f} | {error:.2e} |")
    rows_of, bits, cache = report["calibration"], report["bits_per_weight"], report["kv_cache"]
    turned_on = "`--kv-cache` or `vqcompress.load(…, kv_cache=True)` turns it on"
    return CARD.format(
        base=base,
        title=f"{Path(base).name} · {report['recipe']}",
        origin=base.partition("@")[0],
        version=vqcompress.__version__,
        recipe=report["recipe"],
        bits="" if bits is None else f"{bits:.3f} bits per quantized weight, ",
        cache=f" Cache: {cache_line(cache)}; {turned_on}." if cache else "",
        warning=DENSE if bits is None else COMPRESSED,
        source=size(report["source_bytes"]),
        artifact=size(report["artifact_bytes"]),
        here=out.name,
        rows=TABLE + "\n".join(lines) + "\n" if lines else "",
        calibration="none, the recipe needs no data"
        if rows_of is None
        else f"{rows_of['samples']} rows of {rows_of['seqlen']} tokens",
        seed=report["seed"],
    )
