"""The experts of a mixture with one linear layer per stored matrix, in place of the fused module of transformers.

transformers 5 merges the matrices that a checkpoint stores expert by expert into 3-D parameters. Which matrix becomes
which part of a merge is read from its own conversion mapping; where the checkpoint stores the 3-D parameters, their
shapes leave a few possibilities. That the layers compute what the fused module does is proven by running both, so no
architecture needs a table.
Shape legend: T tokens, K experts of a token, S = T·K rows sorted by expert, E experts, I inputs of an expert,
O outputs, F inner channels.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

from vqcompress.model.expert_layout import Layout, candidates
from vqcompress.model.stacked_experts import Stack, refusal

MERGES = ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)])
# The width of the random experts that the proof runs on; real ones may not fit into memory.
WIDTH, TOKENS = 16, 32


class _Linear(nn.Linear):
    """A linear layer that starts empty: to draw random weights for 45,000 of them takes seconds."""

    def reset_parameters(self) -> None:
        """Nothing: weights are put in later."""


class Experts(nn.Module):
    """y = Σ weight · down(act(up(x))) over the experts that the router chose for a token, as the fused module computes.

    The child `E.MATRIX` is a linear layer of one matrix of `layout`. scaled: the weight multiplies x, before the call.
    """

    def __init__(self, fused: nn.Module, layout: Layout):
        super().__init__()
        self.layout, self.first, self.last = layout, layout.first, layout.last
        self.scaled = len(inspect.signature(fused.forward).parameters) == 1
        cubes = [p for p in fused.parameters() if p.dim() == 3]
        (rows, inputs), (outputs, inner) = (p.shape[1:][::-1] if layout.transposed else p.shape[1:] for p in cubes)
        biased = {matrix for matrices, kind in layout.parameters.values() if kind == "bias" for matrix in matrices}
        made: dict[str, Any] = {"device": cubes[0].device, "dtype": cubes[0].dtype}
        for e in range(layout.experts):
            expert = nn.ModuleDict()
            for leaf in layout.first:
                expert[leaf] = _Linear(inputs, rows // len(layout.first), bias=leaf in biased, **made)
            expert[layout.last] = _Linear(inner, outputs, bias=layout.last in biased, **made)
            self.add_module(str(e), expert)
        # Behind a tuple: transformers would initialize its parameters, which are no longer there.
        self._fused = (_with_parameters(fused),)
        self._stacks: dict[str, Stack] = {}
        self._stacked_for: Any = None

    def _apply(self, fn: Any, recurse: bool = True) -> Experts:
        # So that what moves is not held by the stacks too.
        self._stacks, self._stacked_for = {}, None
        super()._apply(fn, recurse)
        return self

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
        """What `routing` tells → y, of the shape of x."""
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
        """The same with one product a leaf: rows sorted by expert, and nothing that waits for the device."""
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
        """A stack for every leaf, made once for a device and a type; none unless all leaves can be stacked."""
        experts = cast(Any, list(self._modules.values()))
        ends = experts[0], experts[-1]
        current = all(stack.is_current(*(expert[leaf] for expert in ends)) for leaf, stack in self._stacks.items())
        if self._stacked_for != (x.device, x.dtype) or not current:
            self._stacks, self._stacked_for = {}, (x.device, x.dtype)
            if not self.refusal(x.device):
                with torch.inference_mode(False), torch.no_grad():
                    self._stacks = {leaf: Stack(layers, x.dtype) for leaf, layers in self._columns().items()}
        return self._stacks

    def refusal(self, device: torch.device) -> str:
        """Why experts run one after the other on a device, for people to read; empty if they run as one stack."""
        return next((why for layers in self._columns().values() if (why := refusal(layers, device))), "")

    def _columns(self) -> dict[str, list[Any]]:
        experts = cast(Any, list(self._modules.values()))
        return {leaf: [expert[leaf] for expert in experts] for leaf in (*self.first, self.last)}

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
    """transformers' conversion mapping for a model, less the merges of what Experts modules hold one by one."""
    leaves = {leaf for m in model.modules() if isinstance(m, Experts) for leaf in (*m.first, m.last)}
    return [m for m in mapping if not (leaves and isinstance(m, WeightConverter) and leaves & set(_merge(m)[1]))]


