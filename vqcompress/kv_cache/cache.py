"""A transformers `Cache` that holds keys and values as codes.

What enters is encoded at once. The first tokens of a row (attention sinks, StreamingLLM, arXiv 2309.17453) and the
newest ones also stay as they are, and are read instead of their codes. A prompt attends in full precision and is
encoded once; every later token attends to what is stored.
Shape legend: B rows, T tokens, D channels of a head, S first tokens in full precision.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from threading import get_ident
from typing import Any
from weakref import WeakMethod, finalize

from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from vqcompress.errors import VQCompressError
from vqcompress.kv_cache import codes as kv
from vqcompress.kv_cache.attention import CACHE, asked_of, asks_readers, find_rotary
from vqcompress.kv_cache.coders import FP8, Coder, Learned, Universal
from vqcompress.kv_cache.layer import KVLayer, Shared

KINDS = ("keys", "values")


class KVCache(Cache):
    """Keys and values of a model as codes: the cache that its forward and `generate` are given.

    coders: for each layer those of keys and values. rotary: for each layer the module that makes the embedding which
    its keys are stored without, or None. window, sinks: newest and first tokens that stay in full precision. length: of
    the longest sequence, if it is known, so that no room is left over. static: all room is made at once, and a step
    looks at no number of the device, so that it can be recorded as a CUDA graph; needs a length. strict: every token of
    a prompt, too, attends to the past as stored (needs `attention.decoding`), for measuring.
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
        static: bool = False,
    ):
        asked = not strict and asks_readers(model)
        if static and not (length and asked):
            raise VQCompressError("a static cache needs a length, and a model whose attention can be replaced")
        self.shared, self.static = Shared(window, sinks, length or (1 << 60), static, strict, asked), static
        # The thread whose forward has this cache now, if one does: others may run the model at the same time.
        self._thread: int | None = None
        self.model, self._fresh = model, True
        plain = DynamicCache(config=model.config).layers
        windows = [None if strict or static else getattr(layer, "sliding_window", None) for layer in plain]
        # Layers that share the keys and values of others have none of their own.
        windows = (windows + [None] * len(coders))[: len(coders)]
        layers = [KVLayer(self.shared, *given) for given in zip(coders, rotary, windows, strict=True)]
        super().__init__([*layers])
        self._user = {id(module): layer for module, layer in reversed(list(zip(rotary, layers, strict=True)))}
        turn, begin = WeakMethod(self._turn), WeakMethod(self._begin)
        hooks = [m.register_forward_hook(partial(_call, turn)) for m in dict.fromkeys(filter(None, rotary))]
        # Of what is inside, so that it does not matter how the outer model is given its arguments.
        hooks.append(model.base_model.register_forward_pre_hook(partial(_call, begin), with_kwargs=True))
        for hook in hooks:
            finalize(self, hook.remove)

    def _begin(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Where rows that are padded on the left begin."""
        if not any(given is self for given in (*args, *kwargs.values())):
            if self._thread == get_ident():
                self._thread = None
            return
        self._thread = get_ident()
        if self.shared.asked and not asked_of(self.model):
            raise VQCompressError("another attention was set while a coded cache was in use; make a new cache")
        if not (self._fresh or (not self.static and not self.get_seq_length())):
            return
        mask, shared = kwargs.get("attention_mask", args[1] if len(args) > 1 else None), self.shared
        shared.first_place_B, shared.last_sink, self._fresh = None, shared.sinks, False
        if isinstance(mask, Tensor) and mask.dim() == 2:
            # Of a prompt in pieces a row may begin in a later one.
            begun_B, first_B = mask.any(1), mask.long().argmax(1)
            self._fresh, first_B = not bool(begun_B.all()), first_B.masked_fill(~begun_B, mask.shape[1])
            if furthest := int(first_B.max()):
                shared.first_place_B, shared.last_sink = first_B, furthest + shared.sinks

    def _turn(self, module: nn.Module, args: Any, out: Any) -> None:
        if self._thread == get_ident():
            self.shared.turn(module, out, self._user[id(module)].get_seq_length())

    def reorder_cache(self, beam_idx: Any) -> None:
        """The rows in the order of beams."""
        super().reorder_cache(beam_idx)
        self.shared.rows(lambda part: part.index_select(0, beam_idx.to(part.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row several times."""
        super().batch_repeat_interleave(repeats)
        self.shared.rows(lambda part: part.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Some of the rows."""
        super().batch_select_indices(indices)
        self.shared.rows(lambda part: part[indices])

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self._fresh = True
        if not self.static:
            self.shared.turns.clear()

    def nbytes(self) -> int:
        """Memory that all layers take, the embeddings of their keys included."""
        turns = sum(part.nbytes for pair in self.shared.turns.values() for part in pair)
        return turns + sum(layer.nbytes() for layer in self.layers)  # type: ignore[union-attr]


def _call(method: WeakMethod[Any], *arguments: Any) -> None:
    """A method of a cache that may be gone."""
    if (found := method()) is not None:
        found(*arguments)


@dataclass(frozen=True)
class Kept:
    """How a model's keys and values are kept: what a `KVCache` is made of. coders, rotary: by layer, as there."""

    coders: list[tuple[Coder, Coder]]
    rotary: list[nn.Module | None]
    window: int
    sinks: int

    def cache(
        self, model: PreTrainedModel, length: int | None = None, strict: bool = False, static: bool = False
    ) -> KVCache:
        """An empty cache for the model."""
        return KVCache(model, self.coders, self.rotary, self.window, self.sinks, length, strict, static)


def kept(model: PreTrainedModel, settings: dict[str, Any], books: dict[str, Tensor] | None = None) -> Kept:
    """How settings, `recipe.KVCacheConfig` as JSON, keep the keys and values of a model.

    books: `N.keys` and `N.values`, float16 (H, G, E, d), of every layer, for learned codebooks; VQCompressError if they
    do not fit the model. `before`, written by `quantize`: which layers' keys were learned before their embedding.
    """
    rotary = find_rotary(model)
    if settings["keys"] == "after" or settings["codebook"] != "learned":
        # What needs no data is the same before and after a rotation of channels.
        rotary = [None] * len(rotary)
    device, d = model.device, 8 // settings["bits"]
    if settings["codebook"] != "learned":
        coder: Coder = FP8() if settings["codebook"] == "fp8" else Universal(d, device)
        coders = [(coder, coder)] * len(rotary)
    else:
        if [module is not None for module in rotary] != settings.get("before"):
            raise VQCompressError("the codebooks of the cache were learned for another model than this one")
        coders = []
        for n in range(len(rotary)):
            pair = [(books or {}).get(f"{n}.{kind}") for kind in KINDS]
            if any(b is None or b.dim() != 4 or b.shape[2:] != (kv.ENTRIES, d) or not b.isfinite().all() for b in pair):
                raise VQCompressError(f"the codebooks of the cache of layer {n} are missing or damaged")
            # The kernels read float16, what runs on a CPU float32.
            keys, values = (
                Learned(b.to(device) if device.type == "cuda" else b.float()) for b in pair if b is not None
            )
            coders.append((keys, values))
    return Kept(coders, rotary, settings["window"], settings["sinks"])


def keep_coded(model: PreTrainedModel, how: Kept) -> None:
    """Let `model.generate` use a fresh coded cache unless it is given one."""
    if model.generation_config is not None:
        # Which cache a checkpoint likes best is no word of the caller's.
        model.generation_config.cache_implementation = None
    model.generate = partial(_generate, model, how)  # type: ignore[assignment]


def _generate(model: Any, how: Kept, *args: Any, **kwargs: Any) -> Any:
    given = [kwargs.get(name) for name in (CACHE, "past_key_values", "cache_implementation")]
    given += [getattr(config, "cache_implementation", None) for config in (*args, kwargs.get("generation_config"))]
    if any(word is not None for word in given):
        return type(model).generate(model, *args, **kwargs)
    return type(model).generate(model, *args, **{**kwargs, CACHE: how.cache(model)})
