"""Which weights of a block read the same input, and what produces it: observed while the block runs, and proven.

A fold divides a producer's output by s, so that its consumers may multiply their columns by s. It is accepted only if
the block's output stays what it was with random factors in place. That is why no architecture needs a table, and why
an unknown consumer cannot be overlooked. All experts of a mixture read one input, with the router.
Parameters get new tensors, never new values in place: they may share memory with what was read from disk.
Shape legend: I input channels, R rows of the producer.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vqcompress.model.experts import Experts
from vqcompress.storage.targets import Block

Kind = Literal["norm", "norm_plus_one", "rows"]
Role = Literal["norm", "attention", "mlp"]
Run = Callable[[nn.Module], Tensor]
# Distinguishes a tensor from all others that are alive; a view that keeps the channels counts as the same tensor.
Storage = tuple[int, int, int]


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

    reader: the module that is called with all of it. mixture: the experts' module, if only the tokens of one expert
    come by; then those of the others can stand in for them.
    role: where the input comes from, as the options of smoothing name it. producer: what a fold can go into, or None.
    """

    consumers: tuple[str, ...]
    channels: int
    reader: str
    role: Role
    producer: Producer | None
    mixture: str | None = None


@dataclass(frozen=True)
class _Read:
    """A tensor that entered modules. reader: the first of them. norm: the norm that made it, or None."""

    consumers: tuple[str, ...]
    channels: int
    reader: str
    norm: str | None


