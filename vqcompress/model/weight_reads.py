"""Weights that a model uses outside of the layer that they belong to, as Mamba does with `dt_proj.weight`.

What enters such a layer cannot be seen, and some loaders call it while others do not, so it stays dense.
They are found by running a toy of the architecture, whose weights note who uses them.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import PretrainedConfig

from vqcompress.model.targets import find_blocks
from vqcompress.model.toy import toy_model

TOKENS = 16
# What code may ask of a weight without using its values.
FACTS = {"dtype", "device", "shape", "ndim", "dim", "size", "requires_grad", "is_cuda", "is_meta"}


class _Watched(Tensor):
    """A weight that adds its `path` to `seen` when an operation uses it and its layer is not running (`busy`)."""

    path: str
    seen: set[str]
    busy: set[str]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__self__", func).__name__ not in FACTS:
            for used in tree_leaves((args, kwargs)):
                if isinstance(used, _Watched) and used.path not in used.busy:
                    used.seen.add(used.path)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def weights_read(config: PretrainedConfig, blocks: Iterable[nn.Module]) -> frozenset[str]:
    """Paths inside of a block of the matrices that a model's code uses by itself. blocks: its blocks, without memory.

    Without code that names a weight nothing is run. If no toy runs, all matrices count that are named beside a weight.
    """
    suspects = {path for block in blocks for path in _suspects(block)}
    if not suspects:
        return frozenset()
    seen: set[str] = set()
    busy: set[str] = set()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            # A tower beside the decoder may be large.
            toy: Any = toy_model(config.get_text_config(decoder=True), narrow_only=True)
            for block in find_blocks(toy)[1]:
                for path, module in block.named_modules():
                    _watch(module, path, seen, busy)
            toy(torch.arange(TOKENS)[None], use_cache=False)
        except Exception:  # the code of an architecture may raise anything, in a toy more than elsewhere
            return frozenset(suspects)
    return frozenset(seen)


def _matrices(parent: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Path and module of everything below a module that has a 2-D weight of its own."""
    for path, module in parent.named_modules():
        weight = module._parameters.get("weight")
        if path and weight is not None and weight.dim() == 2:
            yield path, module


def _suspects(block: nn.Module) -> set[str]:
    """The matrices below a block whose names stand in a function of a parent's class that also names a `weight`."""
    found = set()
    for path, parent in block.named_modules():
        for names in _names_in(type(parent)):
            if "weight" in names:
                below = [name for name, _ in _matrices(parent) if name.rpartition(".")[2] in names]
                found |= {f"{path}.{name}".lstrip(".") for name in below}
    return found


def _names_in(kind: type[nn.Module]) -> Iterator[set[str]]:
    """The attributes that each function of a class names, without those of torch's own classes."""
    for base in kind.__mro__:
        if not base.__module__.startswith("torch."):
            for member in vars(base).values():
                if code := getattr(inspect.unwrap(member) if callable(member) else member, "__code__", None):
                    yield set(code.co_names)


def _watch(module: nn.Module, path: str, seen: set[str], busy: set[str]) -> None:
    """Let a module's matrix note in `seen` who uses it."""
    weight = module._parameters.get("weight")
    if weight is None or weight.dim() != 2:
        return
    watched = weight.detach().as_subclass(_Watched)
    watched.path, watched.seen, watched.busy = path, seen, busy
    parameters: Any = module._parameters
    parameters["weight"] = watched
    module.register_forward_pre_hook(lambda *_: busy.add(path))
    module.register_forward_hook(lambda *_: busy.discard(path))