def unfuse(model: PreTrainedModel, stored: Mapping[str, int] | None = None) -> str:
    """Put Experts in place of every fused experts module of a model without memory; returns why not, or nothing.

    stored: parameter → number of tensors of the checkpoint that become it, and every other name that the checkpoint
    has; None if there is no checkpoint to ask. All modules change or none: a merge of transformers' mapping holds for
    the whole model.
    """
    mapping = get_model_conversion_mapping(model)
    merges = [merge for m in mapping if (merge := _merge(m))[1]]
    targets = {t.replace("\\", "").rstrip("$") for m in mapping for t in getattr(m, "target_patterns", ())}
    ours: dict[str, Experts] = {}
    proven: dict[tuple[Any, ...], Layout | None] = {}
    for path, module in model.named_modules():
        own = dict(module.named_parameters())
        cubes = [p for p in own.values() if p.dim() == 3]
        if len(cubes) != 2 or any("." in n or p.dim() < 2 or len(p) != len(cubes[0]) for n, p in own.items()):
            continue
        leaves = [next((leaves for end, leaves in merges if f"{path}.{name}".endswith(end)), ()) for name in own]
        if len(own) == 2 and all(leaves) and len(leaves[1]) == 1:
            parameters = {name: (parts, "weight") for name, parts in zip(own, leaves, strict=True)}
            layouts = [Layout(len(cubes[0]), leaves[0], leaves[1][0], parameters)]
            wanted = {f"{path}.{name}": len(p) * len(parameters[name][0]) for name, p in own.items()}
        else:
            wanted = {f"{path}.{name}": 1 for name in own}
            if any(name.endswith(t) for name in wanted for t in targets if t.rpartition(".")[2] in own):
                return "transformers makes them of other tensors than one matrix per expert"
            layouts = list(candidates(module))
        # One that was taken apart already stores the first matrix.
        apart = any(layout.fused and f"{path}.0.{layout.first[0]}.weight" in (stored or {}) for layout in layouts)
        if layouts and stored is not None and not apart and any(stored.get(name) != n for name, n in wanted.items()):
            return "the checkpoint does not store them one by one"
        key = (type(module), *((name, *p.shape) for name, p in own.items()), *leaves)
        if key not in proven:
            proven[key] = next((layout for layout in layouts if _is_exact(module, layout)), None)
        if (layout := proven[key]) is None:
            return f"{type(module).__name__} does more than gate, up and down"
        ours[path] = Experts(module, layout)
    for path, experts in ours.items():
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, experts)
    return ""


def _merge(conversion: Any) -> tuple[str, tuple[str, ...]]:
    """End of a fused parameter's name, and the names of the matrices that are stacked in it; else no such names."""
    if not isinstance(conversion, WeightConverter):
        return "", ()
    operations = [(type(op), getattr(op, "dim", None)) for op in conversion.operations]
    target = conversion.target_patterns[0].replace("\\", "")
    place = target.rpartition(".")[0]
    sources = [re.fullmatch(r"\^?(.*)\.\*\.(\w+)\.weight\$?", s.replace("\\", "")) for s in conversion.source_patterns]
    leaves = tuple(match[2] for match in sources if match and match[1] == place)
    return (target, leaves) if operations in MERGES and len(leaves) == len(sources) else ("", ())


@torch.no_grad()
def _is_exact(fused: nn.Module, layout: Layout) -> bool:
    """Whether Experts compute what a fused module does, on random narrow experts and tokens."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float32)

    # The model may be built under another default device and type.
    with torch.device("cpu"):
        widths = set([p for p in fused.parameters() if p.dim() == 3][1].shape[1:])
        random = {}
        for name, (matrices, kind) in layout.parameters.items():
            shape = (len(matrices) * WIDTH, WIDTH)[:: -1 if layout.transposed else 1]
            random[name] = normal(layout.experts, *(shape if kind == "weight" else (len(matrices) * WIDTH,))) / 3
        small: Any = _with_parameters(fused, **random)
        for attribute, value in list(vars(small).items()):
            # What the module was told of its inputs and inner channels.
            if type(value) is int and value in widths - {layout.experts}:
                setattr(small, attribute, WIDTH)
        if hasattr(small, "config"):
            small.config = copy.copy(small.config)
            small.config._experts_implementation = "eager"
        try:
            ours = Experts(small, layout)
            for name, parameter in random.items():
                for path, part in layout.split(name, parameter):
                    ours.get_parameter(path).data = part
            routing: tuple[Tensor, ...] = ()
            x_TI = normal(TOKENS, WIDTH)
            if not ours.scaled:
                weights_TE = torch.rand(TOKENS, layout.experts, generator=draw, dtype=torch.float32)
                weights_TK, index_TK = weights_TE.topk(min(2, layout.experts))
                routing = index_TK, weights_TK
            else:
                # Sorted by expert; every third has not been chosen.
                x_TI = normal(layout.experts * TOKENS, WIDTH) * (torch.arange(layout.experts * TOKENS) % 3 > 0)[:, None]
            same = torch.allclose(ours(x_TI, *routing), small(x_TI, *routing), rtol=1e-4, atol=1e-5)
            parts = [normal(TOKENS, WIDTH) for _ in layout.first]
            # That gate and up are the rows that meet in a channel: otherwise what was split is only joined again.
            for part in parts:
                before, part[:, 1] = ours._activate(parts), part[:, 1] + 1
                same = same and (ours._activate(parts) != before).any(0).nonzero().tolist() == [[1]]
            return same
        except Exception:
            # Another structure fails in as many ways as there are models; it stays fused.
            return False
