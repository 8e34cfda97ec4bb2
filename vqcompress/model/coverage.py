"""Which large weights of a model no recipe reaches, and why."""

from __future__ import annotations

from collections import Counter

from vqcompress.model.stream import BlockStream
from vqcompress.model.targets import routing_modules


def dense_weights(stream: BlockStream) -> dict[str, str]:
    """The large weights that no recipe reaches → why; names of blocks have a * for their number."""
    found: dict[str, str] = {}
    for module, role in (
        (stream.model.get_input_embeddings(), "read by lookup"),
        (stream.model.get_output_embeddings(), "the output head stays dense"),
    ):
        name = next((name for name, m in stream.model.named_modules() if m is module), None)
        if name is not None:
            found[f"{name}.weight"] = role
    counts: Counter[str] = Counter()
    for block, layer in zip(stream.blocks, stream.skeletons, strict=True):
        known = {f"{block.local(target)}.weight" for target in block.targets}
        deciding = routing_modules(layer)
        for path, tensor in layer.named_parameters():
            if tensor.dim() > 1 and path not in known:
                name = f"{block.name.rpartition('.')[0]}.*.{path}"
                counts[name] += tensor.numel()
                why = stream.fused_reason or "their structure is another than gate, up and down"
                fused = f"the experts of a mixture are one parameter: {why}"
                module = path.rpartition(".")[0]
                plain = "routes or gates" if module in deciding else "not an nn.Linear"
                one = sum(p.dim() == 3 for p in layer.get_submodule(module).parameters(recurse=False)) == 2
                found[name] = f"{fused if one else plain} ({counts[name]:,} weights)"
    return found
