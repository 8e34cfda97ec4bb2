"""Writes artifacts in formats that other runtimes load: one file per format, with its `export` and its `READER`."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import torch

from vqcompress.errors import UsageError, VQCompressError
from vqcompress.export import aqlm, compressed_tensors, dense, fp8
from vqcompress.export.rewrite import tensors
from vqcompress.export.verify import compare
from vqcompress.model.stream import BlockStream
from vqcompress.storage.artifact import SHARD, Artifact
from vqcompress.storage.checkpoint import read_json, resolve
from vqcompress.storage.output import INDEX, WRITER, check_output
from vqcompress.storage.writer import Shards, clear

FORMATS: dict[str, Any] = {"dense": dense, "fp8": fp8, "compressed-tensors": compressed_tensors, "aqlm": aqlm}


def export(artifact: str, format: str, out: Path, verify: bool = False, overwrite: bool = False) -> dict[str, Any]:
    """Write an artifact to `out` in another format; returns JSON with files, bytes and the weights left dense.

    verify: load the result with its own reader in a fresh process and compare its logits with the artifact's.
    """
    check_output(out, overwrite, INDEX)
    source, reader = Artifact(resolve(artifact)), FORMATS[format].READER
    source.check_files()
    if not source.entries and format != "dense":
        raise VQCompressError(f"{artifact} has no compressed weight to write as {format}; export --format dense")
    stream = BlockStream(source, torch.device("cpu"), torch.float32)
    made = FORMATS[format].export(stream, source)
    if verify and made.for_vllm:
        raise UsageError(f"--verify: transformers cannot load experts in {format}, which only vLLM reads")
    if verify:
        reader.check_installed()
    if (out / INDEX).is_file():
        clear(out, {"config.json", *read_json(out / INDEX)["metadata"].get("beside", ())})
    shards, (companions, _) = Shards(out), source.companions()
    # The index is written first, so that an interrupted export can be recognized and replaced.
    metadata: dict[str, Any] = {"written_by": WRITER, "beside": list(companions)}
    shards.write(INDEX, json.dumps({"metadata": metadata}).encode())
    weight_map: dict[str, str] = {}
    size, count = 0, len(stream.blocks) + 1
    for number, shard in enumerate(tensors(stream, source, made), 1):
        weight_map |= dict.fromkeys(shard, shards.write_shard(SHARD.format(number, count), shard)["file"])
        size += sum(t.nbytes for t in shard.values())
    for name, path in companions.items():
        shards.copy(name, path)
    index = {"metadata": {"total_size": size, **metadata}, "weight_map": weight_map}
    shards.write(INDEX, json.dumps(index, indent=1, sort_keys=True).encode())
    # config.json is written last, so that an interrupted export does not load.
    config = {key: value for key, value in source.config.items() if key != "quantization_config"}
    if made.quantization_config:
        config["quantization_config"] = made.quantization_config
    shards.write("config.json", json.dumps(config, indent=2).encode())
    result: dict[str, Any] = {"format": format, "files": count, "bytes": size, "left_dense": made.left_dense}
    result["next"] = f"vllm serve {shlex.quote(str(out))}" if made.for_vllm else reader.line(out)
    if verify:
        try:
            result["verified"] = compare(stream, source, out, reader, made.compressed)
        except BaseException:
            # Without its config it is an interrupted export, which nobody loads and the next one replaces.
            (out / "config.json").unlink()
            raise
    return result
