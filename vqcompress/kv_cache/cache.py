"""A transformers `Cache` that holds keys and values as codes.

New tokens are encoded at once. The first tokens of a row (attention sinks, StreamingLLM, arXiv 2309.17453) and the
newest ones also stay in full precision, and are read instead of their codes. A prompt attends in full precision and is
encoded once; every later token attends to the stored past.
Shape legend: B rows, T tokens, D channels of a head, S first tokens in full precision.
"""

from __future__ import annotations

from collections.abc import Callable
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
from vqcompress.kv_cache.attention import CACHE, AttentionHook, find_rotary
from vqcompress.kv_cache.layer import KVLayer, Shared
from vqcompress.kv_cache.quantizers import FP8, KVQuantizer, Learned, Universal

KINDS = ("keys", "values")


@dataclass(frozen=True)
class KVCacheSpec:
    """How a model's keys and values are stored.

    quantizers: for each layer those of keys and values. rotary: for each layer the module of the rotary embedding that
    its keys are stored without, or None. window, sinks: newest and first tokens that stay in full precision.
    """

    quantizers: list[tuple[KVQuantizer, KVQuantizer]]
    rotary: list[nn.Module | None]
    window: int
    sinks: int


class KVCache(Cache):
    """Keys and values of a model as codes: a cache for its forward and `generate`.

    length: of the longest sequence, if it is known, so that no memory is left over. strict: every token of a prompt,
    too, attends to the past as stored (needs `attention.decoding`), for measuring.
    """

    def __init__(self, model: PreTrainedModel, config: KVCacheSpec, length: int | None = None, strict: bool = False):
        hooked = not strict and AttentionHook(model).install()
        self.shared = Shared(config.window, config.sinks, length or (1 << 60), strict, hooked)
        # The thread whose forward uses this cache: others may run the model at the same time.
        self._thread: int | None = None
        self.model, self._rows_unknown = model, True
        plain, count = DynamicCache(config=model.config).layers, len(config.quantizers)
        windows = [None if strict else getattr(layer, "sliding_window", None) for layer in plain]
        # DynamicCache counts no layers for some configs.
        windows = (windows + [None] * count)[:count]
        pairs = zip(config.quantizers, config.rotary, windows, strict=True)
        layers = [KVLayer(self.shared, *each) for each in pairs]
        super().__init__([*layers])
        self._user = {id(module): layer for module, layer in reversed(list(zip(config.rotary, layers, strict=True)))}
        turn, begin = WeakMethod(self._after_rotary), WeakMethod(self._before_forward)
        hooks = [m.register_forward_hook(partial(_call, turn)) for m in dict.fromkeys(filter(None, config.rotary))]
        # On the inner model: it sees the same arguments whichever way the outer one is called.
        hooks.append(model.base_model.register_forward_pre_hook(partial(_call, begin), with_kwargs=True))
        for hook in hooks:
            finalize(self, hook.remove)

    def _before_forward(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Begin a step, and find where rows that are padded on the left begin."""
        if not any(given is self for given in (*args, *kwargs.values())):
            if self._thread == get_ident():
                self._thread = None
            return
        self._thread = get_ident()
        self.shared.begin_step()
        if self.shared.hooked and not AttentionHook(self.model).installed:
            raise VQCompressError("another attention was set while a coded cache was in use; make a new cache")
        if self._rows_unknown or not self.get_seq_length():
            self._find_rows(kwargs.get("attention_mask", args[1] if len(args) > 1 else None))

    def _find_rows(self, mask: Any) -> None:
        shared = self.shared
        shared.first_token_B, shared.sinks_end, self._rows_unknown = None, shared.sinks, False
        if isinstance(mask, Tensor) and mask.dim() == 2:
            # If the prompt comes in pieces, a row may begin in a later one.
            begun_B, first_B = mask.any(1), mask.long().argmax(1)
            self._rows_unknown, first_B = not bool(begun_B.all()), first_B.masked_fill(~begun_B, mask.shape[1])
            if last := int(first_B.max()):
                shared.first_token_B, shared.sinks_end = first_B, last + shared.sinks

    def _after_rotary(self, module: nn.Module, args: Any, out: Any) -> None:
        if self._thread == get_ident():
            self.shared.append_angles(module, out, self._user[id(module)].get_seq_length())

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply a change of the batch axis to all that is stored."""
        for part in (self.shared, *self.layers):
            part.map_rows(change)  # type: ignore[union-attr]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put the rows into the order of beams."""
        self.map_rows(lambda part: part.index_select(0, beam_idx.to(part.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self.map_rows(lambda part: part.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some of the rows."""
        self.map_rows(lambda part: part[indices])

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self._rows_unknown = True
        self.shared.angles.clear()

    def nbytes(self) -> int:
        """Memory of all layers in bytes, cos and sin of the rotary embeddings included."""
        angles = sum(part.nbytes for pair in self.shared.angles.values() for part in pair)
        return angles + sum(layer.nbytes() for layer in self.layers)  # type: ignore[union-attr]


def _call(method: WeakMethod[Any], *arguments: Any) -> None:
    """A method of a cache that may be gone."""
    if (found := method()) is not None:
        found(*arguments)


def make_config(
    model: PreTrainedModel, settings: dict[str, Any], books: dict[str, Tensor] | None = None
) -> KVCacheSpec:
    """The cache config of a model for settings, the JSON of a recipe's `cache`.

    settings: with `before`, which `quantize` writes: the layers whose keys were learned without their rotary embedding.
    books: for learned codebooks, `N.keys` and `N.values` of every layer, float16 (H, G, E, d). VQCompressError if they
    do not fit the model.
    """
    rotary = find_rotary(model)
    if settings["keys"] == "after" or settings["codebook"] != "learned":
        # Codes without calibration gain nothing from keys without their embedding.
        rotary = [None] * len(rotary)
    device, d = model.device, 8 // settings["bits"]
    if settings["codebook"] != "learned":
        quantizer: KVQuantizer = FP8() if settings["codebook"] == "fp8" else Universal(d, device)
        quantizers = [(quantizer, quantizer)] * len(rotary)
    else:
        if [module is not None for module in rotary] != settings.get("before"):
            raise VQCompressError("the codebooks of the cache were learned for another model than this one")
        quantizers = []
        for n in range(len(rotary)):
            pair = [(books or {}).get(f"{n}.{kind}") for kind in KINDS]
            if any(b is None or b.dim() != 4 or b.shape[2:] != (kv.ENTRIES, d) or not b.isfinite().all() for b in pair):
                raise VQCompressError(f"the codebooks of the cache of layer {n} are missing or damaged")
            # The kernels read float16; the reference on a CPU computes in float32.
            keys, values = (
                Learned(b.to(device) if device.type == "cuda" else b.float()) for b in pair if b is not None
            )
            quantizers.append((keys, values))
    return KVCacheSpec(quantizers, rotary, settings["window"], settings["sinks"])


def use_kv_cache(model: PreTrainedModel, config: KVCacheSpec) -> None:
    """Let `model.generate` make a coded cache for each call that is given no other."""
    if model.generation_config is not None:
        # The checkpoint's choice gives way; a caller's does not.
        model.generation_config.cache_implementation = None
    model.generate = partial(_generate, model, config)  # type: ignore[assignment]


def _generate(model: Any, config: KVCacheSpec, *args: Any, **kwargs: Any) -> Any:
    chosen = [kwargs.get(name) for name in (CACHE, "past_key_values", "cache_implementation")]
    chosen += [getattr(given, "cache_implementation", None) for given in (*args, kwargs.get("generation_config"))]
    if all(choice is None for choice in chosen):
        kwargs[CACHE] = KVCache(model, config)
    return type(model).generate(model, *args, **kwargs)
