"""Codebooks for the keys and values of a model, learned from calibration rows.

The whole model runs, in its own type: the cost of an error in a key is known only from what comes after it.
Shape legend: N rows, L tokens of a row, H heads of keys and values, T tokens that are learned from, D channels of a
head, G = D / d groups, E entries, d channels of a group.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, PreTrainedModel

from vqcompress.codebooks import kv
from vqcompress.errors import VQCompressError
from vqcompress.recipe import CacheKnobs
from vqcompress.runtime.attention import CACHE, find_rotary
from vqcompress.runtime.cache import KINDS

# Tokens that a codebook is learned from at most, spread evenly over all rows: 64 for each entry.
TOKENS = 64 * kv.ENTRIES
# Tokens that run through the model at once.
BATCH_TOKENS = 2048


class _Seen(DynamicCache):
    """A plain cache that lets go of nothing: (keys, values) by layer, and their gradients if there are any."""

    def __init__(self, grads: bool):
        super().__init__()
        self.grads, self.states = grads, dict[int, tuple[Tensor, Tensor]]()

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """As transformers', and a look."""
        for states in (key_states, value_states) if self.grads else ():
            states.retain_grad()
        self.states[layer_idx] = key_states, value_states
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def calibrate(
    model: PreTrainedModel,
    rows_NL: Tensor,
    d: int,
    rotary: list[nn.Module | None],
    seed: int = 0,
    gradients: bool = True,
    rounds: int = 12,
) -> list[tuple[Tensor, Tensor]]:
    """For each layer the codebooks (H, G, E, d) float16 of its keys and of its values.

    rotary: `find_rotary`; keys of a layer that has one are learned without their embedding. gradients: weigh errors by
    the squared gradient of the rows' loss (CQ, arXiv 2405.03917, section 3.3; KVQuant, arXiv 2401.18079, section 3.2);
    else all errors weigh the same. rounds: of k-means. VQCompressError if the heads' channels are no multiple of d.
    """
    samples, weights = _gather(model, rows_NL, rotary, gradients)
    found = []
    for layer, pair in enumerate(samples):
        if channels := next((x.shape[2] for x in pair if x.shape[2] % d), None):
            raise VQCompressError(f"layer {layer}: heads of {channels} channels cannot be coded {d} at a time")
        draw = torch.Generator().manual_seed(seed)
        keys, values = (
            kv.learn(x_THD, w_THD, d, rounds, draw) for x_THD, w_THD in zip(pair, weights[layer], strict=True)
        )
        found.append((keys, values))
    return found


def cache_books(
    model: PreTrainedModel, rows_NL: Tensor, knobs: CacheKnobs, seed: int
) -> tuple[dict[str, Tensor], list[bool]]:
    """What an artifact holds of a calibrated cache: tensors by name, and which layers' keys are without embedding."""
    rotary = find_rotary(model)
    if knobs.keys == "after":
        rotary = [None] * len(rotary)
    books = calibrate(model, rows_NL, 8 // knobs.bits, rotary, seed, knobs.weights == "gradient", knobs.rounds)
    named = {f"{n}.{kind}": book.cpu() for n, pair in enumerate(books) for kind, book in zip(KINDS, pair, strict=True)}
    return named, [module is not None for module in rotary]


def _gather(
    model: PreTrainedModel, rows_NL: Tensor, rotary: list[nn.Module | None], gradients: bool
) -> tuple[list[list[Tensor]], list[list[Tensor | None]]]:
    """Keys and values (T, H, D) of every layer, float32 on the model's device, and what an error in each costs."""
    turns: dict[nn.Module, tuple[Tensor, Tensor]] = {}
    hooks = [m.register_forward_hook(lambda m, _, out: turns.update({m: out})) for m in filter(None, set(rotary))]
    length = rows_NL.shape[1]
    step = max(1, -(-rows_NL.numel() // TOKENS))
    states: list[list[list[Tensor]]] = [[[], []] for _ in rotary]
    costs: list[list[list[Tensor]]] = [[[], []] for _ in rotary]
    wanted = [p.requires_grad for p in model.parameters()]
    model.requires_grad_(False)
    embeddings = model.get_input_embeddings()
    try:
        for number, batch in enumerate(rows_NL.split(max(1, BATCH_TOKENS // length))):
            batch, cache = batch.to(model.device), _Seen(gradients)
            with torch.set_grad_enabled(gradients):
                # No weight asks for a gradient, so that what enters must.
                entering = embeddings(batch).detach().requires_grad_(gradients)
                logits = model(inputs_embeds=entering, **{CACHE: cache}, use_cache=True).logits
                if gradients:
                    loss = cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten(), reduction="sum")
                    loss.backward()
            taken = slice(number % step, None, step)
            for layer, (pair, module) in enumerate(zip(cache.states.values(), rotary, strict=True)):
                for which, x in enumerate(pair):
                    known = [(states, x.detach())]
                    if gradients:
                        assert x.grad is not None
                        known.append((costs, x.grad))
                    for place, part in known:
                        if which == 0 and module is not None:
                            # A rotation: the gradient of what it turned is the gradient turned back.
                            part = kv.turn(part, *turns[module], back=True)
                        flat = part.transpose(1, 2).flatten(0, 1)[taken].float()
                        place[layer][which].append(flat if place is states else flat.square())
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, wants in zip(model.parameters(), wanted, strict=True):
            parameter.requires_grad_(wants)
    joined = [[torch.cat(parts) for parts in pair] for pair in states]
    return joined, [[torch.cat(parts) if gradients else None for parts in pair] for pair in costs]
