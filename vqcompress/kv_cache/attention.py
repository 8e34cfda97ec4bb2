"""Attention functions for a coded cache, and what has to be known of a model's attention, found by running it.

transformers looks attention functions up by name, so a model is told names of ours: `coded` gives the query of a step
to the layer of the cache that its keys came from, and everything else to what the model had before, if that is `PLAIN`;
`strict` measures, in one pass, what decoding token by token would give.
Shape legend: B rows, Q heads of queries, H of keys and values, L new tokens, T tokens, D channels of a head.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from threading import Lock
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
import transformers
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vqcompress.errors import VQCompressError
from vqcompress.kv_cache import codes as kv

STRICT = "vqcompress_decoding"
# What attends to codes beside transformers' own.
PLAIN = {"sdpa": "vqcompress_coded", "eager": "vqcompress_coded_eager"}
# What a model's forward and `generate` call their cache.
CACHE = "cache" if tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 24) else "past_key_values"
# Of keys that are equal before their rotary embedding, how far turning them back may leave them apart.
APART = 0.02
PROBE_TOKENS = 8


class Reader(Protocol):
    """What the keys of a step carry as `reader`: attention to what is stored."""

    def attend(self, query: Tensor, mask: Tensor | None, scaling: float) -> tuple[Tensor, Tensor] | None:
        """`kv.weigh` of a query (B, Q, 1, D) and a boolean mask; None: it cannot, `read` has to do."""

    def read(self, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Keys and values (B, H, T, D) as a plain cache would give them."""


