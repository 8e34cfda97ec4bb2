"""One block of a run: gather statistics, smooth, encode the weights.

Shape legend: O output rows, I input channels.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vqcompress.errors import VQCompressError
from vqcompress.methods import PackedTensors
from vqcompress.methods.fp8.method import FP8
from vqcompress.methods.statistics import Statistics
from vqcompress.methods.vq.codebook import entry_uses
from vqcompress.model.folds import Input, find_inputs
from vqcompress.pipeline.context import BlockContext, generator_for
from vqcompress.pipeline.correction import closing_layer, corrected
from vqcompress.pipeline.gather import coverage, gather
from vqcompress.pipeline.plan import Progress, silent
from vqcompress.pipeline.report import codebook_facts
from vqcompress.pipeline.smoothing import Rewrites, Smoother
from vqcompress.storage.artifact import MARKER, SMOOTHING, part_name, stored_bits
from vqcompress.storage.checkpoint import check_finite

# The packed tensors of a target, on the CPU, and its row of the report.
Encoded = tuple[PackedTensors, dict[str, Any]]


def compress_block(context: BlockContext, progress: Progress) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Compress one block: its tensors by their names on disk, and JSON for journal and report.

    The reference of the context is replaced by that of the block's output.
    """
    stream, plan, block = context.stream, context.plan, context.block
    tensors, module, inputs, statistics = study(context)
    stream.forward(module, context.index, context.reference)
    correcting = [path for path, rule in context.rules.items() if rule.method.compensates]
    closing = closing_layer(context, module, inputs) if context.reference and correcting else None
    rewrites = Smoother(context, module, statistics).smooth(inputs)
    # The weights are encoded from what was stored: the module's type may be too short for the factors.
    del module
    encoder = BlockEncoder(context, tensors, statistics, rewrites)
    weights = {encoder.name(path) for path in encoder.entries}
    # A rotated block comes in float32, and what stays dense is stored as the checkpoint had it.
    tensors |= {name: t.to(stream.source.tensors[name].dtype) for name, t in tensors.items() if name not in weights}
    facts = encoder.encode(closing if closing in correcting and closing not in rewrites.columns else None, progress)
    stored = stream.as_stored(tensors | rewrites.changed, (target.name for target in plan.targets))
    if mixtures := {f"{block.name}.{path}": tokens for path, tokens in coverage(inputs, statistics).items()}:
        facts["experts"] = mixtures
    return stored, {"smoothed": sorted(rewrites.runtime), **facts}


def study(context: BlockContext) -> tuple[dict[str, Tensor], nn.Module, list[Input], dict[str, Statistics]]:
    """A block as it is: tensors by their names on disk, the dense module, its inputs, and statistics by path.

    For a data-free plan, or a block that text skips, the module is on the meta device, and there are neither inputs nor
    statistics.
    """
    stream, block = context.stream, context.block
    tensors = stream.source.read(stream.names.under(block.name))
    check_finite(tensors)
    if not context.states or not stream.runs(context.index):
        return tensors, stream.skeletons[context.index], [], {}
    module, probe = stream.load_block(context.index, tensors), context.probe()
    smoothing = any(rule.smoothing for rule in context.rules.values())
    inputs = find_inputs(module, block, lambda m: stream.outputs(m, context.index, probe), prove=smoothing)
    return tensors, module, inputs, gather(context, module, inputs)


