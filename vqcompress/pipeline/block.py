"""One block of a run: gather statistics, smooth, encode the weights.

Shape legend: O output rows, I input channels.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vqcompress.errors import UsageError, VQCompressError
from vqcompress.methods import PackedTensors
from vqcompress.methods.statistics import Statistics
from vqcompress.model.device import peak_device_bytes, peak_rss_bytes
from vqcompress.model.folds import Input, find_inputs
from vqcompress.model.stream import BlockStream
from vqcompress.pipeline.correction import OutputCorrection, closing_layer
from vqcompress.pipeline.plan import Plan
from vqcompress.pipeline.report import CodebookUses
from vqcompress.pipeline.smoothing import Rewrites, changed_tensors, smooth
from vqcompress.pipeline.statistics import coverage, gather, seed_for
from vqcompress.storage.artifact import MARKER, SMOOTHING, Entry, part_name, stored_bits
from vqcompress.storage.checkpoint import check_finite
from vqcompress.storage.hidden_states import States, keep
from vqcompress.storage.targets import Block, Target

PROBE_TOKENS = 64
# Called with the name of a target that is encoded, and its row of the report.
OnTarget = Callable[[dict[str, Any]], None]


def generator_for(seed: int, name: str) -> torch.Generator:
    """Random state that depends on the seed and the target only, never on what was done before."""
    return torch.Generator().manual_seed(seed_for(seed, name))


def first_states(stream: BlockStream, rows_NL: Tensor) -> States:
    """The hidden states that enter the first block, by batch; of several processes each has some of the batches."""
    # Also learns how blocks are called with the few tokens that folds are proven on.
    stream.embed(rows_NL[:1, :PROBE_TOKENS])
    batches, group = stream.batches(rows_NL), stream.group
    if len(batches) < group.size:
        raise UsageError(
            f"{len(batches)} batches of calibration rows are too few for {group.size} processes; start fewer"
        )
    return keep((stream.embed(batch) for batch in group.shard(batches)), stream.scratch)


def probe_of(stream: BlockStream, states: States, rows: int = 1, tokens: int | None = PROBE_TOKENS) -> Tensor:
    """The first few hidden states of the run, the same for all processes."""
    return stream.group.broadcast(0, states[0][:rows, :tokens].cpu()).to(stream.device)


def compress_block(
    stream: BlockStream,
    plan: Plan,
    index: int,
    states: States,
    reference: States,
    seed: int,
    on_target: OnTarget = lambda facts: None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Compress one block: its tensors by their names on disk, and JSON for journal and report.

    states: the hidden states that enter it, by batch; empty for a data-free plan. reference: those that enter it in the
    dense model, advanced to its output; empty unless a target corrects the block's output.
    """
    block = plan.blocks[index]
    tensors, module, inputs, statistics = study(stream, plan, index, states, seed)
    stream.forward(module, index, reference)
    last = None
    if reference and plan.correcting(block):
        last = closing_layer(stream, index, module, inputs, probe_of(stream, states))
    rewrites = smooth(stream, plan, block, module, inputs, statistics, seed)
    changed = changed_tensors(stream, plan, block, module, rewrites)
    # The weights are encoded from what was stored: the module's type may be too short for the factors.
    del module
    weights = {stream.names.tensor[f"{target.name}.weight"] for target in plan.compressed(block)}
    # A rotated block comes in float32, and what stays dense is stored as the checkpoint had it.
    tensors |= {name: t.to(stream.source.tensors[name].dtype) for name, t in tensors.items() if name not in weights}
    correction = None
    if last is not None and last in plan.correcting(block) and last not in rewrites.columns:
        correction = OutputCorrection(stream, index, last, states, reference)
    encoder = BlockEncoder(stream, plan, block, tensors, statistics, rewrites, seed)
    facts = encoder.encode(changed, correction, on_target)
    stored = stream.as_stored(tensors | changed, (target.name for target in plan.targets))
    mixtures = {f"{block.name}.{path}": tokens for path, tokens in coverage(inputs, statistics).items()}
    facts |= {"experts": mixtures} if mixtures else {}
    facts |= {"peaks": [peak_rss_bytes(), peak_device_bytes()]}
    return stored, {"smoothed": sorted(rewrites.runtime), **facts}


