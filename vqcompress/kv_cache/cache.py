"""A transformers `Cache` that holds keys and values as codes.

New tokens are encoded at once. The first tokens of a row (attention sinks, StreamingLLM, arXiv 2309.17453) and the
newest ones also stay in full precision, and are read instead of their codes. A prompt attends in full precision and is
encoded once; every later token attends to the stored past.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from vqcompress.errors import VQCompressError
from vqcompress.kv_cache.attention import CACHE, install
from vqcompress.kv_cache.codes import ENTRIES
from vqcompress.kv_cache.layer import KVLayer, Shared
from vqcompress.kv_cache.quantizers import FP8, KVQuantizer, Learned
from vqcompress.kv_cache.rotary import find_rotary

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

    strict: every token of a prompt, too, attends to the past as stored, for measuring; needs `attention.install`.
    """

    def __init__(self, model: PreTrainedModel, config: KVCacheSpec, strict: bool = False):
        install(model)
        self.shared = Shared(model, config.window, config.sinks, strict)
        plain, count = DynamicCache(config=model.config).layers, len(config.quantizers)
        windows = [None if strict else getattr(layer, "sliding_window", None) for layer in plain]
        # DynamicCache counts no layers for some configs.
        windows = (windows + [None] * count)[:count]
        pairs = zip(config.quantizers, config.rotary, windows, strict=True)
        super().__init__([KVLayer(self.shared, *each) for each in pairs])
        # On the inner model: it sees the same arguments whichever way the outer one is called.
        if _find_rows not in model.base_model._forward_pre_hooks.values():
            model.base_model.register_forward_pre_hook(_find_rows, with_kwargs=True)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put the rows into the order of beams."""
        self._map_rows(lambda part: part.index_select(0, beam_idx.to(part.device)))

    def _map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply a change of the batch axis to all that is stored."""
        for part in (self.shared, *self.layers):
            part.map_rows(change)  # type: ignore[union-attr]

    def nbytes(self) -> int:
        """Memory of all layers in bytes, cos and sin of the rotary embeddings included."""
        angles = sum(part.nbytes for pair in self.shared.angles.values() for part in pair)
        return angles + sum(layer.nbytes() for layer in self.layers)  # type: ignore[union-attr]


def _find_rows(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    """Show a coded cache the attention mask of its prompt."""
    mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
    for given in (*args, *kwargs.values()):
        if isinstance(given, KVCache):
            given.shared.find_rows(mask, given.get_seq_length())


def make_config(
    model: PreTrainedModel, settings: dict[str, Any], books: dict[str, Tensor] | None = None
) -> KVCacheSpec:
    """The cache config of a model for settings, the JSON of a recipe's `cache`.

    settings: with `before`, which `quantize` writes: the layers whose keys were learned without their rotary embedding.
    books: for learned codebooks, `N.keys` and `N.values` of every layer, float16 (H, G, E, d). VQCompressError if they
    do not fit the model.
    """
    rotary = find_rotary(model)
    if settings["codebook"] == "fp8":
        # FP8 gains nothing from keys without their embedding.
        quantizers: Any = [(FP8(), FP8())] * len(rotary)
        return KVCacheSpec(quantizers, [None] * len(rotary), settings["window"], settings["sinks"])
    if settings["keys"] == "after":
        rotary = [None] * len(rotary)
    if books is None or [module is not None for module in rotary] != settings.get("before"):
        raise VQCompressError("the codebooks of the cache were learned for another model than this one")
    quantizers = [tuple(_learned(model, settings, books, f"{n}.{kind}") for kind in KINDS) for n in range(len(rotary))]
    return KVCacheSpec(quantizers, rotary, settings["window"], settings["sinks"])


def _learned(model: PreTrainedModel, settings: dict[str, Any], books: dict[str, Tensor], name: str) -> Learned:
    book = books.get(name)
    if book is None or book.dim() != 4 or book.shape[2:] != (ENTRIES, 8 // settings["bits"]):
        raise VQCompressError(f"the codebook {name} of the cache is missing or damaged")
    return Learned(book.to(model.device))


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
