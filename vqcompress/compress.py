"""One block: gather statistics, fit the transforms, encode the weights.

Shape legend: O output rows, I input channels, R rows of a producer.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vqcompress.artifact import MARKER, SMOOTHING, Entry, part_name
from vqcompress.blocks import BlockStream
from vqcompress.errors import VQCompressError
from vqcompress.inputs import Input, find_inputs, scale_consumers, scale_producer
from vqcompress.methods import Method, Parts, layout_bits
from vqcompress.plan import Plan
from vqcompress.statistics import Accumulator, Statistics
from vqcompress.targets import Block
from vqcompress.transforms import fit_smoothing

PROBE_TOKENS = 64


@dataclass
class _Rewrites:
    """What the transforms of a block have done. dense: paths of modules whose own tensors changed.

    columns, rows: by path, the factors that a weight's columns and rows were multiplied by. runtime: paths whose
    input is divided at run time. notes: by path, JSON for the report.
    """

    dense: set[str] = field(default_factory=set)
    columns: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    runtime: set[str] = field(default_factory=set)
    notes: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Encoded:
    """A block ready to be written. tensors: by their names on disk. record: JSON for the journal and the report."""

    tensors: dict[str, Tensor]
    entries: list[Entry]
    record: dict[str, Any]


def generator_for(seed: int, name: str) -> torch.Generator:
    """Random state that depends on the seed and the target only, never on what was done before."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def first_states(stream: BlockStream, rows_NL: Tensor) -> list[Tensor]:
    """The hidden states that enter the first block, by batch."""
    # Also learns how blocks are called with the few tokens that folds are proven on.
    stream.begin(rows_NL[:1, :PROBE_TOKENS])
    return [stream.begin(batch) for batch in stream.batches(rows_NL)]


def compress_block(
    stream: BlockStream,
    plan: Plan,
    index: int,
    states: list[Tensor],
    seed: int,
    tick: Callable[[str], None] = lambda name: None,
) -> Encoded:
    """Compress one block of a checkpoint.

    states: the hidden states that enter it, by batch; empty for a data-free plan. tick: called with the name of every
    target that is done.
    """
    start = time.perf_counter()
    block = plan.blocks[index]
    names = stream.names.under(block.name)
    stored = stream.source.read(names)
    check_finite(stored)
    module = stream.load_block(index, stored)
    statistics: dict[str, Statistics] = {}
    inputs: list[Input] = []
    if states:
        probe = states[0][:1, :PROBE_TOKENS]
        inputs = find_inputs(module, block, lambda m: stream.run(m, index, probe))
        statistics = gather(stream, plan, index, module, states, inputs)
    originals = {
        block.local(t): module.get_submodule(block.local(t)).get_parameter("weight").detach().float().clone()
        for t in plan.compressed(block)
    }
    rewrites = smooth(stream, plan, block, module, inputs, statistics, seed)
    encoded, rows = _encode(plan, block, statistics, originals, rewrites, seed, tick)
    tensors, entries = _on_disk(stream, plan, block, module, stored, encoded, rewrites)
    record = {
        "seconds": round(time.perf_counter() - start, 3),
        "smoothed": sorted(rewrites.runtime),
        "targets": rows,
    }
    return Encoded(tensors, entries, record)


