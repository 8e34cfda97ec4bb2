"""The contract of a compression method: its options, frozen, with `encode` and `decode` on one 2-D weight.

Defaults go through `decode`, so a method works end to end before it has a kernel. Methods see tensors only: never a
path, a module, a model's name or a rank.
Shape legend: O output rows, I input columns, T tokens, E experts, S rows sorted by expert.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from vqcompress.methods.statistics import Statistics

PackedTensors = dict[str, Tensor]
Shape = tuple[int, int]
Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]


class Method(BaseModel):
    """Options, validated and frozen. A subclass adds fields for them and defines at least `layout`, `encode`, `decode`.

    name: the method's name in recipes. version: raise it when stored tensors change their meaning. dense: an artifact
    holds the weight itself, under its own name.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: ClassVar[str]
    version: ClassVar[int] = 1
    dense: ClassVar[bool] = False

    @property
    def needs(self) -> frozenset[str]:
        """The names of the `statistics` that `encode` reads; empty for a method that needs no data."""
        return frozenset()

    @property
    def tunable(self) -> tuple[str, ...]:
        """Packed tensors that gradient descent may tune after `encode`; `decode` is differentiable in them."""
        return ()

    @property
    def compensates(self) -> bool:
        """Whether a weight that closes its block is changed before `encode`, to correct the block's earlier errors."""
        return False

    def layout(self, shape: Shape) -> Layout:
        """Type and shape of every tensor that `encode` returns for an (O, I) weight."""
        raise TypeError(f"{type(self).__name__} does not define layout")

    def shared_layout(self) -> Layout:
        """Type and shape of the tensors that all targets of a block with these options share; usually none."""
        return {}

    def fit_shared(
        self, weights: list[Tensor], statistics: list[Statistics], generator: torch.Generator
    ) -> PackedTensors:
        """The shared tensors of a block, fitted on its (O, I) float32 weights; called if `shared_layout` names any."""
        return {}

    def encode(
        self, weight_OI: Tensor, statistics: Statistics, generator: torch.Generator, shared: PackedTensors | None = None
    ) -> PackedTensors:
        """The tensors to store for a finite float32 weight. Deterministic in its arguments and `generator`."""
        raise TypeError(f"{type(self).__name__} does not define encode")

    def decode(self, tensors: PackedTensors, shape: Shape) -> Tensor:
        """The float32 (O, I) weight that was stored, by definition. `tensors` includes the shared ones."""
        raise TypeError(f"{type(self).__name__} does not define decode")

    def check(self, tensors: PackedTensors, shape: Shape) -> None:
        """Raise ValueError naming the tensor if a stored value is out of its range or not finite."""
        for name, tensor in tensors.items():
            if not is_finite(tensor):
                raise ValueError(f"{name} holds NaN or Inf")

    def prepare(
        self, tensors: PackedTensors, shape: Shape, dtype: torch.dtype = torch.float32, packed: bool = False
    ) -> PackedTensors:
        """The tensors that `linear` reads, computed once and never stored. Default: the decoded weight in `dtype`.

        packed: return nothing larger than the stored tensors; without a kernel every call then decodes.
        """
        return dict(tensors) if packed else {"weight": self.decode(tensors, shape).to(dtype)}

    def linear(self, x_TI: Tensor, prepared: PackedTensors, shape: Shape) -> Tensor:
        """x Wᵀ, (T, O) in the type of x, from the prepared tensors."""
        weight_OI = prepared["weight"] if "weight" in prepared else self.decode(prepared, shape).to(x_TI.dtype)
        return x_TI @ weight_OI.T

    def grouped(self, x_SI: Tensor, ends_E: Tensor, prepared: PackedTensors, shape: Shape) -> Tensor:
        """`linear` of the rows of every expert, (S, O), from the prepared tensors of all experts, stacked (E, …).

        x_SI: sorted by expert. ends_E: int32, where the rows of each expert end. Rows behind the last are undefined.
        """

        def linear(x_TI: Tensor, e: int) -> Tensor:
            return self.linear(x_TI, {name: tensor[e] for name, tensor in prepared.items()}, shape)

        return by_expert(x_SI, ends_E, shape[0], linear)

    def has_kernel(self, shape: Shape) -> bool:
        """Whether a GPU multiplies with the stored tensors, not with a decoded weight."""
        return False

    def describe(self) -> dict[str, Any]:
        """JSON for an artifact's config: the method's name, version and every option."""
        return {"method": self.name, "version": self.version, **self.model_dump(mode="json")}


def by_expert(x_SI: Tensor, ends_E: Tensor, outputs: int, linear: Callable[[Tensor, int], Tensor]) -> Tensor:
    """linear(rows, e) of the rows of every expert, (S, O); zeros behind the last expert's."""
    y_SO, start = x_SI.new_zeros((len(x_SI), outputs)), 0
    for e, end in enumerate(ends_E.tolist()):
        if end > start:
            y_SO[start:end] = linear(x_SI[start:end], e)
        start = end
    return y_SO


def expert_of(ends_E: Tensor, rows: int) -> Tensor:
    """The expert of every row, int32 (rows,); rows behind the last expert's count as its own."""
    row_T = torch.arange(rows, device=ends_E.device, dtype=torch.int32)
    return torch.searchsorted(ends_E, row_T, right=True, out_int32=True).clamp(max=len(ends_E) - 1)


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor of any type holds neither NaN nor Inf."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    # The least and the largest are NaN if any number is. float8 has no arithmetic.
    extremes = torch.aminmax(tensor.float() if tensor.itemsize == 1 else tensor)
    return bool(torch.stack(extremes).isfinite().all())


def layout_bits(layout: Layout) -> int:
    """Number of bits that the tensors of a layout take."""
    return sum(8 * dtype.itemsize * torch.Size(shape).numel() for dtype, shape in layout.values())
