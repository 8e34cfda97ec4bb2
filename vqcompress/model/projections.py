"""Linear layers of any class: a module counts as one where a run proves that it computes x Wᵀ + b.

A weight may be stored transposed, as (I, O): GPT-2's Conv1D. Inside of this package every weight is (O, I), so such a
module becomes an nn.Linear, and its checkpoint is read and written through a transposition.
Shape legend: O outputs, I inputs.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from vqcompress.storage.checkpoint import Checkpoint, DerivedCheckpoint

# The widths of the proof: of the longer and the shorter side of a weight.
LONG, SHORT = 24, 16


class Form(NamedTuple):
    """What a linear layer looks like. shape: (O, I) of its weight, which may be stored transposed."""

    shape: tuple[int, int]
    bias: bool
    transposed: bool


def form_of(module: nn.Module) -> Form | None:
    """The form of a module that computes x Wᵀ + b of its own `weight` and `bias`; None if it does anything else."""
    own, plain = dict(module.named_parameters()), type(module).forward is nn.Linear.forward
    if getattr(own.get("weight"), "ndim", 0) != 2:
        return None
    if not plain and (own.keys() - {"weight", "bias"} or [*module.buffers()]):
        return None
    (rows, columns), bias = own["weight"].shape, "bias" in own
    forms = Form((rows, columns), bias, False), Form((columns, rows), bias, True)
    return forms[0] if plain else next((form for form in forms if _is_exact(module, form.transposed)), None)


@torch.no_grad()
def _is_exact(module: nn.Module, transposed: bool) -> bool:
    """Whether a narrow copy of a module, with random weights, computes x Wᵀ + b of random inputs."""
    draw, sides = torch.Generator().manual_seed(0), module.get_parameter("weight").shape
    # Equal sides stay equal.
    narrow = {max(sides): LONG, min(sides): SHORT}
    # The model may be built under another default device or type.
    with torch.device("cpu"):
        weight = torch.randn([narrow[side] for side in sides], generator=draw, dtype=torch.float32)
        weight_OI = weight.T if transposed else weight
        bias = torch.randn(len(weight_OI), generator=draw, dtype=torch.float32)
        # Of several magnitudes, since a layer may also clamp.
        x = torch.randn(6, 4, weight_OI.shape[1], generator=draw, dtype=torch.float32)
        x *= 10.0 ** torch.arange(-3, 3)[:, None, None]
        clone, parameters = copy.copy(module), {"weight": weight, "bias": bias}
        own = {name: p if p is None else nn.Parameter(parameters[name]) for name, p in module._parameters.items()}
        widths = {name: narrow[value] for name, value in vars(module).items() if type(value) is int and value in narrow}
        clone.__dict__ |= {"_parameters": own, "training": False, **widths}
        wanted = linear(x, weight_OI, own.get("bias"))
        try:
            found = clone(x)
            return found.shape == wanted.shape and torch.allclose(found, wanted, rtol=1e-4, atol=1e-4)
        except Exception:  # the forward of a module that is no linear layer may raise anything
            return False


def straighten(root: nn.Module) -> list[str]:
    """Replace linear layers of other classes below root, which has no memory, by nn.Linear.

    Returns the paths of those whose weight was transposed.
    """
    others = {path: module for path, module in root.named_modules() if not isinstance(module, nn.Linear)}
    found = {path: form for path, module in others.items() if (form := form_of(module))}
    for path, form in found.items():
        dtype = others[path].get_parameter("weight").dtype
        root.set_submodule(path, nn.Linear(*form.shape[::-1], form.bias, device="meta", dtype=dtype))
    return [path for path, form in found.items() if form.transposed]


def transposed(tensors: dict[str, Tensor], names: Collection[str]) -> dict[str, Tensor]:
    """Tensors by name, the named ones transposed. A marker that stands in the place of a weight has one dimension."""
    return {n: t.T.contiguous() if n in names and t.dim() == 2 else t for n, t in tensors.items()}


class TransposedCheckpoint(DerivedCheckpoint):
    """A checkpoint as if the named weights were stored as (O, I)."""

    straight = True

    def __init__(self, source: Checkpoint, names: Collection[str]):
        super().__init__(source)
        self._names = names
        self.tensors = {
            n: replace(i, shape=i.shape[::-1]) if n in names and len(i.shape) == 2 else i
            for n, i in source.tensors.items()
        }

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors, on the CPU in their stored type."""
        return transposed(self._source.read(names), self._names)
