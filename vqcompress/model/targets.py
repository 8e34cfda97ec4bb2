"""The blocks of a model, and the linear layers of a block that can be compressed."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn
from transformers import PreTrainedModel

from vqcompress.errors import VQCompressError
from vqcompress.model.projections import form_of
from vqcompress.storage.targets import Block, Target


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The path and the list of a model's decoder blocks; VQCompressError if there is not one such list.

    Looks for lists of modules in the decoder alone, so no tower beside it counts. Neither do lists inside of others
    (experts), nor lists of plain layers. Of several, it is the one that is as long as the text config says. Sizes and
    weights do not matter, so an artifact's blocks are those of its original. That the model calls them one after the
    other is for `BlockStream` to find.
    """
    decoder = model.get_decoder() if isinstance(model, PreTrainedModel) else model
    # Of a few models `get_decoder` returns a projection in front of the head.
    lists = _outer_lists(decoder) or _outer_lists(model)
    if len(lists) > 1 and isinstance(model, PreTrainedModel):
        text = model.config.get_text_config(decoder=True)
        lists = _outer_lists(decoder, type(text)) or lists
        lists = [layers for layers in lists if len(layers) == getattr(text, "num_hidden_layers", None)] or lists
    paths = {module: path for path, module in model.named_modules()}
    if len(lists) != 1:
        found = ", ".join(f"{paths[layers]} of {len(layers)}" for layers in lists) or "none"
        raise VQCompressError(
            f"{type(model).__name__} has no list of layers that is its decoder (lists: {found}),"
            " so it cannot be compressed block by block"
        )
    return paths[lists[0]], lists[0]


def _outer_lists(root: nn.Module, config: type | None = None) -> list[nn.ModuleList]:
    """The lists of modules below a module, without those inside of a list, and without lists of plain layers.

    config: leaves out models inside whose configs are of another class, such as towers.
    """
    found = []
    for module in root.children():
        if isinstance(module, nn.ModuleList):
            found += [module] if any(next(member.children(), None) is not None for member in module) else []
        elif config is None or not isinstance(module, PreTrainedModel) or isinstance(module.config, config):
            found += _outer_lists(module, config)
    return found


def linear_targets(block: nn.Module, name: str, apart: Collection[str] = ()) -> tuple[Target, ...]:
    """Every nn.Linear of a block, in the order of the module tree, except routers and gates of experts.

    A subclass with a forward of its own must compute x Wᵀ + b, too. apart: paths in the block that stay dense.
    """
    excluded = {*routing_modules(block), *apart}
    return tuple(
        Target(f"{name}.{path}", (module.out_features, module.in_features), module.bias is not None)
        for path, module in block.named_modules()
        if isinstance(module, nn.Linear) and form_of(module) and path not in excluded
    )


def routing_modules(block: nn.Module) -> set[str]:
    """Paths of the modules beside experts that route or gate: routers, and gates of shared experts.

    Such a module has a weight with one row for each expert, perhaps one more for "no expert", or a single row. A shared
    expert may have as many inner channels, but it has as many outputs as inputs.
    """
    found = set()
    for path, parent in block.named_modules():
        children = dict(parent.named_children())
        mixtures = {name: m for name, m in children.items() if name == "experts" or _holds_experts(m)}
        rows = {r for m in mixtures.values() for r in _gate_rows(m)}
        for name, module in children.items() if rows else ():
            weights = [p for p in module.parameters() if p.dim() == 2]
            leads_back = any(len(weight) == weights[0].shape[1] for weight in weights[1:])
            if name not in mixtures and not leads_back and rows & {len(weight) for weight in weights}:
                found |= {f"{path}.{name}.{below}".strip(".") for below, _ in module.named_modules()}
    return found


def _holds_experts(module: nn.Module) -> bool:
    """Whether matrices of experts are one parameter of the module."""
    return not isinstance(module, nn.Conv1d) and any(p.dim() == 3 for p in module.parameters(recurse=False))


def _gate_rows(mixture: nn.Module) -> tuple[int, int, int]:
    """Rows that a gate may have: 1, E or E + 1, where E is the number of experts of a mixture."""
    said = getattr(mixture, "num_experts", len(list(mixture.children())))
    experts = next((len(p) for p in mixture.parameters() if p.dim() == 3), said)
    return 1, experts, experts + 1


def blocks_of(model: nn.Module, apart: Collection[str] = ()) -> list[Block]:
    """Every block of a model with its targets, without those at the paths `apart` inside of a block."""
    path, layers = find_blocks(model)
    return [Block(f"{path}.{i}", linear_targets(layer, f"{path}.{i}", apart)) for i, layer in enumerate(layers)]
