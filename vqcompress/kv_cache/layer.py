"""The keys and values of one layer as codes, and attention to them.

A step's query attends to codes without decoding them first, and to the few tokens in full precision; both are merged by
the logarithms of their sums.
Shape legend: B rows, Q heads of queries, H heads of keys and values, T slots of tokens, D channels of a head, N newest
and S first tokens in full precision, M = S + N, G codes of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin

from vqcompress.kv_cache import codes as kv
from vqcompress.kv_cache.attention import READERS, STORED, Stored
from vqcompress.kv_cache.coded_tokens import CodedTokens
from vqcompress.kv_cache.quantizers import KVQuantizer, Learned

# The least growth of memory for codes, in tokens, and the room of a sliding window beyond its length.
ROOM = 256


def grow(held: Tensor, dim: int, length: int, limit: int) -> Tensor:
    """`held` with room for `length` tokens along an axis: by a quarter or ROOM at least, but not beyond `limit`."""
    size = held.shape[dim]
    if size >= length:
        return held
    room = max(length, min(max(length, size + max(ROOM, size // 4)), limit))
    larger = held.new_zeros((*held.shape[:dim], room, *held.shape[dim + 1 :]))
    larger.narrow(dim, 0, size).copy_(held)
    return larger


@dataclass
class SlotMask:
    """The slots that the query of a step attends to.

    start, end: of the coded tokens. coded_BT, full_BM: True where a coded token, or one in full precision, counts; None
    where all do.
    """

    start: int
    end: int
    coded_BT: Tensor | None = None
    full_BM: Tensor | None = None

    @staticmethod
    def one_length(layer: KVLayer) -> SlotMask:
        """Without padding or a mask: all rows attend to the same slots."""
        shared, length = layer.shared, layer.length
        span = max(0, shared.sinks - layer.base), max(0, layer.full_from - layer.base)
        if layer.full_from == max(length - shared.window, 0) >= shared.sinks > layer.base:
            return SlotMask(*span)
        return SlotMask(*span, full_BM=layer.filled(1)[0])

    @staticmethod
    def padded(layer: KVLayer, batch: int) -> SlotMask:
        """Rows that begin at different tokens: the first tokens of each are excluded from its codes."""
        coded_BT = torch.ones((batch, layer.room), dtype=torch.bool, device=layer.device)
        return SlotMask._by_row(layer, coded_BT)

    @staticmethod
    def masked(layer: KVLayer, mask: Tensor) -> SlotMask:
        """mask: boolean (B, 1, 1, tokens), the newest token last."""
        tokens, end = mask.shape[-1], layer.length - layer.base
        coded_BT = torch.zeros((len(mask), layer.room), dtype=torch.bool, device=layer.device)
        coded_BT[:, end - tokens : end] = mask[:, 0, 0]
        return SlotMask._by_row(layer, coded_BT)

    @staticmethod
    def _by_row(layer: KVLayer, coded_BT: Tensor) -> SlotMask:
        shared, batch = layer.shared, len(coded_BT)
        full_BM, token_BM = layer.filled(batch)
        slot_BM = token_BM - layer.base
        full_BM = full_BM & coded_BT.gather(1, slot_BM.clamp(0, layer.room - 1)) & (slot_BM >= 0)
        start, end = max(0, shared.sinks - layer.base), max(0, layer.full_from - layer.base)
        if shared.first_token_B is not None:
            start = 0
            if shared.sinks:
                number_BT = shared.number_in_row(batch, layer.base, layer.room, layer.device)
                coded_BT &= (number_BT < 0) | (number_BT >= shared.sinks)
        return SlotMask(start, end, coded_BT, full_BM)


class Shared:
    """State that all layers of a cache share.

    window, sinks: newest and first tokens that stay in full precision. max_length: tokens at most. strict: prompts too
    attend to the past as stored. hooked: the model attends by `attention.coded`, which asks the layers.
    """

    def __init__(self, window: int, sinks: int, max_length: int, strict: bool, hooked: bool):
        self.window, self.sinks, self.max_length = window, sinks, max_length
        self.strict, self.hooked = strict, hooked
        # The first token of each row that is padded on the left, and the end of the first tokens of all rows.
        self.first_token_B: Tensor | None = None
        self.sinks_end = sinks
        # cos and sin (B or 1, T, D) of the embeddings that keys are stored without, by the module that makes them.
        self.angles: dict[int, list[Tensor]] = {}
        self._masks: dict[Any, tuple[Tensor | None, SlotMask]] = {}

    def begin_step(self) -> None:
        """Forget the masks of the last forward pass."""
        self._masks.clear()

    def append_angles(self, module: nn.Module, made: tuple[Tensor, Tensor], start: int) -> None:
        """Store cos and sin of new tokens from number `start` on."""
        held = self.angles.setdefault(id(module), [])
        for which, part in enumerate(made):
            # A CPU computes with them in float32 at every step.
            part = part.detach() if part.is_cuda else part.detach().float()
            if len(held) <= which:
                held.append(part.new_zeros((len(part), 0, part.shape[2])))
            rows, end = max(len(part), len(held[which])), start + part.shape[1]
            if len(held[which]) < rows:
                held[which] = held[which].repeat(rows, 1, 1)
            held[which] = grow(held[which], 1, end, self.max_length)
            held[which][:, start:end] = part.expand(rows, -1, -1)

    def angles_of(self, rotary: nn.Module | None, start: int, end: int) -> tuple[Tensor, Tensor] | tuple[()]:
        """cos and sin of the tokens from `start` on and before `end`; () without an embedding."""
        if rotary is None:
            return ()
        held = self.angles[id(rotary)]
        held[:] = [grow(part, 1, end, end) for part in held]
        return held[0][:, start:end], held[1][:, start:end]

    def sink_tokens(self, batch: int, device: torch.device) -> Tensor:
        """The first tokens of each row, (B, S)."""
        number_S, first_B = torch.arange(self.sinks, device=device), self.first_token_B
        return number_S.expand(batch, -1) if first_B is None else first_B.to(device)[:, None] + number_S

    def number_in_row(self, batch: int, start: int, count: int, device: torch.device) -> Tensor:
        """The place in its row of each of `count` tokens, (B, count); negative for padding."""
        token_T, first_B = torch.arange(start, start + count, device=device), self.first_token_B
        return token_T.expand(batch, -1) if first_B is None else token_T - first_B.to(device)[:, None]

    def slot_mask(self, layer: KVLayer, mask: Tensor | None) -> SlotMask:
        """`KVLayer.slot_mask`, computed once a step for all layers with the same slots."""
        key = layer.window, layer.base, layer.room, layer.length, layer.full_from, layer.device, id(mask)
        if key not in self._masks:
            # Holding the mask keeps its id from being given to another.
            self._masks[key] = mask, layer.slot_mask(mask)
        return self._masks[key][1]

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply a change of the batch axis."""
        if self.first_token_B is not None:
            self.first_token_B = change(self.first_token_B)
        for held in self.angles.values():
            held[:] = [change(part) if len(part) > 1 else part for part in held]


