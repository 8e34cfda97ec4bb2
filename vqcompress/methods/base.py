"""The contract of a compression method: a frozen description of its knobs with `encode` and `decode` on one 2-D weight.

Defaults go through `decode`, so a method works end to end before it has a kernel. Methods see tensors only: never a
path, a module, a model's name or a rank.
Shape legend: O output rows, I input columns, T tokens, E experts, S rows sorted by expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from vqcompress.methods.statistics import Statistics

PackedTensors = dict[str, Tensor]
Shape = tuple[int, int]
Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]


class Method(BaseModel):
    """Knobs, validated and frozen; a subclass adds fields for them and overrides what differs from storing a matrix.

    name: what recipes call it. version: raised when the meaning of the stored parts changes. dense: an artifact holds
    the weight itself, under its own name. any_float: encode takes a weight in any float type as it
    is stored, and looks for NaN and Inf itself.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: ClassVar[str]
    version: ClassVar[int] = 1
    dense: ClassVar[bool] = False
    any_float: ClassVar[bool] = False

    @property
    def needs(self) -> frozenset[str]:
        """The names of the `statistics` that encode wants; empty means data-free."""
        return frozenset()

    @property
    def tunable(self) -> tuple[str, ...]:
        """Packed tensors that gradient descent may tune after `encode`; `decode` is differentiable in them."""
        return ()

    @property
    def compensates(self) -> bool:
        """Whether a weight that closes its block is moved first, to make good the errors before it."""
        return False

    def layout(self, shape: Shape) -> Layout:
        """Type and shape of every part that `encode` stores for an (O, I) weight, without the shared ones."""
        raise TypeError(f"{type(self).__name__} does not define layout")

    def shared_layout(self) -> Layout:
        """Type and shape of the parts that all targets of a block with these knobs share; usually none."""
        return {}

    def fit_shared(
        self, weights: list[Tensor], statistics: list[Statistics], generator: torch.Generator
    ) -> PackedTensors:
        """The shared parts of a block, fitted on its (O, I) float32 weights; called if `shared_layout` names any."""
        return {}

    def encode(
        self, weight_OI: Tensor, statistics: Statistics, generator: torch.Generator, shared: PackedTensors | None = None
    ) -> PackedTensors:
        """The parts to store for a finite float32 weight. Deterministic in its arguments and `generator`."""
        raise TypeError(f"{type(self).__name__} does not define encode")

    def decode(self, parts: PackedTensors, shape: Shape) -> Tensor:
        """The float32 (O, I) weight that was stored, by definition. `parts` includes the shared ones."""
        raise TypeError(f"{type(self).__name__} does not define decode")

    def decode_rows(self, parts: PackedTensors, shape: Shape) -> Iterator[Tensor]:
        """What `decode` gives, some rows after the other where that is faster."""
        yield self.decode(parts, shape)

    def check(self, parts: PackedTensors, shape: Shape) -> None:
        """Raise ValueError naming the part if a stored value is out of its range or not finite."""
        for name, part in parts.items():
            if not is_finite(part):
                raise ValueError(f"{name} holds NaN or Inf")

    def prepare(
        self, parts: PackedTensors, shape: Shape, dtype: torch.dtype = torch.float32, packed: bool = False
    ) -> PackedTensors:
        """What `linear` reads for inputs of a type, made once and never stored. Default: the decoded weight.

        packed: nothing larger than what is stored; a CPU then decodes at every call, a GPU has kernels for that anyway.
        """
        return dict(parts) if packed else {"weight": self.decode(parts, shape).to(dtype)}

    def linear(self, x_TI: Tensor, prepared: PackedTensors, shape: Shape) -> Tensor:
        """x Wᵀ, (T, O) in the type of x, from the prepared parts."""
        weight_OI = prepared["weight"] if "weight" in prepared else self.decode(prepared, shape).to(x_TI.dtype)
        return x_TI @ weight_OI.T

    def grouped(self, x_SI: Tensor, ends_E: Tensor, prepared: PackedTensors, shape: Shape) -> Tensor:
        """`linear` of the rows of every expert, (S, O), from the prepared parts of all experts, stacked (E, …).

        x_SI: sorted by expert. ends_E: int32, where the rows of each one end. What rows behind the last get is not
        specified.
        """

        def linear(x_TI: Tensor, e: int) -> Tensor:
            return self.linear(x_TI, {name: part[e] for name, part in prepared.items()}, shape)

        return by_expert(x_SI, ends_E, shape[0], linear)

    def has_kernel(self, shape: Shape) -> bool:
        """Whether a GPU multiplies with the stored parts, not with a decoded weight."""
        return False

    @property
    def ungrouped(self) -> str:
        """Why `grouped` goes from expert to expert on every device, for people to read; empty if it does not."""
        return ""

    def path(self, shape: Shape, rows: int, device: torch.device, packed: bool = False, grouped: bool = False) -> str:
        """How `linear` or `grouped` multiplies so many rows on a device, for people to read. packed: see `prepare`."""
        return f"decoded {'at every call' if packed else 'once'}, then a dense product"

    def counts(self, parts: PackedTensors, shape: Shape) -> Tensor | None:
        """How often each entry of a codebook is used by a weight, int64 (stages, entries); None without a table.

        The table is the part `codebook`, shared or the target's own; without such a part it ships with the package.
        """
        return None

    @property
    def compiled_bytes(self) -> int:
        """Memory of code that encoding compiles on a CPU."""
        return 0

    def encode_bytes(self, shape: Shape) -> int:
        """About how much memory `encode` and `decode` take beside the weight and its statistics."""
        return 16 * shape[0] * shape[1]

    def encode_flops(self, shape: Shape) -> float:
        """About how much arithmetic `encode` does, for estimates of time."""
        return 50.0 * shape[0] * shape[1]

    def fit_flops(self, shape: Shape) -> float:
        """The share of a weight in what `fit_shared` does."""
        return 0.0

    def read_knobs(self) -> dict[str, Any]:
        """JSON: the knobs that mean something beside the others."""
        return self.model_dump(mode="json")

    def describe(self) -> dict[str, Any]:
        """JSON for an artifact's config: the method's name, version and every knob."""
        return {"method": self.name, "version": self.version, **self.model_dump(mode="json")}


def by_expert(x_SI: Tensor, ends_E: Tensor, outputs: int, linear: Callable[[Tensor, int], Tensor]) -> Tensor:
    """linear(rows, e) of the rows of every expert, (S, O); zeros behind the last expert's."""
    y_SO, start = x_SI.new_zeros((len(x_SI), outputs)), 0
    for e, end in enumerate(ends_E.tolist()):
        if end > start:
            y_SO[start:end] = linear(x_SI[start:end], e)
        start = end
    return y_SO


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor of any type holds neither NaN nor Inf."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    if tensor.itemsize == 1:
        every = torch.arange(256, dtype=torch.uint8, device=tensor.device)
        others = every[~every.view(tensor.dtype).float().isfinite()]
        return not any((tensor.view(torch.uint8) == byte).any() for byte in others)
    # One pass and no copy: the largest is NaN if anything is.
    ends = torch.aminmax(tensor)
    return bool(ends.min.isfinite() & ends.max.isfinite())


def layout_bits(layout: Layout) -> int:
    """Number of bits that the parts of a layout take."""
    return sum(8 * dtype.itemsize * torch.Size(shape).numel() for dtype, shape in layout.values())
