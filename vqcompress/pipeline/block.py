"""One block: gather statistics, fit the transforms, encode the weights.

Shape legend: O output rows, I input channels, R rows of a producer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vqcompress.errors import UsageError, VQCompressError
from vqcompress.methods import PackedTensors
from vqcompress.methods.smoothing import fit_smoothing
from vqcompress.methods.statistics import Statistics
from vqcompress.model.device import peak_device_bytes, peak_rss_bytes
from vqcompress.model.expert_layout import fused_weight_name
from vqcompress.model.folds import Input, find_inputs, scale_consumers, scale_producer
from vqcompress.model.stream import BlockStream
from vqcompress.pipeline.correction import Compensation, closing_layer
from vqcompress.pipeline.plan import Plan
from vqcompress.pipeline.report import Uses
from vqcompress.pipeline.statistics import coverage, gather, seed_for
from vqcompress.storage.artifact import MARKER, SMOOTHING, Entry, part_name, stored_bits
from vqcompress.storage.checkpoint import check_finite
from vqcompress.storage.hidden_states import States, keep
from vqcompress.storage.targets import Block

PROBE_TOKENS = 64


@dataclass
class Rewrites:
    """What the transforms of a block have done. dense: paths of modules whose own tensors changed.

    columns, rows: by path, the factors that a weight's columns and rows were multiplied by. runtime: paths whose
    input is divided at run time. notes: by path, JSON for the report.
    """

    dense: set[str] = field(default_factory=set)
    columns: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    runtime: set[str] = field(default_factory=set)
    notes: dict[str, dict[str, Any]] = field(default_factory=dict)


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
    truth: States,
    seed: int,
    tick: Callable[[dict[str, Any]], None] = lambda facts: None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Compress one block of a checkpoint: its tensors by their names on disk, and JSON for journal and report.

    states: the hidden states that enter it, by batch; empty for a data-free plan. truth: those that enter it in the
    dense model, moved on to what it puts out; empty unless the plan compensates. tick: called with the name of every
    target that is done, and its row.
    """
    block = plan.blocks[index]
    tensors, module, inputs, statistics = study(stream, plan, index, states, seed)
    stream.forward(module, index, truth)
    last = None
    if plan.compensating(block) and truth:
        last = closing_layer(stream, index, module, inputs, probe_of(stream, states))
    rewrites = smooth(stream, plan, block, module, inputs, statistics, seed)
    changed = _changed(stream, plan, block, module, rewrites)
    # The weights are encoded from what was stored: the module's type may be too short for the factors.
    del module
    weights = {stream.names.tensor[f"{target.name}.weight"] for target in plan.compressed(block)}
    # A rotated block comes in float32, and what stays dense is stored as the checkpoint had it.
    tensors |= {name: t.to(stream.source.tensors[name].dtype) for name, t in tensors.items() if name not in weights}
    closing = None
    if last is not None and last in plan.compensating(block) and last not in rewrites.columns:
        closing = Compensation(stream, index, last, states, truth)
    facts = encode(stream, plan, block, tensors, statistics, rewrites, seed, changed, closing, tick)
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
        stream.check_block(index)
        module = stream.skeletons[index]
    else:
        module = stream.load_block(index, tensors)
        probe = probe_of(stream, states)
        smoothing = any(plan.rules[target.name].smoothing for target in plan.compressed(block))
        inputs = find_inputs(module, block, lambda m: stream.run(m, index, probe), prove=smoothing)
        statistics = gather(stream, plan, index, module, states, inputs, seed)
    return tensors, module, inputs, statistics


