"""The inputs of a block's weights, and the modules that smoothing factors of an input can be folded into.

A fold divides a producer's output by s and multiplies the columns of its consumers by s. It is accepted only if the
block's output stays the same with random factors in place. That is why no architecture needs a table, and why an
unknown consumer cannot be overlooked. All experts of a mixture read one input, together with the router.
Parameters get new tensors, never new values in place: they may share memory with tensors that were read from disk.
Shape legend: I input channels, R rows of the producer.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from vqcompress.model.readers import Read, Readers, observe
from vqcompress.storage.targets import Block

Kind = Literal["norm", "norm_plus_one", "rows"]
Role = Literal["norm", "attention", "mlp"]
Run = Callable[[nn.Module], Tensor]


@dataclass(frozen=True)
class Producer:
    """A module whose output can be divided by s (R,). rows_I: the row that makes each input channel.

    kind: `norm` multiplies by its weight, `norm_plus_one` by 1 + weight (Gemma), `rows` is a linear layer.
    """

    module: str
    kind: Kind
    rows_I: Tensor


@dataclass(frozen=True)
class Input:
    """An activation that targets read. consumers: names inside the block of all modules that read it. channels: I.

    reader: the module that is called with all of it. mixture: the experts' module, if this input has only the tokens
    of one expert; statistics may then be taken from the tokens of all. role: the origin of the input, as the options of
    smoothing name it. producer: the module that a factor can be folded into, or None.
    """

    consumers: tuple[str, ...]
    channels: int
    reader: str
    role: Role
    producer: Producer | None
    mixture: str | None = None


@dataclass(frozen=True)
class _Proof:
    """Tries folds. run: calls the block. reference: its output without a fold. enabled: False accepts none, untried."""

    block: nn.Module
    run: Run
    reference: Tensor
    enabled: bool

    def first(self, candidates: Iterable[Producer], consumers: tuple[str, ...]) -> Producer | None:
        """The first candidate that a factor of the consumers can be folded into, or None."""
        return next((c for c in candidates if self.enabled and self.is_exact(c, consumers)), None)

    @torch.no_grad()
    def is_exact(self, producer: Producer, consumers: tuple[str, ...]) -> bool:
        """Whether dividing the producer's output undoes, to 1 %, the effect of multiplying the consumers' columns.

        Measured on the block's output with random powers of two, which cost no rounding. An overlooked consumer would
        see a changed input, and the output would change.
        """
        touched = [self.block.get_submodule(name) for name in (producer.module, *consumers)]
        saved = [(parameter, parameter.data) for module in touched for parameter in module.parameters(recurse=False)]
        rows = int(producer.rows_I.max()) + 1
        s_R = torch.randint(-1, 2, (rows,), generator=torch.Generator().manual_seed(0)).float().exp2()
        try:
            scale_consumers(self.block, consumers, s_R[producer.rows_I])
            alone = (self.run(self.block) - self.reference).abs().max()
            scale_producer(self.block, producer, s_R)
            both = (self.run(self.block) - self.reference).abs().max()
        finally:
            for parameter, data in saved:
                parameter.data = data
        return bool(both < 0.01 * alone)


@torch.no_grad()
def scale_producer(block: nn.Module, producer: Producer, s_R: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Divide a producer's output by s (R,); returns the factors that were applied after rounding, (R,).

    dtype: the type that the norm's weight will be stored in. Its rounding then counts as part of the factor, so that
    the fold stays exact; a weight of zero keeps a factor of 1.
    """
    module = block.get_submodule(producer.module)
    weight = module.get_parameter("weight")
    s_R = s_R.to(weight.device, torch.float32)
    if producer.kind == "rows":
        weight.data = weight / s_R[:, None].to(weight)
    else:
        offset = 1.0 if producer.kind == "norm_plus_one" else 0.0
        gain = weight.float() + offset
        # As stored, and as the model then computes with it, whichever is shorter.
        stored = (gain / s_R - offset).to(dtype or weight.dtype).to(weight.dtype)
        applied = gain / (stored.float() + offset)
        sound = torch.isfinite(applied) & (applied > 0)
        weight.data = torch.where(sound, stored, weight)
        s_R = torch.where(sound, applied, 1.0)
    bias = getattr(module, "bias", None)
    if bias is not None:
        bias.data = bias / s_R.to(bias)
    return s_R


