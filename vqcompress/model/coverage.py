"""The large weights of a model that no recipe reaches, and the reasons."""

from __future__ import annotations

from collections import Counter

from torch import nn

from vqcompress.model.drafts import draft_bytes, draft_layers
from vqcompress.model.stream import BlockStream
from vqcompress.model.targets import routing_modules
from vqcompress.storage.targets import kind


def dense_weights(stream: BlockStream) -> dict[str, str]:
    """The large weights that no recipe reaches → the reason; names of blocks have a * for their number."""
    found: dict[str, str] = {}
    embedding, head = stream.model.get_input_embeddings(), stream.model.get_output_embeddings()
    for name, module in stream.model.named_modules():
        if module is embedding:
            found[f"{name}.weight"] = "read by lookup"
        elif module is head:
            found[f"{name}.weight"] = "the output head stays dense"
    decoded = f", decoded from {stream.source.format}" if stream.source.format else ""
    read = {kind(name) for name in stream.checkpoint.tensors.keys() - set(stream.unread)}
    for draft, size in draft_bytes(stream).items():
        # What is built as the blocks are was a block before config.json said fewer.
        parts = {kind(name) for name in draft_layers(stream)[draft]}
        what = "layer beyond the num_hidden_layers of config.json" if parts <= read else "draft layer"
        found[draft] = f"{what}, which the model itself does not run ({size:,} bytes{decoded})"
    counts: Counter[str] = Counter()
    for block, layer in zip(stream.blocks, stream.skeletons, strict=True):
        known = {f"{block.local(target)}.weight" for target in block.targets}
        routing = routing_modules(layer)
        for path, tensor in layer.named_parameters():
            if tensor.dim() < 2 or path in known:
                continue
            name, module = f"{block.name.rpartition('.')[0]}.*.{path}", path.rpartition(".")[0]
            counts[name] += tensor.numel()
            why = "the model reads this weight itself" if module in stream.weights_read else "not a linear layer"
            why = "routes or gates" if module in routing else why
            if isinstance(layer.get_submodule(module), nn.Linear):
                why = stream.names.held(f"{block.name}.{path}") or why
            if sum(p.dim() == 3 for p in layer.get_submodule(module).parameters(recurse=False)) == 2:
                reason = stream.fused_reason or "their structure is another than gate, up and down"
                why = f"the experts of a mixture are one parameter: {reason}"
            found[name] = f"{why} ({counts[name]:,} weights)"
    return found