@torch.no_grad()
def smooth(
    stream: BlockStream,
    plan: Plan,
    block: Block,
    module: nn.Module,
    inputs: list[Input],
    statistics: dict[str, Statistics],
    seed: int,
) -> Rewrites:
    """Fit and apply smoothing to the inputs whose rules ask for it, the last read first; changes module and statistics.

    A producer's rows are rescaled before its own input is looked at, hence the order.
    """
    rewrites = Rewrites()
    targets = {block.local(t): t for t in plan.compressed(block)}
    for entrance in reversed(inputs):
        readers = [path for path in entrance.consumers if path in targets]
        wishes = {path: plan.rules[targets[path].name].smoothing for path in readers}
        wish = next((w for w in wishes.values() if w is not None), None)
        place = getattr(wish, entrance.role) if wish else "none"
        if wish is None or place == "none":
            continue
        producer = entrance.producer if place == "fold" else None
        # A fold changes the input for all that read it; at run time each layer divides for itself.
        if set(wishes.values()) - ({None} if producer is None else set()) != {wish}:
            raise VQCompressError(
                f"{block.name}: {', '.join(readers)} read one input, so their rules need the same smoothing"
            )
        smoothed = list(entrance.consumers) if producer else [p for p in readers if wishes[p]]
        readers = [path for path in readers if path in smoothed]
        rows_I = producer.rows_I if producer else torch.arange(entrance.channels)
        short = producer is not None and (
            len(readers) < len(smoothed) or (producer.kind == "rows" and producer.module not in targets)
        )
        s_R, alpha = fit_smoothing(
            wish,
            [module.get_submodule(path).get_parameter("weight").float() for path in readers],
            [plan.rules[targets[path].name].method for path in readers],
            statistics[readers[0]],
            rows_I,
            short,
            seed,
        )
        if producer:
            dtype = stream.source.tensors[stream.names.tensor[f"{block.name}.{producer.module}.weight"]].dtype
            s_R = scale_producer(module, producer, s_R, dtype)
            if producer.kind == "rows" and producer.module in targets:
                rewrites.rows[producer.module] = 1 / s_R[:, None]
            rewrites.dense |= {producer.module} | (set(smoothed) - set(targets))
        else:
            rewrites.runtime.update(smoothed)
        s_I = s_R[rows_I]
        scale_consumers(module, tuple(smoothed), s_I)
        # Experts may have others than those that read the same input.
        divided = {id(statistics[path]): statistics[path].divided(s_I) for path in readers}
        seen = statistics[readers[0]]
        note = {
            "alpha": None if alpha != alpha else alpha,
            "folded_into": producer.module if producer else None,
            "outlier": [seen.outlier, divided[id(seen)].outlier],
        }
        for path in smoothed:
            rewrites.columns[path], rewrites.notes[path] = s_I, note
        for path in readers:
            statistics[path] = divided[id(statistics[path])]
    return rewrites


def _changed(stream: BlockStream, plan: Plan, block: Block, module: nn.Module, rewrites: Rewrites) -> dict[str, Tensor]:
    """By their names on disk, the dense tensors that smoothing changed: norms, biases, weights that are kept."""
    encoded = {f"{block.local(target)}.weight" for target in plan.compressed(block)}
    changed = {}
    for path, parameter in module.named_parameters():
        if path.rpartition(".")[0] in rewrites.dense and path not in encoded:
            name = stream.names.tensor[f"{block.name}.{path}"]
            changed[name] = parameter.detach().to(stream.source.tensors[name].dtype).cpu()
    return changed


