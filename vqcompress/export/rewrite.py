"""Rewrites the tensors of an artifact block by block, and refuses what a format cannot hold."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vqcompress.errors import VQCompressError
from vqcompress.methods import Method, PackedTensors
from vqcompress.model.experts import Experts
from vqcompress.model.stream import BlockStream
from vqcompress.storage.artifact import HINT, Artifact, Entry
from vqcompress.storage.checkpoint import stored_dtype

# A target and its packed tensors → its tensors in a format; keys follow the module's name and a dot.
Write = Callable[[Entry, PackedTensors], dict[str, Tensor]]


@dataclass(frozen=True)
class Export:
    """How to write an artifact in another format; only headers have been read so far.

    quantization_config: of the new config.json; None for a dense checkpoint. write: of the packed tensors of a target
    that stays compressed. compressed: these targets. left_dense: every other target → why it is decoded to the model's
    dtype. for_vllm: transformers cannot load the export.
    """

    quantization_config: dict[str, Any] | None
    write: Write
    compressed: Collection[str]
    left_dense: dict[str, str]
    for_vllm: bool = False


def one_method(
    stream: BlockStream,
    artifact: Artifact,
    kinds: tuple[type[Method], ...],
    instead: str,
    why: Callable[[Entry], str] = lambda entry: "",
) -> Method:
    """The method of all compressed targets; VQCompressError naming the first target that a format cannot hold.

    kinds: methods that the format can hold. instead: what to do otherwise. why: a reason of the format's own, or "".
    """
    first = next(iter(artifact.entries.values()))
    for entry in artifact.entries.values():
        if not isinstance(entry.method, kinds):
            reason = f"is compressed by {entry.method.name}"
        elif entry.method != first.method:
            reason = f"has other options than {first.target.name}"
        elif entry.smoothed:
            reason = "divides its input by a smoothing vector at run time"
        elif mixture_of(entry.target.name) in stream.mixtures:
            reason = "is an expert's that the checkpoint stores fused"
        elif entry.target.name in stream.transposed:
            reason = "is stored transposed by the original, which readers of this format do not expect"
        else:
            reason = why(entry)
        if reason:
            raise VQCompressError(f"{entry.target.name} {reason}; {instead}, or export --format dense")
    return first.method


def mixtures(stream: BlockStream) -> set[str]:
    """Full paths of all modules that hold experts."""
    blocks = zip(stream.blocks, stream.skeletons, strict=True)
    return {f"{b.name}.{path}" for b, block in blocks for path, m in block.named_modules() if isinstance(m, Experts)}


def mixture_of(target: str) -> str:
    """The path of the experts' module, assuming that the target belongs to an expert."""
    return target.rsplit(".", 2)[0]


def tensors(stream: BlockStream, artifact: Artifact, made: Export) -> Iterator[dict[str, Tensor]]:
    """The tensors of an export outside of the blocks, then those of each block, read when iterated."""
    stored = {name: stream.stored_parts(entry) for name, entry in artifact.entries.items()}
    weights = {name: _weight_name(parts) for name, parts in stored.items()}
    # The marker tensor has the name of a weight.
    markers = {stream.marker_name(name, weight) for name, weight in weights.items()}
    packed = {name for parts in stored.values() for name in parts.values()} | markers | {HINT}
    yield stream.source.read(name for name in stream.non_block_weights if name not in packed)
    for block in stream.blocks:
        found = stream.source.read(stream.names.under(block.name))
        written = {name: tensor for name, tensor in found.items() if name not in packed}
        for entry in (artifact.entries[t.name] for t in block.targets if t.name in artifact.entries):
            parts = {part: found[name] for part, name in stored[entry.target.name].items()}
            weight = weights[entry.target.name]
            if entry.target.name in made.compressed:
                written |= {weight.removesuffix("weight") + name: t for name, t in made.write(entry, parts).items()}
            else:
                written[weight] = entry.decode(parts).to(stored_dtype(artifact.config))
        yield stream.as_stored(written, made.compressed)


def _weight_name(parts: dict[str, str]) -> str:
    """The name `X.weight` from the names of its packed tensors, `X.weight_PART`. parts: the target's own ones first."""
    part, name = next(iter(parts.items()))
    return name.removesuffix(f"_{part}")
