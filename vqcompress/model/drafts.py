"""Draft layers (multi-token prediction): they guess tokens ahead of a model, which does not run them itself.

They lie in the model's checkpoint. transformers skips them, vLLM and SGLang read them.
"""

from __future__ import annotations

import re
from collections import defaultdict

from vqcompress.model.stream import BlockStream

# A module named for it; otherwise draft layers are numbered on behind the last block.
NAMED = re.compile(r"((?:.+\.)?(?:mtp|nextn)\w*)\.")


def draft_layers(stream: BlockStream) -> dict[str, list[str]]:
    """The path on disk of each draft layer, or of the module that holds them → the names of its tensors."""
    count = len(stream.blocks)
    path = stream.names.stored_prefix(stream.blocks[0].name).removesuffix(".0")
    further = re.compile(rf"({re.escape(path)}\.(\d+))\.")
    found: dict[str, list[str]] = defaultdict(list)
    for name in stream.unread:
        numbered, named = further.match(name), NAMED.match(name)
        if numbered and int(numbered[2]) >= count:
            found[numbered[1]].append(name)
        elif named:
            found[named[1]].append(name)
    return dict(found)


def draft_bytes(stream: BlockStream) -> dict[str, int]:
    """The path of each draft layer → the bytes of its tensors, as an artifact stores them."""
    tensors = stream.source.tensors
    return {layer: sum(tensors[name].bytes for name in names) for layer, names in draft_layers(stream).items()}
