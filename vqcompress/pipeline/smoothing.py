"""Smoothing of the inputs of one block: fits factors for an input, and applies them.

Shape legend: I input channels, R rows of a producer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vqcompress.errors import VQCompressError
from vqcompress.methods.smoothing import fit_smoothing
from vqcompress.methods.statistics import Statistics
from vqcompress.model.folds import Input, scale_consumers, scale_producer
from vqcompress.pipeline.context import BlockContext


@dataclass
class Rewrites:
    """The changes of smoothing in a block, by path.

    dense: modules whose own tensors changed. changed: these tensors (norms, biases, weights that are kept), by their
    names on disk. columns, rows: factors on the columns and rows of a weight. runtime: modules whose input is divided
    at run time. notes: JSON for the report.
    """

    dense: set[str] = field(default_factory=set)
    changed: dict[str, Tensor] = field(default_factory=dict)
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
        """The weight with its factors divided out."""
        for factor in (self.columns.get(path), self.rows.get(path)):
            weight = weight if factor is None else weight / factor
        return weight


@dataclass
class Smoother:
    """Smooths the inputs of a block: changes its module and its statistics, and records the changes in `rewrites`."""

    context: BlockContext
    module: nn.Module
    statistics: dict[str, Statistics]
    rewrites: Rewrites = field(default_factory=Rewrites)

    def __post_init__(self) -> None:
        self.rules, self.block, self.stream = self.context.rules, self.context.block, self.context.stream

    @torch.no_grad()
    def smooth(self, inputs: list[Input]) -> Rewrites:
        """Fit and apply factors to the inputs whose rules ask for them.

        The input that is read last comes first: a producer's rows are rescaled before its own input is smoothed.
        """
        for entrance in reversed(inputs):
            self._smooth_input(entrance)
        for path, parameter in self.module.named_parameters():
            parent, _, attribute = path.rpartition(".")
            if parent in self.rewrites.dense and not (parent in self.rules and attribute == "weight"):
                name = self.stream.names.tensor[f"{self.block.name}.{path}"]
                stored = parameter.detach().to(self.stream.source.tensors[name].dtype).cpu()
                self.rewrites.changed[name] = stored
        return self.rewrites

    def _held(self, entrance: Input) -> bool:
        """Whether a fold would change a tensor that cannot be stored anew: one shared, or made of others."""
        fixed = set(entrance.consumers) - self.rules.keys() | {entrance.producer.module if entrance.producer else ""}
        return any(self.stream.names.held(f"{self.block.name}.{module}.weight") for module in fixed)

    def _smooth_input(self, entrance: Input) -> None:
        """Fit and apply the factors of an input, if any; VQCompressError if the rules of its readers differ."""
        readers = [path for path in entrance.consumers if path in self.rules]
        asked = {path: self.rules[path].smoothing for path in readers}
        options = next((o for o in asked.values() if o is not None), None)
        where = getattr(options, entrance.role) if options else "none"
        if options is None or where == "none":
            return
        producer = entrance.producer if where == "fold" and not self._held(entrance) else None
        # A fold changes the input for all that read it; at run time each layer divides for itself.
        if any(o != options for o in asked.values() if o is not None or producer):
            raise VQCompressError(
                f"{self.block.name}: {', '.join(readers)} read one input, so their rules need the same smoothing"
            )
        consumers = list(entrance.consumers) if producer else [path for path in readers if asked[path]]
        # A layer that reads two inputs (Zaya: also that of the token before) has room for the factors of one.
        if self.rewrites.columns.keys() & set(consumers):
            return
        targets = [path for path in readers if path in consumers]
        # Factors of a tensor that stays dense, in its 16-bit type, are powers of two.
        rounded = producer is not None and (
            len(targets) < len(consumers) or (producer.kind == "rows" and producer.module not in self.rules)
        )
        # The producer's row of each channel.
        rows_I = producer.rows_I if producer else torch.arange(entrance.channels)
        s_R, alpha = fit_smoothing(
            options,
            [self.module.get_submodule(path).get_parameter("weight").float() for path in targets],
            [self.rules[path].method for path in targets],
            self.statistics[targets[0]],
            rows_I,
            rounded,
            self.context.seed,
            self.context.few_tokens,
        )
        rewrites = self.rewrites
        if producer:
            name = self.stream.names.tensor[f"{self.block.name}.{producer.module}.weight"]
            s_R = scale_producer(self.module, producer, s_R, self.stream.source.tensors[name].dtype)
            rewrites.dense |= {producer.module} | (set(consumers) - self.rules.keys())
            if producer.kind == "rows" and producer.module in self.rules:
                rewrites.rows[producer.module] = 1 / s_R[:, None]
        else:
            rewrites.runtime.update(consumers)
        s_I = s_R[rows_I]
        scale_consumers(self.module, tuple(consumers), s_I)
        before = self.statistics[targets[0]]
        # Readers of one input share an object, but experts may have statistics of their own.
        divided = {id(self.statistics[path]): self.statistics[path].divided(s_I) for path in targets}
        outlier = [before.outlier, divided[id(before)].outlier]
        note = {"alpha": alpha, "folded_into": producer.module if producer else None, "outlier": outlier}
        rewrites.columns |= dict.fromkeys(consumers, s_I)
        rewrites.notes |= dict.fromkeys(consumers, note)
        self.statistics |= {path: divided[id(self.statistics[path])] for path in targets}
