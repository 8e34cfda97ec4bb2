"""What a recipe will do to a model, from its config alone: which target gets which method."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vqcompress.errors import UsageError
from vqcompress.methods import Method
from vqcompress.model.coverage import dense_weights
from vqcompress.model.experts import Experts
from vqcompress.model.stream import BlockStream
from vqcompress.storage.artifact import Entry
from vqcompress.storage.recipe import Recipe, Rule
from vqcompress.storage.targets import Block, Target

# See `Plan.ahead`.
AHEAD = 2


@dataclass(frozen=True)
class Plan:
    """Which target gets which method. rules: target name → rule, for every linear layer of the blocks.

    left_dense: what stays as it is although it is a large weight → why. target_bits: the budget, if there is one.
    """

    recipe: Recipe
    blocks: list[Block]
    rules: dict[str, Rule]
    left_dense: dict[str, str]
    target_bits: float | None = None

    def compressed(self, block: Block) -> list[Target]:
        """The targets of a block whose rule is more than to keep them."""
        return [t for t in block.targets if not self.rules[t.name].method.dense]

    def correcting(self, block: Block) -> set[str]:
        """Paths of the targets of a block that correct its output if they close it."""
        return {block.local(t) for t in self.compressed(block) if self.rules[t.name].method.compensates}

    @property
    def needs_reference(self) -> bool:
        """Whether the dense model's hidden states are needed too, to correct the output of blocks by."""
        return any(self.correcting(block) for block in self.blocks)

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
        return [self.entry(block, target, False) for block in self.blocks for target in self.compressed(block)]

    @property
    def methods(self) -> list[Method]:
        """The distinct methods, in the order of the recipe; their places name shared parts on disk."""
        return list(dict.fromkeys(rule.method for rule in self.recipe.rules))

    @property
    def calibrated(self) -> bool:
        """Whether any target asks for statistics, or a budget for measurements; if not, the model is never run."""
        return self.target_bits is not None or any(self.rules[target.name].needs for target in self.targets)

    @property
    def reads_text(self) -> bool:
        """Whether rows are needed, for weights or for the codebooks of a cache."""
        return self.calibrated or self.learns_cache

    @property
    def learns_cache(self) -> bool:
        """Whether codebooks of keys and values come after the blocks."""
        return self.recipe.cache is not None and self.recipe.cache.codebook == "learned"

    @property
    def goes_on(self) -> bool:
        """Whether more work comes after the blocks."""
        return self.learns_cache or self.recipe.tuning is not None

    def ahead(self, device: torch.device) -> int:
        """How many blocks may be made while another is written: none with calibration, a rotated model or a GPU."""
        return 0 if self.calibrated or self.recipe.rotation or device.type != "cpu" else AHEAD

    def entry(self, block: Block, target: Target, smoothed: bool) -> Entry:
        """How the target will be stored."""
        method = self.rules[target.name].method
        shared = f"{block.name}.shared_parts.{self.methods.index(method)}" if method.shared_layout() else None
        return Entry(target, method, smoothed, shared)


def make_plan(stream: BlockStream, recipe: Recipe) -> Plan:
    """The plan for a model; UsageError for a rule that matches nothing or a recipe that compresses nothing.

    A recipe with a `cache` may leave all weights as they are.
    """
    plan = Plan(recipe, stream.blocks, recipe.assign(stream.blocks), dense_weights(stream))
    if not plan.targets and (recipe.cache is None or recipe.candidates):
        raise UsageError(f"recipe {recipe.name} compresses nothing in this model")
    if recipe.experts and not any(isinstance(m, Experts) for layer in stream.skeletons for m in layer.modules()):
        why = stream.fused_reason or "the model has no mixture of experts"
        raise UsageError(f"recipe {recipe.name}: 'experts' speaks of nothing here: {why}")
    if recipe.experts and not plan.calibrated:
        raise UsageError(f"recipe {recipe.name}: 'experts' calibrates nothing: its methods need no data")
    return plan
