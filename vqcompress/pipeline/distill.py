"""Distillation: training of scales, learned codebooks, norms, and biases of dense layers after the codes are fixed.

The loss is the mean Kullback–Leibler divergence of the model's predictions from those of the original. Codes have no
gradient and stay. Values are trained in float32 and rounded to the stored type once, at the end.
Shape legend: B rows, L tokens of a row, V vocabulary, O output rows, I input channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from vqcompress.model.linear import CompressedLinear, SharedParts
from vqcompress.model.stream import BlockStream
from vqcompress.storage.artifact import SMOOTHING, Entry
from vqcompress.storage.recipe import Tuning

# Tokens of a step: smaller steps learn more in the same number of passes.
BATCH_TOKENS = 2048
WARMUP = 5
# Least unit of norms and biases: zeros must be able to move, and a norm of Gemma multiplies by 1 + weight.
LEAST_UNIT = 0.1


class _Master:
    """A float32 parameter in the place of a stored tensor.

    name, dtype: of the stored tensor. unit: the size of a step, its root mean square but at least `least`.
    """

    def __init__(self, name: str, stored: Tensor, dtype: torch.dtype, least: float = 0.0):
        self.name, self.dtype = name, dtype
        self.parameter = nn.Parameter(stored.detach().float().clone())
        self.unit = max(self.parameter.detach().square().mean().sqrt().item(), least)

    def stored(self) -> Tensor:
        """The value to store, in the stored type."""
        value = self.parameter.detach()
        if not self.dtype.is_floating_point:
            limits = torch.iinfo(self.dtype)
            value = value.round().clamp(limits.min, limits.max)
        return value.to(self.dtype).cpu()


class _Tuned(nn.Module):
    """y = decoded weight · x + bias of a compressed linear layer. trained: takes the place of its tunable parts."""

    def __init__(self, layer: CompressedLinear, trained: dict[str, nn.Parameter]):
        super().__init__()
        self.layer, self.trained = layer, nn.ParameterDict(trained)
        self.unit_OI: Tensor | None = None
        if trained.keys() == {"scale"}:
            # The rows of a weight are proportional to their scale: decoded once, with a scale of 1.
            self.unit_OI = self._decode({"scale": torch.ones_like(trained["scale"].detach())})

    def _decode(self, trained: dict[str, Tensor]) -> Tensor:
        parts = {name: part for name, part in self.layer.parts().items() if name != SMOOTHING}
        return self.layer.entry.method.decode(parts | trained, self.layer.entry.target.shape)

    def forward(self, x: Tensor) -> Tensor:
        """x (…, I) → (…, O)."""
        if self.unit_OI is not None:
            weight_OI = self.unit_OI * self.trained["scale"][:, None]
        else:
            weight_OI = self._decode(dict(self.trained))
        if self.layer.entry.smoothed:
            x = x / self.layer.parts()[SMOOTHING].to(x)
        return nn.functional.linear(x, weight_OI.to(x.dtype), self.layer.bias)


def _attach(root: nn.Module, entries: Iterable[Entry], stream: BlockStream) -> list[_Master]:
    """Put masters in the place of the norms, biases and tunable parts of a float32 model; returns them.

    entries: of its compressed layers. stream: of the original, whose names and types the masters get.
    """
    on_disk, packed = stream.names.on_disk, (CompressedLinear, SharedParts)
    inside = {id(p) for module in root.modules() if isinstance(module, packed) for p in module.parameters()}
    vectors = []
    for path, parameter in root.named_parameters():
        if parameter.dim() == 1 and id(parameter) not in inside:
            name = on_disk(path)
            vectors.append(_Master(name, parameter, stream.source.tensors[name].dtype, LEAST_UNIT))
            parent, _, attribute = path.rpartition(".")
            setattr(root.get_submodule(parent), attribute, vectors[-1].parameter)
    parts: dict[str, _Master] = {}
    for entry in entries:
        layer = root.get_submodule(entry.target.name)
        assert isinstance(layer, CompressedLinear)
        own, trained = entry.layout(), {}
        for part in entry.method.tunable:
            name = on_disk(f"{entry.target.name}.weight_{part}" if part in own else f"{entry.shared}.{part}")
            if name not in parts:
                stored = layer.parts()[part]
                parts[name] = _Master(name, stored, stored.dtype)
            trained[part] = parts[name].parameter
        root.set_submodule(entry.target.name, _Tuned(layer, trained))
    return [*vectors, *parts.values()]


def distill(
    student: nn.Module,
    teacher: nn.Module,
    stream: BlockStream,
    entries: list[Entry],
    rows_NL: Tensor,
    tuning: Tuning,
    seed: int,
    progress: Callable[[int, int], None],
) -> dict[str, Tensor]:
    """New values, by name on disk, of all scales, codebooks and norms of a model, for predictions like its original's.

    Adam, each tensor with steps in its own unit; the rate falls to 0. student: the compressed model, changed by this.
    teacher: the original; both in float32 on the same device. stream: of the original. rows_NL: calibration tokens.
    progress: called before every step with its number and the number of steps.
    """
    masters, group = _attach(student, entries, stream), stream.group
    batches = rows_NL.to(next(teacher.parameters()).device).split(max(1, BATCH_TOKENS // rows_NL.shape[1]))
    gradients = [torch.zeros_like(master.parameter) for master in masters]
    for master, gradient in zip(masters, gradients, strict=True):
        master.parameter.grad = gradient
    optimizer = torch.optim.Adam([{"params": [m.parameter]} for m in masters], betas=(0.9, 0.95), eps=1e-16)
    draw = torch.Generator().manual_seed(seed)
    order = [int(k) for _ in range(tuning.distill_epochs) for k in torch.randperm(len(batches), generator=draw)]
    for step, k in enumerate(order):
        progress(step, len(order))
        rate = tuning.distill_rate * min(1.0, (step + 1) / WARMUP) * (1 - step / len(order))
        for settings, master in zip(optimizer.param_groups, masters, strict=True):
            settings["lr"] = rate * master.unit
        optimizer.zero_grad(set_to_none=False)
        if k % group.size == group.rank:
            with torch.no_grad():
                wanted_BLV = teacher(batches[k]).logits.float().log_softmax(-1)
            found_BLV = student(batches[k]).logits.float().log_softmax(-1)
            (wanted_BLV.exp() * (wanted_BLV - found_BLV)).sum(-1).mean().backward()
        for gradient in gradients:
            # All processes but one add zeros.
            group.all_reduce(gradient)
        optimizer.step()
    return {master.name: master.stored() for master in masters}
