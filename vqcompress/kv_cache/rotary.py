"""Rotary embeddings of keys: applied, removed, recorded while a model runs, and found in a model of any architecture.

Shape legend: B rows, H heads of keys and values, T tokens, D channels of a head.
"""

from __future__ import annotations

from threading import local
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from vqcompress.errors import VQCompressError
from vqcompress.kv_cache.attention import CACHE, RecordingCache

# cos and sin (B or 1, T, D) of each token's position, as transformers makes them.
Angles = tuple[Tensor, Tensor]
# Largest relative distance of keys that count as equal.
APART = 0.02
PROBE_TOKENS = 8


class _Made(local):
    """The newest cos and sin of each rotary embedding in this thread: others may run the same model."""

    def __init__(self) -> None:
        self.angles: WeakKeyDictionary[nn.Module, Angles] = WeakKeyDictionary()


_made = _Made()


def _record(module: nn.Module, args: Any, out: Any) -> None:
    _made.angles[module] = out


def take_angles(module: nn.Module | None) -> Angles | None:
    """cos and sin that a module from `find_rotary` made since they were last taken."""
    return None if module is None else _made.angles.pop(module, None)


def apply_rope(x_BHTD: Tensor, angles: Angles, inverse: bool = False) -> Tensor:
    """x in float32 with its rotary embedding: channel i turns with channel i + D/2 (arXiv 2104.09864).

    inverse: remove the embedding instead, and a scale that cos and sin carry (YaRN) with it.
    """
    cos, sin = (part[:, None].float() for part in angles)
    if inverse:
        square = cos.square() + sin.square()
        cos, sin = cos / square, -sin / square
    x_BHTD = x_BHTD.float()
    first, second = x_BHTD.chunk(2, -1)
    return x_BHTD * cos + torch.cat([-second, first], -1) * sin


@torch.inference_mode()
def find_rotary(model: PreTrainedModel) -> list[nn.Module | None]:
    """For each layer the module that makes the rotary embedding of its keys; None where that cannot be proven.

    Proven by running: in a row of equal tokens the keys of a layer differ only by position, so they must be equal once
    their embedding is removed. Candidates are modules that return (cos, sin). VQCompressError for a model with layers
    that keep a recurrent state instead.
    """
    layers = enumerate(DynamicCache(config=model.config).layers)
    if recurrent := [n for n, layer in layers if "LinearAttention" in type(layer).__name__]:
        name = type(model).__name__
        raise VQCompressError(f"{name}: layers {recurrent} keep a state that a cache of codes cannot hold")
    modules = [module for module in model.modules() if "rotary" in type(module).__name__.lower()]
    for module in modules:
        if _record not in module._forward_hooks.values():
            module.register_forward_hook(_record)
    cache, ids = RecordingCache(), torch.full((1, PROBE_TOKENS), 7, device=model.device)
    model(ids, **{CACHE: cache}, use_cache=True, logits_to_keep=1)
    made = {module: take_angles(module) for module in modules}
    return [
        next((m for m, angles in made.items() if angles and _explains(angles, keys)), None)
        for _, (keys, _) in sorted(cache.states.items())
    ]


def _explains(angles: Any, keys_BHTD: Tensor) -> bool:
    """Whether the keys of equal tokens are equal without the embedding."""
    if not isinstance(angles, tuple) or angles[0].dim() != 3 or angles[0].shape[2] != keys_BHTD.shape[3]:
        return False
    x_BHTD = apply_rope(keys_BHTD, angles, inverse=True)
    return bool((x_BHTD - x_BHTD[:, :, :1]).norm() <= APART * x_BHTD.norm())
