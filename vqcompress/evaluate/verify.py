"""Checks an artifact against its own description: checksums, shapes, ranges of codes, finite numbers."""

from __future__ import annotations

import time
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


def check_books(artifact: Artifact) -> None:
    """VQCompressError naming the first codebook of the cache that is missing, unknown, misshapen or not finite.

    Each layer has one for keys and one for values, of shape (heads, groups, 256, 8 / bits) in float16.
    """
    settings = artifact.cache
    if not settings or settings["codebook"] != "learned":
        return
    books, entries = tensors_of(artifact.path / KV_CACHE), (256, 8 // settings["bits"])
    wanted = {f"{n}.{kind}" for n in range(len(settings["before"])) for kind in ("keys", "values")}
    for name in sorted(wanted | books.keys()):
        book = books.get(name)
        right = name in wanted and book is not None and book.dim() == 4 and book.shape[2:] == entries
        if book is None or not right or book.dtype != torch.float16 or not book.isfinite().all():
            raise VQCompressError(f"{artifact.path / KV_CACHE}: the codebook {name} is missing or damaged")


def verify(path: str) -> dict[str, Any]:
    """JSON: how many files, targets and bytes were checked; VQCompressError naming the first file or tensor at fault.

    Reads every byte, one block at a time.
    """
    start = time.perf_counter()
    artifact = Artifact(resolve(path))
    sealed = artifact.check_files(reports=True)
    # The stream compares the stored shapes with the layouts.
    stream = BlockStream(artifact, torch.device("cpu"), torch.float32)
    entries = list(artifact.entries.values())
    check_books(artifact)
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
        "seconds": round(time.perf_counter() - start, 3),
    }
