"""What an artifact holds: a row per compressed weight, and totals."""

from __future__ import annotations

from typing import Any

import torch

from vqcompress.evaluate.read_report import read_report
from vqcompress.methods.triton import launch
from vqcompress.model.device import choose_device, model_dtype
from vqcompress.model.experts import Experts
from vqcompress.model.linear import CompressedLinear, keep_packed, replace_linears
from vqcompress.model.weights import load_config, skeleton
from vqcompress.storage.artifact import Artifact, stored_bits
from vqcompress.storage.checkpoint import resolve

# What only the run that wrote the artifact could measure.
MEASURED = ("relative_error", "proxy_error", "tokens", "borrowed", "smoothing", "compensates")
# Rows of x that `runtime` speaks of: decoding, a batch, a prompt.
ROWS = (1, 16, 512)


def inspect(path: str, device: str | None = None, cpu_weights: str = "auto") -> dict[str, Any]:
    """The targets of an artifact, JSON: method, knobs, shape, bits per weight; errors and tokens from its report.

    Bits are computed from the layouts that the config states, with a share of what a block's targets have in common.
    Reads headers only. A missing report leaves None in its columns. device: also say how that device multiplies with
    each weight, for a few numbers of rows, and how it goes through the experts of a mixture. cpu_weights: as in `load`.
    """
    chosen = choose_device(device) if device else None
    artifact = Artifact(resolve(path))
    report = read_report(artifact.path)
    measured = {row["name"]: row for row in report.get("targets", [])}
    stored = stored_bits(artifact.entries.values())
    runtime = _runtime(artifact, chosen, cpu_weights) if chosen else {}
    rows = []
    for name, entry in artifact.entries.items():
        rows.append(
            {
                "name": name,
                "method": entry.method.name,
                "knobs": entry.method.read_knobs(),
                "shape": list(entry.target.shape),
                "smoothed": entry.smoothed,
                "bits_per_weight": stored[name] / entry.target.weights,
                **{key: measured.get(name, {}).get(key) for key in MEASURED},
            }
        )
        rows[-1] |= runtime.get(name, {})
    weights = sum(entry.target.weights for entry in artifact.entries.values())
    return {
        "artifact": path,
        "recipe": report.get("recipe"),
        "model": report.get("model"),
        "bits_per_weight": sum(stored.values()) / weights if weights else None,
        "weights_quantized": weights,
        "source_bytes": report.get("source_bytes"),
        "artifact_bytes": sum(file.stat().st_size for file in artifact.files),
        "files": len(artifact.files),
        "kv_cache": artifact.config["quantization_config"].get("kv_cache"),
        "codebooks": report.get("codebooks", {}),
        "experts": report.get("experts", {}),
        "uncalibrated": report.get("uncalibrated", []),
        **(
            {"device": launch.device_properties(chosen).name if chosen.type == "cuda" else chosen.type}
            if chosen
            else {}
        ),
        "targets": rows,
    }


def _runtime(artifact: Artifact, device: torch.device, cpu_weights: str) -> dict[str, dict[str, Any]]:
    """By target: `runtime`, the way of so many rows; of a mixture `experts`, together or one by one and why.

    Found on the model itself, without memory, since which layers are experts is the model's business.
    """
    dtype, entries = model_dtype(artifact.config, device), artifact.entries
    packed = device.type == "cpu" and keep_packed(cpu_weights, entries.values(), dtype)
    model = skeleton(load_config(artifact.path), dtype)
    replace_linears(model, "", entries.values(), dtype, packed)
    told: dict[str, str] = {}
    for module in model.modules():
        if isinstance(module, Experts):
            why = module.refusal(device)
            # The operator of a stack has kernels on a GPU only.
            together = "one stack, expert by expert" if device.type == "cpu" else "all in one launch"
            names = [layer.entry.target.name for layer in module.modules() if isinstance(layer, CompressedLinear)]
            told |= dict.fromkeys(names, f"one by one: {why}" if why else together)
    found: dict[str, dict[str, Any]] = {}
    for name, entry in entries.items():
        grouped = told.get(name) == "all in one launch"
        ways = {str(rows): entry.method.path(entry.target.shape, rows, device, packed, grouped) for rows in ROWS}
        found[name] = {"runtime": ways, **({"experts": told[name]} if name in told else {})}
    return found
