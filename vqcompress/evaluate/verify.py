"""Checks an artifact against its own description: checksums, shapes, ranges of codes, finite numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vqcompress.errors import VQCompressError
from vqcompress.model.stream import BlockStream
from vqcompress.storage.artifact import KV_CACHE, SMOOTHING, Artifact, Entry, tensors_of
from vqcompress.storage.checkpoint import check_finite, resolve


def check_values(entry: Entry, packed: dict[str, Tensor]) -> None:
    """VQCompressError naming the weight and the tensor if a code is out of range or a number is not finite."""
    own = dict(packed)
    smoothing = own.pop(SMOOTHING, None)
    try:
        if smoothing is not None and not (torch.isfinite(smoothing).all() and (smoothing > 0).all()):
            raise ValueError(f"{SMOOTHING} is not finite and positive")
        entry.method.check(own, entry.target.shape)
    except ValueError as error:
        raise VQCompressError(f"{entry.target.name}: {error}") from error


def verify(path: str) -> dict[str, Any]:
    """JSON: how many files, targets and bytes were checked; VQCompressError naming the first file or tensor at fault.

    Reads every byte, one block at a time.
    """
    artifact = Artifact(resolve(path))
    sealed = artifact.check_files(reports=True)
    # The stream compares the stored shapes with the layouts.
    stream = BlockStream(artifact, torch.device("cpu"), torch.float32)
    entries = list(artifact.entries.values())
    if (artifact.path / KV_CACHE).is_file():
        check_finite(tensors_of(artifact.path / KV_CACHE))
    check_finite(stream.source.read(stream.non_block_weights))
    # Loading refuses dense tensors that are missing or have another shape.
    stream.load_non_block_weights()
    for i, block in enumerate(stream.blocks):
        tensors = stream.source.read(stream.names.under(block.name))
        check_finite(tensors)
        stream.load_block(i, tensors)
        for entry in entries:
            if entry.target in block.targets:
                check_values(entry, {part: tensors[name] for part, name in stream.stored_parts(entry).items()})
    return {
        "files": len(artifact.files),
        "targets": len(entries),
        "checksums": sealed,
        "bytes": sum(file.stat().st_size for file in artifact.files),
    }
