"""Which weights of a block read the same input, and what produces it: found by watching a block run, and proven.

A fold (dividing a producer's output by s, so that its consumers may multiply their columns by s) is accepted only if
the block's output stays what it was with random factors in place. That is why no architecture needs a table, and why
a consumer that nobody knows of cannot be forgotten. All experts of a mixture read one input, with the router.
Parameters get new tensors, never new values in place: they may share memory with what was read from disk.
Shape legend: I input channels, R rows of the producer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vqcompress.model.experts import Experts
from vqcompress.storage.targets import Block

Kind = Literal["norm", "norm_plus_one", "rows"]


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
    """An activation that targets read. consumers: paths inside the block of all that reads it. channels: I.

    reader: the module that is called with all of it. mixture: the experts' module, if only the tokens of one expert
    come by; then those of the others can stand in for them.
    role: what the input comes from, as the knobs of smoothing name it. producer: what a fold can go into, or None.
    """

    consumers: tuple[str, ...]
    channels: int
    reader: str
    role: Literal["norm", "attention", "mlp"]
    producer: Producer | None
    mixture: str | None = None


@dataclass(eq=False)
class _Read:
    """A tensor that was seen entering modules. reader: the first of them."""

    x: Tensor
    reader: str
    consumers: list[str]


@torch.no_grad()
def scale_producer(block: nn.Module, producer: Producer, s_R: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Divide what a producer puts out by s (R,); returns the factors that were really applied, (R,).

    dtype: what the norm's weight will be stored in. Its rounding then counts as part of the factor, so that the fold
    stays exact; a weight of zero keeps a factor of 1.
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


def find_inputs(block: nn.Module, layout: Block, run: Callable[[nn.Module], Tensor], prove: bool = True) -> list[Input]:
    """The inputs of a block's targets in the order in which they are read.

    run: calls the block on a small batch and returns its output; it is called a few times. The block is left as it was.
    prove: look for producers at all, which costs most of the runs.
    """
    local = [layout.local(target) for target in layout.targets]
    mixtures = {path: module for path, module in block.named_modules() if isinstance(module, Experts)}
    reads, norms, busiest, reference = _watch(block, local, mixtures, run)

    def first(candidates: Iterable[Producer], consumers: tuple[str, ...]) -> Producer | None:
        return next((c for c in candidates if prove and _is_exact(block, c, consumers, run, reference)), None)

    for path in mixtures if prove else ():
        # What a router has multiplied is another tensor than the norm's; that the norm is its producer too is proven.
        for own in [read for read in reads if read.reader == path and _storage(read.x) not in norms]:
            for read in reads:
                norm, width, together = norms.get(_storage(read.x)), own.x.shape[-1], (*read.consumers, *own.consumers)
                if norm and read.x.shape[-1] == width and first(_norm_candidates(norm, width), together):
                    read.consumers.extend(own.consumers)
                    reads.remove(own)
                    break
    inputs: list[Input] = []
    earlier: list[str] = []
    for read in reads:
        norm, consumers, channels = norms.get(_storage(read.x)), tuple(read.consumers), read.x.shape[-1]
        candidates = _norm_candidates(norm, channels) if norm else row_candidates(block, earlier, channels)
        attention = any("attn" in path or "attention" in path for path in consumers)
        role: Literal["norm", "attention", "mlp"] = "norm" if norm else "attention" if attention else "mlp"
        inputs.append(Input(consumers, channels, read.reader, role, first(candidates, consumers)))
        # What feeds an expert's last layer is its own first ones, found below.
        earlier += [path for path in consumers if path in local and not _within(path, mixtures)]
    for path, mixture in mixtures.items():
        experts = [([f"{path}.{leaf}" for leaf in heads], f"{path}.{last}") for heads, last in mixture.leaves()]
        heads, last = experts[busiest[path]]
        channels = int(block.get_submodule(last).get_parameter("weight").shape[1])
        fold = first(row_candidates(block, heads, channels), (last,))
        # All experts run the same code, so what holds for the one that most tokens of the probe went to holds for all.
        number = heads.index(fold.module) if fold else 0
        for heads, last in experts:
            producer = replace(fold, module=heads[number]) if fold else None
            inputs.append(Input((last,), channels, last, "mlp", producer, path))
    return inputs


def _within(path: str, modules: Iterable[str]) -> bool:
    return any(path.startswith(module + ".") for module in modules)


def _storage(x: Tensor) -> tuple[int, tuple[int, ...]]:
    """What tells a tensor from others that are alive; a view with the channels kept counts as the same tensor."""
    return x.data_ptr(), (x.numel(), x.shape[-1])


def _watch(
    block: nn.Module, targets: list[str], mixtures: Mapping[str, Experts], run: Callable[[nn.Module], Tensor]
) -> tuple[list[_Read], dict[tuple[int, tuple[int, ...]], str], dict[str, int], Tensor]:
    """Run the block once: what targets read, which norm made which tensor, the expert most used, the output."""
    reads: dict[tuple[int, tuple[int, ...]], _Read] = {}
    made: dict[tuple[int, tuple[int, ...]], str] = {}
    busiest: dict[str, int] = {}
    # Everything seen stays alive until the run is over, or a new tensor could take an old one's address.
    alive: list[Tensor] = []
    handles = []
    for path, module in block.named_modules():
        weight = getattr(module, "weight", None)
        if _within(path, mixtures):
            continue
        if path in mixtures:

            def enter(_: nn.Module, args: tuple[Tensor, ...], path: str = path) -> None:
                heads = [f"{path}.{leaf}" for leaves, _ in mixtures[path].leaves() for leaf in leaves]
                reads.setdefault(_storage(args[0]), _Read(args[0], path, [])).consumers.extend(heads)
                index_TK = mixtures[path].routing(*args)[1]
                busiest[path] = int(torch.bincount(index_TK.flatten())[: len(mixtures[path].leaves())].argmax())

            handles.append(module.register_forward_pre_hook(enter))
        elif path in targets or (isinstance(weight, nn.Parameter) and weight.dim() == 2):
            # A matrix that is no linear layer may be a router: one more consumer, if the proof agrees.
            def read(module: nn.Module, args: tuple[Any, ...], path: str = path) -> None:
                if path in targets or (args and _reads_rows(module, args[0])):
                    reads.setdefault(_storage(args[0]), _Read(args[0], path, [])).consumers.append(path)

            handles.append(module.register_forward_pre_hook(read))
        elif isinstance(weight, nn.Parameter) and weight.dim() == 1:

            def write(_: nn.Module, args: tuple[Tensor, ...], out: Tensor, path: str = path) -> None:
                alive.append(out)
                made[_storage(out)] = path

            handles.append(module.register_forward_hook(write))
    try:
        reference = run(block)
    finally:
        for handle in handles:
            handle.remove()
    wanted = [read for read in reads.values() if any(path in targets for path in read.consumers)]
    return wanted, made, busiest, reference


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


@torch.no_grad()
def _is_exact(
    block: nn.Module,
    producer: Producer,
    consumers: tuple[str, ...],
    run: Callable[[nn.Module], Tensor],
    reference: Tensor,
) -> bool:
    """Whether dividing the producer's output undoes, to 1 %, what multiplying the consumers' columns does.

    Measured on the block's output with random powers of two, which cost no rounding. A consumer that was overlooked
    would see a changed input, and the output would move by as much as it matters.
    """
    touched = [block.get_submodule(path) for path in (producer.module, *consumers)]
    saved = [(parameter, parameter.data) for module in touched for parameter in module.parameters(recurse=False)]
    rows = int(producer.rows_I.max()) + 1
    s_R = torch.randint(-1, 2, (rows,), generator=torch.Generator().manual_seed(0)).float().exp2()
    try:
        scale_consumers(block, consumers, s_R[producer.rows_I])
        alone = (run(block) - reference).abs().max()
        scale_producer(block, producer, s_R)
        both = (run(block) - reference).abs().max()
    finally:
        for parameter, data in saved:
            parameter.data = data
    return bool(both < 0.01 * alone)
