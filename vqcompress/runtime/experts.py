"""The experts of a mixture with one linear layer per stored matrix, in place of the fused module of transformers.

transformers 5 merges the matrices that a checkpoint stores expert by expert into 3-D parameters. Which matrix becomes
which part of a merge is read from its own conversion mapping, and that the layers compute what the fused module does
is proven by running both, so no architecture needs a table.
Shape legend: T tokens, K experts of a token, S = T·K rows sorted by expert, E experts, I inputs of an expert,
O outputs, F inner channels.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

from vqcompress.runtime.stacked import Stack, refusal

MERGES = ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)])
# Widths of the random experts that the proof runs on; real ones may not fit into memory.
WIDTH, INNER, TOKENS = 16, 8, 32


class _Linear(nn.Linear):
    """A linear layer that starts empty: to draw random weights for 45,000 of them takes seconds."""

    def reset_parameters(self) -> None:
        """Nothing: weights are put in later."""


class Experts(nn.Module):
    """y = Σ weight · down(act(up(x))) over the experts that the router chose for a token, as the fused module computes.

    The child `E.LEAF` is a linear layer of what the checkpoint stores as one matrix. first: the leaves that read the
    input (gate and up), in the order in which the merge stacks them. last: the one that reads what they make.
    """

    def __init__(self, fused: nn.Module, first: tuple[str, ...], last: str):
        super().__init__()
        up, down = fused.parameters()
        self.first, self.last = first, last
        # Behind a tuple: transformers would initialize its parameters, which are no longer there.
        self._fused = (_with_parameters(fused),)
        self._stacks: dict[str, Stack] = {}
        self._stacked_for: Any = None
        inputs, inner, made = up.shape[2], up.shape[1] // len(first), {"device": up.device, "dtype": up.dtype}
        for e in range(len(up)):
            expert = nn.ModuleDict({leaf: _Linear(inputs, inner, bias=False, **made) for leaf in first})
            expert[last] = _Linear(down.shape[2], down.shape[1], bias=False, **made)
            self.add_module(str(e), expert)

    def _apply(self, fn: Any, recurse: bool = True) -> Experts:
        # So that what moves is not held by the stacks too.
        self._stacks, self._stacked_for = {}, None
        super()._apply(fn, recurse)
        return self

    def leaves(self) -> list[tuple[list[str], str]]:
        """For each expert the paths below this module of the layers that read the input, and of the last."""
        return [([f"{e}.{leaf}" for leaf in self.first], f"{e}.{self.last}") for e in self._modules]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """x (T, I), the chosen experts (T, K) and their weights (T, K) → (T, I). An index of E means no expert."""
        if stacks := self._stacked(hidden_states):
            return self._grouped(hidden_states, top_k_index, top_k_weights, stacks)
        out = torch.zeros_like(hidden_states)
        for e in top_k_index.unique().tolist():
            if e >= len(self._modules):
                continue
            expert: Any = self._modules[str(e)]
            tokens, place = torch.where(top_k_index == e)
            x_TI = hidden_states[tokens]
            inner_TF = self._activate(torch.cat([expert[leaf](x_TI) for leaf in self.first], -1))
            y_TI = expert[self.last](inner_TF) * top_k_weights[tokens, place, None]
            out.index_add_(0, tokens, y_TI.to(out.dtype))
        return out

    def _grouped(self, x_TI: Tensor, index_TK: Tensor, weight_TK: Tensor, stacks: dict[str, Stack]) -> Tensor:
        """The same with one product a leaf: rows sorted by expert, and nothing that waits for the device."""
        experts, (tokens, chosen) = len(self._modules), index_TK.shape
        expert_S, order_S = index_TK.flatten().sort(stable=True)
        among_E = torch.arange(experts, device=expert_S.device, dtype=expert_S.dtype)
        ends_E = torch.searchsorted(expert_S, among_E, right=True, out_int32=True)
        x_SI = x_TI[order_S // chosen]
        inner_SF = self._activate(torch.cat([stacks[leaf](x_SI, ends_E) for leaf in self.first], -1))
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

    def _activate(self, x: Tensor) -> Tensor:
        fused: Any = self._fused[0]
        # transformers' own, where a class clamps or scales; a class without it has the plain gate.
        if len(self.first) == 1 or not hasattr(fused, "_apply_gate"):
            gate, *up = x.chunk(len(self.first), -1)
            return fused.act_fn(gate) * up[0] if up else fused.act_fn(gate)
        return fused._apply_gate(x)


def _with_parameters(module: nn.Module, **parameters: Tensor) -> nn.Module:
    """The module with these parameters in place of its own; everything else is shared."""
    other = copy.copy(module)
    other.__dict__["_parameters"] = {n: nn.Parameter(p, requires_grad=False) for n, p in parameters.items()}
    return other


def without_merges(model: PreTrainedModel, mapping: list[Any]) -> list[Any]:
    """transformers' conversion mapping for a model, less the merges of what Experts modules hold one by one."""
    leaves = {leaf for m in model.modules() if isinstance(m, Experts) for leaf in (*m.first, m.last)}
    return [m for m in mapping if not (leaves and isinstance(m, WeightConverter) and leaves & set(_merge(m)[1]))]


