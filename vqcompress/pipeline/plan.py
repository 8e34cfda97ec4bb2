"""What a recipe will do to a model, from its config alone: which target gets which method."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from vqcompress.errors import UsageError
from vqcompress.methods import Method
from vqcompress.model.coverage import dense_weights
from vqcompress.model.drafts import draft_bytes
from vqcompress.model.experts import Experts
from vqcompress.model.stream import BlockStream
from vqcompress.storage.artifact import Entry
from vqcompress.storage.recipe import KVCacheConfig, Recipe, Rule
from vqcompress.storage.targets import Block, Target

# Called with the name of an event of a run ("measure", "plan", "block", "target", "done", "after") and facts about it.
Progress = Callable[[str, dict[str, Any]], None]


def silent(event: str, facts: dict[str, Any]) -> None:
    """The progress callback that ignores all events."""


@dataclass(frozen=True)
class Plan:
    """Which target gets which method. rules: target name → rule, for every linear layer of the blocks.

    left_dense: name of a large weight that no rule reaches → the reason. target_bits: the budget, if there is one.
    drafts: path of a draft layer → its bytes.
    """

    recipe: Recipe
    blocks: list[Block]
    rules: dict[str, Rule]
    left_dense: dict[str, str]
    target_bits: float | None = None
    drafts: dict[str, int] = field(default_factory=dict)

    def compressed(self, block: Block) -> list[Target]:
        """The targets of a block that the recipe does not keep dense."""
        return [t for t in block.targets if not self.rules[t.name].method.dense]

    @property
    def needs_reference(self) -> bool:
        """Whether the hidden states of the dense model are needed, to correct the outputs of blocks."""
        return any(self.rules[target.name].method.compensates for target in self.targets)

    @property
    def targets(self) -> list[Target]:
        """All targets that will be compressed."""
        return [target for block in self.blocks for target in self.compressed(block)]

    @property
    def weights(self) -> int:
        """Number of weights that will be compressed."""
        return sum(target.weights for target in self.targets)

    @property
    def entries(self) -> list[Entry]:
        """How all targets will be stored if no smoothing is left for run time."""
        return [entry for block in self.blocks for entry in self.entries_of(block)]

    @property
    def methods(self) -> list[Method]:
        """The distinct methods, in the order of the recipe; a method's index is in the names of its shared parts."""
        return list(dict.fromkeys(rule.method for rule in self.recipe.rules))

    @property
    def calibrated(self) -> bool:
        """Whether the model runs on calibration rows: for statistics, or to measure candidates for a budget."""
        return self.target_bits is not None or any(self.rules[target.name].needs for target in self.targets)

    @property
    def reads_text(self) -> bool:
        """Whether calibration rows are needed, for weights or for the codebooks of a cache."""
        return self.calibrated or self.learned_cache is not None

    @property
    def learned_cache(self) -> KVCacheConfig | None:
        """The options of a cache whose codebooks are learned after the blocks; None without one."""
        cache = self.recipe.cache
        return cache if cache is not None and cache.codebook == "learned" else None

    def entries_of(self, block: Block, smoothed: Collection[str] = ()) -> list[Entry]:
        """How the targets of a block will be stored. smoothed: paths of those whose input is divided at run time."""
        entries = []
        for target in self.compressed(block):
            method = self.rules[target.name].method
            shared = f"{block.name}.shared_parts.{self.methods.index(method)}" if method.shared_layout() else None
            entries.append(Entry(target, method, block.local(target) in smoothed, shared))
        return entries


def make_plan(stream: BlockStream, recipe: Recipe) -> Plan:
    """The plan for a model; UsageError for a rule that matches nothing or a recipe that compresses nothing.

    A recipe with a `cache` may leave all weights as they are.
    """
    plan = Plan(recipe, stream.blocks, recipe.assign(stream.blocks), dense_weights(stream), drafts=draft_bytes(stream))
    mixture = any(isinstance(module, Experts) for layer in stream.skeletons for module in layer.modules())
    if recipe.experts and not (mixture and any(rule.needs for rule in recipe.rules + recipe.candidates)):
        raise UsageError(f"recipe {recipe.name}: 'experts' has no effect without a mixture and a calibrated method")
    if not plan.targets and (recipe.cache is None or recipe.candidates):
        raise UsageError(f"recipe {recipe.name} compresses nothing in this model")
    return plan
