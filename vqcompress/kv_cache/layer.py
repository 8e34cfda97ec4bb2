"""The keys and values of one layer as codes, and attention to them.

A step's query attends to codes without decoding them first, and to the few tokens in full precision; both are merged by
the logarithms of their sums.
Shape legend: B rows, Q heads of queries, H heads of keys and values, T slots of tokens, D channels of a head, N newest
and S first tokens in full precision, M = S + N, G codes of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin

from vqcompress.kv_cache import codes as kv
from vqcompress.kv_cache.coders import Coder, Learned

# Tokens by which the room for codes grows at least, and for which a sliding window keeps room on top.
ROOM = 256


def grown(held: Tensor | None, part: Tensor, dim: int, filled: int, length: int, most: int) -> Tensor:
    """Room for `length` tokens along an axis, like that of a part, that keeps the first `filled` of what was held."""
    if held is not None and held.shape[dim] >= length:
        return held
    size = max(length, ROOM if held is None else held.shape[dim] + max(ROOM, held.shape[dim] // 4))
    grown = part.new_zeros((*part.shape[:dim], max(length, min(size, most)), *part.shape[dim + 1 :]))
    if held is not None:
        grown.narrow(dim, 0, filled).copy_(held.narrow(dim, 0, filled))
    return grown


@dataclass
class Seen:
    """Which slots the query of a step attends to.

    start, end: of the coded ones; filled: the end on the device. coded_BT, kept_BM: where those within and those in
    full precision count, None where all do.
    """

    start: int
    end: int
    filled: Tensor | None
    coded_BT: Tensor | None
    kept_BM: Tensor | None


class Shared:
    """What all layers of a cache share. window, sinks: newest and first tokens that stay in full precision.

    room: tokens at most. static: all room is made at once, and what a step needs to know of it lies on the device.
    strict: prompts, too, attend to the past as stored. asked: the model's attention asks layers, as `attention.coded`.
    """

    def __init__(self, window: int, sinks: int, room: int, static: bool, strict: bool, asked: bool):
        self.window, self.sinks, self.room, self.static = window, sinks, room, static
        self.strict, self.asked = strict, asked
        # Where rows that are padded on the left begin, and the last token that is the first of any.
        self.first_place_B: Tensor | None = None
        self.last_sink = sinks
        # cos and sin (B or 1, T, D) of the embeddings that keys are stored without, by the module that makes them.
        self.turns: dict[int, list[Tensor]] = {}
        self._seen: dict[Any, tuple[Tensor | None, Seen]] = {}
        self._answered: set[int] = set()

    def turn(self, module: nn.Module, made: tuple[Tensor, Tensor], start: Any) -> None:
        """Keep the embedding of new tokens, the first of them number `start`."""
        held = self.turns.setdefault(id(module), [])
        for which, part in enumerate(made):
            # On a CPU they are read as float32 again and again.
            part = part.detach() if part.is_cuda else part.detach().float()
            if len(held) <= which:
                held.append(part.new_zeros((len(part), 0, part.shape[2])))
            rows, new = max(len(part), len(held[which])), part.shape[1]
            if len(held[which]) < rows:
                held[which] = held[which].repeat(rows, 1, 1)
            part = part.expand(rows, -1, -1)
            if self.static:
                held[which] = grown(held[which], part, 1, 0, self.room, self.room)
                held[which].index_copy_(1, start + torch.arange(new, device=part.device), part)
            else:
                held[which] = grown(held[which], part, 1, start, start + new, self.room)
                held[which][:, start : start + new] = part

    def turned(self, rotary: nn.Module | None, length: int = 0) -> list[Tensor] | None:
        """cos and sin of all tokens, with room for `length` at least; None without an embedding."""
        if rotary is None:
            return None
        held = self.turns[id(rotary)]
        held[:] = [grown(part, part, 1, part.shape[1], length, length) for part in held]
        return held

    def sink_places(self, batch: int, device: torch.device) -> Tensor:
        """Which tokens are the first of each row, (B, S)."""
        places_S, first_B = torch.arange(self.sinks, device=device), self.first_place_B
        return places_S.expand(batch, -1) if first_B is None else first_B.to(device)[:, None] + places_S

    def sink_number(self, batch: int, start: int, count: int, device: torch.device) -> Tensor:
        """Which token of its row each of so many tokens is, (B, count); negative in front of a row."""
        tokens_T = torch.arange(start, start + count, device=device)
        return (
            tokens_T.expand(batch, -1)
            if (first_B := self.first_place_B) is None
            else tokens_T - first_B.to(device)[:, None]
        )

    def seen(self, layer: KVLayer, mask: Tensor | None) -> Seen:
        """`KVLayer.seen`, once a step for all layers that answer the same."""
        if id(layer) in self._answered:
            self._seen.clear()
            self._answered.clear()
        self._answered.add(id(layer))
        room = next(iter(layer.parts[0].values())).shape[2]
        key = layer.sliding, layer.base, room, layer.device, id(mask)
        if key not in self._seen:
            self._seen[key] = mask, layer.seen(mask)
        return self._seen[key][1]

    def rows(self, change: Any) -> None:
        """Apply a change of the batch axis."""
        if self.first_place_B is not None:
            self.first_place_B = change(self.first_place_B)
        for held in self.turns.values():
            held[:] = [change(part) if len(part) > 1 else part for part in held]


class KVLayer(CacheLayerMixin):
    """The keys and values of one layer. coders: of both. rotary: of the embedding that keys are stored without.

    window: of a layer whose tokens attend to the newest so many only. Slot t holds token base + t.
    """

    is_croppable = True

    def __init__(self, shared: Shared, coders: tuple[Coder, Coder], rotary: nn.Module | None, window: int | None):
        super().__init__()
        self.shared, self.coders, self.rotary, self.sliding = shared, coders, rotary, window
        self.is_sliding = window is not None
        self.base = 0
        # Tokens that came, and the first of those that the ring holds; a static cache has them on the device, where a
        # CUDA graph sees them change.
        self.length: Any = 0
        self.full_from: Any = 0
        self.parts: tuple[dict[str, Tensor], ...] = ({}, {})
        # Of keys and values, (B, H, M, D): the first tokens, then the newest in a ring, token p in slot p mod N of it.
        self.kept: tuple[Tensor, ...] = ()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Room for what stays in full precision, of a ring as far as it is filled."""
        for coder, x in zip(self.coders, (key_states, value_states), strict=True):
            coder.check(x)
        count = self.shared.sinks + (self.shared.window if self.shared.static else 0)
        self.kept = tuple(x.new_zeros((*x.shape[:2], count, x.shape[3])) for x in (key_states, value_states))
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        if self.shared.static:
            self.length, self.full_from = (torch.zeros((), dtype=torch.long, device=self.device) for _ in range(2))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store new keys and values (B, H, n, D); returns all of them, the past as stored.

        Of a single token those that came come back, with this layer as their `reader`, if the model asks readers.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = key_states.shape[2]
        past = self._read(self._reach(int(self.length))) if new > 1 and int(self.length) else None
        self._encode((key_states, value_states), new)
        self._keep((key_states, value_states), new)
        self.length += new
        if self.shared.static:
            self.full_from.copy_(torch.maximum(self.full_from, self.length - self.shared.window))
        else:
            self.full_from = max(self.full_from, self.length - self.shared.window)
        if new == 1 and self.shared.asked:
            key_states.reader = self  # type: ignore[attr-defined]
        elif new == 1:
            # The token itself is read as stored, too.
            key_states, value_states = self._read(self._reach(self.length - 1) + 1)
        elif past is not None:
            key_states, value_states = torch.cat([past[0], key_states], 2), torch.cat([past[1], value_states], 2)
        if self.shared.strict:
            # For the attention that lets every token see the past as it will be stored by then.
            key_states.stored = self._decoded(0, self.length)  # type: ignore[attr-defined]
            key_states.kept = self.shared.window, self.shared.sinks  # type: ignore[attr-defined]
        return key_states, value_states

    def _encode(self, states: tuple[Tensor, Tensor], new: int) -> None:
        """Write the codes of new tokens behind those of the others."""
        turned = self.shared.turned(self.rotary)
        places = torch.empty(0)
        if self.shared.static:
            places = self.length + torch.arange(new, device=self.device)
        else:
            self._make_room(new)
        for which, (coder, x) in enumerate(zip(self.coders, states, strict=True)):
            angles: tuple[Tensor, ...] = ()
            if which == 0 and turned:
                if self.shared.static:
                    angles = tuple(part.index_select(1, places) for part in turned)
                else:
                    angles = tuple(part[:, self.length : self.length + new] for part in turned)
            if isinstance(coder, Learned):
                # In one launch.
                parts = coder.encode(x, *angles)
            else:
                parts = coder.encode(kv.turn(x, angles[0], angles[1], back=True) if angles else x)
            for name, part in parts.items():
                held = self.parts[which].get(name)
                if self.shared.static:
                    if held is None:
                        held = part.new_zeros((*part.shape[:2], self.shared.room, *part.shape[3:]))
                    held.index_copy_(2, places, part)
                else:
                    # Of a long prompt a sliding window takes the end only.
                    start, part = max(self.length - self.base, 0), part[:, :, max(self.base - self.length, 0) :]
                    held = grown(held, part, 2, start, start + part.shape[2], min(self.shared.room, self._most))
                    held[:, :, start : start + part.shape[2]] = part
                self.parts[which][name] = held

    @property
    def _most(self) -> int:
        """Tokens that are held at most."""
        return 1 << 60 if self.sliding is None else self.sliding + 2 * ROOM

    def _make_room(self, new: int) -> None:
        """Forget what lies behind a sliding window, now and then, so that slots stay in the order of tokens."""
        held = self.length - self.base
        if self.sliding is None or held + new <= self._most:
            return
        dropped = held + new - (self.sliding + ROOM)
        for part in (part for parts in self.parts for part in parts.values()):
            if dropped < held:
                part[:, :, : held - dropped] = part[:, :, dropped:held].clone()
        self.base += dropped

    def _keep(self, states: tuple[Tensor, Tensor], new: int) -> None:
        """Put new tokens into the ring and, if they are a row's first, in front of it."""
        sinks, window, start = self.shared.sinks, self.shared.window, self.length
        tail, held = min(new, window), self.kept[0].shape[2]
        if not self.shared.static:
            # Before it is full, a token has the slot of its number.
            full = sinks + window, sinks + min(window, start + new)
            self.kept = tuple(grown(kept, kept, 2, held, full[1], full[0]) for kept in self.kept)
        if window and new == 1 and not self.shared.static:
            slots: Any = slice(sinks + start % window, sinks + start % window + 1)
        elif window:
            slots = sinks + (start + new - tail + torch.arange(tail, device=self.device)) % window
        for x, kept in zip(states, self.kept, strict=True):
            if window:
                kept[:, :, slots] = x[:, :, new - tail :]
            if sinks and (self.shared.static or start < self.shared.last_sink):
                at_BS = self.shared.sink_places(len(x), self.device) - start
                inside = ((at_BS >= 0) & (at_BS < new))[:, None, :, None]
                index = at_BS.clamp(0, new - 1)[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
                first = kept[:, :, :sinks]
                first.copy_(torch.where(inside, x.gather(2, index), first))

    def _reach(self, length: int) -> int:
        """Of so many tokens, how many the next one attends to."""
        return length if self.sliding is None else min(length, self.sliding - 1)

    def _decoded(self, start: int, count: int) -> tuple[Tensor, Tensor]:
        """Keys and values (B, H, count, D) from their codes, in the type of the model. start: the first slot."""
        keys, values = (
            coder.decode({name: part[:, :, start : start + count] for name, part in parts.items()})
            for coder, parts in zip(self.coders, self.parts, strict=True)
        )
        turned = self.shared.turned(self.rotary, self.base + start + count)
        if turned:
            cos, sin = (part[:, self.base + start : self.base + start + count] for part in turned)
            keys = kv.turn(keys, cos, sin)
        return keys.to(self.dtype), values.to(self.dtype)

    def _read(self, count: int) -> tuple[Tensor, Tensor]:
        """What a later token attends to, of the last tokens: codes, but for the first and the newest tokens."""
        sinks, length = self.shared.sinks, int(self.length)
        begin = length - count
        found = self._decoded(begin - self.base, count)
        newest = torch.arange(max(int(self.full_from), begin), length, device=self.device)
        upto = min(count, self.shared.last_sink - begin)
        for x, kept in zip(found, self.kept, strict=True):
            x[:, :, newest - begin] = kept[:, :, sinks + newest % max(self.shared.window, 1)]
            if sinks and upto > 0:
                # Of each token, which of the first of its row it is.
                which_BT = self.shared.sink_number(len(x), begin, upto, self.device)
                index = which_BT.clamp(0, sinks - 1)[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
                first = ((which_BT >= 0) & (which_BT < sinks))[:, None, :, None]
                x[:, :, :upto] = torch.where(first, kept.gather(2, index), x[:, :, :upto])
        return found

    def read(self, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Keys and values (B, H, T, D) that a mask over T tokens, or none, speaks of, but for room behind the last."""
        return self._read(self._reach(int(self.length) - 1) + 1)

    def seen(self, mask: Tensor | None) -> Seen:
        """Which slots count for the newest token. mask: (B, 1, 1, tokens), the newest last; None: all do."""
        sinks, window, base = self.shared.sinks, self.shared.window, self.base
        length, full_from, padded = self.length, self.full_from, self.shared.first_place_B is not None
        room, static = next(iter(self.parts[0].values())).shape[2], self.shared.static
        start, end = 0 if padded else max(0, sinks - base), room if static else max(0, full_from - base)
        filled = (full_from - base).to(torch.int32).view(1) if static else None
        plain = mask is None and not padded
        if plain and not static and full_from == max(length - window, 0) >= sinks > base:
            return Seen(start, end, None, None, None)
        batch = len(mask) if mask is not None else len(self.kept[0]) if padded else 1
        sink_BS = self.shared.sink_places(batch, self.device)
        last, ring_N = length - 1, torch.arange(self.kept[0].shape[2] - sinks, device=self.device)
        newest_BN = (last - (last - ring_N) % max(window, 1)).expand(batch, -1)
        behind_B1 = sink_BS[:, -1:] + 1 if sinks else newest_BN.new_zeros((batch, 1))
        kept_BM = torch.cat([sink_BS < length, (newest_BN >= full_from) & (newest_BN >= behind_B1)], 1)
        if plain:
            return Seen(start, end, filled, None, kept_BM)
        coded_BT = torch.full((batch, room), mask is None, device=self.device)
        if mask is not None:
            # A static cache has a mask over all of its room, from the first token on.
            before = 0 if static else length - mask.shape[-1] - base
            coded_BT[:, before : before + mask.shape[-1]] = mask[:, 0, 0]
        slot_BM = torch.cat([sink_BS, newest_BN], 1) - base
        kept_BM &= coded_BT.gather(1, slot_BM.clamp(0, room - 1)) & (slot_BM >= 0)
        if padded and sinks:
            which_BT = self.shared.sink_number(batch, base, room, self.device)
            coded_BT &= (which_BT < 0) | (which_BT >= sinks)
        return Seen(start, end, filled, coded_BT, kept_BM)

    def attend(self, query: Tensor, mask: Tensor | None, scaling: float) -> tuple[Tensor, Tensor] | None:
        """`kv.weigh` of a query (B, Q, 1, D) for the newest token; None where codes cannot be attended to."""
        (keys, values), (kept_k, kept_v) = self.coders, self.kept
        if keys.book is None or values.book is None:
            return None
        if keys.book.shape != values.book.shape or kept_k.shape != kept_v.shape:
            return None
        if (mask is not None and mask.shape[1] > 1) or (self.rotary is not None and not keys.plain):
            return None
        if query.is_cuda and self.parts[0]["codes"].shape[3] % 2:
            # The kernel reads two codes at a time.
            return None
        seen, q_BQD = self.shared.seen(self, mask), query[:, :, 0]
        codes_k, codes_v = (parts["codes"] for parts in self.parts)
        upto = self.base + codes_k.shape[2]
        turned = self.shared.turned(self.rotary, upto)
        call = torch.ops.vqcompress.kv_attend if q_BQD.is_cuda else kv.attend_on_cpu
        coded = call(
            keys.enter(q_BQD), codes_k, keys.book, codes_v, values.book, scaling, seen.start, seen.end, seen.filled,
            None if seen.coded_BT is None else seen.coded_BT.expand(len(q_BQD), -1),
            *(part[:, self.base : upto] for part in turned) if turned else (None, None),
            *(parts.get("scale") for parts in self.parts),
        )  # fmt: skip
        coded = values.leave(coded[0]), coded[1]
        if not kept_k.shape[2]:
            return coded
        return kv.merge(coded, kv.weigh(q_BQD, kept_k, kept_v, scaling, seen.kept_BM))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of tokens that a mask speaks of, and the first of them."""
        if self.shared.static:
            return self.shared.room, 0
        reach = self._reach(self.length)
        return reach + query_length, self.length - reach

    def get_seq_length(self) -> Any:
        """Tokens that came; of a static cache on the device."""
        return self.length

    def get_max_length(self) -> int:
        """What a static cache has room for, else no maximum."""
        return self.shared.room if self.shared.static else -1

    def reset(self) -> None:
        """Forget everything; a static cache keeps its memory."""
        if self.shared.static and self.is_initialized:
            self.length.zero_()
            self.full_from.zero_()
            return
        self.length = self.full_from = self.base = 0
        self.parts, self.kept, self.is_initialized = ({}, {}), (), False

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens, given as a negative number."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes the number of tokens to remove as a negative number, not {tokens_to_remove}")
        if self.shared.static and self.is_initialized:
            self.length.add_(tokens_to_remove).clamp_(min=0)
            self.full_from.copy_(torch.minimum(self.full_from, self.length))
            return
        length = max(0, self.length + tokens_to_remove)
        if self.base and length - self.base < self._reach(length):
            raise RuntimeError(
                f"crop({tokens_to_remove}): a sliding window has forgotten what the tokens before attend to"
            )
        self.length, self.full_from = length, min(self.full_from, length)

    def state(self) -> list[Tensor]:
        """What a step of a static cache changes but for what it appends."""
        return [self.length, self.full_from, *self.kept]

    def _rows(self, change: Any) -> None:
        """Apply a change of the batch axis to everything."""
        if not self.is_initialized:
            return
        if self.shared.static:
            for part in (*self.kept, *(part for parts in self.parts for part in parts.values())):
                part.copy_(change(part))
            return
        self.parts = tuple({name: change(part) for name, part in parts.items()} for parts in self.parts)
        self.kept = tuple(map(change, self.kept))

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
        return sum(part.nbytes for part in (*held, *self.kept))
