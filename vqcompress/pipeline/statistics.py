"""Statistics of what enters the weights of a block, gathered while the calibration rows run through it.

The gate and up matrices of all experts share the input of their mixture; the last matrix of each expert has its own,
from the tokens that were routed to it. Shape legend: T tokens, K experts of a token, I input channels.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

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
    """What the experts of a mixture see.

    shared: of their input, if its other readers count it differently. lasts: of the input of each expert's last layer.
    index_TK: chosen experts of the last call. weight_TK: their squared weights, where rows are weighted by them.
    """

    experts: Experts
    options: ExpertCalibration
    shared: Accumulator | None = None
    lasts: list[Accumulator] = field(default_factory=list)
    index_TK: Tensor | None = None
    weight_TK: Tensor | None = None

    def enter(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Before the experts run: count their input, and with `all` what every expert's last layer would read."""
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


@dataclass(frozen=True)
class Observation:
    """What is to be counted for some readers of one input.

    kind: "input", what enters the reader; "mixture", the tokens that enter the mixture `module`, which counts them
    itself; "expert", the tokens that its router sends to the last layer of an expert. needs: names of statistics.
    """

    entrance: Input
    paths: tuple[str, ...]
    needs: frozenset[str]
    kind: Literal["input", "mixture", "expert"]
    module: str


def observations(inputs: list[Input], needs: dict[str, frozenset[str]], apart: list[str]) -> list[Observation]:
    """What is to be counted for the inputs of a block.

    needs: by the path of a target. apart: mixtures that do not count their input as its other readers do.
    """
    found = []
    for entrance in inputs:
        if entrance.mixture:
            asked = frozenset[str]().union(*(needs.get(path, frozenset()) for path in entrance.consumers))
            # Also without needs: coverage counts its tokens.
            found.append(Observation(entrance, tuple(entrance.consumers), asked, "expert", entrance.mixture))
            continue
        groups: dict[str | None, list[str]] = defaultdict(list)
        for path in entrance.consumers:
            groups[next((m for m in apart if path.startswith(f"{m}.")), None)].append(path)
        for mixture, paths in groups.items():
            if asked := frozenset[str]().union(*(needs.get(path, frozenset()) for path in paths)):
                kind: Literal["input", "mixture"] = "mixture" if mixture else "input"
                found.append(Observation(entrance, tuple(paths), asked, kind, mixture or entrance.reader))
    return found


def gather(
    stream: BlockStream, plan: Plan, index: int, module: nn.Module, states: States, inputs: list[Input], seed: int
) -> dict[str, Statistics]:
    """Run the calibration rows through a dense block; statistics by the path of each target that reads an input.

    Targets of one input share one object, except where experts see a part of it or count it by other weights.
    """
    block, options = plan.blocks[index], plan.recipe.experts or ExpertCalibration(min_tokens=None)
    needs = {block.local(t): plan.rules[t.name].needs for t in plan.compressed(block)}
    mixtures = {path: _Mixture(m, options) for path, m in module.named_modules() if isinstance(m, Experts)}
    apart = [path for path, m in mixtures.items() if options.calibrate == "weighted" or m.experts.scaled]
    counts = stream.group.all_gather(sum(state.shape[0] * state.shape[1] for state in states))
    total, before = sum(counts), sum(counts[: stream.group.rank])
    counted: list[tuple[Observation, Accumulator]] = []
    hooks: list[tuple[str, Callable[[nn.Module, Any], None]]] = [(path, m.enter) for path, m in mixtures.items()]
    for seen in observations(inputs, needs, apart):
        # How many tokens earlier processes send to an expert is not known.
        start = before if seen.kind == "input" else None
        accumulator = Accumulator(seen.needs, seen.entrance.channels, total, stream.device, start)
        counted.append((seen, accumulator))
        if seen.kind == "input":
            hooks.append((seen.module, partial(_read, accumulator)))
        elif seen.kind == "mixture":
            mixtures[seen.module].shared = accumulator
        else:
            mixture = mixtures[seen.module]
            if options.calibrate != "all":
                hooks.append((seen.entrance.reader, partial(mixture.leave, len(mixture.lasts))))
            mixture.lasts.append(accumulator)
    handles = [module.get_submodule(path).register_forward_pre_hook(hook) for path, hook in hooks]
    try:
        for state in states:
            stream.run(module, index, state)
    finally:
        for handle in handles:
            handle.remove()
    found: dict[str, Statistics] = {}
    for seen, accumulator in counted:
        reduce_statistics(stream.group, accumulator)
        totals = accumulator.statistics(seed_for(seed, f"{block.name}.{seen.entrance.consumers[0]}"))
        found |= dict.fromkeys(seen.paths, totals)
    experts = [(seen.entrance, accumulator) for seen, accumulator in counted if seen.kind == "expert"]
    return found | _borrowed(experts, found, total, stream.device, options.min_tokens)


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
