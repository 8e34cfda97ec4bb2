"""The keys and values of one layer as codes, and attention to them.

Shape legend: B rows, Q heads of queries, H heads of keys and values, T tokens, D channels of a head, S first tokens in
full precision, n new tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from vqcompress.errors import VQCompressError
from vqcompress.kv_cache import codes as kv
from vqcompress.kv_cache.attention import READERS, Attention, decode_at_once, is_installed
from vqcompress.kv_cache.quantizers import KVQuantizer, Learned
from vqcompress.kv_cache.rotary import Angles, apply_rope, take_angles


class Shared:
    """State that all layers of a cache share.

    model: whose keys and values are stored. window, sinks: newest and first tokens that stay in full precision. strict:
    the tokens of a prompt, too, attend to the past as stored.
    """

    def __init__(self, model: PreTrainedModel, window: int, sinks: int, strict: bool):
        self.model, self.window, self.sinks, self.strict = model, window, sinks, strict
        # The first token (B, 1) of rows that are padded on the left, and the end of the first tokens of all rows.
        self.first_B1: Tensor | None = None
        self.sinks_end = sinks
        # Of all tokens, by the module that makes the embedding that keys are stored without.
        self.angles: dict[nn.Module, Angles] = {}

    def find_rows(self, mask: Any, past: int) -> None:
        """Learn from the attention mask (B, T) of a prompt after `past` tokens where its rows begin."""
        if not past:
            self.first_B1, self.sinks_end = None, self.sinks
        if isinstance(mask, Tensor) and mask.dim() == 2 and (not past or mask.shape[1] > past + 1):
            # A row that begins in a later piece of the prompt is found then.
            first_B1 = mask.long().argmax(1, keepdim=True)
            if last := int(first_B1.max()):
                self.first_B1, self.sinks_end = first_B1, last + self.sinks

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply a change of the batch axis."""
        if self.first_B1 is not None:
            self.first_B1 = change(self.first_B1)
        for rotary, (cos, sin) in self.angles.items():
            if len(cos) > 1:
                self.angles[rotary] = change(cos), change(sin)

    def sink_places(self, start: int, end: int, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Which of the rows' first tokens (B, S) are among the tokens from `start` to `end`, and which of these (B, T).

        Both are boolean, with the same number of True in each row.
        """
        first_B1 = torch.zeros((batch, 1), dtype=torch.long) if self.first_B1 is None else self.first_B1
        token_BS = first_B1.to(device) + torch.arange(self.sinks, device=device)
        number_BT = torch.arange(start, end, device=device) - first_B1.to(device)
        return (token_BS >= start) & (token_BS < end), (number_BT >= 0) & (number_BT < self.sinks)

    def append_angles(self, rotary: nn.Module, start: int) -> None:
        """Store cos and sin of the tokens from number `start` on, unless another layer has."""
        if (made := take_angles(rotary)) is None:
            return
        if start:
            # Positions may differ between rows from some token on.
            rows = max(len(made[0]), len(self.angles[rotary][0]))
            pairs = zip(self.angles[rotary], made, strict=True)
            cos, sin = (
                torch.cat([held[:, :start].expand(rows, -1, -1), new.expand(rows, -1, -1)], 1) for held, new in pairs
            )
            made = cos, sin
        self.angles[rotary] = made

    def angles_of(self, rotary: nn.Module, start: int, end: int) -> Angles:
        """cos and sin of the tokens from `start` on and before `end`."""
        cos, sin = self.angles[rotary]
        return cos[:, start:end], sin[:, start:end]


def _append(held: Tensor, new: Tensor, limit: int | None) -> Tensor:
    """Both (B, H, T, …) behind one another; of the newest `limit` tokens. A copy, as in DynamicCache."""
    both = torch.cat([held, new], 2)
    return both if limit is None else both[:, :, max(0, both.shape[2] - limit) :].clone()


class KVLayer(CacheLayerMixin):
    """The keys and values of one layer.

    quantizers: of keys and of values. rotary: the embedding that keys are stored without. window: tokens that a query
    attends to in a layer with sliding attention, else None; older ones are dropped.
    """

    def __init__(
        self, shared: Shared, quantizers: tuple[KVQuantizer, KVQuantizer], rotary: nn.Module | None, window: int | None
    ):
        super().__init__()
        self.shared, self.quantizers, self.rotary, self.window = shared, quantizers, rotary, window
        self.is_sliding = window is not None
        self.is_croppable = not self.is_sliding
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        # Tokens that came.
        self.length = 0
        # Of keys and of values: the parts that their quantizer stores.
        self.parts: list[dict[str, Tensor]] = [{}, {}]
        # Keys and values in full precision: the first tokens of each row (B, H, S, D), and the newest.
        self.first: list[Tensor] = []
        self.newest: list[Tensor] = []
        self.is_initialized = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make room for the first tokens in full precision."""
        states = key_states, value_states
        self.first = [x.new_zeros((*x.shape[:2], self.shared.sinks, x.shape[3])) for x in states]
        self.newest = [x.new_zeros((*x.shape[:2], 0, x.shape[3])) for x in states]
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store new keys and values (B, H, n, D); returns all that the new tokens attend to, the past as stored.

        While decoding, only the new key and value come back if the model attends by `attention.coded`, which then calls
        `attend`.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new, shared = key_states.shape[2], self.shared
        past = self._read(self._reach(self.length)) if new > 1 and self.length else None
        self._store([key_states, value_states])
        if shared.strict:
            READERS[key_states] = partial(decode_at_once, (*self._decode(self.length), shared.window, shared.sinks))
        elif new == 1 and is_installed(shared.model):
            READERS[key_states] = self.attend
        elif new == 1:
            return self.read()
        elif past is not None:
            return torch.cat([past[0], key_states], 2), torch.cat([past[1], value_states], 2)
        return key_states, value_states

    @torch.no_grad()
    def _store(self, states: list[Tensor]) -> None:
        """Append the codes of new tokens, and keep in full precision what stays so."""
        shared, start, end = self.shared, self.length, self.length + states[0].shape[2]
        plain = list(states)
        if self.rotary is not None:
            shared.append_angles(self.rotary, start)
            plain[0] = apply_rope(states[0], shared.angles_of(self.rotary, start, end), inverse=True)
        for quantizer, held, x in zip(self.quantizers, self.parts, plain, strict=True):
            for name, part in quantizer.encode(x).items():
                held[name] = _append(held.get(name, part[:, :, :0]), part, self.window)
        self.newest = [_append(newest, x, shared.window) for newest, x in zip(self.newest, states, strict=True)]
        if start < shared.sinks_end:
            slot_BS, token_BT = shared.sink_places(start, end, len(states[0]), self.device)
            for first, x in zip(self.first, states, strict=True):
                first.transpose(1, 2)[slot_BS] = x.transpose(1, 2)[token_BT]
        self.length = end

    def _reach(self, length: int) -> int:
        """How many of `length` tokens in the cache the next one attends to: at most window − 1."""
        return length if self.window is None else min(length, self.window - 1)

    @torch.no_grad()
    def _decode(self, count: int) -> tuple[Tensor, Tensor]:
        """The last `count` keys and values (B, H, count, D) from their codes, in the model's type."""
        found = []
        for quantizer, parts in zip(self.quantizers, self.parts, strict=True):
            found.append(quantizer.decode({name: x[:, :, x.shape[2] - count :] for name, x in parts.items()}))
        if self.rotary is not None:
            found[0] = apply_rope(found[0], self.shared.angles_of(self.rotary, self.length - count, self.length))
        return found[0].to(self.dtype), found[1].to(self.dtype)

    @torch.no_grad()
    def _read(self, count: int) -> tuple[Tensor, Tensor]:
        """The last `count` keys and values: decoded, but for the first and the newest tokens."""
        begin, found = self.length - count, self._decode(count)
        for x, newest in zip(found, self.newest, strict=True):
            exact = min(count, newest.shape[2])
            x[:, :, count - exact :] = newest[:, :, newest.shape[2] - exact :]
        if begin < self.shared.sinks_end:
            slot_BS, token_BT = self.shared.sink_places(begin, self.length, len(found[0]), self.device)
            for x, first in zip(found, self.first, strict=True):
                x.transpose(1, 2)[token_BT] = first.transpose(1, 2)[slot_BS]
        return found

    def read(self) -> tuple[Tensor, Tensor]:
        """Keys and values (B, H, T, D) that the newest token attends to, as a plain cache would give them."""
        return self._read(self._reach(self.length - 1) + 1)

    def attend(
        self,
        plain: Attention,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        *arguments: Any,
        scaling: float | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention (B, 1, Q, D) of the newest token: to codes where that is possible, else to what `read` decodes."""
        limited = any(options.get(name) is not None for name in ("softcap", "position_bias", "s_aux"))
        if mask is None and self.shared.first_B1 is None and not limited and self._has_readable_codes(query):
            return self._attend_codes(query[:, :, 0], scaling or query.shape[3] ** -0.5)[:, None], None
        return plain(query, *self.read(), mask, *arguments, scaling=scaling, **options)

    def _has_readable_codes(self, query: Tensor) -> bool:
        keys, values = self.quantizers
        if not isinstance(keys, Learned) or not isinstance(values, Learned) or keys.book.shape != values.book.shape:
            return False
        codes = self.parts[0]["codes"]
        # The kernel reads pairs of codes and multiplies in 16 bits.
        return codes.shape[2] == self.length and not (query.is_cuda and (codes.shape[3] % 2 or query.itemsize != 2))

    @torch.no_grad()
    def _attend_codes(self, q_BQD: Tensor, scaling: float) -> Tensor:
        """Attention (B, Q, D) of the newest token to codes, and to the few tokens in full precision.

        Both are merged by the logarithms of their sums.
        """
        (keys, values), (parts_k, parts_v) = self.quantizers, self.parts
        assert isinstance(keys, Learned)
        assert isinstance(values, Learned)
        angles = [] if self.rotary is None else list(self.shared.angles_of(self.rotary, 0, self.length))
        sinks, end = self.shared.sinks, self.length - self.newest[0].shape[2]
        codes, books = [parts_k["codes"], parts_v["codes"]], [keys.book, values.book]
        coded = kv.attend(q_BQD, codes, books, angles, sinks, end, scaling)
        pairs = zip(self.first, self.newest, strict=True)
        # The newest tokens may be among the first.
        full_k, full_v = (
            torch.cat([first[:, :, : self.length], newest[:, :, max(0, sinks - end) :]], 2) for first, newest in pairs
        )
        return kv.merge(coded, kv.weigh(q_BQD, full_k, full_v, scaling)).to(q_BQD.dtype)

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

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens, given as a negative number; VQCompressError if the sliding window is full."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes the number of tokens to remove as a negative number, not {tokens_to_remove}")
        if tokens_to_remove and self.window is not None and self.length > self.window:
            raise VQCompressError("a cache whose sliding window is full cannot be cropped; make a new cache")
        length = max(0, self.length + tokens_to_remove)
        self.newest = [x[:, :, : max(0, x.shape[2] - self.length + length)] for x in self.newest]
        self.parts = [{name: part[:, :, :length] for name, part in parts.items()} for parts in self.parts]
        self.length = length

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply a change of the batch axis."""
        self.parts = [{name: change(part) for name, part in parts.items()} for parts in self.parts]
        self.first, self.newest = list(map(change, self.first)), list(map(change, self.newest))

    def nbytes(self) -> int:
        """Memory of this layer in bytes."""
        parts = [part for parts in self.parts for part in parts.values()]
        return sum(part.nbytes for part in (*parts, *self.first, *self.newest))