@dataclass
class BlockEncoder:
    """Encodes the targets of a block and puts their packed tensors in the place of the weights in `tensors`.

    tensors: by their names on disk. statistics: by path; empty for a data-free plan.
    """

    context: BlockContext
    tensors: dict[str, Tensor]
    statistics: dict[str, Statistics]
    rewrites: Rewrites

    def __post_init__(self) -> None:
        self.stream, self.block, self.seed = self.context.stream, self.context.block, self.context.seed
        entries = self.context.plan.entries_of(self.block, self.rewrites.runtime)
        self.entries, self.bits = {self.block.local(entry.target): entry for entry in entries}, stored_bits(entries)
        # Packed tensors that targets share, by their path; None stands for sharing nothing.
        self.shared: dict[str | None, PackedTensors] = {None: {}}
        # How often entries of codebooks are used, by the path of shared parts or the target.
        self.uses: dict[str, Tensor] = {}

    def encode(self, closing: str | None = None, progress: Progress = silent) -> dict[str, Any]:
        """Encode all targets; returns JSON: `targets`, a row for each, and `codebooks`.

        closing: path of the layer that corrects the block's output, and is encoded last.
        """
        for place in dict.fromkeys(entry.shared for entry in self.entries.values() if entry.shared):
            self._fit_shared(place)
        rows: dict[str, dict[str, Any]] = {}
        for path, (packed, row) in self._encode_all(closing):
            self._store(path, packed)
            rows[path] = row
            progress("target", {"name": row["name"], "row": row})
        books = {place: codebook_facts(uses_RK, place in self.shared) for place, uses_RK in self.uses.items()}
        return {"targets": [rows[path] for path in self.entries], "codebooks": books}

    def _encode_all(self, closing: str | None) -> Iterator[tuple[str, Encoded]]:
        """Path and packed tensors of every target; each is stored before the closing layer is encoded."""
        group = self.stream.group
        # The largest first, so that weights that take about as long are encoded at the same time, one by each process.
        ordered = sorted((p for p in self.entries if p != closing), key=lambda p: -self.entries[p].target.weights)
        for n in range(0, len(ordered), group.size):
            at_once = ordered[n : n + group.size]
            mine = {path: self._encode_target(path, self._weight(path)) for path in at_once[group.rank :][:1]}
            for rank, path in enumerate(at_once):
                yield path, group.broadcast(rank, mine.get(path))
        if closing is not None:
            # All processes encode it: the correction is a sum over the rows of all of them.
            yield closing, self._encode_closing(closing)

    def name(self, path: str) -> str:
        """The weight of a target, by its name on disk."""
        return self.stream.names.tensor[f"{self.entries[path].target.name}.weight"]

    def _weight(self, path: str) -> Tensor:
        """The dense weight (O, I), float32."""
        return self.tensors[self.name(path)].to(self.stream.device).float()

    def _encode_closing(self, path: str) -> Encoded:
        """Encode the closing layer, moved to correct the block's output so far."""
        others = [entry for name, entry in self.entries.items() if name != path]
        stored = self.stream.load_block(self.context.index, self.tensors | self.rewrites.changed, others)
        needs, seed = self.entries[path].method.needs, self.statistics.get(path, Statistics()).seed
        weight_OI, statistics = corrected(self.context, stored, path, self._weight(path), needs, seed)
        del stored
        return self._encode_target(path, weight_OI, statistics)

    def _encode_target(self, path: str, original_OI: Tensor, moved: Statistics | None = None) -> Encoded:
        """Encode a weight. moved: statistics of a closing layer, whose weight is moved already."""
        start, entry = time.perf_counter(), self.entries[path]
        target, shared = entry.target, self.shared[entry.shared]
        statistics = moved or self.statistics.get(path, Statistics())
        weight_OI = self.rewrites.rescale(original_OI, path)
        with _naming(target.name):
            packed = self._tiles(path, weight_OI) or entry.method.encode(
                weight_OI, statistics, generator_for(self.seed, target.name), shared
            )
            # What `verify` would refuse, such as the scale of weights beyond its type.
            entry.method.check(packed, target.shape)
        decoded_OI = entry.method.decode(packed | shared, target.shape)
        row = {
            "name": target.name,
            "method": entry.method.name,
            "shape": list(target.shape),
            "bits_per_weight": self.bits[target.name] / target.weights,
            "tokens": statistics.seen,
            "borrowed": statistics.own_tokens is not None,
            "relative_error": _relative_error(original_OI, self.rewrites.undo(decoded_OI, path)),
            "proxy_error": statistics.proxy_error(weight_OI, decoded_OI),
            "compensates": moved is not None,
            "seconds": round(time.perf_counter() - start, 3),
            "smoothing": self.rewrites.notes.get(path),
        }
        return {name: part.cpu() for name, part in packed.items()}, row

    def _tiles(self, path: str, weight_OI: Tensor) -> PackedTensors | None:
        """The FP8 tensors that the checkpoint itself has for a weight, if the method could have stored them."""
        entry = self.entries[path]
        if not isinstance(entry.method, FP8) or (tiles := self.stream.source.tiles(self.name(path))) is None:
            return None
        tiles = {name: part.to(self.stream.device) for name, part in tiles.items()}
        try:
            entry.method.check(tiles, entry.target.shape)
        except ValueError:
            return None
        same = torch.equal(entry.method.decode(tiles, entry.target.shape), weight_OI)
        return tiles if same else None

    def _store(self, path: str, packed: PackedTensors) -> None:
        """Put packed tensors in the place of a weight."""
        entry, name = self.entries[path], self.name(path)
        uses_RK = entry_uses(entry.method, packed, entry.target.shape)
        if uses_RK is not None:
            place = entry.shared or entry.target.name
            self.uses[place] = self.uses.get(place, 0) + uses_RK
        if entry.smoothed:
            # A copy of its own: safetensors refuses tensors that share memory, and q, k and v share this one.
            packed = {**packed, SMOOTHING: self.rewrites.columns[path].clone().cpu()}
        del self.tensors[name]
        self.tensors |= {part_name(name, key): part for key, part in packed.items()}
        if entry.target == self.context.plan.targets[0]:
            self.tensors[self.stream.marker_name(entry.target.name, name)] = MARKER

    def _fit_shared(self, shared_path: str) -> None:
        """Fit and store the packed tensors that targets share."""
        members = [path for path, entry in self.entries.items() if entry.shared == shared_path]
        with _naming(shared_path):
            parts = self.entries[members[0]].method.fit_shared(
                [self.rewrites.rescale(self._weight(path), path) for path in members],
                [self.statistics.get(path, Statistics()) for path in members],
                generator_for(self.seed, shared_path),
            )
        prefix = self.stream.names.stored_prefix(self.block.name) + shared_path.removeprefix(self.block.name)
        self.shared[shared_path] = parts
        self.tensors |= {f"{prefix}.{part}": tensor.cpu() for part, tensor in parts.items()}


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """A method sees no names; its errors get one here."""
    try:
        yield
    except ValueError as error:
        raise VQCompressError(f"{name}: {error}") from error


def _relative_error(weight_OI: Tensor, decoded_OI: Tensor) -> float:
    """Σ (w − ŵ)² / Σ w²."""
    error, energy = 0.0, 0.0
    # Rows that fit into a CPU's cache take a fraction of the time.
    rows = max(1, 2**19 // weight_OI.shape[1])
    for weight, decoded in zip(weight_OI.split(rows), decoded_OI.split(rows), strict=True):
        weight = weight.float()
        energy += torch.linalg.vector_norm(weight).double().square().item()
        error += torch.linalg.vector_norm(weight - decoded).double().square().item()
    return error / max(energy, 1e-30)