@dataclass
class _Observer:
    """What one run of a block shows. targets: names of its targets. alive: tensors that must keep their addresses.

    readers: by tensor, the modules that were called with it, the first one first. consumers: the same with a mixture
    replaced by the first layers of its experts. norms: by tensor, the norm that made it. busiest: by mixture, the
    expert that most tokens went to.
    """

    targets: list[str]
    mixtures: Mapping[str, Experts]
    alive: list[Tensor] = field(default_factory=list)
    readers: dict[Storage, list[str]] = field(default_factory=dict)
    consumers: dict[Storage, list[str]] = field(default_factory=dict)
    norms: dict[Storage, str] = field(default_factory=dict)
    busiest: dict[str, int] = field(default_factory=dict)

    def hook(self, name: str, module: nn.Module) -> Any:
        """Observe a module's calls; the handle of the hook, or None if the module tells nothing."""
        weight = getattr(module, "weight", None)
        dim = weight.dim() if isinstance(weight, nn.Parameter) else 0
        if _is_within(name, self.mixtures):
            return None
        if name in self.mixtures:
            return module.register_forward_pre_hook(partial(self._enter_mixture, name))
        if name in self.targets or dim == 2:
            return module.register_forward_pre_hook(partial(self._enter, name))
        return module.register_forward_hook(partial(self._leave_norm, name)) if dim == 1 else None

    def _enter_mixture(self, name: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        mixture = self.mixtures[name]
        self._read(args[0], name, [f"{name}.{leaf}" for leaves, _ in mixture.leaves() for leaf in leaves])
        index_TK = mixture.routing(*args)[1]
        self.busiest[name] = int(torch.bincount(index_TK.flatten())[: len(mixture.leaves())].argmax())

    def _enter(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        # A matrix that is no linear layer may be a router: one more consumer, if the proof agrees.
        if name in self.targets or (args and _reads_rows(module, args[0])):
            self._read(args[0], name, [name])

    def _leave_norm(self, name: str, _: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        self.alive.append(out)
        self.norms[_storage(out)] = name

    def _read(self, x: Tensor, reader: str, consumers: list[str]) -> None:
        self.alive.append(x)
        self.readers.setdefault(_storage(x), []).append(reader)
        self.consumers.setdefault(_storage(x), []).extend(consumers)

    def reads(self) -> list[_Read]:
        """The tensors that targets read, in the order in which they were read."""
        wanted = {key: names for key, names in self.consumers.items() if not set(names).isdisjoint(self.targets)}
        return [_Read(tuple(names), key[2], self.readers[key][0], self.norms.get(key)) for key, names in wanted.items()]


@dataclass(frozen=True)
class _Proof:
    """Tries folds. run: calls the block. reference: its output as it is. enabled: False accepts no fold, untried."""

    block: nn.Module
    run: Run
    reference: Tensor
    enabled: bool

    def first(self, candidates: Iterable[Producer], consumers: tuple[str, ...]) -> Producer | None:
        """The first candidate that a factor of the consumers can be folded into."""
        return next((c for c in candidates if self.enabled and self.is_exact(c, consumers)), None)

    @torch.no_grad()
    def is_exact(self, producer: Producer, consumers: tuple[str, ...]) -> bool:
        """Whether dividing the producer's output undoes, to 1 %, what multiplying the consumers' columns does.

        Measured on the block's output with random powers of two, which cost no rounding. An overlooked consumer would
        see a changed input, and the output would move by as much as that matters.
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
    """The inputs of a block's targets in the order in which they are read.

    run: calls the block on a small batch and returns its output; it is called a few times. The block is left as it was.
    prove: False looks for no producers, whose proofs are most of the runs.
    """
    targets = [layout.local(target) for target in layout.targets]
    observed, reference = observe(block, targets, run)
    proof = _Proof(block, run, reference, prove)
    reads = merge_reads(observed.reads(), observed.mixtures, proof)
    return prove_folds(reads, observed, proof) + expert_inputs(observed, proof)


def observe(block: nn.Module, targets: list[str], run: Run) -> tuple[_Observer, Tensor]:
    """What a run of the block shows, and its output."""
    mixtures = {name: module for name, module in block.named_modules() if isinstance(module, Experts)}
    observer = _Observer(targets, mixtures)
    handles = [handle for name, module in block.named_modules() if (handle := observer.hook(name, module))]
    try:
        return observer, run(block)
    finally:
        for handle in handles:
            handle.remove()
        observer.alive.clear()


def merge_reads(reads: list[_Read], mixtures: Mapping[str, Experts], proof: _Proof) -> list[_Read]:
    """The reads, with experts that read a multiple of a norm's output joined to the other readers of that norm.

    What a router has multiplied is another tensor than the norm's; that a fold into the norm reaches it is proven.
    """
    merged = list(reads)
    for scaled in reads:
        if scaled.norm or scaled.reader not in mixtures:
            continue
        for k, read in enumerate(merged):
            together = (*read.consumers, *scaled.consumers)
            if not read.norm or read.channels != scaled.channels:
                continue
            if proof.first(_norm_candidates(read.norm, read.channels), together):
                merged[k] = replace(read, consumers=together)
                merged = [other for other in merged if other is not scaled]
                break
    return merged


def prove_folds(reads: list[_Read], observed: _Observer, proof: _Proof) -> list[Input]:
    """The inputs that all tokens go through, each with the producer that a fold into is exact."""
    inputs: list[Input] = []
    earlier: list[str] = []
    for read in reads:
        if read.norm:
            candidates = _norm_candidates(read.norm, read.channels)
        else:
            candidates = row_candidates(proof.block, earlier, read.channels)
        role: Role = "norm" if read.norm else "attention" if _in_attention(proof.block, read.reader) else "mlp"
        producer = proof.first(candidates, read.consumers)
        inputs.append(Input(read.consumers, read.channels, read.reader, role, producer))
        # What feeds an expert's last layer is found by `expert_inputs`.
        own = [name for name in read.consumers if name in observed.targets]
        earlier += [name for name in own if not _is_within(name, observed.mixtures)]
    return inputs


def expert_inputs(observed: _Observer, proof: _Proof) -> list[Input]:
    """The inputs of the last layers of all experts. Folds are proven on the busiest expert of each mixture.

    All experts run the same code, so a fold that is exact in one is exact in all.
    """
    inputs = []
    for name, mixture in observed.mixtures.items():
        experts = [([f"{name}.{leaf}" for leaf in heads], f"{name}.{last}") for heads, last in mixture.leaves()]
        heads, last = experts[observed.busiest[name]]
        channels = int(proof.block.get_submodule(last).get_parameter("weight").shape[1])
        fold = proof.first(row_candidates(proof.block, heads, channels), (last,))
        number = heads.index(fold.module) if fold else 0
        for heads, last in experts:
            producer = replace(fold, module=heads[number]) if fold else None
            inputs.append(Input((last,), channels, last, "mlp", producer, name))
    return inputs


def _in_attention(block: nn.Module, name: str) -> bool:
    """Whether a module lies in one that takes an attention mask, below the block itself."""
    parts = name.split(".")
    parents = (block.get_submodule(".".join(parts[:end])) for end in range(1, len(parts)))
    return any("attention_mask" in inspect.signature(parent.forward).parameters for parent in parents)


def _is_within(name: str, modules: Iterable[str]) -> bool:
    return any(name.startswith(module + ".") for module in modules)


def _storage(x: Tensor) -> Storage:
    return x.data_ptr(), x.numel(), x.shape[-1]


def _reads_rows(module: nn.Module, x: object) -> bool:
    """Whether a module could multiply x by the rows of its weight."""
    return isinstance(x, Tensor) and x.dim() > 0 and x.shape[-1] == module.get_parameter("weight").shape[-1]


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
