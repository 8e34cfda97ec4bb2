"""Weights that a model uses outside of the layer that they belong to, as Mamba does with `dt_proj.weight`.

What enters such a layer cannot be seen, and some loaders call it while others do not, so it stays dense.
They are found by running a toy of the architecture, whose weights note who uses them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import PretrainedConfig

from vqcompress.model.readers import weight_of
from vqcompress.model.targets import find_blocks
from vqcompress.model.toy import toy_model

TOKENS = 16
# What code may ask of a weight without using its values.
FACTS = {"dtype", "device", "shape", "ndim", "dim", "size", "requires_grad", "is_cuda", "is_meta"}


class _Watched(Tensor):
    """A weight that calls its `note` when an operation uses it."""

    note: Callable[[], object]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__self__", func).__name__ not in FACTS:
            for used in tree_leaves((args, kwargs)):
                if isinstance(used, _Watched):
                    used.note()
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def weights_read(config: PretrainedConfig, blocks: Iterable[nn.Module]) -> frozenset[str]:
    """Paths inside of a block of the matrices that a model's code uses by itself. blocks: its blocks, without memory.

    Without code that names a weight nothing is run. If no toy runs, all matrices count that are named beside a weight.
    """
    suspects = frozenset(path for block in blocks for path in _suspects(block))
    seen: set[str] = set()
    if suspects:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            try:
                # A tower beside the decoder may be large.
                toy: Any = toy_model(config.get_text_config(decoder=True), narrow_only=True)[0]
                for block in find_blocks(toy)[1]:
                    for path, module in block.named_modules():
                        _watch(module, path, seen)
                toy(torch.arange(TOKENS)[None], use_cache=False)
            except Exception:  # the code of an architecture may raise anything, in a toy more than elsewhere
                return suspects
    return frozenset(seen)


@cache
def _named_beside_weight(kind: type[nn.Module]) -> frozenset[str]:
    """What the functions of a class name that also name a `weight`."""
    functions = (function for _, function in inspect.getmembers(kind, inspect.isfunction))
    names = [inspect.unwrap(function).__code__.co_names for function in functions]
    return frozenset().union(*(own for own in names if "weight" in own))


def _suspects(block: nn.Module) -> set[str]:
    """The matrices below a block whose names stand in a function of a parent's class that also names a `weight`."""
    return {
        f"{path}.{below}".lstrip(".")
        for path, parent in block.named_modules()
        if (names := _named_beside_weight(type(parent)))  # type: ignore[arg-type]
        for below, module in parent.named_modules()
        if below.rpartition(".")[2] in names and (weight := weight_of(module)) is not None and weight.dim() == 2
    }


def _watch(module: nn.Module, path: str, seen: set[str]) -> None:
    """Let a module's matrix note in `seen` that something else uses it."""
    weight, running = weight_of(module), set[str]()
    if weight is not None and weight.dim() == 2:
        watched: Any = weight.detach().as_subclass(_Watched)
        watched.note = lambda: seen.update({path} - running)
        module._parameters["weight"] = watched
        module.register_forward_pre_hook(lambda *_: running.add(path))
        module.register_forward_hook(lambda *_: running.clear())
