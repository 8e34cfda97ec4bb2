"""The facts about one block that all steps of its compression share."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from vqcompress.model.stream import BlockStream
from vqcompress.pipeline.calibration import PROBE_TOKENS
from vqcompress.pipeline.plan import Plan
from vqcompress.storage.hidden_states import State, States
from vqcompress.storage.recipe import Rule
from vqcompress.storage.targets import Block


def seed_for(seed: int, name: str) -> int:
    """A seed that depends on the run's and a name."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little") >> 1


def generator_for(seed: int, name: str) -> torch.Generator:
    """Random state that depends on the run's seed and a name only, never on what was done before."""
    return torch.Generator().manual_seed(seed_for(seed, name))


@dataclass(frozen=True)
class BlockContext:
    """A block of a run. index: its number. seed: of the run.

    states: what enters it, by batch; empty for a data-free plan. reference: what enters it in the dense model; empty
    unless the recipe corrects outputs. few_tokens: whether the calibration rows hold hardly any different tokens.
    """

    stream: BlockStream
    plan: Plan
    index: int
    states: States
    seed: int
    reference: States = field(default_factory=list)
    few_tokens: bool = False

    @property
    def block(self) -> Block:
        """Its name and targets."""
        return self.plan.blocks[self.index]

    @property
    def rules(self) -> dict[str, Rule]:
        """Path in the block → rule, of the targets that are compressed."""
        return {self.block.local(t): self.plan.rules[t.name] for t in self.plan.compressed(self.block)}

    def run(self, module: nn.Module, state: State) -> Tensor:
        """The hidden states that the block puts out as `module`."""
        return self.stream.run(module, self.index, state)

    def probe(self, rows: int = 1, tokens: int | None = PROBE_TOKENS) -> State:
        """The state of the first rows and tokens of all, the same for every process.

        Of a model that is not plain the whole first batch: only its code knows how to cut such a state.
        """
        first: State = self.states[0]
        if self.stream.calls.plain:
            first = State(first.hidden[:rows, :tokens], first.ids[:rows, :tokens])
        return self.stream.group.broadcast(0, first.to("cpu")).to(self.stream.device)

    def count_tokens(self) -> tuple[int, int]:
        """The number of calibration tokens of all processes, and of the processes before this one."""
        group = self.stream.group
        counts = group.all_gather(sum(state.ids.numel() for state in self.states))
        return sum(counts), sum(counts[: group.rank])
