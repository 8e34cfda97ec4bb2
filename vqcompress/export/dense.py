"""The plain checkpoint that an artifact stands for: every weight decoded, in the type of the original."""

from __future__ import annotations

from vqcompress.export.rewrite import Export, tensors
from vqcompress.model.stream import BlockStream
from vqcompress.storage.artifact import Artifact


def export(stream: BlockStream, artifact: Artifact) -> Export:
    """The config without its quantization, and all weights decoded. Holds any artifact."""
    config = {k: v for k, v in artifact.config.items() if k != "quantization_config"}
    return Export(config, frozenset(), {}, tensors(stream, artifact, (), lambda entry, parts: {}))