def coded(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *arguments: Any,
    plain: Any = None,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of a step to coded keys and values, out (B, 1, Q, D), where they are that; else the model's own."""
    reader: Reader | None = getattr(key, "reader", None)
    # A soft limit of the scores, or a bias beside the mask, is more than `kv.attend` knows of.
    if reader is not None and not any(others.get(name) is not None for name in ("softcap", "position_bias")):
        mask = attention_mask
        if mask is not None and mask.dtype != torch.bool:
            mask = mask == 0
        found = reader.attend(query, mask, scaling or query.shape[-1] ** -0.5)
        if found is not None:
            out_BQD, lse_BQ = found
            if (sink_Q := others.get("s_aux")) is not None:
                # One more score, of a value 0 (gpt-oss).
                out_BQD = out_BQD * torch.sigmoid(lse_BQ - sink_Q.to(lse_BQ))[..., None]
            return out_BQD.to(query.dtype)[:, None], None
    if reader is not None:
        key, value = reader.read(attention_mask)
    if attention_mask is not None and attention_mask.shape[-1] > key.shape[2]:
        # Of a static cache, whose mask speaks of room that is not filled.
        attention_mask = attention_mask[..., : key.shape[2]]
    if plain is None:
        plain = sys.modules[type(module).__module__].eager_attention_forward
    out: tuple[Tensor, Tensor | None] = plain(
        module, query, key, value, attention_mask, *arguments, scaling=scaling, **others
    )
    return out


def strict(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention with two versions of the past, one of them stored; out (B, L, Q, D)."""
    groups, (length, total) = query.shape[1] // key.shape[1], (query.shape[2], key.shape[2])
    window, sinks = key.kept  # type: ignore[attr-defined]
    age_LT = torch.arange(total - length, total, device=key.device)[:, None] - torch.arange(total, device=key.device)
    full_LT = (age_LT < window) | (torch.arange(total, device=key.device) < sinks)

    def scores(keys: Tensor) -> Tensor:
        return (query @ keys.repeat_interleave(groups, 1).mT) * (scaling or query.shape[3] ** -0.5)

    stored_keys, stored_values = key.stored  # type: ignore[attr-defined]
    score = torch.where(full_LT, scores(key), scores(stored_keys))
    if softcap is not None:
        score = torch.tanh(score / softcap) * softcap
    score = score.masked_fill(age_LT < 0, -torch.inf) if attention_mask is None else score + attention_mask
    if s_aux is not None:
        score = torch.cat([score, s_aux.to(score)[None, :, None, None].expand(*score.shape[:3], 1)], -1)
    share = score.float().softmax(-1).to(query.dtype)[..., :total]
    out = (share * full_LT) @ value.repeat_interleave(groups, 1)
    out = out + (share * ~full_LT) @ stored_values.repeat_interleave(groups, 1)
    return out.transpose(1, 2).contiguous(), None


for name, function, masks in (
    (STRICT, strict, eager_mask),
    (PLAIN["sdpa"], partial(coded, plain=ALL_ATTENTION_FUNCTIONS["sdpa"]), sdpa_mask),
    (PLAIN["eager"], coded, eager_mask),
):
    ALL_ATTENTION_FUNCTIONS.register(name, function)
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, masks)


@contextmanager
def decoding(model: PreTrainedModel) -> Iterator[None]:
    """Inside, a pass with a strict `KVCache` lets every token attend to the past as it is stored when that token comes.

    The newest and the first tokens, as seen from each token, are read in full precision; all others from their codes.
    """
    before = model.config._attn_implementation
    model.set_attn_implementation(STRICT)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


class _Watch(DynamicCache):
    """A plain cache that remembers the keys that came to each layer, and which layers were asked to attend."""

    def __init__(self) -> None:
        super().__init__()
        self.keys_seen: dict[int, Tensor] = {}
        self.asked = self.reached = 0

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """As transformers', and a look."""
        self.keys_seen[layer_idx] = key_states.detach()
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        self.newest = keys, values
        keys.reader = self  # type: ignore[attr-defined]
        return keys, values

    def attend(self, *arguments: object) -> None:
        """Counts, and leaves it to the model."""
        self.asked += 1

    def read(self, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Counts, too; keys and values of the layer that came last."""
        self.reached += 1
        return self.newest


# What a model attends by after it was asked for the first time, and whether every layer does so by what transformers
# looks up; another attention since then has to be tried anew.
_tried: WeakKeyDictionary[nn.Module, tuple[str, bool]] = WeakKeyDictionary()
_trying = Lock()


def asked_of(model: PreTrainedModel) -> bool:
    """Whether the model attends by `coded` now."""
    return model.config._attn_implementation in PLAIN.values()


@torch.inference_mode()
def asks_readers(model: PreTrainedModel) -> bool:
    """Tell a model of `coded`, if every one of its layers attends by it, which one token shows; whether that is so.

    A model with another attention than transformers' "sdpa" and "eager" keeps it.
    """
    with _trying:
        before = model.config._attn_implementation
        if _tried.get(model, ("", False))[0] != before:
            cache, asks = _Watch(), False
            try:
                if before in PLAIN and model._can_set_attn_implementation():
                    model.set_attn_implementation(PLAIN[before])
                model(torch.full((1, 1), 7, device=model.device), **{CACHE: cache}, use_cache=True, logits_to_keep=1)
                asks = 0 < len(cache.keys_seen) == cache.asked
            finally:
                if not asks:
                    model.set_attn_implementation(before)
            _tried[model] = model.config._attn_implementation, 0 < len(cache.keys_seen) == cache.reached
    return asked_of(model)


def replaceable(model: PreTrainedModel) -> bool:
    """Whether every layer attends by a function that transformers looks up, so that `decoding` can take its place."""
    return asks_readers(model) or _tried[model][1]


@torch.inference_mode()
def find_rotary(model: PreTrainedModel) -> list[nn.Module | None]:
    """For each layer the module that makes the rotary embedding of its keys; None where that cannot be proven.

    Proven by running: a row of equal tokens has, in every layer, equal keys but for their positions, so keys that are
    turned back must be equal. What a module gives as (cos, sin) is tried by `kv.turn`. VQCompressError for a model of
    which some layers keep something else (a recurrent state).
    """
    layers = enumerate(DynamicCache(config=model.config).layers)
    if recurrent := [n for n, layer in layers if "LinearAttention" in type(layer).__name__]:
        raise VQCompressError(
            f"{type(model).__name__}: layers {recurrent} keep a state that a cache of codes cannot hold"
        )
    made: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def look(module: nn.Module, args: Any, out: Any) -> None:
        if (
            isinstance(out, tuple)
            and len(out) == 2
            and all(isinstance(part, Tensor) and part.dim() == 3 for part in out)
        ):
            made[module] = out

    hooks = [m.register_forward_hook(look) for m in model.modules() if "rotary" in type(m).__name__.lower()]
    cache, ids = _Watch(), torch.full((1, PROBE_TOKENS), 7, device=model.device)
    try:
        model(ids, **{CACHE: cache}, use_cache=True, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    found: list[nn.Module | None] = []
    for layer in range(len(cache.keys_seen)):
        keys = cache.keys_seen[layer].float()
        fitting = [m for m, turns in made.items() if turns[0].shape[-1] == keys.shape[-1]]
        back = {m: kv.turn(keys, *made[m], back=True) for m in fitting}
        apart = {m: (x - x[:, :, :1]).norm() / x.norm().clamp(min=1e-30) for m, x in back.items()}
        found.append(next((m for m in fitting if apart[m] <= APART), None))
    return found
