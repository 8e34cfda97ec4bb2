"""One product for the same layer of all experts, from parts that lie behind one another in memory.

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

    layers: the CompressedLinear of every expert. What they store moves into the stack and is viewed from there, so that
    memory holds it once.
    """

    def __init__(self, layers: Sequence[Any], dtype: torch.dtype):
        self.entry, self.layers = layers[0].entry, list(layers)
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
        self.bias_EO = torch.stack([layer.bias for layer in layers]) if self.entry.target.bias else None
        for layer, bias_O in zip(layers, () if self.bias_EO is None else self.bias_EO, strict=False):
            layer.bias.data = bias_O

    def is_current(self, first: Any, last: Any) -> bool:
        """Whether the layers of the first and last expert still view the stack; others may be in their places now."""
        name = next(iter(self.entry.layout()))
        return all(
            layer is ours and layer.parts()[name].data_ptr() == self.parts[name][e].data_ptr()
            for layer, ours, e in ((first, self.layers[0], 0), (last, self.layers[-1], -1))
        )

    def __call__(self, x_SI: Tensor, ends_E: Tensor) -> Tensor:
        """What rows behind the last end get is not specified."""
        y_SO = self.entry.method.grouped(x_SI, ends_E, self.parts, self.entry.target.shape)
        if self.bias_EO is None:
            return y_SO
        among_S = torch.arange(len(y_SO), device=ends_E.device, dtype=ends_E.dtype)
        expert_S = torch.searchsorted(ends_E, among_S, right=True).clamp(max=len(ends_E) - 1)
        return y_SO + self.bias_EO[expert_S].to(y_SO.dtype)


def refusal(layers: Sequence[Any], device: torch.device) -> str:
    """Why layers cannot be stacked on a device, for people to read; empty if they can.

    They must be compressed alike and multiplied as they are stored, with nothing to divide by.
    """
    entries: list[Any] = [getattr(layer, "entry", None) for layer in layers]
    if None in entries:
        return "not all are compressed"
    first = entries[0]
    alike = (first.method, first.target.shape, first.target.bias)
    reasons = {
        "different settings": any((e.method, e.target.shape, e.target.bias) != alike for e in entries),
        "smoothing at run time": any(e.smoothed for e in entries),
        "stored scales of activations": "input_scale" in first.layout(),
        "decoded weights": not all(layer.keeps_parts(device) for layer in layers),
    }
    return next((reason for reason, holds in reasons.items() if holds), "")
