"""The weights that can be compressed: which modules of a model are blocks, and which linear layers they hold."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from vqcompress.errors import VQCompressError


@dataclass(frozen=True)
class Target:
    """One weight to compress. name: path of its module in the model. shape: (O, I)."""

    name: str
    shape: tuple[int, int]
    bias: bool

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class Block:
    """One decoder layer. name: path of its module in the model, without a dot at the end."""

    name: str
    targets: tuple[Target, ...]

    def local(self, target: Target) -> str:
        """The target's path inside the block."""
        return target.name.removeprefix(self.name + ".")


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The path and the list of a model's decoder layers: the ModuleList that holds the most parameters."""
    sizes = {
        name: sum(p.numel() for p in module.parameters())
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module)
    }
    if not sizes or not max(sizes.values()):
        raise VQCompressError(
            f"{type(model).__name__} has no list of layers, so it cannot be compressed block by block"
        )
    # An outer list holds all that its inner lists hold, so with equal sizes the shorter path is the outer one.
    path = min(sizes, key=lambda name: (-sizes[name], len(name)))
    layers = model.get_submodule(path)
    assert isinstance(layers, nn.ModuleList)
    return path, layers


def linear_targets(block: nn.Module, name: str) -> tuple[Target, ...]:
    """Every nn.Linear of a block, in the order of the module tree, but those that decide about experts.

    A subclass with a forward of its own does more than multiply.
    """
    kept = gates(block)
    return tuple(
        Target(f"{name}.{path}", (module.out_features, module.in_features), module.bias is not None)
        for path, module in block.named_modules()
        if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward and path not in kept
    )


def gates(block: nn.Module) -> set[str]:
    """Paths of routers and gates of shared experts: beside `experts`, a matrix with a row for each of them, or one."""
    found = set()
    for path, parent in block.named_modules():
        experts = getattr(parent, "experts", None)
        if not isinstance(experts, nn.Module) or not list(experts.parameters()):
            continue
        count = len(list(experts.children())) or len(next(experts.parameters()))
        for name, module in parent.named_children():
            weight = getattr(module, "weight", None)
            if isinstance(weight, nn.Parameter) and weight.dim() == 2 and len(weight) in (1, count):
                found.add(f"{path}.{name}".removeprefix("."))
    return found


def blocks_of(model: nn.Module) -> list[Block]:
    """Every block of a model with its targets."""
    path, layers = find_blocks(model)
    return [Block(f"{path}.{i}", linear_targets(layer, f"{path}.{i}")) for i, layer in enumerate(layers)]