def check_finite(tensors: dict[str, Tensor]) -> None:
    """VQCompressError naming the first tensor that holds NaN or Inf."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
            raise VQCompressError(f"the tensor {name} of the checkpoint holds NaN or Inf")


def gather(
    stream: BlockStream, plan: Plan, index: int, module: nn.Module, states: list[Tensor], inputs: list[Input]
) -> dict[str, Statistics]:
    """Run the calibration rows through a dense block; statistics by the path of each target that reads an input.

    Targets of one input share one object.
    """
    block = plan.blocks[index]
    rules = {block.local(t): plan.rules[t.name] for t in plan.compressed(block)}
    total = sum(state.shape[0] * state.shape[1] for state in states)
    accumulators: list[tuple[Input, Accumulator]] = []
    handles = []
    for entrance in inputs:
        readers = [rules[path] for path in entrance.consumers if path in rules]
        needs = frozenset().union(*(rule.method.needs for rule in readers))
        for rule in readers:
            # The sample also measures the error that the report shows.
            needs |= rule.smoothing.needs | {"sample"} if rule.smoothing else frozenset()
        if not needs:
            continue
        accumulator = Accumulator(needs, entrance.channels, total, stream.device)
        accumulators.append((entrance, accumulator))

        def read(_: nn.Module, args: tuple[Tensor, ...], accumulator: Accumulator = accumulator) -> None:
            accumulator.add(args[0])

        handles.append(module.get_submodule(entrance.consumers[0]).register_forward_pre_hook(read))
    try:
        for state in states:
            stream.run(module, index, state)
    finally:
        for handle in handles:
            handle.remove()
    return {path: totals for entrance, a in accumulators for totals in [a.statistics()] for path in entrance.consumers}


@torch.no_grad()
def smooth(
    stream: BlockStream,
    plan: Plan,
    block: Block,
    module: nn.Module,
    inputs: list[Input],
    statistics: dict[str, Statistics],
    seed: int,
) -> _Rewrites:
    """Fit and apply smoothing to the inputs whose rules ask for it, the last read first; changes module and statistics.

    A producer's rows are rescaled before its own input is looked at, hence the order.
    """
    rewrites = _Rewrites()
    targets = {block.local(t): t for t in plan.compressed(block)}
    for entrance in reversed(inputs):
        readers = [path for path in entrance.consumers if path in targets]
        wishes = {path: plan.rules[targets[path].name].smoothing for path in readers}
        wish = next((w for w in wishes.values() if w is not None), None)
        place = getattr(wish, entrance.place) if wish else "none"
        if wish is None or place == "none":
            continue
        producer = entrance.producer if place == "fold" else None
        if place == "fold" and producer is not None and set(wishes.values()) != {wish}:
            raise VQCompressError(
                f"{block.name}: {', '.join(entrance.consumers)} read one input, so their rules need the same smoothing"
            )
        smoothed = list(entrance.consumers) if producer else [p for p in readers if wishes[p]]
        rows_I = producer.rows_I if producer else torch.arange(entrance.channels)
        short = producer is not None and (
            len(readers) < len(smoothed) or (producer.kind == "rows" and producer.path not in targets)
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
            dtype = stream.source.tensors[stream.names.tensor[f"{block.name}.{producer.path}.weight"]].dtype
            s_R = scale_producer(module, producer, s_R, dtype)
            if producer.kind == "rows" and producer.path in targets:
                rewrites.rows[producer.path] = 1 / s_R[:, None]
            rewrites.dense.add(producer.path)
            rewrites.dense.update(set(smoothed) - set(readers))
        else:
            rewrites.runtime.update(smoothed)
        s_I = s_R[rows_I]
        scale_consumers(module, tuple(smoothed), s_I)
        note = {"alpha": None if alpha != alpha else alpha, "folded_into": producer.path if producer else None}
        divided = statistics[readers[0]].divided(s_I)
        for path in smoothed:
            rewrites.columns[path], rewrites.notes[path], statistics[path] = s_I, note, divided
    return rewrites


def _encode(
    plan: Plan,
    block: Block,
    statistics: dict[str, Statistics],
    originals: dict[str, Tensor],
    rewrites: _Rewrites,
    seed: int,
    tick: Callable[[str], None],
) -> tuple[dict[str, tuple[Entry, Parts, Parts]], list[dict[str, Any]]]:
    """Encode every target: by path its entry, its own parts and the shared ones; and rows for the report."""
    targets = {block.local(t): t for t in plan.compressed(block)}
    # From the originals rather than the module, whose type may be too short for the factors.
    weights = {path: _rescaled(original, path, rewrites) for path, original in originals.items()}
    shared: dict[Method, Parts] = {}
    for method in plan.methods:
        members = [p for p, t in targets.items() if plan.rules[t.name].method == method]
        if members and method.shared_layout():
            shared[method] = method.fit_shared(
                [weights[p] for p in members],
                [statistics.get(p, Statistics()) for p in members],
                generator_for(seed, f"{block.name}.shared_parts.{plan.methods.index(method)}"),
            )
    encoded, rows = {}, []
    for path, target in targets.items():
        start = time.perf_counter()
        method = plan.rules[target.name].method
        entry = plan.entry(block, target, path in rewrites.runtime)
        facts = statistics.get(path, Statistics())
        common = shared.get(method, {})
        parts = method.encode(weights[path], facts, generator_for(seed, target.name), common)
        decoded = method.decode(parts | common, target.shape)
        members_weights = sum(t.weights for t in targets.values() if plan.rules[t.name].method == method)
        bits = layout_bits(entry.layout()) + layout_bits(method.shared_layout()) * target.weights / members_weights
        rows.append(
            {
                "name": target.name,
                "method": method.name,
                "shape": list(target.shape),
                "experts": None,
                "bits_per_weight": bits / target.weights,
                "relative_error": _relative_error(originals[path], decoded, path, rewrites),
                "proxy_error": facts.proxy_error(weights[path], decoded),
                "tokens": facts.tokens,
                "seconds": round(time.perf_counter() - start, 3),
                "smoothing": rewrites.notes.get(path),
            }
        )
        if path in rewrites.runtime:
            # A copy of its own: safetensors refuses tensors that share memory, and q, k and v share this one.
            parts = {**parts, SMOOTHING: rewrites.columns[path].clone()}
        encoded[path] = (entry, parts, common)
        tick(target.name)
    return encoded, rows


def _rescaled(weight: Tensor, path: str, rewrites: _Rewrites, back: bool = False) -> Tensor:
    """The weight with the factors of smoothing on its columns and rows, or with them taken off again."""
    for factor in (rewrites.columns.get(path), rewrites.rows.get(path)):
        if factor is not None:
            weight = weight / factor if back else weight * factor
    return weight


def _relative_error(original: Tensor, decoded: Tensor, path: str, rewrites: _Rewrites) -> float:
    """‖W − Ŵ‖² / ‖W‖² with all that smoothing did to W undone."""
    decoded = _rescaled(decoded, path, rewrites, back=True)
    return ((original - decoded).square().sum() / original.square().sum().clamp(min=1e-30)).item()


def _on_disk(
    stream: BlockStream,
    plan: Plan,
    block: Block,
    module: nn.Module,
    stored: dict[str, Tensor],
    encoded: dict[str, tuple[Entry, Parts, Parts]],
    rewrites: _Rewrites,
) -> tuple[dict[str, Tensor], list[Entry]]:
    """The block's tensors under the checkpoint's own names, and the entries of its compressed targets."""
    tensors = dict(stored)
    parameters = dict(module.named_parameters())
    for path, parameter in parameters.items():
        if path.rpartition(".")[0] in rewrites.dense:
            name = stream.names.tensor[f"{block.name}.{path}"]
            if name in tensors:
                tensors[name] = parameter.detach().to(stored[name].dtype).cpu()
    for path, (entry, parts, common) in encoded.items():
        name = stream.names.tensor[f"{entry.target.name}.weight"]
        del tensors[name]
        for part, tensor in parts.items():
            tensors[part_name(name, part)] = tensor.cpu()
        if entry.shared is not None:
            # The block's path as the checkpoint spells it, which may lack the model's prefix.
            prefix = name.removesuffix(f"{path}.weight")
            place = prefix + entry.shared.removeprefix(block.name + ".")
            tensors |= {f"{place}.{part}": tensor.cpu() for part, tensor in common.items()}
        if entry.target == plan.targets[0]:
            tensors[name] = MARKER
    return tensors, [entry for entry, _, _ in encoded.values()]


def entries_of(plan: Plan, block: Block, record: dict[str, Any]) -> list[Entry]:
    """The entries of a block that an earlier run committed, from its journal record."""
    return [plan.entry(block, t, block.local(t) in record["smoothed"]) for t in plan.compressed(block)]
