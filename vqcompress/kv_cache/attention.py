"""Attention functions that read a coded cache.

transformers looks attention functions up by name, and they get no cache but only the keys that it returned. So a cache
registers a reader for these keys, which attends in the model's place.
Shape legend: B rows, Q heads of queries, H of keys and values, L new tokens, T tokens, D channels of a head.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, MutableMapping
from functools import partial
from threading import Lock
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary
from transformers import DynamicCache, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

Attention = Callable[..., tuple[Tensor, Tensor | None]]
# transformers' attention → its replacement that asks readers.
CODED = {"sdpa": "vqcompress_coded", "eager": "vqcompress_coded_eager"}
# The name of the cache argument of a model's forward and `generate`.
CACHE = "cache" if tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 24) else "past_key_values"
# Keys that a cache returned → (the model's own attention, query, key, value, mask, **options) → attention.
READERS: MutableMapping[Tensor, Attention] = WeakIdKeyDictionary()
_lock = Lock()


def coded(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *arguments: Any,
    plain: Attention | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention (B, L, Q, D) by the reader of the keys, or by the model's own function where they have none."""
    if plain is None:
        plain = sys.modules[type(module).__module__].eager_attention_forward
    attend, reader = partial(plain, module), READERS.get(key)
    if reader is None:
        return attend(query, key, value, attention_mask, *arguments, **options)
    return reader(attend, query, key, value, attention_mask, *arguments, **options)


ALL_ATTENTION_FUNCTIONS.register(CODED["sdpa"], partial(coded, plain=ALL_ATTENTION_FUNCTIONS["sdpa"]))
ALL_MASK_ATTENTION_FUNCTIONS.register(CODED["sdpa"], sdpa_mask)
ALL_ATTENTION_FUNCTIONS.register(CODED["eager"], coded)
ALL_MASK_ATTENTION_FUNCTIONS.register(CODED["eager"], eager_mask)


class RecordingCache(DynamicCache):
    """A plain cache that records the keys and values of each layer, and how many layers attend by `coded`.

    Where they have gradients, these are retained.
    """

    def __init__(self) -> None:
        super().__init__()
        self.states: dict[int, tuple[Tensor, Tensor]] = {}
        self.asked: list[None] = []

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """As transformers' own."""
        self.states[layer_idx] = key_states, value_states
        for states in self.states[layer_idx]:
            if states.requires_grad:
                states.retain_grad()
        found = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        READERS[found[0]] = partial(_count, self.asked)
        return found


def _count(asked: list[None], attend: Attention, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
    asked.append(None)
    return attend(*arguments, **options)


def is_installed(model: PreTrainedModel) -> bool:
    """Whether the model attends by `coded` now."""
    return model.config._attn_implementation in CODED.values()


@torch.inference_mode()
def install(model: PreTrainedModel) -> bool:
    """Let a model attend by `coded`, if running one token shows that all its layers do; returns whether they do.

    Only transformers' "sdpa" and "eager" are replaced.
    """
    with _lock:
        before = model.config._attn_implementation
        if before in CODED and model._can_set_attn_implementation():
            model.set_attn_implementation(CODED[before])
            cache = RecordingCache()
            try:
                model(torch.full((1, 1), 7, device=model.device), **{CACHE: cache}, use_cache=True, logits_to_keep=1)
            finally:
                if not 0 < len(cache.states) == len(cache.asked):
                    model.set_attn_implementation(before)
        return is_installed(model)


def decode_at_once(
    stored: tuple[Tensor, Tensor, int, int],
    attend: Attention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """A reader: attention (B, L, Q, D) of all tokens of a text as if each was decoded by itself.

    stored: decoded keys and values (B, H, T, D), window and sinks: each token reads its `window` newest and the first
    `sinks` ones in full precision, all others as stored.
    """
    stored_keys, stored_values, window, sinks = stored
    groups, (length, total) = query.shape[1] // key.shape[1], (query.shape[2], key.shape[2])
    token_T = torch.arange(total, device=key.device)
    age_LT = token_T[total - length :, None] - token_T
    full_LT = (age_LT < window) | (token_T < sinks)

    def scores(keys: Tensor) -> Tensor:
        return (query @ keys.repeat_interleave(groups, 1).mT) * (scaling or query.shape[3] ** -0.5)

    score = torch.where(full_LT, scores(key), scores(stored_keys))
    if (softcap := options.get("softcap")) is not None:
        score = torch.tanh(score / softcap) * softcap
    if mask is None:
        mask = age_LT >= 0
    # An additive mask is 0 where a token counts.
    score = score.masked_fill(~mask if mask.dtype == torch.bool else mask != 0, -torch.inf)
    if (s_aux := options.get("s_aux")) is not None:
        # One more score, with a value of 0 (gpt-oss).
        score = torch.cat([score, s_aux.to(score)[None, :, None, None].expand(*score.shape[:3], 1)], -1)
    share = score.float().softmax(-1).to(query.dtype)[..., :total]
    out = (share * full_LT) @ value.repeat_interleave(groups, 1)
    out = out + (share * ~full_LT) @ stored_values.repeat_interleave(groups, 1)
    return out.transpose(1, 2).contiguous(), None
