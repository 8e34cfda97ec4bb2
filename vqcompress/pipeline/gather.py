"""Statistics of what enters the weights of a block, gathered while the calibration rows run through it.

The gate and up matrices of all experts share the input of their mixture; the last matrix of each expert has its own,
from the tokens that were routed to it. Shape legend: T tokens, K experts of a token, I input channels.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vqcompress.methods.statistics import Accumulator, Statistics
from vqcompress.model.experts import Experts
from vqcompress.model.folds import Input
from vqcompress.pipeline.context import BlockContext, seed_for
from vqcompress.storage.distributed import reduce_statistics
from vqcompress.storage.recipe import ExpertCalibration

# The path of a module, and a forward pre-hook for it.
Hook = tuple[str, Callable[[nn.Module, Any], None]]


@dataclass
class _Mixture:
    """Counts what the experts of a mixture see. calibrate: see `ExpertCalibration`.

    shared: of their input, if its other readers count it differently. lasts: of the input of each expert's last layer,
    by its path; channels: of that. index_TK: chosen experts of the last call. weight_TK: their squared weights, where
    tokens are weighted by them.
    """

    experts: Experts
    calibrate: str
    shared: Accumulator | None = None
    lasts: dict[str, Accumulator] = field(default_factory=dict)
    channels: int = 0
    index_TK: Tensor | None = None
    weight_TK: Tensor | None = None

    def enter(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Before the experts run: count their input, and with `all` the input of every expert's last layer."""
        x_TI, self.index_TK, weight_TK = self.experts.routing(*args)
        chosen_TK = self.index_TK < len(self.experts.leaves())
        rows_T = chosen_TK.any(1)
        if self.calibrate == "weighted":
            self.weight_TK = torch.where(chosen_TK, weight_TK.float().square(), 0)
        if self.shared is not None:
            self.shared.add(x_TI[rows_T], None if self.weight_TK is None else self.weight_TK.sum(1)[rows_T])
        if self.calibrate == "all":
            for e, accumulator in enumerate(self.lasts.values()):
                accumulator.add(self.experts.inner(e, x_TI[rows_T]))
                accumulator.routed += int((self.index_TK == e).sum())

    def count_last(self, entrance: Input, accumulator: Accumulator) -> list[Hook]:
        """Count the input of the next expert's last layer; returns the hooks that this takes."""
        e, path = len(self.lasts), entrance.reader
        self.lasts[path], self.channels = accumulator, entrance.channels

        def enter_last(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            accumulator.add(args[0], None if self.weight_TK is None else self.weight_TK[self.index_TK == e])
            accumulator.routed = accumulator.tokens

        return [] if self.calibrate == "all" else [(path, enter_last)]

    def borrowed(self, own: dict[str, Statistics], floor: int | None) -> dict[str, Statistics]:
        """By path, for experts that saw fewer tokens than the floor: what all experts saw together, if anything."""
        members = list(self.lasts.values())
        short = {path: a for path, a in self.lasts.items() if a.tokens < (floor or self.channels)}
        if not short or not any(a.tokens for a in members):
            return {}
        together = Accumulator(frozenset().union(*(a.needs for a in members)), self.channels, 1, members[0].device)
        for accumulator in members:
            together.merge(accumulator)
        shared = together.statistics(own[next(iter(self.lasts))].seed)
        return {path: replace(shared, own_tokens=a.tokens, routed=a.routed) for path, a in short.items()}


def gather(context: BlockContext, module: nn.Module, inputs: list[Input]) -> dict[str, Statistics]:
    """Run the calibration rows through a dense block; statistics by the path of each target that reads an input.

    Targets of one input share one object, except where experts see a part of it or count it by other weights.
    """
    stream, options = context.stream, context.plan.recipe.experts or ExpertCalibration(min_tokens=None)
    needs = {path: rule.needs for path, rule in context.rules.items()}
    mixtures = {path: _Mixture(m, options.calibrate) for path, m in module.named_modules() if isinstance(m, Experts)}
    total, before = context.count_tokens()
    hooks: list[Hook] = [(path, experts.enter) for path, experts in mixtures.items()]
    counted: list[tuple[Input, list[str], Accumulator]] = []
    for entrance in inputs:
        for mixture, readers in _counted_together(entrance, mixtures).items():
            asked = frozenset[str]().union(*(needs.get(path, frozenset()) for path in readers))
            # The tokens of experts are counted without needs, too, for `coverage`.
            if not asked and not entrance.mixture:
                continue
            # How many tokens earlier processes send to experts is not known.
            start = None if mixture else before
            accumulator = Accumulator(asked, entrance.channels, total, stream.device, start)
            counted.append((entrance, readers, accumulator))
            if mixture is None:
                hooks.append((entrance.reader, partial(_read, accumulator)))
            elif entrance.mixture:
                hooks += mixtures[mixture].count_last(entrance, accumulator)
            else:
                mixtures[mixture].shared = accumulator
    with ExitStack() as stack:
        for path, hook in hooks:
            stack.enter_context(module.get_submodule(path).register_forward_pre_hook(hook))
        for state in context.states:
            context.run(module, state)
    found: dict[str, Statistics] = {}
    for entrance, readers, accumulator in counted:
        reduce_statistics(stream.group, accumulator)
        totals = accumulator.statistics(seed_for(context.seed, f"{context.block.name}.{entrance.consumers[0]}"))
        found |= dict.fromkeys(readers, totals)
    for experts in mixtures.values():
        found |= experts.borrowed(found, options.min_tokens)
    return found


def _read(accumulator: Accumulator, _: nn.Module, args: tuple[Tensor, ...]) -> None:
    accumulator.add(args[0])


def _counted_together(entrance: Input, mixtures: dict[str, _Mixture]) -> dict[str | None, list[str]]:
    """The readers of an input by the path of the mixture that counts it for them, None for a plain hook."""
    groups: dict[str | None, list[str]] = defaultdict(list)
    apart = [path for path, m in mixtures.items() if m.calibrate == "weighted" or m.experts.scaled]
    for path in entrance.consumers:
        groups[entrance.mixture or next((m for m in apart if path.startswith(f"{m}.")), None)].append(path)
    return groups


def coverage(inputs: list[Input], statistics: dict[str, Statistics]) -> dict[str, Any]:
    """JSON by the path of a mixture: tokens `routed` to each expert, `counted` for its last layer, who `borrowed`."""
    found: dict[str, dict[str, list[int]]] = {}
    for entrance in inputs:
        if entrance.mixture and (facts := statistics.get(entrance.consumers[0])):
            row = found.setdefault(entrance.mixture, {"routed": [], "counted": [], "borrowed": []})
            if facts.own_tokens is not None:
                row["borrowed"].append(len(row["routed"]))
            row["routed"].append(facts.routed)
            row["counted"].append(facts.seen)
    return found
