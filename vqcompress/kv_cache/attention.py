"""Attention functions for a coded cache, and tests of a model's attention that run it.

transformers looks attention functions up by name. `coded` gives the query of a step to the cache layer that its keys
came from, and everything else to the model's attention from before; `strict` computes in one pass the logits of
decoding token by token.
Shape legend: B rows, Q heads of queries, H of keys and values, L new tokens, T tokens, D channels of a head.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from functools import partial
from threading import Lock
from typing import Any, ClassVar, NamedTuple, Protocol
from weakref import WeakKeyDictionary

import torch
import transformers
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary
from transformers import DynamicCache, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vqcompress.errors import VQCompressError
from vqcompress.kv_cache import codes as kv

STRICT = "vqcompress_decoding"
# transformers' attention → its replacement that attends to codes.
PLAIN = {"sdpa": "vqcompress_coded", "eager": "vqcompress_coded_eager"}
# The name of the cache argument of a model's forward and `generate`.
CACHE = "cache" if tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 24) else "past_key_values"
# Relative distance that equal keys may have after their rotary embedding was removed.
APART = 0.02
PROBE_TOKENS = 8


class Reader(Protocol):
    """Attention to the stored past of one step's keys."""

    def attend(self, query: Tensor, mask: Tensor | None, scaling: float) -> tuple[Tensor, Tensor] | None:
        """`codes.weigh` of a query (B, Q, 1, D) and a boolean mask; None where `read` has to be used."""

    def read(self) -> tuple[Tensor, Tensor]:
        """Keys and values (B, H, T, D) as a plain cache would give them."""


class Stored(NamedTuple):
    """Decoded keys and values (B, H, T, D), and how many of the newest and first tokens are not read from them."""

    keys: Tensor
    values: Tensor
    window: int
    sinks: int


# Attention functions get no cache, only the keys that it returned: these are looked up by those keys.
READERS: MutableMapping[Tensor, Reader] = WeakIdKeyDictionary()
STORED: MutableMapping[Tensor, Stored] = WeakIdKeyDictionary()


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
    """Attention of a step to coded keys and values, (B, 1, Q, D); for keys without a reader the model's own."""
    reader = READERS.get(key)
    # `codes.attend` has no limit of scores and no bias beside the mask.
    if reader is not None and not any(others.get(name) is not None for name in ("softcap", "position_bias")):
        mask = attention_mask
        if mask is not None and mask.dtype != torch.bool:
            mask = mask == 0
        found = reader.attend(query, mask, scaling or query.shape[-1] ** -0.5)
        if found is not None:
            out_BQD, lse_BQ = found
            if (sink_Q := others.get("s_aux")) is not None:
                # One more score, with a value of 0 (gpt-oss).
                out_BQD = out_BQD * torch.sigmoid(lse_BQ - sink_Q.to(lse_BQ))[..., None]
            return out_BQD.to(query.dtype)[:, None], None
    if reader is not None:
        key, value = reader.read()
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
    """Attention (B, L, Q, D) in which each token reads older tokens as stored, newer ones in full precision."""
    groups, (length, total) = query.shape[1] // key.shape[1], (query.shape[2], key.shape[2])
    stored_keys, stored_values, window, sinks = STORED[key]
    age_LT = torch.arange(total - length, total, device=key.device)[:, None] - torch.arange(total, device=key.device)
    full_LT = (age_LT < window) | (torch.arange(total, device=key.device) < sinks)

    def scores(keys: Tensor) -> Tensor:
        return (query @ keys.repeat_interleave(groups, 1).mT) * (scaling or query.shape[3] ** -0.5)

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
    """Context in which a pass with a strict `KVCache` gives the logits of decoding token by token.

    Each token reads its newest and first tokens in full precision, all others from their codes.
    """
    before = model.config._attn_implementation
    model.set_attn_implementation(STRICT)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


class _Probe(DynamicCache):
    """A plain cache that records the keys of each layer, and how often `coded` asked it to attend and to read."""

    def __init__(self) -> None:
        super().__init__()
        self.keys_by_layer: dict[int, Tensor] = {}
        self.attends = self.reads = 0

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """As transformers' own; this cache becomes the keys' reader."""
        self.keys_by_layer[layer_idx] = key_states.detach()
        self.newest = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        READERS[self.newest[0]] = self
        return self.newest

    def attend(self, *arguments: object) -> None:
        """Counts, and leaves attention to the model."""
        self.attends += 1

    def read(self) -> tuple[Tensor, Tensor]:
        """Counts; keys and values of the last layer."""
        self.reads += 1
        return self.newest


class AttentionHook:
    """Lets a model attend by `coded`, if that replaces the attention of all its layers.

    Only transformers' "sdpa" and "eager" are replaced.
    """

    # The attention that a model was left with after a probe, and whether all layers call it through transformers.
    _probed: ClassVar[WeakKeyDictionary[nn.Module, tuple[str, bool]]] = WeakKeyDictionary()
    _lock: ClassVar[Lock] = Lock()

    def __init__(self, model: PreTrainedModel):
        self.model = model

    @property
    def installed(self) -> bool:
        """Whether the model attends by `coded` now."""
        return self.model.config._attn_implementation in PLAIN.values()

    @torch.inference_mode()
    def install(self) -> bool:
        """Set the attention unless one token shows that a layer does not use it; returns `installed`."""
        with self._lock:
            before = self.model.config._attn_implementation
            if self._probed.get(self.model, ("", False))[0] != before:
                self._probe(before)
        return self.installed

    @property
    def covers_all_layers(self) -> bool:
        """Whether every layer looks its attention up in transformers, so that `decoding` can replace it."""
        return self.install() or self._probed[self.model][1]

    def _probe(self, before: str) -> None:
        model, cache, replaced = self.model, _Probe(), False
        try:
            if before in PLAIN and model._can_set_attn_implementation():
                model.set_attn_implementation(PLAIN[before])
            model(torch.full((1, 1), 7, device=model.device), **{CACHE: cache}, use_cache=True, logits_to_keep=1)
            replaced = 0 < len(cache.keys_by_layer) == cache.attends
        finally:
            if not replaced:
                model.set_attn_implementation(before)
        self._probed[model] = model.config._attn_implementation, 0 < len(cache.keys_by_layer) == cache.reads


@torch.inference_mode()
def find_rotary(model: PreTrainedModel) -> list[nn.Module | None]:
    """For each layer the module that makes the rotary embedding of its keys; None where that cannot be proven.

    Proven by running: in a row of equal tokens the keys of a layer differ only by position, so they must be equal once
    their embedding is removed. Candidates are modules that return (cos, sin). VQCompressError for a model with layers
    that keep a recurrent state instead.
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
    cache, ids = _Probe(), torch.full((1, PROBE_TOKENS), 7, device=model.device)
    try:
        model(ids, **{CACHE: cache}, use_cache=True, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    found: list[nn.Module | None] = []
    for layer in range(len(cache.keys_by_layer)):
        keys = cache.keys_by_layer[layer].float()
        fitting = [m for m, turns in made.items() if turns[0].shape[-1] == keys.shape[-1]]
        back = {m: kv.apply_rope(keys, *made[m], inverse=True) for m in fitting}
        apart = {m: (x - x[:, :, :1]).norm() / x.norm().clamp(min=1e-30) for m, x in back.items()}
        found.append(next((m for m in fitting if apart[m] <= APART), None))
    return found