def encode(
    stream: BlockStream,
    plan: Plan,
    block: Block,
    tensors: dict[str, Tensor],
    statistics: dict[str, Statistics],
    rewrites: Rewrites,
    seed: int,
    changed: dict[str, Tensor] | None = None,
    closing: Compensation | None = None,
    tick: Callable[[dict[str, Any]], None] = lambda facts: None,
) -> dict[str, Any]:
    """Put the parts of every target in the place of its weight in `tensors`; returns `targets`, rows, and `Uses`.

    changed: dense tensors that smoothing changed. closing: what to do with the weight that is encoded last.
    """
    targets = {block.local(t): t for t in plan.compressed(block)}
    if closing:
        targets[closing.path] = targets.pop(closing.path)
    names = {path: stream.names.tensor[f"{target.name}.weight"] for path, target in targets.items()}
    entries = {path: plan.entry(block, target, path in rewrites.runtime) for path, target in targets.items()}
    bits = stored_bits(entries.values())

    def weight_of(path: str) -> Tensor:
        weight_OI = tensors[names[path]].to(stream.device)
        return weight_OI if entries[path].method.any_float and not statistics else weight_OI.float()

    shared = _fit_shared(entries, weight_of, statistics, rewrites, seed)
    for place in filter(None, shared):
        prefix = stream.names.stored_prefix(block.name) + place.removeprefix(block.name)
        tensors |= {f"{prefix}.{part}": tensor.cpu() for part, tensor in shared[place].items()}
    uses = Uses(block)

    def one(path: str) -> tuple[PackedTensors, dict[str, Any]]:
        """The parts of a target, and its row of the report."""
        start, target = time.perf_counter(), targets[path]
        entry, common, facts = entries[path], shared[entries[path].shared], statistics.get(path, Statistics())
        original = weight_of(path)
        if closing and path == closing.path:
            others = [entry for name, entry in entries.items() if name != path]
            stored = stream.load_block(closing.index, tensors | (changed or {}), others)
            original, facts = closing(stored, original, entry.method.needs, facts)
            del stored
        weight = _rescaled(original, path, rewrites)
        with _naming(target.name):
            parts = entry.method.encode(weight, facts, generator_for(seed, target.name), common)
        row = {
            **_facts(entry, facts, bits[target.name]),
            **_errors(entry, parts | common, original, weight, facts, partial(_rescaled, path=path, rewrites=rewrites)),
            "compensates": closing is not None and path == closing.path,
            "seconds": round(time.perf_counter() - start, 3),
            "smoothing": rewrites.notes.get(path),
        }
        return {name: part.cpu() for name, part in parts.items()}, row

    def put(path: str, parts: PackedTensors, row: dict[str, Any]) -> None:
        """Packed tensors in the place of the weight."""
        entry, common = entries[path], {name: part.cpu() for name, part in shared[entries[path].shared].items()}
        uses.add(entry, parts, common)
        if entry.smoothed:
            # A copy of its own: safetensors refuses tensors that share memory, and q, k and v share this one.
            parts = {**parts, SMOOTHING: rewrites.columns[path].clone().cpu()}
        del tensors[names[path]]
        tensors.update({part_name(names[path], part): tensor for part, tensor in parts.items()})
        if targets[path] == plan.targets[0]:
            layout = stream.fused_layout(targets[path].name)
            tensors[fused_weight_name(names[path].removesuffix(".weight"), layout)] = MARKER
        rows[path] = row
        tick({"name": targets[path].name, "row": row})

    last = closing.path if closing else None
    rows: dict[str, dict[str, Any]] = {}
    # Those of about equal cost at once, one for each process.
    ordered = sorted((p for p in targets if p != last), key=lambda p: -targets[p].weights)
    group = stream.group
    for n in range(0, len(ordered), group.size):
        at_once = ordered[n : n + group.size]
        found = {path: one(path) for path in at_once[group.rank : group.rank + 1]}
        for rank, path in enumerate(at_once):
            parts, row = group.broadcast(rank, found.get(path))
            put(path, parts, row)
    if last is not None:
        # It sums over the rows of all processes, so all of them make it.
        put(last, *one(last))
    return {"targets": [rows[path] for path in targets], "codebooks": uses.report()}


def _fit_shared(
    entries: dict[str, Entry],
    weight_of: Callable[[str], Tensor],
    statistics: dict[str, Statistics],
    rewrites: Rewrites,
    seed: int,
) -> dict[str | None, PackedTensors]:
    """By place, the parts that targets share; None has none."""
    shared: dict[str | None, PackedTensors] = {None: {}}
    for place in dict.fromkeys(entry.shared for entry in entries.values() if entry.shared):
        members = [path for path, entry in entries.items() if entry.shared == place]
        with _naming(place):
            shared[place] = entries[members[0]].method.fit_shared(
                [_rescaled(weight_of(path), path, rewrites) for path in members],
                [statistics.get(path, Statistics()) for path in members],
                generator_for(seed, place),
            )
    return shared


def _facts(entry: Entry, statistics: Statistics, bits: float) -> dict[str, Any]:
    """What a target's row of the report says before it is encoded. bits: those stored for it."""
    return {
        "name": entry.target.name,
        "method": entry.method.name,
        "shape": list(entry.target.shape),
        "bits_per_weight": bits / entry.target.weights,
        "tokens": statistics.seen,
        "borrowed": statistics.own_tokens is not None,
    }


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """A method sees no names; what it refuses gets one here."""
    try:
        yield
    except ValueError as error:
        raise VQCompressError(f"{name}: {error}") from error


def _rescaled(weight: Tensor, path: str, rewrites: Rewrites, back: bool = False) -> Tensor:
    """The weight with the factors of smoothing on its columns and rows, or with them taken off again."""
    for factor in (rewrites.columns.get(path), rewrites.rows.get(path)):
        if factor is not None:
            weight = weight / factor if back else weight * factor
    return weight


def _errors(
    entry: Entry,
    parts: PackedTensors,
    original: Tensor,
    weight: Tensor,
    facts: Statistics,
    rescaled: Callable[..., Tensor],
) -> dict[str, float | None]:
    """What a weight lost, and what that costs its output. weight: the original as smoothing left it."""
    shape = entry.target.shape
    if weight is original and facts.hessian_II is None and facts.sample_SI is None:
        return {
            "relative_error": _relative_error(original, entry.method.decode(parts, shape)),
            "proxy_error": None,
        }
    decoded = entry.method.decode(parts, shape)
    relative_error = _relative_error(original, rescaled(decoded, back=True))
    return {"relative_error": relative_error, "proxy_error": facts.proxy_error(weight, decoded)}


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