def study(
    stream: BlockStream, plan: Plan, index: int, states: States, seed: int
) -> tuple[dict[str, Tensor], nn.Module, list[Input], dict[str, Statistics]]:
    """A block as it is: tensors by their names on disk, the dense module, its inputs, and statistics by path.

    Of a data-free plan the module has no memory, and there are neither inputs nor statistics.
    """
    block = plan.blocks[index]
    tensors = stream.source.read(stream.names.under(block.name))
    # Those look for NaN in the pass that encodes.
    strict = [t for t in plan.compressed(block) if not states and plan.rules[t.name].method.any_float]
    later = {stream.names.tensor[f"{target.name}.weight"] for target in strict}
    check_finite({name: tensor for name, tensor in tensors.items() if name not in later})
    statistics: dict[str, Statistics] = {}
    inputs: list[Input] = []
    if not states:
        # Nothing will run: what the block would have become is enough.
        module = stream.skeletons[index]
    else:
        module = stream.load_block(index, tensors)
        probe = probe_of(stream, states)
        smoothing = any(plan.rules[target.name].smoothing for target in plan.compressed(block))
        inputs = find_inputs(module, block, lambda m: stream.run(m, index, probe), prove=smoothing)
        statistics = gather(stream, plan, index, module, states, inputs, seed)
    return tensors, module, inputs, statistics


@dataclass(frozen=True)
class Encoded:
    """The packed tensors of one target, on the CPU, and its row of the report."""

    tensors: PackedTensors
    row: dict[str, Any]


