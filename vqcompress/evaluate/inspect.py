"""A row for each compressed weight of an artifact, and totals."""

from __future__ import annotations

from typing import Any

from vqcompress.evaluate.read_report import read_report
from vqcompress.storage.artifact import Artifact, stored_bits
from vqcompress.storage.checkpoint import resolve

# Columns of report.json: only the run that wrote the artifact could measure them.
MEASURED = ("relative_error", "proxy_error", "tokens", "borrowed", "smoothing", "compensates")


def inspect(path: str) -> dict[str, Any]:
    """JSON: method, options, shape and bits of each target, with errors and calibration tokens from its report.

    Reads only headers. A codebook that several targets share is divided among them. Without a report the measured
    columns are None.
    """
    artifact = Artifact(resolve(path))
    report = read_report(artifact.path)
    measured = {row["name"]: row for row in report.get("targets", [])}
    stored = stored_bits(artifact.entries.values())
    rows = [
        {
            "name": name,
            "method": entry.method.name,
            "options": entry.method.model_dump(mode="json"),
            "shape": list(entry.target.shape),
            "smoothed": entry.smoothed,
            "bits_per_weight": stored[name] / entry.target.weights,
            **{key: measured.get(name, {}).get(key) for key in MEASURED},
        }
        for name, entry in artifact.entries.items()
    ]
    weights = sum(entry.target.weights for entry in artifact.entries.values())
    return {
        "artifact": path,
        **{key: report.get(key) for key in ("recipe", "model", "source_bytes")},
        **{key: report.get(key, {}) for key in ("codebooks", "experts", "draft_layers")},
        "bits_per_weight": sum(stored.values()) / weights if weights else None,
        "weights_quantized": weights,
        "artifact_bytes": sum(file.stat().st_size for file in artifact.files),
        "files": len(artifact.files),
        "kv_cache": artifact.cache,
        "uncalibrated": report.get("uncalibrated", []),
        "targets": rows,
    }
