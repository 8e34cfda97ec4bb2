"""An artifact rewritten in a format that other runtimes load. A format is a pure function over one block's tensors."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from vqcompress.artifact import SHARD, Artifact
from vqcompress.blocks import BlockStream
from vqcompress.checkpoint import INDEX, resolve
from vqcompress.errors import UsageError, VQCompressError, did_you_mean
from vqcompress.export import aqlm, compressed_tensors, dense, fp8
from vqcompress.export.rewrite import Export
from vqcompress.export.verify import Reader, compare
from vqcompress.runtime.device import peak_rss_bytes


@dataclass(frozen=True)
class Format:
    """How an artifact is rewritten, and what reads the result. Refusals come before anything is written."""

    export: Callable[[BlockStream, Artifact], Export]
    reader: Reader


FORMATS = {
    "dense": Format(dense.export, Reader()),
    "fp8": Format(fp8.export, Reader()),
    # It rounds activations to other INT8 steps (amax / 127.5) than the artifact (amax / 127).
    "compressed-tensors": Format(
        compressed_tensors.export, Reader("compressed-tensors>=0.20", rounds=True, bound=0.01)
    ),
    "aqlm": Format(aqlm.export, Reader("aqlm[cpu]>=1.1.7", setup=aqlm.REFERENCE)),
}


def export(artifact: str, format: str, out: Path, verify: bool = False, overwrite: bool = False) -> dict[str, Any]:
    """Write the artifact to `out` in another format; returns what was written, and how it was verified if asked.

    verify: load the result with its own reader in a fresh process and compare logits with the artifact's.
    """
    start = time.perf_counter()
    if format not in FORMATS:
        raise UsageError(f"no export format '{format}'.{did_you_mean(format, FORMATS)}")
    reader = FORMATS[format].reader
    source = Artifact(resolve(artifact))
    source.check_files()
    if not source.entries and format != "dense":
        raise VQCompressError(f"{artifact} has no compressed weight to write as {format}; export --format dense")
    stream = BlockStream(source, torch.device("cpu"), torch.float32)
    made = FORMATS[format].export(stream, source)
    if verify:
        reader.check_installed()
        if made.unreadable:
            raise UsageError(made.unreadable)
    _empty(out, overwrite)
    count = len(stream.blocks) + 1
    weight_map: dict[str, str] = {}
    total = 0
    for number, tensors in enumerate(made.tensors, 1):
        file = SHARD.format(number, count)
        save_file({name: t.contiguous() for name, t in tensors.items()}, out / file, metadata={"format": "pt"})
        (out / file).chmod(0o644)
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(t.numel() * t.element_size() for t in tensors.values())
    for path in source.companions():
        (out / path.name).write_bytes(path.read_bytes())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (out / INDEX).write_text(json.dumps(index, indent=1, sort_keys=True))
    # Last, so that an export that was interrupted is no checkpoint.
    (out / "config.json").write_text(json.dumps(made.config, indent=2))
    result: dict[str, Any] = {"format": format, "files": count, "bytes": total, "left_dense": made.left_dense}
    if verify:
        result["verified"] = compare(stream, source, out, reader, made.held)
    return {**result, "seconds": round(time.perf_counter() - start, 3), "peak_rss_bytes": peak_rss_bytes()}


def _empty(out: Path, overwrite: bool) -> None:
    if out.is_dir() and any(out.iterdir()):
        if not overwrite:
            raise VQCompressError(f"{out} is not empty; choose another directory or give --overwrite")
        if Artifact.is_one(out):
            raise VQCompressError(f"{out} holds an artifact; an export does not overwrite one")
        (out / "config.json").unlink(missing_ok=True)
        for old in (*out.glob("model-*-of-*.safetensors"), out / INDEX):
            old.unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