@torch.no_grad()
def scale_consumers(block: nn.Module, consumers: tuple[str, ...], s_I: Tensor) -> None:
    """Multiply the columns of the consumers' weights by s (I,)."""
    for path in consumers:
        weight = block.get_submodule(path).get_parameter("weight")
        weight.data = weight * s_I.to(weight)


def find_inputs(block: nn.Module, layout: Block, run: Run, prove: bool = True) -> list[Input]:
    """The inputs of a block's targets in the order in which they are read, those of experts' last layers at the end.

    run: calls the block on a small batch and returns its output; it is called a few times. The block is left as it was.
    prove: False looks for no producers, whose proofs are most of the runs.
    """
    targets = {layout.local(target) for target in layout.targets}
    seen = observe(block, lambda: run(block))
    proof = _Proof(block, run, seen.output, prove)
    reads = [read for read in seen.reads if targets & set(read.consumers)]
    _merge_scaled(reads, seen, proof)
    inputs: list[Input] = []
    earlier: list[str] = []
    inside = tuple(f"{mixture}." for mixture in seen.mixtures)
    for read in reads:
        candidates = row_candidates(block, earlier, read.channels)
        if read.norm:
            candidates = _norm_candidates(read.norm, read.channels)
        role: Role = "norm" if read.norm else "attention" if _in_attention(block, read.reader) else "mlp"
        consumers = tuple(read.consumers)
        inputs.append(Input(consumers, read.channels, read.reader, role, proof.first(candidates, consumers)))
        # Products of single experts are matched to their last layers by `_expert_inputs`.
        earlier += [path for path in consumers if path in targets and not path.startswith(inside)]
    return inputs + _expert_inputs(seen, proof)


def _merge_scaled(reads: list[Read], seen: Readers, proof: _Proof) -> None:
    """Join experts that read a multiple of a norm's output (Llama-4) to the other readers of that norm, in place.

    The multiple is another tensor than the norm's; the proof shows that a fold into the norm reaches it.
    """
    for scaled in [read for read in reads if read.reader in seen.mixtures and not read.norm]:
        for read in [read for read in reads if read.norm and read.channels == scaled.channels]:
            together = (*read.consumers, *scaled.consumers)
            if proof.first(_norm_candidates(str(read.norm), read.channels), together):
                read.consumers = list(together)
                reads.remove(scaled)
                break


def _expert_inputs(seen: Readers, proof: _Proof) -> list[Input]:
    """The inputs of the last layers of all experts. Folds are proven on the busiest expert of each mixture.

    All experts run the same code, so a fold that is exact in one is exact in all.
    """
    inputs = []
    for name, mixture in seen.mixtures.items():
        experts = [([f"{name}.{leaf}" for leaf in first], f"{name}.{last}") for first, last in mixture.leaves()]
        first, last = experts[seen.busiest[name]]
        channels = int(proof.block.get_submodule(last).get_parameter("weight").shape[1])
        fold = proof.first(row_candidates(proof.block, first, channels), (last,))
        number = first.index(fold.module) if fold else 0
        for first, last in experts:
            producer = replace(fold, module=first[number]) if fold else None
            inputs.append(Input((last,), channels, last, "mlp", producer, name))
    return inputs


def _in_attention(block: nn.Module, name: str) -> bool:
    """Whether a module lies in one that takes an attention mask, below the block itself."""
    parts = name.split(".")
    parents = (block.get_submodule(".".join(parts[:end])) for end in range(1, len(parts)))
    return any("attention_mask" in inspect.signature(parent.forward).parameters for parent in parents)


def _norm_candidates(path: str, channels: int) -> Iterator[Producer]:
    yield Producer(path, "norm", torch.arange(channels))
    yield Producer(path, "norm_plus_one", torch.arange(channels))


def row_candidates(block: nn.Module, earlier: list[str], channels: int) -> Iterator[Producer]:
    """Linear layers that ran before and could make the input row by row, the latest first."""
    for path in reversed(earlier):
        rows = block.get_submodule(path).out_features
        assert isinstance(rows, int)
        if rows == channels:
            yield Producer(path, "rows", torch.arange(channels))
        elif channels % rows == 0:
            # Grouped-query attention: each value head serves channels / rows query heads in a row.
            head = getattr(block.get_submodule(path.rpartition(".")[0]), "head_dim", None)
            if isinstance(head, int) and rows % head == 0:
                heads = torch.arange(rows).view(-1, head)
                yield Producer(path, "rows", heads.repeat_interleave(channels // rows, 0).flatten())
