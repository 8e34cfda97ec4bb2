"""Statistics of what enters the weights of a block, gathered while the calibration rows run through it.

The gate and up matrices of all experts share what enters their mixture; each last matrix has what its expert makes of
the tokens that came to it. Shape legend: T tokens, K experts of a token, I input channels.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vqcompress.methods.statistics import Accumulator, Statistics
from vqcompress.model.experts import Experts
from vqcompress.model.folds import Input
from vqcompress.model.stream import BlockStream
from vqcompress.pipeline.plan import Plan
from vqcompress.storage.distributed import reduce_statistics
from vqcompress.storage.hidden_states import States
from vqcompress.storage.recipe import ExpertCalibration


def seed_for(seed: int, name: str) -> int:
    """A seed that depends on the run's and a name."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little") >> 1


@dataclass
class _Mixture:
    """What experts see. shared: of their input, if it is not counted as others that read it count it. lasts: of what
    enters the last layer of each expert. weight_TK: squared, of the last call, where rows are weighted by it.
    """

    experts: Experts
    options: ExpertCalibration
    shared: Accumulator | None = None
    lasts: list[Accumulator] = field(default_factory=list)
    index_TK: Tensor | None = None
    weight_TK: Tensor | None = None

    def enter(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Before the experts run: count their input, and for the last layers whatever does not come by itself."""
        x_TI, self.index_TK, weight_TK = self.experts.routing(*args)
        chosen_TK = self.index_TK < len(self.experts.leaves())
        rows_T = chosen_TK.any(1)
        if self.options.calibrate == "weighted":
            self.weight_TK = torch.where(chosen_TK, weight_TK.float().square(), 0)
        if self.shared is not None:
            self.shared.add(x_TI[rows_T], None if self.weight_TK is None else self.weight_TK.sum(1)[rows_T])
        if self.options.calibrate == "all":
            for e, accumulator in enumerate(self.lasts):
                accumulator.add(self.experts.inner(e, x_TI[rows_T]))
                accumulator.routed += int((self.index_TK == e).sum())

    def leave(self, e: int, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Before the last layer of expert e runs on the tokens that came to it."""
        weight_T = None if self.weight_TK is None else self.weight_TK[self.index_TK == e]
        self.lasts[e].add(args[0], weight_T)
        self.lasts[e].routed = self.lasts[e].tokens


def gather(
    stream: BlockStream, plan: Plan, index: int, module: nn.Module, states: States, inputs: list[Input], seed: int
) -> dict[str, Statistics]:
    """Run the calibration rows through a dense block; statistics by the path of each target that reads an input.

    Targets of one input share one object, but where experts see a part of it or count it by other weights.
    """
    block, options = plan.blocks[index], plan.recipe.experts or ExpertCalibration(min_tokens=None)
    rules = {block.local(t): plan.rules[t.name] for t in plan.compressed(block)}
    mixtures = {path: _Mixture(m, options) for path, m in module.named_modules() if isinstance(m, Experts)}
    apart = [path for path, m in mixtures.items() if options.calibrate == "weighted" or m.experts.scaled]
    counts = stream.group.all_gather(sum(state.shape[0] * state.shape[1] for state in states))
    total, before = sum(counts), sum(counts[: stream.group.rank])
    groups: list[tuple[Input, tuple[str, ...], Accumulator]] = []
    handles = [module.get_submodule(path).register_forward_pre_hook(m.enter) for path, m in mixtures.items()]
    for entrance in inputs:
        members: dict[str | None, list[str]] = defaultdict(list)
        for path in entrance.consumers:
            members[entrance.mixture or next((m for m in apart if path.startswith(f"{m}.")), None)].append(path)
        for place, paths in members.items():
            needs = frozenset().union(*(rules[path].needs for path in paths if path in rules))
            if not needs and not entrance.mixture:
                continue
            # Which tokens come to an expert nobody knows before.
            accumulator = Accumulator(needs, entrance.channels, total, stream.device, None if place else before)
            groups.append((entrance, tuple(paths), accumulator))
            if entrance.mixture:
                mixture = mixtures[entrance.mixture]
                mixture.lasts.append(accumulator)
                if options.calibrate == "all":
                    continue
                hook: Any = partial(mixture.leave, len(mixture.lasts) - 1)
            elif place:
                mixtures[place].shared = accumulator
                continue
            else:
                hook = partial(_read, accumulator)
            handles.append(module.get_submodule(entrance.reader).register_forward_pre_hook(hook))
    try:
        for state in states:
            stream.run(module, index, state)
    finally:
        for handle in handles:
            handle.remove()
    found: dict[str, Statistics] = {}
    for entrance, consumers, accumulator in groups:
        reduce_statistics(stream.group, accumulator)
        totals = accumulator.statistics(seed_for(seed, f"{block.name}.{entrance.consumers[0]}"))
        found |= dict.fromkeys(consumers, totals)
    pooled = [(entrance, accumulator) for entrance, _, accumulator in groups if entrance.mixture]
    return found | _borrowed(pooled, found, total, stream.device, options.min_tokens)


def _read(accumulator: Accumulator, _: nn.Module, args: tuple[Tensor, ...]) -> None:
    accumulator.add(args[0])


def _borrowed(
    pooled: list[tuple[Input, Accumulator]],
    own: dict[str, Statistics],
    total: int,
    device: torch.device,
    floor: int | None,
) -> dict[str, Statistics]:
    """For experts that saw fewer tokens than the floor: what all experts of the layer saw together, if anything.

    floor: as many as their input has channels unless given.
    """
    found: dict[str, Statistics] = {}
    for pool in dict.fromkeys(entrance.mixture for entrance, _ in pooled):
        members = [(entrance, a) for entrance, a in pooled if entrance.mixture == pool]
        short = [(entrance, a) for entrance, a in members if a.tokens < (floor or entrance.channels)]
        if short and any(a.tokens for _, a in members):
            needs = frozenset().union(*(a.needs for _, a in members))
            everything = Accumulator(needs, short[0][0].channels, total, device)
            for _, a in members:
                everything.merge(a)
            shared = everything.statistics(own[members[0][0].consumers[0]].seed)
            for entrance, a in short:
                mine = replace(shared, own_tokens=a.tokens, routed=a.routed)
                found |= dict.fromkeys(entrance.consumers, mine)
    return found


def coverage(inputs: list[Input], statistics: dict[str, Statistics]) -> dict[str, Any]:
    """JSON by the path of a mixture: tokens `routed` to each expert, `counted` for its last layer, who `borrowed`."""
    found: dict[str, dict[str, list[int]]] = {}
    for entrance in inputs:
        facts = statistics.get(entrance.consumers[0])
        if entrance.mixture and facts:
            place = found.setdefault(entrance.mixture, {"routed": [], "counted": [], "borrowed": []})
            if facts.own_tokens is not None:
                place["borrowed"].append(len(place["routed"]))
            place["routed"].append(facts.routed)
            place["counted"].append(facts.seen)
    return found
