"""Writes artifacts in formats that other runtimes load. A format is a pure function of one block's tensors."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vqcompress.errors import UsageError, VQCompressError, did_you_mean
from vqcompress.export import aqlm, compressed_tensors, dense, fp8
from vqcompress.export.rewrite import Export
from vqcompress.export.verify import Reader, compare
from vqcompress.model.device import peak_rss_bytes
from vqcompress.model.stream import BlockStream
from vqcompress.storage.artifact import OURS, SHARD, Artifact
from vqcompress.storage.checkpoint import INDEX, read_json, resolve
from vqcompress.storage.writer import Shards, clear

# Stands in the index of an export, beside a list of its other files: --overwrite deletes only files of ours.
WRITER = "vqcompress export"


@dataclass(frozen=True)
class Format:
    """The function that converts an artifact, or refuses to before anything is written; and what reads the result."""

    export: Callable[[BlockStream, Artifact], Export]
    reader: Reader


FORMATS = {
    "dense": Format(dense.export, Reader()),
    "fp8": Format(fp8.export, Reader()),
    # This reader rounds activations to steps of amax / 127.5; artifacts use amax / 127.
    "compressed-tensors": Format(
        compressed_tensors.export, Reader("compressed-tensors>=0.20", rounds=True, bound=0.01)
    ),
    "aqlm": Format(aqlm.export, Reader("aqlm[cpu]>=1.1.7", setup=aqlm.REFERENCE)),
}


def export(artifact: str, format: str, out: Path, verify: bool = False, overwrite: bool = False) -> dict[str, Any]:
    """Write an artifact to `out` in another format; returns JSON with files, bytes and the weights left dense.

    verify: load the result with its own reader in a fresh process and compare its logits with the artifact's.
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
    shards = Shards(out)
    companions = source.companions()
    metadata: dict[str, Any] = {"written_by": WRITER, "beside": [path.name for path in companions]}
    # The index is written first, so that an interrupted export can be recognized and replaced.
    shards.write(INDEX, json.dumps({"metadata": metadata, "weight_map": {}}).encode())
    for number, tensors in enumerate(made.tensors, 1):
        weight_map |= dict.fromkeys(tensors, shards.write_shard(SHARD.format(number, count), tensors)["file"])
        total += sum(t.nbytes for t in tensors.values())
    for path in companions:
        shards.write(path.name, path.read_bytes())
    index = {"metadata": {"total_size": total, **metadata}, "weight_map": weight_map}
    shards.write(INDEX, json.dumps(index, indent=1, sort_keys=True).encode())
    # config.json is written last, so that an interrupted export does not load.
    shards.write("config.json", json.dumps(made.config, indent=2).encode())
    result: dict[str, Any] = {"format": format, "files": count, "bytes": total, "left_dense": made.left_dense}
    result["next"] = f"vllm serve {shlex.quote(str(out))}" if made.unreadable else reader.line(out)
    if verify:
        try:
            result["verified"] = compare(stream, source, out, reader, made.held)
        except KeyboardInterrupt:
            (out / "config.json").unlink(missing_ok=True)
            raise
    return {**result, "seconds": round(time.perf_counter() - start, 3), "peak_rss_bytes": peak_rss_bytes()}


def _empty(out: Path, overwrite: bool) -> None:
    """Delete an earlier export in a directory; VQCompressError if the directory holds anything else."""
    # An export that is killed while it writes the index leaves only the partial file.
    if out.is_dir() and any(path.name != f"{INDEX}.partial" for path in out.iterdir()):
        index = read_json(out / INDEX) if (out / INDEX).is_file() else {}
        metadata = index.get("metadata") if isinstance(index, dict) else None
        if not isinstance(metadata, dict) or metadata.get("written_by") != WRITER:
            raise VQCompressError(f"{out} holds files that are not an export; choose another directory")
        weights = [path for path in out.iterdir() if path.suffix in (".safetensors", ".bin")]
        if foreign := [path for path in weights if not OURS.fullmatch(path.name)]:
            raise VQCompressError(f"{foreign[0]} was not written by vqcompress export; choose another directory")
        # An interrupted export has no config.json and is replaced.
        if not overwrite and (out / "config.json").exists():
            raise VQCompressError(f"{out} already holds an export; choose another directory or give --overwrite")
        clear(out, {"config.json", *map(str, metadata.get("beside", []))})
    out.mkdir(parents=True, exist_ok=True)
