"""Linear layers of any class: a module counts as one where a run proves that it computes x Wᵀ + b.

A weight may be stored transposed, as (I, O): GPT-2's Conv1D. Inside of this package every weight is (O, I), so such a
module becomes an nn.Linear, and its checkpoint is read and written through a transposition.
Shape legend: O outputs, I inputs.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from vqcompress.storage.checkpoint import Checkpoint

Kind = Literal["linear", "transposed"]
# The widths of the proof: of the longer and the shorter side of a weight.
LONG, SHORT = 24, 16


def kind_of(module: nn.Module) -> Kind | None:
    """Whether a module computes x Wᵀ + b of its own `weight`, (O, I) or transposed, and `bias`; None if not."""
    if type(module).forward is nn.Linear.forward:
        return "linear"
    own = dict(module.named_parameters())
    weight, bias = own.get("weight"), own.get("bias")
    if weight is None or weight.dim() != 2 or len(own) != 1 + (bias is not None) or [*module.buffers()]:
        return None
    kinds: tuple[Kind, Kind] = ("linear", "transposed")
    return next((kind for kind in kinds if _is_exact(module, kind)), None)


def shape_of(module: nn.Module) -> tuple[tuple[int, int], bool] | None:
    """The shape (O, I) of a linear layer's weight and whether it has a bias; None of any other module."""
    if (kind := kind_of(module)) is None:
        return None
    rows, columns = module.get_parameter("weight").shape
    return (rows, columns) if kind == "linear" else (columns, rows), getattr(module, "bias", None) is not None


@torch.no_grad()
def _is_exact(module: nn.Module, kind: Kind) -> bool:
    """Whether a narrow copy of a module, with random weights, computes on random inputs what its kind says."""
    draw = torch.Generator().manual_seed(0)
    rows, columns = module.get_parameter("weight").shape
    # Equal sides stay equal.
    narrow = {rows: LONG, columns: SHORT} if rows > columns else {columns: LONG, rows: SHORT}
    # The model may be built under another default device or type.
    with torch.device("cpu"):
        weight = torch.randn(narrow[rows], narrow[columns], generator=draw, dtype=torch.float32)
        weight_OI = weight if kind == "linear" else weight.T
        bias = torch.randn(len(weight_OI), generator=draw, dtype=torch.float32)
        # Of several magnitudes, since a layer may also clamp.
        x = torch.randn(6, 4, weight_OI.shape[1], generator=draw, dtype=torch.float32)
        x *= 10.0 ** torch.arange(-3, 3)[:, None, None]
        clone = copy.copy(module)
        parameters = {"weight": weight, "bias": bias if getattr(module, "bias", None) is not None else None}
        clone.__dict__["_parameters"] = {n: p if p is None else nn.Parameter(p) for n, p in parameters.items()}
        clone.training = False
        for attribute, value in list(vars(clone).items()):
            if type(value) is int and value in narrow:
                setattr(clone, attribute, narrow[value])
        wanted = linear(x, weight_OI, parameters["bias"])
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
    kinds = {path: kind for path, module in others.items() if (kind := kind_of(module))}
    for path in kinds:
        (outputs, inputs), has_bias = shape_of(others[path]) or ((0, 0), False)
        dtype = others[path].get_parameter("weight").dtype
        root.set_submodule(path, nn.Linear(inputs, outputs, has_bias, device="meta", dtype=dtype))
    return [path for path, kind in kinds.items() if kind == "transposed"]


def transposed(tensors: dict[str, Tensor], names: Collection[str]) -> dict[str, Tensor]:
    """Tensors by name, the named ones transposed. A marker that stands in the place of a weight has one dimension."""
    return {n: t.T.contiguous() if n in names and t.dim() == 2 else t for n, t in tensors.items()}


class TransposedCheckpoint(Checkpoint):
    """A checkpoint as if the named weights were stored as (O, I)."""

    straight = True

    def __init__(self, source: Checkpoint, names: Collection[str]):
        self._source, self._names = source, names
        self.path, self.config = source.path, source.config
        self.tensors = {
            n: replace(i, shape=i.shape[::-1]) if n in names and len(i.shape) == 2 else i
            for n, i in source.tensors.items()
        }

    def holders(self, names: Iterable[str]) -> tuple[Checkpoint, set[str]]:
        """The source's, of tensors as they are stored."""
        return self._source.holders(names)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors, on the CPU in their stored type."""
        return transposed(self._source.read(names), self._names)
