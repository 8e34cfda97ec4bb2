"""Shared by all formats: which weights stay dense, their names, and the tensors of each block."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vqcompress.errors import VQCompressError
from vqcompress.methods import PackedTensors
from vqcompress.model.experts import Experts
from vqcompress.model.linear import CompressedLinear
from vqcompress.model.stream import BlockStream
from vqcompress.storage.artifact import HINT, Artifact, Entry
from vqcompress.storage.checkpoint import stored_dtype
from vqcompress.storage.targets import Target

# A target and its packed tensors → its tensors in a format; keys follow the module's name and a dot.
Write = Callable[[Entry, PackedTensors], dict[str, Tensor]]


@dataclass(frozen=True)
class Export:
    """An artifact in another format; only headers have been read so far.

    config: the new config.json. held: targets that stay compressed. left_dense: every other target → why it is
    decoded to the model's dtype. tensors: those outside of the blocks, then those of each block, read when iterated.
    unreadable: why transformers cannot load the export, or "".
    """

    config: dict[str, Any]
    held: frozenset[str]
    left_dense: dict[str, str]
    tensors: Iterator[dict[str, Tensor]]
    unreadable: str = ""


def refuse(artifact: Artifact, format: str, why: Callable[[Entry], str], instead: str) -> None:
    """VQCompressError naming the first target that a format cannot store. why: the reason, "" if it can."""
    for entry in artifact.entries.values():
        if reason := why(entry):
            name = entry.target.name
            raise VQCompressError(f"{name} {reason}: the format {format} cannot hold it; {instead}, or --format dense")


def mixtures(stream: BlockStream) -> set[str]:
    """Full paths of all modules that hold experts."""
    blocks = zip(stream.blocks, stream.skeletons, strict=True)
    return {f"{b.name}.{path}" for b, block in blocks for path, m in block.named_modules() if isinstance(m, Experts)}


def mixture_of(target: str) -> str:
    """The path of the experts' module, assuming that the target belongs to an expert."""
    return target.rsplit(".", 2)[0]


def stays_dense(
    stream: BlockStream, artifact: Artifact, unfit: Callable[[Target], str]
) -> tuple[frozenset[str], dict[str, str]]:
    """The targets that stay compressed, and every other target → why it is written dense.

    unfit: why a weight has to be dense, or "". vLLM and SGLang merge projections (q, k and v; gate and up; the
    inputs of latent attention; all experts of a layer) and refuse a checkpoint that compresses only some of them. Each
    of their models has its own table, but they always merge weights of one parent module with equal input width, or
    the experts of one layer. So these groups are all compressed or all dense. A group that is too large costs a few
    dense weights; with one that is too small the export would not load.
    """
    groups: dict[tuple[str, int], list[Target]] = defaultdict(list)
    experts = mixtures(stream)
    for target in (target for block in stream.blocks for target in block.targets):
        above = mixture_of(target.name)
        key = (above, 0) if above in experts else (target.name.rpartition(".")[0], target.shape[1])
        groups[key].append(target)
    held: set[str] = set()
    left_dense: dict[str, str] = {}
    for targets in groups.values():
        compressed = [target.name for target in targets if target.name in artifact.entries]
        why = {t.name: unfit(t) if t.name in artifact.entries else "the recipe keeps it" for t in targets}
        dense = next((name for name, reason in why.items() if reason), "")
        if not dense:
            held.update(compressed)
        else:
            left_dense |= {name: why[name] or f"has to agree with {dense}, {why[dense]}" for name in compressed}
    if not held:
        name, reason = next(iter(left_dense.items()))
        raise VQCompressError(f"no weight would stay compressed ({name}: {reason}); export --format dense")
    return frozenset(held), left_dense


def dense_modules(stream: BlockStream, held: Collection[str]) -> list[str]:
    """Full names of the modules with dense matrices, both as in the model and as in the checkpoint.

    The output head and routers are included, embeddings are not. Patterns mean different things to different readers,
    so every name is written out.
    """
    blocks = zip(stream.blocks, stream.skeletons, strict=True)
    inside = [(f"{b.name}.{path}", module) for b, block in blocks for path, module in block.named_modules()]
    paths = {
        path
        for path, module in (*stream.model.named_modules(), *inside)
        if not isinstance(module, nn.Embedding)
        and path not in held
        and (isinstance(module, CompressedLinear) or any(p.dim() > 1 for p in module.parameters(recurse=False)))
    }
    paths |= mixtures(stream) & {mixture_of(path) for path in paths}
    modules = {stored: parameter.rpartition(".")[0] for stored, parameter in stream.names.parameter.items()}
    return sorted(paths | {stored.rpartition(".")[0] for stored, module in modules.items() if module in paths})


def _weight(stream: BlockStream, entry: Entry) -> str:
    """The name of a target's weight in a dense checkpoint: packed tensors are named `X.weight_PART`."""
    part = next(iter(entry.layout()))
    return stream.stored_parts(entry)[part].removesuffix(f"_{part}")


def tensors(
    stream: BlockStream, artifact: Artifact, held: Collection[str], write: Write
) -> Iterator[dict[str, Tensor]]:
    """Tensors outside of the blocks, then those of each block: held targets converted by `write`, others decoded."""
    weights = {name: _weight(stream, entry) for name, entry in artifact.entries.items()}
    # The marker tensor is named like a weight and may count as one outside of the blocks.
    marked = {stream.marker_name(name, weight) for name, weight in weights.items()}
    yield stream.source.read(name for name in stream.non_block_weights if name not in marked | {HINT})
    dtype = stored_dtype(artifact.config)
    for block in stream.blocks:
        found = stream.source.read(stream.names.under(block.name))
        for entry in (artifact.entries[t.name] for t in block.targets if t.name in artifact.entries):
            names = stream.stored_parts(entry)
            parts = {part: found[name] for part, name in names.items()}
            weight = weights[entry.target.name]
            for own in (weight, *(names[part] for part in entry.layout())):
                found.pop(own, None)
            if entry.target.name in held:
                found |= {weight.removesuffix("weight") + name: t for name, t in write(entry, parts).items()}
            else:
                found[weight] = entry.decode(parts).to(dtype)
        yield stream.as_stored({name: t for name, t in found.items() if ".shared_parts." not in name}, held)
