"""A transformers `Cache` that holds keys and values as codes.

What enters is encoded at once. The first tokens of a row (attention sinks, StreamingLLM, arXiv 2309.17453) and the
newest ones also stay as they are, and are read instead of their codes. A prompt attends in full precision and is
encoded once; every later token attends to what is stored.
Shape legend: B rows, H heads of keys and values, T tokens, D channels of a head, N newest and S first tokens in full
precision, G codes of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vqcompress.codebooks import kv
from vqcompress.errors import VQCompressError
from vqcompress.runtime.coders import FP8, Coder, Learned, Universal

# Tokens by which the room for codes grows at least.
ROOM = 256
# Of keys that are equal before their rotary embedding, how far turning them back may leave them apart.
APART = 0.02
PROBE_TOKENS = 8
STRICT = "vqcompress_decoding"
KINDS = ("keys", "values")


class KVLayer(CacheLayerMixin):
    """The keys and values of one layer. coders: of both. rotary: of the embedding that keys are stored without."""

    is_sliding = False
    is_croppable = True

    def __init__(self, cache: KVCache, coders: tuple[Coder, Coder], rotary: nn.Module | None):
        super().__init__()
        self.cache, self.coders, self.rotary = cache, coders, rotary
        self.length = self.full_from = 0
        self.parts: tuple[dict[str, Tensor], ...] = ({}, {})
        # Of keys and values: the first tokens (B, H, S, D), and the newest in a ring (B, H, N, D), slot mod N.
        self.first: tuple[Tensor, ...] = ()
        self.ring: tuple[Tensor, ...] = ()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Room for what stays in full precision."""
        for coder, x in zip(self.coders, (key_states, value_states), strict=True):
            coder.check(x)
        sizes = self.cache.sinks, self.cache.window
        self.first, self.ring = (
            tuple(x.new_zeros((*x.shape[:2], size, x.shape[3])) for x in (key_states, value_states)) for size in sizes
        )
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store new keys and values (B, H, n, D); returns all of them, the past as stored."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, new = self.length, key_states.shape[2]
        past = self._read(start) if start and new > 1 else None
        turned = self.cache.turned(self.rotary)
        for which, x in enumerate((key_states, value_states)):
            if which == 0 and turned:
                x = kv.turn(x, turned[0][:, start : start + new], turned[1][:, start : start + new], back=True)
            for name, part in self.coders[which].encode(x).items():
                self._room(which, name, part, start + new)[:, :, start : start + new] = part
        self._keep((key_states, value_states), start)
        self.length = start + new
        if new == 1:
            # The token itself is read as stored, too.
            found = self._read(self.length)
        elif past is None:
            found = key_states, value_states
        else:
            found = torch.cat([past[0], key_states], 2), torch.cat([past[1], value_states], 2)
        if self.cache.strict:
            # For the attention that lets every token see the past as it will be stored by then.
            found[0].stored = self._decoded(self.length)  # type: ignore[attr-defined]
            found[0].kept = self.cache.window, self.cache.sinks  # type: ignore[attr-defined]
        return found[0], found[1]

    def _room(self, which: int, name: str, part: Tensor, length: int) -> Tensor:
        """The stored part, grown to a length."""
        held = self.parts[which].get(name)
        if held is None or held.shape[2] < length:
            size = max(length, ROOM) if held is None else max(length, held.shape[2] + max(ROOM, held.shape[2] // 4))
            size = min(size, self.cache.room) if length <= self.cache.room else size
            grown = part.new_zeros((*part.shape[:2], size, *part.shape[3:]))
            if held is not None:
                grown[:, :, : self.length] = held[:, :, : self.length]
            self.parts[which][name] = held = grown
        return held

    def _keep(self, states: tuple[Tensor, Tensor], start: int) -> None:
        """Put new tokens into the ring and, if they are a row's first, beside it."""
        new, window = states[0].shape[2], self.ring[0].shape[2]
        for x, first, ring in zip(states, self.first, self.ring, strict=True):
            if window:
                tail = min(new, window)
                slots = torch.arange(start + new - tail, start + new, device=x.device) % window
                ring[:, :, slots] = x[:, :, new - tail :]
            if first.shape[2] and start < self.cache.last_sink:
                at_BS = self.cache.sink_slots(x) - start
                inside = ((at_BS >= 0) & (at_BS < new))[:, None, :, None]
                index = at_BS.clamp(0, new - 1)[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
                first.copy_(torch.where(inside, x.gather(2, index), first))
        self.full_from = max(self.full_from, start + new - window)

    def _decoded(self, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values (B, H, length, D) from their codes, in the type of the model."""
        keys, values = (
            coder.decode({name: part[:, :, :length] for name, part in parts.items()})
            for coder, parts in zip(self.coders, self.parts, strict=True)
        )
        turned = self.cache.turned(self.rotary)
        if turned:
            keys = kv.turn(keys, turned[0][:, :length], turned[1][:, :length])
        return keys.to(self.dtype), values.to(self.dtype)

    def _read(self, length: int) -> tuple[Tensor, Tensor]:
        """What a later token attends to: codes, but for the first and the newest tokens."""
        found = self._decoded(length)
        newest = torch.arange(max(self.full_from, 0), length, device=self.device)
        for x, first, ring in zip(found, self.first, self.ring, strict=True):
            if len(newest):
                x[:, :, newest] = ring[:, :, newest % ring.shape[2]]
            if first.shape[2] and self.cache.first_slot_B is None:
                x[:, :, : first.shape[2]] = first[:, :, :length]
            elif first.shape[2]:
                at_BS = self.cache.sink_slots(x)
                index = at_BS.clamp(max=length - 1)[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
                stored = torch.where((at_BS < length)[:, None, :, None], first, x.gather(2, index))
                x.scatter_(2, index, stored)
        return found

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Tokens that a mask speaks of, from the first one on."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens held."""
        return self.length

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def reset(self) -> None:
        """Forget everything, and the room for it."""
        self.length = self.full_from = 0
        self.parts, self.first, self.ring, self.is_initialized = ({}, {}), (), (), False

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens, given as a negative number."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes the number of tokens to remove as a negative number, not {tokens_to_remove}")
        self.length = max(0, self.length + tokens_to_remove)
        self.full_from = min(self.full_from, self.length)

    def _rows(self, change: Any) -> None:
        """Apply a change of the batch axis to everything."""
        if self.is_initialized:
            self.parts = tuple({name: change(part) for name, part in parts.items()} for parts in self.parts)
            self.first, self.ring = tuple(map(change, self.first)), tuple(map(change, self.ring))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """The rows in the order of beams."""
        self._rows(lambda part: part.index_select(0, beam_idx.to(part.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row several times."""
        self._rows(lambda part: part.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Some of the rows."""
        self._rows(lambda part: part[indices])

    def nbytes(self) -> int:
        """Memory that this layer takes."""
        held = [part for parts in self.parts for part in parts.values()]
        return sum(part.nbytes for part in (*held, *self.first, *self.ring))


class KVCache(Cache):
    """Keys and values of a model as codes: `past_key_values` of its forward and of `generate`.

    coders: for each layer those of keys and values. rotary: for each layer the module that makes the embedding which
    its keys are stored without, or None. window, sinks: newest and first tokens that stay in full precision. length: of
    the longest sequence, if it is known, so that no room is left over. strict: every token of a prompt, too, attends to
    the past as stored (needs `decoding`), for measuring.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        coders: list[tuple[Coder, Coder]],
        rotary: list[nn.Module | None],
        window: int,
        sinks: int,
        length: int | None = None,
        strict: bool = False,
    ):
        self.window, self.sinks, self.room, self.strict = window, sinks, length or (1 << 60), strict
        self._turns: dict[int, tuple[Tensor, Tensor]] = {}
        self._running = False
        self.first_slot_B: Tensor | None = None
        self.last_sink = sinks
        super().__init__([KVLayer(self, *pair) for pair in zip(coders, rotary, strict=True)])
        self._hooks = [m.register_forward_hook(self._turn) for m in dict.fromkeys(filter(None, rotary))]
        self._hooks.append(model.register_forward_pre_hook(self._begin, with_kwargs=True))

    def close(self) -> None:
        """Take the hooks off the model; the cache is of no use after that."""
        for hook in self._hooks:
            hook.remove()

    def _begin(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Where rows that are padded on the left begin."""
        mask = kwargs.get("attention_mask")
        # Which of the names transformers uses depends on its version.
        self._running = any(kwargs.get(name) is self for name in ("past_key_values", "cache"))
        if self._running and not self.get_seq_length() and isinstance(mask, Tensor) and mask.dim() == 2:
            first_B = mask.long().argmax(1)
            if furthest := int(first_B.max()):
                self.first_slot_B, self.last_sink = first_B, furthest + self.sinks

    def _turn(self, module: nn.Module, args: Any, out: Any) -> None:
        """Keep the embedding of new tokens."""
        if not self._running:
            return
        cos, sin = (part.detach() for part in out)
        start = self.get_seq_length()
        before = self._turns.get(id(module))
        if start and before is not None:
            rows = max(len(cos), len(before[0]))
            joined = [
                torch.cat([old[:, :start].expand(rows, -1, -1), new.expand(rows, -1, -1)], 1)
                for old, new in zip(before, (cos, sin), strict=True)
            ]
            cos, sin = joined
        self._turns[id(module)] = cos, sin

    def turned(self, rotary: nn.Module | None) -> tuple[Tensor, Tensor] | None:
        """cos and sin (B or 1, T, D) of all tokens."""
        return None if rotary is None else self._turns[id(rotary)]

    def sink_slots(self, x: Tensor) -> Tensor:
        """Where the first tokens of each row lie, (B, S)."""
        first_B = self.first_slot_B if self.first_slot_B is not None else torch.zeros(len(x), dtype=torch.long)
        return first_B.to(x.device)[:, None] + torch.arange(self.sinks, device=x.device)

    def _of_rows(self, change: Any) -> None:
        if self.first_slot_B is not None:
            self.first_slot_B = change(self.first_slot_B)
        self._turns = {key: tuple(change(p) if len(p) > 1 else p for p in pair) for key, pair in self._turns.items()}  # type: ignore[misc]

    def reorder_cache(self, beam_idx: Any) -> None:
        """The rows in the order of beams."""
        super().reorder_cache(beam_idx)
        self._of_rows(lambda part: part.index_select(0, beam_idx.to(part.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row several times."""
        super().batch_repeat_interleave(repeats)
        self._of_rows(lambda part: part.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Some of the rows."""
        super().batch_select_indices(indices)
        self._of_rows(lambda part: part[indices])

    def nbytes(self) -> int:
        """Memory that all layers take, the embeddings of their keys included."""
        turns = sum(part.nbytes for pair in self._turns.values() for part in pair)
        return turns + sum(layer.nbytes() for layer in self.layers)  # type: ignore[union-attr]


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


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention with two versions of the past, one of them stored; out (B, L, Q, D)."""
    if others.get("s_aux") is not None:
        raise VQCompressError("this model's attention has learned sinks of its own, which cannot be measured this way")
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
    share = score.float().softmax(-1).to(query.dtype)
    out = (share * full_LT) @ value.repeat_interleave(groups, 1)
    out = out + (share * ~full_LT) @ stored_values.repeat_interleave(groups, 1)
    return out.transpose(1, 2).contiguous(), None


ALL_ATTENTION_FUNCTIONS.register(STRICT, _attend)
ALL_MASK_ATTENTION_FUNCTIONS.register(STRICT, eager_mask)


class _Watch(DynamicCache):
    """A plain cache that remembers the keys that came to each layer."""

    def __init__(self) -> None:
        super().__init__()
        self.keys_seen: dict[int, Tensor] = {}

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """As transformers', and a look."""
        self.keys_seen[layer_idx] = key_states.detach()
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


@torch.inference_mode()
def find_rotary(model: PreTrainedModel) -> list[nn.Module | None]:
    """For each layer the module that makes the rotary embedding of its keys; None where that cannot be proven.

    Proven by running: a row of equal tokens has, in every layer, equal keys but for their positions, so keys that are
    turned back must be equal. What a module gives as (cos, sin) is tried by `kv.turn`.
    """
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
        model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
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


@dataclass(frozen=True)
class Kept:
    """How a model's keys and values are kept: what a `KVCache` is made of. coders, rotary: by layer, as there."""

    coders: list[tuple[Coder, Coder]]
    rotary: list[nn.Module | None]
    window: int
    sinks: int

    def cache(self, model: PreTrainedModel, length: int | None = None, strict: bool = False) -> KVCache:
        """An empty cache for the model."""
        return KVCache(model, self.coders, self.rotary, self.window, self.sinks, length, strict)


def kept(model: PreTrainedModel, settings: dict[str, Any], books: dict[str, Tensor] | None = None) -> Kept:
    """How settings, `recipe.CacheKnobs` as JSON, keep the keys and values of a model.

    books: `N.keys` and `N.values`, float16 (H, G, E, d), of every layer, for learned codebooks; VQCompressError if they
    do not fit the model. `before`, written by `quantize`: which layers' keys were learned before their embedding.
    """
    rotary = find_rotary(model)
    if settings["keys"] == "after":
        rotary = [None] * len(rotary)
    device, d = model.device, 8 // settings["bits"]
    if settings["codebook"] != "learned":
        coder: Coder = FP8() if settings["codebook"] == "fp8" else Universal(d)
        coders = [(coder, coder)] * len(rotary)
    else:
        if [module is not None for module in rotary] != settings.get("before"):
            raise VQCompressError("the codebooks of the cache were learned for another model than this one")
        coders = []
        for n in range(len(rotary)):
            pair = [(books or {}).get(f"{n}.{kind}") for kind in KINDS]
            if any(b is None or b.dim() != 4 or b.shape[2:] != (kv.ENTRIES, d) or not b.isfinite().all() for b in pair):
                raise VQCompressError(f"the codebooks of the cache of layer {n} are missing or damaged")
            keys, values = (Learned(b.to(device)) for b in pair if b is not None)
            coders.append((keys, values))
    return Kept(coders, rotary, settings["window"], settings["sinks"])


def keep_coded(model: PreTrainedModel, how: Kept) -> None:
    """Let `model.generate` use a fresh coded cache unless it is given one."""
    plain: Any = model.generate

    def generate(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("past_key_values") is not None:
            return plain(*args, **kwargs)
        cache = how.cache(model)
        try:
            return plain(*args, **{**kwargs, "past_key_values": cache})
        finally:
            cache.close()

    model.generate = generate  # type: ignore[assignment]
