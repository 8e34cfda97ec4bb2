"""Codebooks for the keys and values of a model, learned from calibration rows.

The whole model runs, in its own type: the cost of an error in a key is known only from what comes after it. Of several
processes each runs its share of the rows and learns every so many layers; the bytes are those of one.
Shape legend: N rows, L tokens of a row, H heads of keys and values, T tokens that are learned from, D channels of a
head, G = D / d groups, E entries, d channels of a group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, PreTrainedModel

from vqcompress.errors import VQCompressError
from vqcompress.kv_cache import codes as kv
from vqcompress.kv_cache.attention import CACHE, find_rotary
from vqcompress.kv_cache.cache import KINDS
from vqcompress.storage.distributed import ALONE, ProcessGroup
from vqcompress.storage.recipe import KVCacheConfig

# Tokens that a codebook is learned from at most, spread evenly over all rows: 64 for each entry.
TOKENS = 64 * kv.ENTRIES
# Tokens that run through the model at once.
BATCH_TOKENS = 2048
# Tensors by name, and which layers' keys are without their rotary embedding.
Books = tuple[dict[str, Tensor], list[bool]]
# Of keys or of values of a layer, by batch: (T, H, D) float32, and what an error in each costs.
Samples = list[tuple[Tensor, Tensor | None]]


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
    group: ProcessGroup = ALONE,
    tell: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> list[tuple[Tensor, Tensor]]:
    """For each layer the codebooks (H, G, E, d) float16 of its keys and of its values.

    rotary: `find_rotary`; keys of a layer that has one are learned without their embedding. gradients: weigh errors by
    the squared gradient of the rows' loss (CQ, arXiv 2405.03917, section 3.3; KVQuant, arXiv 2401.18079, section 3.2);
    else all errors weigh the same. rounds: of k-means. tell: called with what is done, and how often of how many times,
    before each and at the end. VQCompressError if the heads' channels are no multiple of d.
    """
    found, samples = dict[int, tuple[Tensor, Tensor]](), _gather(model, rows_NL, d, rotary, gradients, group, tell)
    learning = "learning codebooks of keys and values, layer"
    for first in range(0, len(samples), group.size):
        tell(learning, first, len(samples))
        own: list[list[Samples]] = []
        for rank, pair in enumerate(samples[first : first + group.size]):
            shares = [group.gather(rank, parts) for parts in pair]
            own = shares if rank == group.rank else own
            pair.clear()
        draw = torch.Generator().manual_seed(seed)
        books = [kv.learn(*_joined(shares, model.device), d, rounds, draw).cpu() for shares in own]
        found |= {first + group.rank: (books[0], books[1])} if books else {}
    tell(learning, len(samples), len(samples))
    every = {layer: books for each in group.all_gather(found) for layer, books in each.items()}
    return [every[layer] for layer in range(len(samples))]


def cache_books(
    model: PreTrainedModel,
    rows_NL: Tensor,
    knobs: KVCacheConfig,
    seed: int,
    group: ProcessGroup,
    tell: Callable[[str, int, int], None],
) -> Books:
    """What an artifact holds of a calibrated cache; all processes of a group make it."""
    rotary = find_rotary(model)
    if knobs.keys == "after":
        rotary = [None] * len(rotary)
    gradients = knobs.weights == "gradient"
    books = calibrate(model, rows_NL, 8 // knobs.bits, rotary, seed, gradients, knobs.rounds, group, tell)
    named = {f"{n}.{kind}": book for n, pair in enumerate(books) for kind, book in zip(KINDS, pair, strict=True)}
    return named, [module is not None for module in rotary]


def _joined(shares: list[Samples], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """The samples of all processes as one, on a device."""
    states, costs = zip(*(part for share in shares for part in share), strict=True)
    return torch.cat(states).to(device), None if costs[0] is None else torch.cat(costs).to(device)


def _gather(
    model: PreTrainedModel,
    rows_NL: Tensor,
    d: int,
    rotary: list[nn.Module | None],
    gradients: bool,
    group: ProcessGroup,
    tell: Callable[[str, int, int], None],
) -> list[list[Samples]]:
    """Of every layer the samples of its keys and of its values in this process's share of the rows."""
    turns: dict[nn.Module | None, tuple[Tensor, Tensor]] = {}
    hooks = [m.register_forward_hook(lambda m, _, out: turns.update({m: out})) for m in filter(None, set(rotary))]
    length = rows_NL.shape[1]
    step = max(1, -(-rows_NL.numel() // TOKENS))
    found: list[list[Samples]] = [[[], []] for _ in rotary]
    batches = list(enumerate(rows_NL.split(max(1, BATCH_TOKENS // length))))
    wanted = [p.requires_grad for p in model.parameters()]
    model.requires_grad_(False)
    embeddings = model.get_input_embeddings()
    try:
        share = group.shard(batches)
        gathering = f"gathering keys and values for the codebooks of {len(rotary)} layers, batch"
        for place, (number, batch) in enumerate(share):
            tell(gathering, place, len(share))
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
                for x, parts, turned in zip(pair, found[layer], (turns.get(module), None), strict=True):
                    if x.shape[3] % d:
                        raise VQCompressError(
                            f"layer {layer}: heads of {x.shape[3]} channels cannot be coded {d} at a time"
                        )
                    cost = _taken(x.grad, turned, taken).square() if x.grad is not None else None
                    parts.append((_taken(x.detach(), turned, taken), cost))
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, wants in zip(model.parameters(), wanted, strict=True):
            parameter.requires_grad_(wants)
    return found


def _taken(x_BHTD: Tensor, angles: tuple[Tensor, Tensor] | None, taken: slice) -> Tensor:
    """Some tokens (n, H, D), float32 on the CPU, without the rotary embedding, if they have one.

    That is a rotation: the gradient of what it turned is the gradient turned back.
    """
    x_BHTD = x_BHTD if angles is None else kv.apply_rope(x_BHTD, *angles, inverse=True)
    return x_BHTD.transpose(1, 2).flatten(0, 1)[taken].float().cpu()
