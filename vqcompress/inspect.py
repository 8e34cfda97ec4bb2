"""What an artifact holds: a row per compressed weight, and totals."""

from __future__ import annotations

from collections import Counter
from typing import Any

from vqcompress.artifact import Artifact
from vqcompress.checkpoint import read_json, resolve
from vqcompress.errors import VQCompressError
from vqcompress.methods import layout_bits

# What only the run that wrote the artifact could measure.
MEASURED = ("relative_error", "proxy_error", "tokens")


def inspect(path: str) -> dict[str, Any]:
    """The targets of an artifact, JSON: method, knobs, shape, bits per weight; errors and tokens from its report.

    Bits are computed from the layouts that the config states, with a share of what a block's targets have in common.
    Reads headers only. A missing report leaves None in its columns.
    """
    artifact = Artifact(resolve(path))
    report = _report(artifact)
    measured = {row["name"]: row for row in report.get("targets", [])}
    sharing: Counter[str] = Counter()
    for entry in artifact.entries.values():
        sharing[entry.shared or ""] += entry.target.weights
    rows, bits, weights = [], 0.0, 0
    for name, entry in artifact.entries.items():
        own = float(layout_bits(entry.layout()))
        if entry.shared:
            own += layout_bits(entry.method.shared_layout()) * entry.target.weights / sharing[entry.shared]
        bits, weights = bits + own, weights + entry.target.weights
        rows.append(
            {
                "name": name,
                "method": entry.method.name,
                "knobs": entry.method.model_dump(mode="json"),
                "shape": list(entry.target.shape),
                "smoothed": entry.smoothed,
                "bits_per_weight": own / entry.target.weights,
                **{key: measured.get(name, {}).get(key) for key in MEASURED},
            }
        )
    files = {info.file for info in artifact.weights.tensors.values()}
    return {
        "artifact": path,
        "recipe": report.get("recipe"),
        "model": report.get("model"),
        "bits_per_weight": bits / max(weights, 1),
        "weights_quantized": weights,
        "source_bytes": report.get("source_bytes"),
        "artifact_bytes": sum((artifact.path / file).stat().st_size for file in files),
        "files": len(files),
        "targets": rows,
    }


def _report(artifact: Artifact) -> dict[str, Any]:
    file = artifact.path / "report.json"
    if not file.is_file():
        return {}
    report = read_json(file)
    rows = report.get("targets", []) if isinstance(report, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "name" in row for row in rows):
        raise VQCompressError(f"{file} is not a report of vqcompress; delete it to inspect the artifact without it")
    return dict(report)
