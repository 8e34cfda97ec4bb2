"""The plain checkpoint that an artifact stands for: every weight decoded, in the type of the original."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from vqcompress.artifact import HINT, Artifact
from vqcompress.blocks import BlockStream
from vqcompress.checkpoint import stored_dtype


def export(stream: BlockStream, artifact: Artifact) -> tuple[dict[str, Any], Iterator[dict[str, Tensor]]]:
    """The config without its quantization, and the tensors: what lies outside of the blocks, then block by block."""
    config = {k: v for k, v in artifact.config.items() if k != "quantization_config"}
    return config, _tensors(stream, artifact)


def _tensors(stream: BlockStream, artifact: Artifact) -> Iterator[dict[str, Tensor]]:
    yield stream.source.read(name for name in stream.rest if name != HINT)
    dtype = stored_dtype(artifact.config)
    for block in stream.blocks:
        tensors = stream.source.read(stream.names.under(block.name))
        for target in block.targets:
            entry = artifact.entries.get(target.name)
            if entry is None:
                continue
            names = stream.stored_parts(entry)
            weight = entry.decode({part: tensors[name] for part, name in names.items()})
            for part in entry.layout():
                stored = names[part]
                # `X.weight_PART` stands for `X.weight`; under that name the first target also has its marker.
                name = stored.removesuffix(f"_{part}")
                del tensors[stored]
            tensors[name] = weight.to(dtype)
        yield stream.as_stored({name: t for name, t in tensors.items() if ".shared_parts." not in name})
