"""Experts of a mixture as one linear layer per matrix, in place of the fused module of transformers.

transformers 5 merges the matrices that a checkpoint stores expert by expert into 3-D parameters. Its own conversion
mapping says which matrix becomes which part. Where the checkpoint itself stores 3-D parameters, their shapes allow a
few layouts. A layout is accepted only if the linear layers compute what the fused module computes, so that no
architecture needs a table.
Shape legend: T tokens, K experts of a token, S = T·K rows sorted by expert, E experts, I inputs of an expert,
O outputs, F inner channels.
"""

from __future__ import annotations

import copy
import inspect
import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, WeightRenaming
from transformers.initialization import no_init_weights

from vqcompress.model.expert_layout import Layout, candidates
from vqcompress.model.stacked_experts import Stack, can_stack

MERGES = ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)])
# The width and the tokens of the proof; experts of the real width may not fit into memory.
WIDTH, TOKENS = 16, 32

logger = logging.getLogger(__name__)


class Experts(nn.Module):
    """y = Σ weight · down(act(up(x))) over the experts that the router chose for a token, as the fused module computes.

    The child `E.MATRIX` is a linear layer of one matrix of `layout`. scaled: the weight multiplies x, before the call.
    """

    def __init__(self, fused: nn.Module, layout: Layout):
        super().__init__()
        self.layout, self.first, self.last = layout, layout.first, layout.last
        self.scaled = len(inspect.signature(fused.forward).parameters) == 1
        up, down = ((p.mT if layout.transposed else p) for p in fused.parameters() if p.dim() == 3)
        sizes = dict.fromkeys(layout.first, (up.shape[2], up.shape[1] // len(layout.first)))
        sizes[layout.last] = (down.shape[2], down.shape[1])
        biased = {matrix for matrices, kind in layout.parameters.values() if kind == "bias" for matrix in matrices}
        # Random weights for the 45,000 matrices of a large mixture would take seconds.
        with no_init_weights():
            for e in range(layout.experts):
                layers = {n: nn.Linear(*size, n in biased, up.device, up.dtype) for n, size in sizes.items()}
                self.add_module(str(e), nn.ModuleDict(layers))
        # In a tuple: transformers would initialize its parameters, which are no longer there.
        self._fused = (_with_parameters(fused),)
        self._stacks: dict[str, Stack] = {}
        self._stacked_for: torch.dtype | None = None

    def _apply(self, fn: Any, recurse: bool = True) -> Experts:
        # Stacks would keep the tensors that are moved in memory.
        self._stacks, self._stacked_for = {}, None
        super()._apply(fn, recurse)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._stacks, self._stacked_for = {}, None
        super()._load_from_state_dict(*args, **kwargs)

    def leaves(self) -> list[tuple[list[str], str]]:
        """For each expert the paths below this module of the layers that read the input, and of the last."""
        return [([f"{e}.{leaf}" for leaf in self.first], f"{e}.{self.last}") for e in self._modules]

    def routing(
        self, x: Tensor, index_TK: Tensor | None = None, weight_TK: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x (T, I), the chosen experts (T, K) and their weights (T, K). An index of E means no expert.

        Without a choice x is (E·T, I), sorted by expert and multiplied by what the router gave it (Llama-4): a row of
        zeros was not chosen.
        """
        if index_TK is None or weight_TK is None:
            experts = self.layout.experts
            expert_T = torch.arange(experts, device=x.device).repeat_interleave(len(x) // experts)
            index_TK = torch.where(x.any(-1), expert_T, experts)[:, None]
            weight_TK = torch.ones_like(index_TK, dtype=x.dtype)
        return x, index_TK, weight_TK

    def inner(self, e: int, x_TI: Tensor) -> Tensor:
        """What enters the last layer of expert e, (T, F)."""
        expert: Any = self._modules[str(e)]
        return self._activate([expert[leaf](x_TI) for leaf in self.first])

    def forward(
        self, hidden_states: Tensor, top_k_index: Tensor | None = None, top_k_weights: Tensor | None = None
    ) -> Tensor:
        """The arguments of `routing` → y, of the shape of x."""
        x_TI, index_TK, weight_TK = self.routing(hidden_states, top_k_index, top_k_weights)
        if stacks := self._stacked(x_TI):
            return self._grouped(x_TI, index_TK, weight_TK, stacks)
        out = torch.zeros_like(x_TI)
        for e in index_TK.unique().tolist():
            if e >= len(self._modules):
                continue
            expert: Any = self._modules[str(e)]
            tokens, place = torch.where(index_TK == e)
            y_TI = expert[self.last](self.inner(e, x_TI[tokens])) * weight_TK[tokens, place, None]
            out.index_add_(0, tokens, y_TI.to(out.dtype))
        return out

    def _grouped(self, x_TI: Tensor, index_TK: Tensor, weight_TK: Tensor, stacks: dict[str, Stack]) -> Tensor:
        """The same by one grouped product per projection: rows sorted by expert, and no wait for the device."""
        experts, (tokens, chosen) = len(self._modules), index_TK.shape
        expert_S, order_S = index_TK.flatten().sort(stable=True)
        among_E = torch.arange(experts, device=expert_S.device, dtype=expert_S.dtype)
        ends_E = torch.searchsorted(expert_S, among_E, right=True, out_int32=True)
        x_SI = x_TI[order_S // chosen]
        inner_SF = self._activate([stacks[leaf](x_SI, ends_E) for leaf in self.first])
        y_SI = stacks[self.last](inner_SF, ends_E)
        y_TKI = torch.empty_like(y_SI)
        y_TKI[order_S] = y_SI
        y_TKI = y_TKI.view(tokens, chosen, -1) * weight_TK[:, :, None].to(y_SI.dtype)
        # What belongs to no expert is not even a number.
        return y_TKI.masked_fill_((index_TK >= experts)[:, :, None], 0).sum(1).to(x_TI.dtype)

    def _stacked(self, x: Tensor) -> dict[str, Stack]:
        """A stack for every layer, made once for a type of x; empty if any layer cannot be stacked."""
        if self._stacked_for != x.dtype:
            self._stacks, self._stacked_for = {}, x.dtype
            experts = cast(Any, list(self._modules.values()))
            columns = {leaf: [expert[leaf] for expert in experts] for leaf in (*self.first, self.last)}
            if all(can_stack(layers, x.device) for layers in columns.values()):
                with torch.inference_mode(False), torch.no_grad():
                    self._stacks = {leaf: Stack(layers, x.dtype) for leaf, layers in columns.items()}
        return self._stacks

    def _activate(self, parts: list[Tensor]) -> Tensor:
        fused: Any = self._fused[0]
        # transformers' own, where a class clamps or scales; a class without it has the plain gate.
        if len(parts) == 2 and hasattr(fused, "_apply_gate"):
            turns = torch.stack(parts, -1).flatten(-2) if self.layout.interleaved else torch.cat(parts, -1)
            return fused._apply_gate(turns)
        gate, *up = parts
        return fused.act_fn(gate) * up[0] if up else fused.act_fn(gate)


def _with_parameters(module: nn.Module, **parameters: Tensor) -> nn.Module:
    """The module with these parameters in place of its own; everything else is shared."""
    other = copy.copy(module)
    other.__dict__["_parameters"] = {n: nn.Parameter(p, requires_grad=False) for n, p in parameters.items()}
    return other


def without_merges(model: PreTrainedModel, mapping: list[Any]) -> list[Any]:
    """transformers' conversion mapping for a model, without the merges of matrices that Experts modules hold."""
    leaves = {leaf for m in model.modules() if isinstance(m, Experts) for leaf in (*m.first, m.last)}
    return [m for m in mapping if not leaves & set(_merged(m))]


def unfuse(model: PreTrainedModel, sources: Mapping[str, int] | None = None) -> str:
    """Replace every fused experts module of a model without memory by Experts; why that is impossible, or "".

    sources: parameter → number of tensors of the checkpoint that become it; None without a checkpoint. All modules
    change or none: a merge of transformers' mapping holds for the whole model.
    """
    # A parameter with another name on disk is still one tensor.
    made = [c for c in get_model_conversion_mapping(model) if not isinstance(c, WeightRenaming)]
    layouts: dict[str, Layout] = {}
    proven: dict[tuple[type, str], bool] = {}
    for name, module in model.named_modules():
        if _is_fused(module):
            found = find_layouts(name, module, _merges_for(name, made, model.base_model_prefix), sources)
            if isinstance(found, str):
                return found
            for layout in found:
                key = (type(module), repr(layout))
                if key not in proven:
                    proven[key] = _is_exact(module, layout)
                if proven[key]:
                    layouts[name] = layout
                    break
            else:
                return f"{type(module).__name__} does more than gate, up and down"
    for name, layout in layouts.items():
        model.set_submodule(name, Experts(model.get_submodule(name), layout))
        # Some models would initialize the fused parameters from the module around them.
        around: Any = model.get_submodule(name.rpartition(".")[0])
        around._is_hf_initialized = True
    return ""


def _merges_for(name: str, conversions: Iterable[Any], base: str) -> dict[str, tuple[str, ...]]:
    """The merges of `find_layouts`, from the conversions whose part of the model holds the module `name`."""
    merges: dict[str, tuple[str, ...]] = {}
    for conversion in conversions:
        scope = f"{conversion.scope_prefix}." if conversion.scope_prefix else ""
        if name.startswith((scope, f"{base}.{scope}")):
            for target in conversion.target_patterns:
                end = target.replace("\\", "").rstrip("$")
                merges[end] = merges.get(end) or _merged(conversion)
    return merges


def _is_fused(module: nn.Module) -> bool:
    """Whether a module's parameters are two 3-D stacks of experts, perhaps with their biases."""
    own = dict(module.named_parameters())
    stacks = [p for p in own.values() if p.dim() == 3]
    return len(stacks) == 2 and all("." not in n and p.dim() > 1 and len(p) == len(stacks[0]) for n, p in own.items())


def find_layouts(
    name: str, module: nn.Module, merges: Mapping[str, tuple[str, ...]], sources: Mapping[str, int] | None
) -> list[Layout] | str:
    """The layouts that the fused module `name` may have, or why it has to stay fused.

    merges: end of a parameter's name → the matrices that transformers merges into it, none if it makes the parameter of
    other tensors. sources: as for `unfuse`.
    """
    own = dict(module.named_parameters())
    experts = len(next(iter(own.values())))
    made: dict[str, tuple[str, ...] | None] = {}
    for p in own:
        found = [m for end, m in merges.items() if f"{name}.{p}".endswith(end) and end.endswith(p)]
        made[p] = max(found, default=None)
    first, last = list(made.values())[:2]
    if len(own) == 2 and first and last and len(last) == 1:
        matrices = {p: (leaves or (), "weight") for p, leaves in made.items()}
        layouts = [Layout(experts, first, last[0], matrices)]
        wanted = {f"{name}.{p}": experts * len(leaves or ()) for p, leaves in made.items()}
    elif any(leaves is not None for leaves in made.values()):
        return "transformers makes them of other tensors than one matrix per expert"
    else:
        layouts = list(candidates(module))
        wanted = dict.fromkeys((f"{name}.{p}" for p in own), 1)
    # An artifact may store single matrices although its checkpoint stores them fused.
    single = {f"{name}.0.{layout.first[0]}.weight" for layout in layouts}
    if sources is not None and not wanted.items() <= sources.items() and not single & sources.keys():
        return "the checkpoint does not store them one by one"
    return layouts


def _merged(conversion: Any) -> tuple[str, ...]:
    """The names of the matrices that a conversion of transformers stacks to one parameter; none if it does not."""
    if not isinstance(conversion, WeightConverter):
        return ()
    operations = [(type(op), getattr(op, "dim", None)) for op in conversion.operations]
    parent = conversion.target_patterns[0].replace("\\", "").rpartition(".")[0]
    sources = [re.fullmatch(r"\^?(.*)\.\*\.(\w+)\.weight\$?", s.replace("\\", "")) for s in conversion.source_patterns]
    leaves = tuple(match[2] for match in sources if match and match[1] == parent)
    return leaves if operations in MERGES and len(leaves) == len(sources) else ()


@torch.no_grad()
def _is_exact(fused: nn.Module, layout: Layout) -> bool:
    """Whether Experts of a layout compute the same as a fused module, on random narrow experts and tokens."""
    draw = torch.Generator().manual_seed(0)
    # The model may be built under another default device.
    with torch.device("cpu"):
        parameters = {}
        for name, (matrices, kind) in layout.parameters.items():
            rows = len(matrices) * WIDTH
            shape = (rows,) if kind == "bias" else (WIDTH, rows) if layout.transposed else (rows, WIDTH)
            parameters[name] = _normal(draw, layout.experts, *shape) / 3
        narrow = _narrowed(fused, layout, parameters)
        ours = Experts(narrow, layout)
        ours.load_state_dict(dict(pair for name, p in parameters.items() for pair in layout.split(name, p)))
        inputs = _random_call(ours, draw)
        try:
            same = torch.allclose(ours(*inputs), cast(Any, narrow)(*inputs), rtol=1e-4, atol=1e-5)
            return same and _channels_meet(ours, draw)
        except (RuntimeError, TypeError, ValueError, AttributeError, LookupError) as error:
            # Parameters of another meaning do not fit each other; a forward of another structure takes other arguments.
            logger.info("%s is not %s: %s", type(fused).__name__, layout, error)
            return False


def _normal(draw: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=draw, dtype=torch.float32)


def _narrowed(fused: nn.Module, layout: Layout, parameters: dict[str, Tensor]) -> nn.Module:
    """A copy of a fused module with narrow parameters, and every attribute that is one of its widths adapted."""
    widths = set([p for p in fused.parameters() if p.dim() == 3][1].shape[1:]) - {layout.experts}
    narrow: Any = _with_parameters(fused, **parameters)
    for attribute, value in list(vars(narrow).items()):
        if type(value) is int and value in widths:
            setattr(narrow, attribute, WIDTH)
    if hasattr(narrow, "config"):
        narrow.config = copy.copy(narrow.config)
        narrow.config._experts_implementation = "eager"
    return narrow


def _random_call(experts: Experts, draw: torch.Generator) -> tuple[Tensor, ...]:
    """Arguments for a mixture: tokens with two experts each, or tokens sorted by expert, every third not chosen."""
    count = experts.layout.experts
    if experts.scaled:
        return (_normal(draw, count * TOKENS, WIDTH) * (torch.arange(count * TOKENS) % 3 > 0)[:, None],)
    x_TI = _normal(draw, TOKENS, WIDTH)
    weights_TK, index_TK = torch.rand(TOKENS, count, generator=draw, dtype=torch.float32).topk(min(2, count))
    return x_TI, index_TK, weights_TK


def _channels_meet(experts: Experts, draw: torch.Generator) -> bool:
    """Whether channel 1 of gate and of up moves channel 1 of their product and no other.

    Without this test, rows that were split wrongly and joined again in the same order would pass.
    """
    parts = [_normal(draw, TOKENS, WIDTH) for _ in experts.first]
    for part in parts:
        before, part[:, 1] = experts._activate(parts), part[:, 1] + 1
        if (experts._activate(parts) != before).any(0).nonzero().tolist() != [[1]]:
            return False
    return True
