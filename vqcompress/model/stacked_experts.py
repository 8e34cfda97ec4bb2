"""One grouped product for the same layer of all experts.

Shape legend: S rows sorted by expert, E experts, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vqcompress.methods import PackedTensors


class Stack:
    """x (S, I) sorted by expert → (S, O), by `Method.grouped`.

    layers: the CompressedLinear of every expert. Their packed tensors move into the stack and become views of it, so
    that memory holds them once.
    """

    def __init__(self, layers: Sequence[Any], dtype: torch.dtype):
        self.entry = layers[0].entry
        prepared = [layer.prepare(dtype) for layer in layers]
        self.parts: PackedTensors = {}
        for name, first in prepared[0].items():
            parts = [own[name] for own in prepared]
            if all(part.data_ptr() == first.data_ptr() for part in parts):
                self.parts[name] = first.expand(len(layers), *first.shape)
            else:
                self.parts[name] = torch.stack(parts)
                for layer, part in zip(layers, self.parts[name], strict=True):
                    layer.view_part(name, part)
        self.bias_EO = None
        if self.entry.target.bias:
            self.bias_EO = torch.stack([layer.bias for layer in layers])
            for layer, bias_O in zip(layers, self.bias_EO, strict=True):
                layer.bias.data = bias_O

    def __call__(self, x_SI: Tensor, ends_E: Tensor) -> Tensor:
        """The product (S, O). ends_E: where the rows of each expert end; rows behind the last end are undefined."""
        y_SO = self.entry.method.grouped(x_SI, ends_E, self.parts, self.entry.target.shape)
        if self.bias_EO is None:
            return y_SO
        rows_S = torch.arange(len(y_SO), device=ends_E.device, dtype=ends_E.dtype)
        expert_S = torch.searchsorted(ends_E, rows_S, right=True).clamp(max=len(ends_E) - 1)
        return y_SO + self.bias_EO[expert_S].to(y_SO.dtype)


def can_stack(layers: Sequence[Any], device: torch.device) -> bool:
    """Whether the same layer of all experts can be one product on a device.

    All must be compressed with the same settings and multiplied as they are stored, without smoothing at run time or
    stored scales of activations.
    """
    entries: list[Any] = [getattr(layer, "entry", None) for layer in layers]
    if None in entries or any(entry.smoothed or "input_scale" in entry.layout() for entry in entries):
        return False
    settings = {(entry.method, entry.target.shape, entry.target.bias) for entry in entries}
    return len(settings) == 1 and all(layer.keeps_parts(device) for layer in layers)
