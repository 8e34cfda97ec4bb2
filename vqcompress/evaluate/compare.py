"""Bits, bytes and quality of several models on one text."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any, Unpack

from vqcompress.errors import UsageError, VQCompressError
from vqcompress.evaluate.perplexity import Progress, Windowing, score
from vqcompress.evaluate.read_report import named, read_report
from vqcompress.storage import hub
from vqcompress.storage.artifact import Artifact, stored_bits
from vqcompress.storage.checkpoint import Checkpoint, resolve


def compare(
    models: list[str],
    text: str,
    baseline: str | None = None,
    device: str = "auto",
    progress: Progress = lambda done, total: None,
    **cut: Unpack[Windowing],
) -> dict[str, Any]:
    """JSON: a row for each model with bits per weight, bytes, perplexity and its comparison with the original.

    baseline: the original, the first row; if None, `_original` looks for it. Then models from most to fewest bits.
    """
    start = time.perf_counter()
    baseline = baseline if baseline is not None else _original(models)
    if baseline is not None:
        models = [model for model in models if resolve(model) != resolve(baseline)]
    if not models:
        raise UsageError(f"{baseline} is the original; name at least one other model")
    found, protocol = score(models, text, baseline, device, progress, **cut)
    nothing = {"ratio": None, "kl_divergence": None, "top1_agreement": None}
    rows = [
        {"model": model, **_footprint(model), "perplexity": scores.perplexity}
        | (scores.against_baseline(baseline) if baseline is not None else nothing)
        for model, scores in zip(models, found, strict=True)
    ]
    rows.sort(key=lambda row: -row["bits_per_weight"])
    if baseline is not None:
        same = {"ratio": 1.0, "kl_divergence": dict.fromkeys(("mean", "p99", "max"), 0.0), "top1_agreement": 1.0}
        rows.insert(0, {"model": baseline, **_footprint(baseline), **rows[0]["baseline"], **same})
    return {
        "text": named(text),
        "protocol": protocol,
        "baseline": baseline,
        "seconds": round(time.perf_counter() - start, 3),
        "models": [{key: value for key, value in row.items() if key != "baseline"} for row in rows],
    }


def _original(models: list[str]) -> str | None:
    """The original of several models, or None if it is unclear or not on this machine.

    It is the only dense checkpoint among them, if all vocabularies have one size; else the model that all reports name.
    """
    plain = [model for model in models if not Artifact.is_one(resolve(model))]
    vocabularies = {Checkpoint(resolve(model)).config.get("vocab_size") for model in models}
    if len(plain) == len(vocabularies) == 1 < len(models):
        return plain[0]
    found = [read_report(path).get("model") for path in map(resolve, models) if Artifact.is_one(path)]
    model: Any = found[0] if found and found.count(found[0]) == len(found) else None
    repo = hub.ID.fullmatch(model) if isinstance(model, str) else None
    try:
        if repo and model != "demo" and not (Path(model) / "config.json").is_file():
            # A report is not trusted to start a download.
            hub.fetch(repo[1], repo[2], download=False)
        return model if repo and not Artifact.is_one(resolve(model)) else None
    except (VQCompressError, OSError):
        return None


def _footprint(model: str) -> dict[str, Any]:
    """JSON: bits per compressed weight (of an uncompressed model: per weight), and bytes of the weight files."""
    path = resolve(model)
    source = Artifact(path) if Artifact.is_one(path) else Checkpoint(path)
    entries = source.entries.values() if isinstance(source, Artifact) else ()
    weights = sum(entry.target.weights for entry in entries)
    bits, numbers = sum(stored_bits(entries).values()), weights
    if not weights:
        bits, numbers = 8 * source.bytes, sum(math.prod(info.shape) for info in source.tensors.values())
    return {"bits_per_weight": bits / numbers, "bytes": sum(file.stat().st_size for file in source.files)}
