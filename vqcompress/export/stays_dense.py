"""Decides which weights the formats `fp8` and `compressed-tensors` leave dense, and lists dense modules for readers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection

from torch import nn

from vqcompress.errors import VQCompressError
from vqcompress.export.rewrite import mixture_of, mixtures
from vqcompress.methods.fp8.reference import TILE
from vqcompress.model.linear import CompressedLinear
from vqcompress.model.stream import BlockStream
from vqcompress.storage.artifact import Artifact
from vqcompress.storage.targets import Target


def stays_dense(
    stream: BlockStream, artifact: Artifact, unfit: Callable[[Target], str]
) -> tuple[frozenset[str], dict[str, str]]:
    """The targets that stay compressed, and each other target → the reason why it is written dense.

    unfit: why the format cannot hold a weight, or "". vLLM and SGLang merge projections (q, k and v; gate and up; the
    inputs of latent attention; all experts of a layer) and refuse a checkpoint that compresses only some of them. Each
    of their models has its own table, but they always merge weights of one parent module with equal input width, or
    the experts of one layer. So each such group is all compressed or all dense. A group that is too large costs a few
    dense weights; with one that is too small the export would not load.
    """
    groups: dict[tuple[str, int], list[Target]] = defaultdict(list)
    experts = mixtures(stream)
    for target in (target for block in stream.blocks for target in block.targets):
        above = mixture_of(target.name)
        groups[(above, 0) if above in experts else (target.name.rpartition(".")[0], target.shape[1])].append(target)
    compressed: set[str] = set()
    left_dense: dict[str, str] = {}
    for targets in groups.values():
        ours = [target.name for target in targets if target.name in artifact.entries]
        why = {t.name: unfit(t) if t.name in artifact.entries else "the recipe keeps it" for t in targets}
        dense = next((name for name, reason in why.items() if reason), None)
        if dense is None:
            compressed.update(ours)
        else:
            left_dense |= {name: why[name] or f"has to agree with {dense}, {why[dense]}" for name in ours}
    if not compressed:
        name, reason = next(iter(left_dense.items()))
        raise VQCompressError(f"no weight would stay compressed ({name}: {reason}); export --format dense")
    return frozenset(compressed), left_dense


def partial_tile(target: Target) -> str:
    """Why an FP8 weight stays dense, or "": readers differ on tiles that it does not fill.

    transformers 5.24 computes the rows of a tile as rows // tiles, and would load 192 rows as two tiles of 96.
    """
    rows, columns = target.shape
    return f"{rows} × {columns} is no multiple of {TILE}" if rows % TILE or columns % TILE else ""


def dense_modules(stream: BlockStream, compressed: Collection[str]) -> list[str]:
    """Full names of the modules with dense matrices, both as in the model and as in the checkpoint.

    The output head, routers, draft layers and towers are included, the model's embeddings are not. Readers interpret
    patterns differently, so every name is written out.
    """
    blocks = zip(stream.blocks, stream.skeletons, strict=True)
    inside = [(f"{b.name}.{path}", module) for b, block in blocks for path, module in block.named_modules()]
    paths = {
        path
        for path, module in (*stream.model.named_modules(), *inside)
        if not isinstance(module, nn.Embedding)
        and path not in compressed
        and (isinstance(module, CompressedLinear) or any(p.dim() > 1 for p in module.parameters(recurse=False)))
    }
    paths |= mixtures(stream) & {mixture_of(path) for path in paths}
    modules = {stored: parameter.rpartition(".")[0] for stored, parameter in stream.names.parameter.items()}
    unread = {name.rpartition(".")[0] for name in stream.unread if len(stream.source.tensors[name].shape) > 1}
    # Other readers have experts of a draft layer as one module.
    unread |= {mixture for name in unread if (mixture := mixture_of(name)).endswith(".experts")}
    return sorted(paths | unread | {stored.rpartition(".")[0] for stored, module in modules.items() if module in paths})
