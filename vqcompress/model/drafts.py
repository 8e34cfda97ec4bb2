"""Draft layers (multi-token prediction): they guess tokens ahead of a model, which does not run them itself.

They lie in the model's checkpoint. transformers skips them, vLLM and SGLang read them.
"""

from __future__ import annotations

import re
from collections import defaultdict

from vqcompress.model.stream import BlockStream
from vqcompress.storage.targets import kind

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


def left_over(stream: BlockStream) -> set[str]:
    """Those of the draft layers that are built as the blocks are: config.json says fewer layers than the files hold."""
    read = {kind(name) for name in stream.checkpoint.tensors.keys() - set(stream.unread)}
    return {layer for layer, names in draft_layers(stream).items() if {kind(name) for name in names} <= read}


def draft_bytes(stream: BlockStream) -> dict[str, int]:
    """The path of each draft layer → the bytes of its tensors, as an artifact stores them."""
    tensors = stream.source.tensors
    return {layer: sum(tensors[name].bytes for name in names) for layer, names in draft_layers(stream).items()}
