"""Tuning of what is continuous after the codes are fixed: scales, learned codebooks, and norms with their biases.

Block by block, against the hidden states that the dense model's block puts out (AQLM, arXiv 2401.06118, section 3.4);
and of all blocks together, by distillation: the mean Kullback–Leibler divergence of the model's predictions from its
original's. Gradients of codes there are none; what is stored is rounded to its type once, at the end.
Shape legend: B rows, L tokens of a row, V vocabulary, O output rows, I input columns, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from vqcompress.model.linear import CompressedLinear, SharedParts
from vqcompress.model.stream import BlockStream
from vqcompress.storage.artifact import SMOOTHING, Entry
from vqcompress.storage.distributed import ProcessGroup
from vqcompress.storage.recipe import Tuning

# Of a step; smaller ones make more of the same passes.
BATCH_TOKENS = 2048
WARMUP = 5
# Of norms and biases: those that are zero must be able to move, and a norm of Gemma multiplies by 1 + weight.
LEAST_UNIT = 0.1


class _Master:
    """A stored tensor as something that can be trained. parameter: float32. unit: the size of a step for it.

    dtype: that it is stored in. least: of the unit.
    """

    def __init__(self, name: str, stored: Tensor, dtype: torch.dtype, least: float = 0.0):
        self.name, self.dtype = name, dtype
        self.parameter = nn.Parameter(stored.detach().float().clone())
        self.unit = max(self.parameter.detach().square().mean().sqrt().item(), least)

    def stored(self) -> Tensor:
        """What to store, in the type that it had."""
        value = self.parameter.detach()
        if not self.dtype.is_floating_point:
            limits = torch.iinfo(self.dtype)
            value = value.round().clamp(limits.min, limits.max)
        return value.to(self.dtype).cpu()


class _Tuned(nn.Module):
    """y = decoded weight · x + bias of a compressed linear layer, with the masters in place of its tunable parts."""

    def __init__(self, layer: CompressedLinear, masters: dict[str, _Master]):
        super().__init__()
        self.layer = layer
        self.trained = nn.ParameterDict({name: master.parameter for name, master in masters.items()})
        self.unit_OI: Tensor | None = None
        if masters.keys() == {"scale"}:
            # The rows of a weight are proportional to their scale: decoded once, with a scale of 1.
            ones = {"scale": torch.ones_like(masters["scale"].parameter.detach())}
            self.unit_OI = layer.entry.method.decode(self._parts() | ones, layer.entry.target.shape)

    def _parts(self) -> dict[str, Tensor]:
        return {name: part for name, part in self.layer.parts().items() if name != SMOOTHING}

    def forward(self, x: Tensor) -> Tensor:
        """x (…, I) → (…, O)."""
        if self.unit_OI is not None:
            weight_OI = self.unit_OI * self.trained["scale"][:, None]
        else:
            weight_OI = self.layer.entry.method.decode(
                self._parts() | dict(self.trained), self.layer.entry.target.shape
            )
        if self.layer.entry.smoothed:
            x = x / self.layer.parts()[SMOOTHING].to(x)
        return nn.functional.linear(x, weight_OI.to(x.dtype), self.layer.bias)


def make_tunable(root: nn.Module, prefix: str, entries: Iterable[Entry], stream: BlockStream) -> list[_Master]:
    """Put masters in place below a module, a block or a model in float32; returns them, named as they will be stored.

    prefix: of the module's own name, with its dot. stream: of the original, whose names and types they get.
    """
    disk = stream.names.on_disk
    masters: list[_Master] = []
    made: dict[str, _Master] = {}
    inside = {id(p) for m in root.modules() if isinstance(m, (CompressedLinear, SharedParts)) for p in m.parameters()}
    for path, parameter in root.named_parameters():
        if parameter.dim() == 1 and id(parameter) not in inside:
            name = disk(prefix + path)
            masters.append(_Master(name, parameter, stream.source.tensors[name].dtype, LEAST_UNIT))
            parent, _, name = path.rpartition(".")
            setattr(root.get_submodule(parent), name, masters[-1].parameter)
    for entry in entries:
        path = entry.target.name.removeprefix(prefix)
        layer = root.get_submodule(path)
        assert isinstance(layer, CompressedLinear)
        tuned: dict[str, _Master] = {}
        for part in entry.method.tunable:
            own = part in entry.layout()
            name = disk(f"{entry.target.name}.weight_{part}" if own else f"{entry.shared}.{part}")
            if name not in made:
                stored = layer.parts()[part]
                made[name] = _Master(name, stored, stored.dtype)
            tuned[part] = made[name]
        parent, _, name = path.rpartition(".")
        setattr(root.get_submodule(parent), name, _Tuned(layer, tuned))
    return [*masters, *made.values()]


def _fit(
    masters: list[_Master],
    epochs: int,
    rate: float,
    batches: int,
    seed: int,
    loss_of: Callable[[int], Tensor | None],
    group: ProcessGroup,
    tell: Callable[[int, int], None] = lambda step, steps: None,
) -> None:
    """Adam on the masters, each with steps in its own unit; the rate falls to nothing.

    loss_of: of a batch's number; None if another process of the group has that batch. tell: called before every step,
    with its number and how many there are.
    """
    groups = [{"params": [m.parameter], "lr": 0.0} for m in masters]
    optimizer, steps = torch.optim.Adam(groups, betas=(0.9, 0.95), eps=1e-16), epochs * batches
    draw = torch.Generator().manual_seed(seed)
    order = [int(k) for _ in range(epochs) for k in torch.randperm(batches, generator=draw)]
    with torch.enable_grad():
        for step, k in enumerate(order):
            tell(step, steps)
            now = rate * min(1.0, (step + 1) / WARMUP) * (1 - step / steps)
            for settings, master in zip(optimizer.param_groups, masters, strict=True):
                settings["lr"] = now * master.unit
            optimizer.zero_grad()
            loss = loss_of(k)
            if loss is not None:
                loss.backward()
            for master in masters if group.size > 1 else ():
                gradient = master.parameter.grad
                master.parameter.grad = torch.zeros_like(master.parameter) if gradient is None else gradient
                # All but one add zeros.
                group.all_reduce(master.parameter.grad)
            optimizer.step()


def distill(
    student: nn.Module,
    teacher: nn.Module,
    stream: BlockStream,
    entries: list[Entry],
    rows_NL: Tensor,
    tuning: Tuning,
    seed: int,
    tell: Callable[[int, int], None],
) -> dict[str, Tensor]:
    """New values, by name on disk, of all scales, codebooks and norms of a model, for predictions like its original's.

    student: the compressed model, changed by this. teacher: the original; both in float32 on the same device. stream:
    of the original. rows_NL: calibration tokens. tell: see `_fit`.
    """
    masters = make_tunable(student, "", entries, stream)
    device = next(iter(teacher.parameters())).device
    batches = rows_NL.to(device).split(max(1, BATCH_TOKENS // rows_NL.shape[1]))

    def loss_of(k: int) -> Tensor | None:
        if k % stream.group.size != stream.group.rank:
            return None
        with torch.no_grad():
            wanted_BLV = teacher(batches[k]).logits.float().log_softmax(-1)
        found_BLV = student(batches[k]).logits.float().log_softmax(-1)
        return (wanted_BLV.exp() * (wanted_BLV - found_BLV)).sum(-1).mean()

    _fit(masters, tuning.distill_epochs, tuning.distill_rate, len(batches), seed, loss_of, stream.group, tell)
    return {master.name: master.stored() for master in masters}
