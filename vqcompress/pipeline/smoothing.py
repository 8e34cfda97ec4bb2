"""Smoothing of the inputs of one block: which rule an input has, fitting of its factors, and applying them.

Shape legend: I input channels, R rows of a producer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vqcompress.errors import VQCompressError
from vqcompress.methods.smoothing import Smoothing, fit_smoothing
from vqcompress.methods.statistics import Statistics
from vqcompress.model.folds import Input, Producer, scale_consumers, scale_producer
from vqcompress.model.stream import BlockStream
from vqcompress.pipeline.plan import Plan
from vqcompress.storage.targets import Block, Target


@dataclass
class Rewrites:
    """What smoothing changed in a block, by path.

    dense: modules whose own tensors changed. columns, rows: factors on the columns and rows of a weight. runtime:
    modules whose input is divided at run time. notes: JSON for the report.
    """

    dense: set[str] = field(default_factory=set)
    columns: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    runtime: set[str] = field(default_factory=set)
    notes: dict[str, dict[str, Any]] = field(default_factory=dict)

    def rescale(self, weight: Tensor, path: str) -> Tensor:
        """The weight with its factors applied; the weight itself if it has none."""
        for factor in (self.columns.get(path), self.rows.get(path)):
            weight = weight if factor is None else weight * factor
        return weight

    def undo(self, weight: Tensor, path: str) -> Tensor:
        """The weight with its factors taken off."""
        for factor in (self.columns.get(path), self.rows.get(path)):
            weight = weight if factor is None else weight / factor
        return weight


@dataclass(frozen=True)
class InputRule:
    """How one input is smoothed.

    consumers: modules whose columns are multiplied. targets: those of them that are compressed, on which the factors
    are fitted. producer: what 1/s folds into; None if the input is divided at run time.
    """

    options: Smoothing
    consumers: list[str]
    targets: list[str]
    producer: Producer | None
    channels: int

    @property
    def rows_I(self) -> Tensor:
        """The producer's row of each channel."""
        return self.producer.rows_I if self.producer else torch.arange(self.channels)


@dataclass(frozen=True)
class _Smoother:
    """The block that is smoothed, and what is known of it."""

    stream: BlockStream
    plan: Plan
    block: Block
    module: nn.Module
    statistics: dict[str, Statistics]
    seed: int
    rewrites: Rewrites

    @property
    def targets(self) -> dict[str, Target]:
        """The targets that are compressed, by path."""
        return {self.block.local(t): t for t in self.plan.compressed(self.block)}

    def rule_for_input(self, entrance: Input) -> InputRule | None:
        """The rule for an input, None if it is not smoothed; VQCompressError if the rules of its readers differ."""
        targets = self.targets
        readers = [path for path in entrance.consumers if path in targets]
        asked = {path: self.plan.rules[targets[path].name].smoothing for path in readers}
        options = next((o for o in asked.values() if o is not None), None)
        where = getattr(options, entrance.role) if options else "none"
        if options is None or where == "none":
            return None
        producer = entrance.producer if where == "fold" else None
        # A fold changes the input for all that read it; at run time each layer divides for itself.
        if any(o != options for o in asked.values() if o is not None or producer):
            raise VQCompressError(
                f"{self.block.name}: {', '.join(readers)} read one input, so their rules need the same smoothing"
            )
        consumers = list(entrance.consumers) if producer else [path for path in readers if asked[path]]
        fitted = [path for path in readers if path in consumers]
        return InputRule(options, consumers, fitted, producer, entrance.channels)

    def fit(self, rule: InputRule) -> tuple[Tensor, float | None]:
        """The factors s (R,) of an input and the α they were made with, None if no smoothing was best."""
        producer, targets = rule.producer, self.targets
        stays_dense = producer is not None and (
            len(rule.targets) < len(rule.consumers) or (producer.kind == "rows" and producer.module not in targets)
        )
        return fit_smoothing(
            rule.options,
            [self.module.get_submodule(path).get_parameter("weight").float() for path in rule.targets],
            [self.plan.rules[targets[path].name].method for path in rule.targets],
            self.statistics[rule.targets[0]],
            rule.rows_I,
            stays_dense,
            self.seed,
        )

    def apply(self, rule: InputRule, s_R: Tensor, alpha: float | None) -> None:
        """Multiply the consumers' columns and divide the producer, or note that the input is divided at run time."""
        producer, rewrites, targets = rule.producer, self.rewrites, self.targets
        if producer:
            name = self.stream.names.tensor[f"{self.block.name}.{producer.module}.weight"]
            s_R = scale_producer(self.module, producer, s_R, self.stream.source.tensors[name].dtype)
            if producer.kind == "rows" and producer.module in targets:
                rewrites.rows[producer.module] = 1 / s_R[:, None]
            rewrites.dense |= {producer.module} | (set(rule.consumers) - set(targets))
        else:
            rewrites.runtime.update(rule.consumers)
        s_I = s_R[rule.rows_I]
        scale_consumers(self.module, tuple(rule.consumers), s_I)
        # Readers of one input share an object, but experts may have statistics of their own.
        divided = {id(self.statistics[path]): self.statistics[path].divided(s_I) for path in rule.targets}
        before = self.statistics[rule.targets[0]]
        note = {
            "alpha": alpha,
            "folded_into": producer.module if producer else None,
            "outlier": [before.outlier, divided[id(before)].outlier],
        }
        rewrites.columns |= dict.fromkeys(rule.consumers, s_I)
        rewrites.notes |= dict.fromkeys(rule.consumers, note)
        for path in rule.targets:
            self.statistics[path] = divided[id(self.statistics[path])]


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
    """Fit and apply smoothing to the inputs whose rules ask for it; changes the module and the statistics.

    The input that is read last comes first: a producer's rows are rescaled before its own input is looked at.
    """
    smoother = _Smoother(stream, plan, block, module, statistics, seed, Rewrites())
    for entrance in reversed(inputs):
        if rule := smoother.rule_for_input(entrance):
            smoother.apply(rule, *smoother.fit(rule))
    return smoother.rewrites


def changed_tensors(
    stream: BlockStream, plan: Plan, block: Block, module: nn.Module, rewrites: Rewrites
) -> dict[str, Tensor]:
    """The dense tensors that smoothing changed (norms, biases, weights that are kept), by their names on disk."""
    encoded = {f"{block.local(target)}.weight" for target in plan.compressed(block)}
    changed = {}
    for path, parameter in module.named_parameters():
        if path.rpartition(".")[0] in rewrites.dense and path not in encoded:
            name = stream.names.tensor[f"{block.name}.{path}"]
            changed[name] = parameter.detach().to(stream.source.tensors[name].dtype).cpu()
    return changed
