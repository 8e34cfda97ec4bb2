"""Codebooks for the keys and values of a model, learned from calibration rows.

The whole model runs, in its own type: the cost of an error in a key is known only from the layers after it. With
several processes each runs its share of the rows and learns a share of the layers; the bytes are those of one process.
Shape legend: N rows, L tokens of a row, H heads of keys and values, T tokens to learn from, D channels of a head,
G = D / d groups, E entries, d channels of a group.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from vqcompress.errors import VQCompressError
from vqcompress.kv_cache import codes as kv
from vqcompress.kv_cache.attention import CACHE, RecordingCache
from vqcompress.kv_cache.cache import KINDS
from vqcompress.kv_cache.rotary import Angles, apply_rope, find_rotary, take_angles
from vqcompress.storage.distributed import ALONE, ProcessGroup
from vqcompress.storage.recipe import KVCacheConfig

# The most tokens that a codebook is learned from, spread evenly over all rows: 64 for each entry.
TOKENS = 64 * kv.ENTRIES
# Tokens in one forward pass.
BATCH_TOKENS = 2048
# `N.keys` and `N.values` of each layer: (H, G, E, d) float16. And whether its keys are coded without their embedding.
Books = tuple[dict[str, Tensor], list[bool]]
# Called with the name of the work, and how much of how much is done.
Progress = Callable[[str, int, int], None]


def calibrate(
    model: PreTrainedModel,
    rows_NL: Tensor,
    options: KVCacheConfig,
    seed: int = 0,
    group: ProcessGroup = ALONE,
    progress: Progress = lambda name, done, total: None,
) -> Books:
    """The codebooks of an artifact's cache, and `before` of its config; called by all processes of a group.

    With `gradient` an error weighs the squared gradient of the rows' loss (CQ, arXiv 2405.03917, section 3.3; KVQuant,
    arXiv 2401.18079, section 3.2). The parameters of the model lose theirs. VQCompressError if the channels of a head
    are no multiple of d.
    """
    rotary = find_rotary(model)
    if options.keys == "after":
        rotary = [None] * len(rotary)
    samples = _samples(model, rows_NL, options, rotary, group, progress)
    name, learned = "learning codebooks of keys and values, layer", dict[str, Tensor]()
    for first in range(0, len(samples), group.size):
        progress(name, first, len(samples))
        own: list[list[list[Tensor]]] = []
        for rank, pair in enumerate(samples[first : first + group.size]):
            shares = [group.all_gather(parts) for parts in pair]
            own = shares if rank == group.rank else own
            pair.clear()
        draw = torch.Generator().manual_seed(seed)
        for kind, share in zip(KINDS[: len(own)], own, strict=True):
            x_THD, *weight = torch.cat([part for parts in share for part in parts], 1).to(model.device)
            book = kv.learn(x_THD, weight[0] if weight else None, 8 // options.bits, options.rounds, draw)
            learned[f"{first + group.rank}.{kind}"] = book.cpu()
    progress(name, len(samples), len(samples))
    every = {name: book for each in group.all_gather(learned) for name, book in each.items()}
    names = [f"{layer}.{kind}" for layer in range(len(samples)) for kind in KINDS]
    return {name: every[name] for name in names}, [module is not None for module in rotary]


def _samples(
    model: PreTrainedModel,
    rows_NL: Tensor,
    options: KVCacheConfig,
    rotary: list[nn.Module | None],
    group: ProcessGroup,
    progress: Progress,
) -> list[list[list[Tensor]]]:
    """For each layer the samples of its keys and of its values from this process's share of the rows, by batch.

    A sample is (1, T, H, D) float32 on the CPU, or (2, T, H, D) with the cost of an error in each number.
    """
    d, step = 8 // options.bits, max(1, -(-rows_NL.numel() // TOKENS))
    found: list[list[list[Tensor]]] = [[[], []] for _ in rotary]
    share = group.shard(list(enumerate(rows_NL.split(max(1, BATCH_TOKENS // rows_NL.shape[1])))))
    name = f"gathering keys and values for the codebooks of {len(rotary)} layers, batch"
    model.requires_grad_(False)
    for done, (number, batch_NL) in enumerate(share):
        progress(name, done, len(share))
        states = _forward(model, batch_NL.to(model.device), options.weights == "gradient")
        angles = {module: take_angles(module) for module in set(rotary)}
        every = slice(number % step, None, step)
        for layer, (pair, module) in enumerate(zip(states, rotary, strict=True)):
            for x, parts, turn in zip(pair, found[layer], (angles[module], None), strict=True):
                if x.shape[3] % d:
                    raise VQCompressError(f"layer {layer}: heads of {x.shape[3]} channels have no groups of {d}")
                sample = [_tokens(x.detach(), turn, every)]
                if x.grad is not None:
                    sample.append(_tokens(x.grad, turn, every).square())
                parts.append(torch.stack(sample))
    return found


def _forward(model: PreTrainedModel, batch_NL: Tensor, gradients: bool) -> list[tuple[Tensor, Tensor]]:
    """Keys and values (N, H, L, D) of each layer, with the gradients of the loss if asked for."""
    cache = RecordingCache()
    with torch.set_grad_enabled(gradients):
        # No weight asks for a gradient, so the input must.
        embedded = model.get_input_embeddings()(batch_NL).detach().requires_grad_(gradients)
        logits = model(inputs_embeds=embedded, **{CACHE: cache}, use_cache=True).logits
        if gradients:
            loss = cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch_NL[:, 1:].flatten(), reduction="sum")
            loss.backward()
    return list(cache.states.values())


def _tokens(x_BHTD: Tensor, angles: Angles | None, every: slice) -> Tensor:
    """A slice of the tokens (n, H, D), float32 on the CPU, without the rotary embedding of `angles`.

    The embedding is a rotation, so removing it from a gradient gives the gradient of the keys before it.
    """
    x_BHTD = x_BHTD if angles is None else apply_rope(x_BHTD, angles, inverse=True)
    return x_BHTD.transpose(1, 2).flatten(0, 1)[every].float().cpu()
