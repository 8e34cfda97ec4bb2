"""The matrices that read a tensor, and the norm that made it, observed in one forward pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vqcompress.model.experts import Experts


@dataclass
class Read:
    """A tensor that matrices multiply. channels: size of its last axis. norm: path of the norm that made it, or None.

    reader: path of the first module that is called with it. consumers: all of them; for a mixture, whose router sends
    each token to other experts, the first layers of all its experts.
    """

    reader: str
    channels: int
    norm: str | None
    consumers: list[str] = field(default_factory=list)


@dataclass
class Readers:
    """The reads of a forward pass in their order, and its output.

    mixtures: modules with experts by path. busiest: the expert of each that most tokens went to.
    """

    output: Tensor
    reads: list[Read]
    mixtures: dict[str, Experts]
    busiest: dict[str, int]

    def norm_of(self) -> dict[str, str | None]:
        """Path of every module with a matrix that was called → the norm whose output it reads, or None."""
        lasts = dict.fromkeys(f"{path}.{last}" for path, m in self.mixtures.items() for _, last in m.leaves())
        return {path: read.norm for read in self.reads for path in read.consumers} | lasts


def weight_of(module: nn.Module) -> Tensor | None:
    """The parameter `weight` of a module itself, or None."""
    return module._parameters.get("weight")


def observe(root: nn.Module, run: Callable[[], Tensor]) -> Readers:
    """Run once with a hook on every module that has a matrix or a norm's weight; `run` returns the output."""
    mixtures = {path: module for path, module in root.named_modules() if isinstance(module, Experts)}
    alive: list[Tensor] = []
    norms: dict[tuple[int, ...], str] = {}
    reads: dict[tuple[int, ...], Read] = {}
    busiest: dict[str, int] = {}

    def identity(x: Tensor) -> tuple[int, ...]:
        # A view with the same channels counts as the same tensor. Kept alive, so that no other takes its address.
        alive.append(x)
        return x.data_ptr(), x.numel(), x.shape[-1]

    def made(path: str, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        norms[identity(out)] = path

    def read(path: str, consumers: list[str], x: Tensor) -> None:
        key = identity(x)
        reads.setdefault(key, Read(path, x.shape[-1], norms.get(key))).consumers.extend(consumers)

    def multiply(path: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        weight, x = weight_of(module), args[0] if args else None
        # A matrix that is no linear layer may be a router's. An embedding is called with ids.
        if isinstance(x, Tensor) and x.is_floating_point() and weight is not None and x.shape[-1:] == weight.shape[-1:]:
            read(path, [path], x)

    def route(path: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        leaves, index_TK = mixtures[path].leaves(), mixtures[path].routing(*args)[1]
        busiest[path] = int(torch.bincount(index_TK.flatten())[: len(leaves)].argmax())
        read(path, [f"{path}.{leaf}" for first, _ in leaves for leaf in first], args[0])

    handles = []
    for path, module in root.named_modules():
        weight = weight_of(module)
        if path in mixtures:
            handles.append(module.register_forward_pre_hook(partial(route, path)))
        elif weight is not None and not any(path.startswith(f"{mixture}.") for mixture in mixtures):
            if weight.dim() == 1:
                handles.append(module.register_forward_hook(partial(made, path)))
            elif weight.dim() == 2:
                handles.append(module.register_forward_pre_hook(partial(multiply, path)))
    try:
        output = run()
    finally:
        for handle in handles:
            handle.remove()
    return Readers(output, list(reads.values()), mixtures, busiest)
