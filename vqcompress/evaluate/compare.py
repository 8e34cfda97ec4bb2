"""Bits, bytes and quality of several models on one text."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Unpack

from vqcompress.errors import UsageError, VQCompressError
from vqcompress.evaluate.perplexity import Progress, Windowing, score
from vqcompress.evaluate.read_report import named, read_report
from vqcompress.storage import hub
from vqcompress.storage.artifact import Artifact, open_dense, stored_bits
from vqcompress.storage.checkpoint import resolve


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
    # A model that is named twice is shown once.
    models = list({resolve(model): model for model in models}.values())
    if not models:
        raise UsageError(f"{baseline} is the original; name at least one other model")
    found, protocol = score(models, text, baseline, device, progress, **cut)
    rows: list[dict[str, Any]] = [
        {"model": model, **_footprint(model), "perplexity": scores.perplexity}
        | dict.fromkeys(("ratio", "kl_divergence", "top1_agreement"))
        | (scores.against_baseline(baseline) if baseline is not None else {})
        for model, scores in zip(models, found, strict=True)
    ]
    rows.sort(key=lambda row: -row["bits_per_weight"])
    if baseline is not None:
        same = {"ratio": 1.0, "kl_divergence": dict.fromkeys(("mean", "p99", "max"), 0.0), "top1_agreement": 1.0}
        rows.insert(0, {**rows[0]["baseline"], "model": baseline, **_footprint(baseline), **same})
    return {
        "text": named(text),
        "protocol": protocol,
        "baseline": baseline,
        "seconds": round(time.perf_counter() - start, 3),
        "models": [{key: value for key, value in row.items() if key != "baseline"} for row in rows],
    }


def _original(models: list[str]) -> str | None:
    """The only dense checkpoint among several models, or the model that the reports of all artifacts name.

    None if there are several, or if it is not on this machine: a report is not trusted to start a download.
    """
    plain = [model for model in models if not Artifact.is_one(resolve(model))]
    if plain:
        return plain[0] if len(plain) == 1 < len(models) else None
    name, *others = {str(read_report(resolve(model)).get("model")) for model in models}
    try:
        found = hub.find(name)
        path = found if isinstance(found, Path) else hub.fetch(*found, download=False)
        return None if others or Artifact.is_one(path) else name
    except VQCompressError:
        return None


def _footprint(model: str) -> dict[str, Any]:
    """JSON: bits per compressed weight (of an uncompressed model: per weight), and bytes of the weight files."""
    path = resolve(model)
    source = Artifact(path) if Artifact.is_one(path) else open_dense(path)
    entries = source.entries.values() if isinstance(source, Artifact) else ()
    weights = sum(entry.target.weights for entry in entries)
    bits, numbers = sum(stored_bits(entries).values()), weights
    if not weights:
        bits, numbers = 8 * source.bytes, source.numbers
    return {"bits_per_weight": bits / numbers, "bytes": sum(file.stat().st_size for file in source.files)}
