"""The format `dense`: a plain checkpoint with every weight decoded to the dtype of the original."""

from __future__ import annotations

from vqcompress.export.rewrite import Export, tensors
from vqcompress.model.stream import BlockStream
from vqcompress.storage.artifact import Artifact


def export(stream: BlockStream, artifact: Artifact) -> Export:
    """All weights decoded, and the config without its quantization. Any artifact can be exported."""
    config = {k: v for k, v in artifact.config.items() if k != "quantization_config"}
    return Export(config, frozenset(), {}, tensors(stream, artifact, (), lambda entry, parts: {}))