class KVLayer(CacheLayerMixin):
    """The keys and values of one layer. Slot t holds token base + t.

    quantizers: of keys and of values. rotary: the embedding that keys are stored without. window: tokens that a query
    attends to in a layer with sliding attention, else None.
    """

    is_croppable = True

    def __init__(
        self,
        shared: Shared,
        quantizers: tuple[KVQuantizer, KVQuantizer],
        rotary: nn.Module | None,
        window: int | None,
    ):
        super().__init__()
        self.shared, self.quantizers, self.rotary, self.window = shared, quantizers, rotary, window
        self.is_sliding = window is not None
        # Tokens that came, and the first of those that the ring holds.
        self.length = self.full_from = self.base = 0
        self.parts: tuple[dict[str, Tensor], ...] = ({}, {})
        # Keys and values in full precision, (B, H, M, D): the first tokens, then the newest, token p in slot p mod N.
        self.full: tuple[Tensor, ...] = ()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make room for the first tokens; the ring grows as it fills."""
        for quantizer, x in zip(self.quantizers, (key_states, value_states), strict=True):
            quantizer.check(x)
        sinks = self.shared.sinks
        self.full = tuple(x.new_zeros((*x.shape[:2], sinks, x.shape[3])) for x in (key_states, value_states))
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True

    @property
    def room(self) -> int:
        """Slots for codes."""
        return next(iter(self.parts[0].values())).shape[2]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store new keys and values (B, H, n, D); returns all of them, the past as stored.

        A single token comes back alone, with this layer as its reader, if the model attends by `attention.coded`.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = key_states.shape[2]
        past = self._read(self._reach(self.length)) if new > 1 and self.length else None
        self._encode((key_states, value_states), new)
        self._keep_full((key_states, value_states), new)
        self.length += new
        self.full_from = max(self.full_from, self.length - self.shared.window)
        if new == 1 and self.shared.hooked:
            READERS[key_states] = self
        elif new == 1:
            # The token itself is read as stored, too.
            key_states, value_states = self._read(self._reach(self.length - 1) + 1)
        elif past is not None:
            key_states, value_states = torch.cat([past[0], key_states], 2), torch.cat([past[1], value_states], 2)
        if self.shared.strict:
            STORED[key_states] = Stored(*self._decode(0, self.length), self.shared.window, self.shared.sinks)
        return key_states, value_states

    @torch.no_grad()
    def _encode(self, states: tuple[Tensor, Tensor], new: int) -> None:
        """Append the codes of new tokens."""
        self._forget(new)
        angles = self.shared.angles_of(self.rotary, self.length, self.length + new)
        for which, (quantizer, x) in enumerate(zip(self.quantizers, states, strict=True)):
            if which == 1 or not angles:
                parts = quantizer.encode(x)
            elif isinstance(quantizer, Learned):
                parts = quantizer.encode(x, *angles)
            else:
                parts = quantizer.encode(kv.apply_rope(x, *angles, inverse=True))
            # Of a long prompt a sliding window takes the end only.
            start, skipped = max(self.length - self.base, 0), max(self.base - self.length, 0)
            for name, part in parts.items():
                part = part[:, :, skipped:]
                held, end = self.parts[which].get(name), start + part.shape[2]
                held = part.new_zeros((*part.shape[:2], 0, *part.shape[3:])) if held is None else held
                self.parts[which][name] = grow(held, 2, end, min(self.shared.max_length, self._limit))
                self.parts[which][name][:, :, start:end] = part

    @property
    def _limit(self) -> int:
        """Tokens held at most."""
        return 1 << 60 if self.window is None else self.window + 2 * ROOM

    def _forget(self, new: int) -> None:
        """Drop tokens behind a sliding window once its room is full; slots stay in the order of tokens."""
        held = self.length - self.base
        if self.window is None or held + new <= self._limit:
            return
        dropped = held + new - (self.window + ROOM)
        for part in (part for parts in self.parts for part in parts.values()):
            if dropped < held:
                part[:, :, : held - dropped] = part[:, :, dropped:held].clone()
        self.base += dropped

    def _keep_full(self, states: tuple[Tensor, Tensor], new: int) -> None:
        """Put new tokens into the ring and, if they are the first of a row, in front of it."""
        sinks, window, start = self.shared.sinks, self.shared.window, self.length
        tail = min(new, window)
        # Before the ring is full, a token has the slot of its number.
        self.full = tuple(grow(full, 2, sinks + min(window, start + new), sinks + window) for full in self.full)
        slots = sinks + (start + new - tail + torch.arange(tail, device=self.device)) % max(window, 1)
        for x, full in zip(states, self.full, strict=True):
            full[:, :, slots] = x[:, :, new - tail :]
            if sinks and start < self.shared.sinks_end:
                at_BS = self.shared.sink_tokens(len(x), self.device) - start
                inside = ((at_BS >= 0) & (at_BS < new))[:, None, :, None]
                index = at_BS.clamp(0, new - 1)[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
                first = full[:, :, :sinks]
                first.copy_(torch.where(inside, x.gather(2, index), first))

    def _reach(self, length: int) -> int:
        """The number of `length` tokens that the next one attends to."""
        return length if self.window is None else min(length, self.window - 1)

    @torch.no_grad()
    def _decode(self, start: int, count: int) -> tuple[Tensor, Tensor]:
        """Keys and values (B, H, count, D) from their codes, in the model's type. start: the first slot."""
        keys, values = (
            quantizer.decode({name: part[:, :, start : start + count] for name, part in parts.items()})
            for quantizer, parts in zip(self.quantizers, self.parts, strict=True)
        )
        if angles := self.shared.angles_of(self.rotary, self.base + start, self.base + start + count):
            keys = kv.apply_rope(keys, *angles)
        return keys.to(self.dtype), values.to(self.dtype)

    def _read(self, count: int) -> tuple[Tensor, Tensor]:
        """The last `count` keys and values: decoded, but for the first and the newest tokens."""
        sinks, begin = self.shared.sinks, self.length - count
        found = self._decode(begin - self.base, count)
        newest = torch.arange(max(self.full_from, begin), self.length, device=self.device)
        first = min(count, self.shared.sinks_end - begin)
        for x, full in zip(found, self.full, strict=True):
            x[:, :, newest - begin] = full[:, :, sinks + newest % max(self.shared.window, 1)]
            if sinks and first > 0:
                number_BT = self.shared.number_in_row(len(x), begin, first, self.device)
                index = number_BT.clamp(0, sinks - 1)[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
                is_sink = ((number_BT >= 0) & (number_BT < sinks))[:, None, :, None]
                x[:, :, :first] = torch.where(is_sink, full.gather(2, index), x[:, :, :first])
        return found

    def read(self) -> tuple[Tensor, Tensor]:
        """Keys and values (B, H, T, D) that the newest token attends to, as a plain cache would give them."""
        return self._read(self._reach(self.length - 1) + 1)

    def filled(self, batch: int) -> tuple[Tensor, Tensor]:
        """Which slots in full precision count without a mask, (B, M), and the token that each holds."""
        sinks, window, last = self.shared.sinks, self.shared.window, self.length - 1
        sink_BS = self.shared.sink_tokens(batch, self.device)
        ring_N = torch.arange(self.full[0].shape[2] - sinks, device=self.device)
        newest_BN = (last - (last - ring_N) % max(window, 1)).expand(batch, -1)
        after_sinks_B1 = sink_BS[:, -1:] + 1 if sinks else newest_BN.new_zeros((batch, 1))
        counts_BN = (newest_BN >= self.full_from) & (newest_BN >= after_sinks_B1)
        return torch.cat([sink_BS < self.length, counts_BN], 1), torch.cat([sink_BS, newest_BN], 1)

    def slot_mask(self, mask: Tensor | None) -> SlotMask:
        """The slots that the newest token attends to. mask: boolean (B, 1, 1, tokens), the newest last, or None."""
        if mask is not None:
            return SlotMask.masked(self, mask)
        if self.shared.first_token_B is not None:
            return SlotMask.padded(self, len(self.full[0]))
        return SlotMask.one_length(self)

    def _can_attend(self, query: Tensor, mask: Tensor | None) -> bool:
        """Whether codes can be attended to as they are: not FP8, masks by head, or an odd number of codes on a GPU."""
        (keys, values), (full_k, full_v) = self.quantizers, self.full
        if keys.book is None or values.book is None or keys.book.shape != values.book.shape:
            return False
        if full_k.shape != full_v.shape or (mask is not None and mask.shape[1] > 1):
            return False
        if self.rotary is not None and not keys.plain:
            return False
        # The kernel reads two codes at a time.
        return not (query.is_cuda and self.parts[0]["codes"].shape[3] % 2)

    @torch.no_grad()
    def attend(self, query: Tensor, mask: Tensor | None, scaling: float) -> tuple[Tensor, Tensor] | None:
        """`codes.weigh` of a query (B, Q, 1, D) for the newest token; None where codes have to be decoded first."""
        if not self._can_attend(query, mask):
            return None
        (keys, values), (parts_k, parts_v), q_BQD = self.quantizers, self.parts, query[:, :, 0]
        assert keys.book is not None
        assert values.book is not None
        slots = self.shared.slot_mask(self, mask)
        cos, sin = self.shared.angles_of(self.rotary, self.base, self.base + self.room) or (None, None)
        coded_BT = None if slots.coded_BT is None else slots.coded_BT.expand(len(q_BQD), -1)
        tokens = CodedTokens(
            parts_k["codes"], keys.book, parts_v["codes"], values.book, slots.start, slots.end, coded_BT,
            cos, sin, parts_k.get("scale"), parts_v.get("scale"),
        )  # fmt: skip
        out_BQD, lse_BQ = kv.attend_by_kernel(keys.enter(q_BQD), tokens, scaling)
        coded = values.leave(out_BQD), lse_BQ
        if not self.full[0].shape[2]:
            return coded
        full_k, full_v = self.full
        return kv.merge(coded, kv.weigh(q_BQD, full_k, full_v, scaling, slots.full_BM))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of tokens that a mask covers, and the first of them."""
        reach = self._reach(self.length)
        return reach + query_length, self.length - reach

    def get_seq_length(self) -> int:
        """Tokens that came."""
        return self.length

    def get_max_length(self) -> int:
        """-1: no maximum."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.length = self.full_from = self.base = 0
        self.parts, self.full, self.is_initialized = ({}, {}), (), False

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens, given as a negative number; RuntimeError where a sliding window forgot too much."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes the number of tokens to remove as a negative number, not {tokens_to_remove}")
        length = max(0, self.length + tokens_to_remove)
        if self.base and length - self.base < self._reach(length):
            raise RuntimeError(
                f"crop({tokens_to_remove}): the sliding window no longer holds the tokens before; make a new cache"
            )
        self.length, self.full_from = length, min(self.full_from, length)

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply a change of the batch axis."""
        if self.is_initialized:
            self.parts = tuple({name: change(part) for name, part in parts.items()} for parts in self.parts)
            self.full = tuple(map(change, self.full))

    def nbytes(self) -> int:
        """Memory of this layer in bytes."""
        return sum(part.nbytes for part in (*self.parts[0].values(), *self.parts[1].values(), *self.full))