@dataclass
class BlockEncoder:
    """Encodes the targets of a block and puts their packed tensors in the place of the weights in `tensors`.

    statistics: by path; empty for a data-free plan. seed: of the run.
    """

    stream: BlockStream
    plan: Plan
    block: Block
    tensors: dict[str, Tensor]
    statistics: dict[str, Statistics]
    rewrites: Rewrites
    seed: int
    targets: dict[str, Target] = field(init=False)
    entries: dict[str, Entry] = field(init=False)
    shared: dict[str | None, PackedTensors] = field(init=False)

    def __post_init__(self) -> None:
        self.targets = {self.block.local(t): t for t in self.plan.compressed(self.block)}
        runtime = self.rewrites.runtime
        self.entries = {path: self.plan.entry(self.block, t, path in runtime) for path, t in self.targets.items()}
        self.bits, self.uses = stored_bits(self.entries.values()), CodebookUses(self.block)

    def encode(
        self,
        changed: dict[str, Tensor] | None = None,
        correction: OutputCorrection | None = None,
        on_target: OnTarget = lambda facts: None,
    ) -> dict[str, Any]:
        """Encode all targets; returns JSON: `targets`, a row for each, and `codebooks`.

        changed: the dense tensors that smoothing changed. correction: for the target that is encoded last, if any.
        """
        if correction:
            self.targets[correction.path] = self.targets.pop(correction.path)
            self.entries[correction.path] = self.entries.pop(correction.path)
        self._fit_shared()
        rows: dict[str, dict[str, Any]] = {}

        def store(path: str, encoded: Encoded) -> None:
            self.store(path, encoded.tensors)
            rows[path] = encoded.row
            on_target({"name": self.targets[path].name, "row": encoded.row})

        last, group = correction.path if correction else None, self.stream.group
        # The largest first, so that weights that take about as long are encoded at the same time, one by each process.
        ordered = sorted((p for p in self.targets if p != last), key=lambda p: -self.targets[p].weights)
        for n in range(0, len(ordered), group.size):
            at_once = ordered[n : n + group.size]
            mine = {path: self.encode_target(path, self.weight(path)) for path in at_once[group.rank : group.rank + 1]}
            for rank, path in enumerate(at_once):
                store(path, group.broadcast(rank, mine.get(path)))
        if correction:
            # All processes encode it: the correction is a sum over the rows of all of them.
            store(correction.path, self.encode_closing(correction, changed or {}))
        return {"targets": [rows[path] for path in self.targets], "codebooks": self.uses.report()}

    def name(self, path: str) -> str:
        """The weight of a target, by its name on disk."""
        return self.stream.names.tensor[f"{self.targets[path].name}.weight"]

    def weight(self, path: str) -> Tensor:
        """The dense weight (O, I): float32, or as stored where the method and missing statistics allow it."""
        weight_OI = self.tensors[self.name(path)].to(self.stream.device)
        return weight_OI if self.entries[path].method.any_float and not self.statistics else weight_OI.float()

    def encode_closing(self, correction: OutputCorrection, changed: dict[str, Tensor]) -> Encoded:
        """Encode the closing layer, moved to correct the block's output so far."""
        path, start = correction.path, time.perf_counter()
        others = [entry for name, entry in self.entries.items() if name != path]
        stored = self.stream.load_block(correction.index, self.tensors | changed, others)
        statistics = self.statistics.get(path, Statistics())
        weight_OI, statistics = correction(stored, self.weight(path), self.entries[path].method.needs, statistics)
        del stored
        return self.encode_target(path, weight_OI, statistics, start)

    def encode_target(
        self, path: str, original_OI: Tensor, corrected: Statistics | None = None, start: float | None = None
    ) -> Encoded:
        """Encode a weight. corrected: the statistics of a closing layer. start: of its seconds, if not now."""
        start = time.perf_counter() if start is None else start
        entry, target = self.entries[path], self.targets[path]
        shared, statistics = self.shared[entry.shared], corrected or self.statistics.get(path, Statistics())
        weight_OI = self.rewrites.rescale(original_OI, path)
        with _naming(target.name):
            packed = entry.method.encode(weight_OI, statistics, generator_for(self.seed, target.name), shared)
        row = {
            "name": target.name,
            "method": entry.method.name,
            "shape": list(target.shape),
            "bits_per_weight": self.bits[target.name] / target.weights,
            "tokens": statistics.seen,
            "borrowed": statistics.own_tokens is not None,
            **self._errors(path, packed | shared, original_OI, weight_OI, statistics),
            "compensates": corrected is not None,
            "seconds": round(time.perf_counter() - start, 3),
            "smoothing": self.rewrites.notes.get(path),
        }
        return Encoded({name: part.cpu() for name, part in packed.items()}, row)

    def store(self, path: str, packed: PackedTensors) -> None:
        """Put packed tensors in the place of a weight."""
        entry, target, name = self.entries[path], self.targets[path], self.name(path)
        self.uses.add(entry, packed, {key: part.cpu() for key, part in self.shared[entry.shared].items()})
        if entry.smoothed:
            # A copy of its own: safetensors refuses tensors that share memory, and q, k and v share this one.
            packed = {**packed, SMOOTHING: self.rewrites.columns[path].clone().cpu()}
        del self.tensors[name]
        self.tensors |= {part_name(name, key): part for key, part in packed.items()}
        if target == self.plan.targets[0]:
            self.tensors[self.stream.marker_name(target.name, name)] = MARKER

    def _fit_shared(self) -> None:
        """Fit and store the packed tensors that targets share, by their path; None stands for sharing nothing."""
        self.shared = {None: {}}
        for place in dict.fromkeys(entry.shared for entry in self.entries.values() if entry.shared):
            members = [path for path, entry in self.entries.items() if entry.shared == place]
            with _naming(place):
                self.shared[place] = self.entries[members[0]].method.fit_shared(
                    [self.rewrites.rescale(self.weight(path), path) for path in members],
                    [self.statistics.get(path, Statistics()) for path in members],
                    generator_for(self.seed, place),
                )
            prefix = self.stream.names.stored_prefix(self.block.name) + place.removeprefix(self.block.name)
            self.tensors |= {f"{prefix}.{part}": tensor.cpu() for part, tensor in self.shared[place].items()}

    def _errors(
        self, path: str, packed: PackedTensors, original_OI: Tensor, weight_OI: Tensor, statistics: Statistics
    ) -> dict[str, float | None]:
        """What a weight lost, and what that costs its output. weight_OI: the original as smoothing left it."""
        method, shape = self.entries[path].method, self.targets[path].shape
        decoded_OI = method.decode(packed, shape)
        error = _relative_error(original_OI, self.rewrites.undo(decoded_OI, path))
        return {"relative_error": error, "proxy_error": statistics.proxy_error(weight_OI, decoded_OI)}


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """A method sees no names; what it refuses gets one here."""
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


def entries_of(plan: Plan, block: Block, record: dict[str, Any]) -> list[Entry]:
    """The entries of a block that an earlier run committed, from its journal record."""
    return [plan.entry(block, t, block.local(t) in record["smoothed"]) for t in plan.compressed(block)]