def unfuse(model: PreTrainedModel, merged: Mapping[str, int] | None = None) -> str:
    """Put Experts in place of every fused experts module of a model without memory; returns why not, or nothing.

    merged: parameter → number of tensors that the checkpoint merges into it; None if there is no checkpoint to ask.
    All modules change or none: a merge of transformers' mapping holds for the whole model.
    """
    merges = [merge for m in get_model_conversion_mapping(model) if (merge := _merge(m))[1]]
    ours: dict[str, Experts] = {}
    proven: dict[tuple[Any, ...], bool] = {}
    for path, module in model.named_modules():
        own = list(module.named_parameters())
        if len(own) != 2 or any("." in name or p.dim() != 3 or len(p) != len(own[0][1]) for name, p in own):
            continue
        leaves = [next((leaves for end, leaves in merges if f"{path}.{name}".endswith(end)), ()) for name, _ in own]
        if not all(leaves) or len(leaves[1]) != 1:
            return "transformers does not merge them from one matrix per expert"
        for (name, parameter), parts in zip(own, leaves, strict=True):
            if merged is not None and merged.get(f"{path}.{name}") != len(parameter) * len(parts):
                return "the checkpoint does not store them one by one"
        first, last = tuple(leaves[0]), leaves[1][0]
        key = (type(module), len(own[0][1]), first, last)
        if key not in proven:
            proven[key] = _is_exact(module, first, last)
        if not proven[key]:
            return f"{type(module).__name__} does more than gate, up and down"
        ours[path] = Experts(module, first, last)
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
def _is_exact(fused: nn.Module, first: tuple[str, ...], last: str) -> bool:
    """Whether Experts compute what a fused module does, on random narrow experts and tokens."""
    draw = torch.Generator().manual_seed(0)
    # The model may be built under another default device and type.
    with torch.device("cpu"):
        (up, p), (down, _) = fused.named_parameters()
        shapes = {up: (len(p), len(first) * INNER, WIDTH), down: (len(p), WIDTH, INNER)}
        random = {name: torch.randn(s, generator=draw, dtype=torch.float32) / 3 for name, s in shapes.items()}
        small: Any = _with_parameters(fused, **random)
        if hasattr(small, "config"):
            small.config = copy.copy(small.config)
            small.config._experts_implementation = "eager"
        x_TI = torch.randn(TOKENS, WIDTH, generator=draw, dtype=torch.float32)
        weights_TE = torch.rand(TOKENS, len(p), generator=draw, dtype=torch.float32)
        weights_TK, index_TK = weights_TE.topk(min(2, len(p)))
        try:
            ours = Experts(small, first, last)
            for e, (heads, tail) in enumerate(ours.leaves()):
                ours.get_parameter(f"{tail}.weight").copy_(random[down][e])
                for path, part in zip(heads, random[up][e].chunk(len(first)), strict=True):
                    ours.get_parameter(f"{path}.weight").copy_(part)
            expected = small(x_TI, index_TK, weights_TK)
            return torch.allclose(ours(x_TI, index_TK, weights_TK), expected, rtol=1e-4, atol=1e-5)
        except Exception:
            # Another structure fails in as many ways as there are models; it stays fused.
            return False
