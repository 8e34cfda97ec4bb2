"""Codebooks for the keys and values of a model, learned from calibration rows.

The whole model runs, in its own type: the cost of an error in a key is known only from the layers after it. With
several processes each runs its share of the rows and learns a share of the layers; the bytes are those of one process.
Shape legend: N rows, L tokens of a row, H heads of keys and values, T tokens to learn from, D channels of a head,
G = D / d groups, E entries, d channels of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
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

# The most tokens that a codebook is learned from, spread evenly over all rows: 64 for each entry.
TOKENS = 64 * kv.ENTRIES
# Tokens in one forward pass.
BATCH_TOKENS = 2048
# Tensors by name, and for each layer whether its keys are coded without their rotary embedding.
Books = tuple[dict[str, Tensor], list[bool]]
# By batch, keys or values of a layer: (T, H, D) float32, and the cost of an error in each number.
Samples = list[tuple[Tensor, Tensor | None]]
# Called with the name of the work, and how much of how much is done.
Progress = Callable[[str, int, int], None]


class _RecordingCache(DynamicCache):
    """A plain cache that records (keys, values) by layer, and their gradients if asked to."""

    def __init__(self, gradients: bool):
        super().__init__()
        self.gradients, self.states = gradients, dict[int, tuple[Tensor, Tensor]]()

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """As transformers' own."""
        for states in (key_states, value_states) if self.gradients else ():
            states.retain_grad()
        self.states[layer_idx] = key_states, value_states
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def calibrate(
    model: PreTrainedModel,
    rows_NL: Tensor,
    options: KVCacheConfig,
    rotary: list[nn.Module | None],
    seed: int = 0,
    group: ProcessGroup = ALONE,
    progress: Progress = lambda name, done, total: None,
) -> list[tuple[Tensor, Tensor]]:
    """For each layer the codebooks (H, G, E, d) float16 of its keys and of its values.

    options: bits, weights and rounds are used. With `gradient` an error weighs the squared gradient of the rows' loss
    (CQ, arXiv 2405.03917, section 3.3; KVQuant, arXiv 2401.18079, section 3.2). rotary: from `find_rotary`; keys of a
    layer with a module are learned without their embedding. VQCompressError if the channels of a head are no multiple
    of d.
    """
    d, found = 8 // options.bits, dict[int, tuple[Tensor, Tensor]]()
    samples = _gather(model, rows_NL, options, rotary, group, progress)
    name = "learning codebooks of keys and values, layer"
    for first in range(0, len(samples), group.size):
        progress(name, first, len(samples))
        own: list[list[Samples]] = []
        for rank, pair in enumerate(samples[first : first + group.size]):
            shares = [group.gather(rank, parts) for parts in pair]
            own = shares if rank == group.rank else own
            pair.clear()
        draw = torch.Generator().manual_seed(seed)
        books = [kv.learn(*_joined(shares, model.device), d, options.rounds, draw).cpu() for shares in own]
        if books:
            found[first + group.rank] = books[0], books[1]
    progress(name, len(samples), len(samples))
    every = {layer: books for each in group.all_gather(found) for layer, books in each.items()}
    return [every[layer] for layer in range(len(samples))]


def cache_books(
    model: PreTrainedModel, rows_NL: Tensor, options: KVCacheConfig, seed: int, group: ProcessGroup, progress: Progress
) -> Books:
    """The tensors of an artifact's calibrated cache, and `before` of its config; called by all processes of a group."""
    rotary = find_rotary(model)
    if options.keys == "after":
        rotary = [None] * len(rotary)
    books = calibrate(model, rows_NL, options, rotary, seed, group, progress)
    named = {f"{n}.{kind}": book for n, pair in enumerate(books) for kind, book in zip(KINDS, pair, strict=True)}
    return named, [module is not None for module in rotary]


def _joined(shares: list[Samples], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """The samples of all processes as one tensor on a device, and their costs."""
    states, costs = zip(*(part for share in shares for part in share), strict=True)
    return torch.cat(states).to(device), None if costs[0] is None else torch.cat(costs).to(device)


@contextmanager
def _frozen(model: PreTrainedModel) -> Iterator[None]:
    """Context in which no weight asks for a gradient."""
    before = [parameter.requires_grad for parameter in model.parameters()]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, wants in zip(model.parameters(), before, strict=True):
            parameter.requires_grad_(wants)


def _forward(model: PreTrainedModel, batch_NL: Tensor, gradients: bool) -> list[tuple[Tensor, Tensor]]:
    """Keys and values (N, H, L, D) of each layer, with the gradients of the loss if asked for."""
    cache = _RecordingCache(gradients)
    with torch.set_grad_enabled(gradients):
        # No weight asks for a gradient, so the input must.
        embedded = model.get_input_embeddings()(batch_NL).detach().requires_grad_(gradients)
        logits = model(inputs_embeds=embedded, **{CACHE: cache}, use_cache=True).logits
        if gradients:
            loss = cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch_NL[:, 1:].flatten(), reduction="sum")
            loss.backward()
    return list(cache.states.values())


def _gather(
    model: PreTrainedModel,
    rows_NL: Tensor,
    options: KVCacheConfig,
    rotary: list[nn.Module | None],
    group: ProcessGroup,
    progress: Progress,
) -> list[list[Samples]]:
    """For each layer the samples of its keys and of its values from this process's share of the rows."""
    d, step = 8 // options.bits, max(1, -(-rows_NL.numel() // TOKENS))
    found: list[list[Samples]] = [[[], []] for _ in rotary]
    share = group.shard(list(enumerate(rows_NL.split(max(1, BATCH_TOKENS // rows_NL.shape[1])))))
    name = f"gathering keys and values for the codebooks of {len(rotary)} layers, batch"
    angles: dict[nn.Module | None, tuple[Tensor, Tensor]] = {}
    hooks = [m.register_forward_hook(lambda m, _, out: angles.update({m: out})) for m in filter(None, set(rotary))]
    try:
        with _frozen(model):
            for done, (number, batch_NL) in enumerate(share):
                progress(name, done, len(share))
                states = _forward(model, batch_NL.to(model.device), options.weights == "gradient")
                every = slice(number % step, None, step)
                for layer, (pair, module) in enumerate(zip(states, rotary, strict=True)):
                    for x, parts, turn in zip(pair, found[layer], (angles.get(module), None), strict=True):
                        if x.shape[3] % d:
                            raise VQCompressError(
                                f"layer {layer}: heads of {x.shape[3]} channels are no multiple of the {d} that share "
                                f"a code at {options.bits} bits; choose more bits, or codebook fp8"
                            )
                        cost = None if x.grad is None else _tokens(x.grad, turn, every).square()
                        parts.append((_tokens(x.detach(), turn, every), cost))
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _tokens(x_BHTD: Tensor, angles: tuple[Tensor, Tensor] | None, every: slice) -> Tensor:
    """A slice of the tokens (n, H, D), float32 on the CPU, without the rotary embedding of `angles`.

    The embedding is a rotation, so removing it from a gradient gives the gradient of the keys before it.
    """
    x_BHTD = x_BHTD if angles is None else kv.apply_rope(x_BHTD, *angles, inverse=True)
    return x_BHTD.transpose(1, 2).flatten(0, 1)[every].float().cpu()
