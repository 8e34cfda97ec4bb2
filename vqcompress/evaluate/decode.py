"""Greedy decoding with a cache of fixed size; on a GPU a step is one CUDA graph, so that no launch waits for Python.

What cannot be recorded runs step by step, and says so once: transformers' cache of sliding windows, which keeps its
position as a number of Python's, a coded cache that is not static, or a layer that waits for the device (experts that
are not multiplied as one stack).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache
from transformers.cache_utils import Cache, StaticLayer

from vqcompress.errors import Fallback
from vqcompress.kv_cache.attention import CACHE
from vqcompress.kv_cache.cache import KVCache
from vqcompress.kv_cache.layer import KVLayer

# Steps before a capture, so that whatever is made at a first call has been made.
WARM_UP = 2


def nbytes(cache: Any) -> int:
    """Memory of the keys and values that a cache holds, however it does."""
    if isinstance(cache, KVCache):
        return cache.nbytes()
    return sum(part.nbytes for layer in cache.layers if layer.is_initialized for part in (layer.keys, layer.values))


class Decoder:
    """Decodes the continuation of one batch of prompts. length: positions of the cache, prompt and new tokens.

    make: what makes the cache from the model and its length, unless it is transformers' own.
    """

    def __init__(
        self, network: PreTrainedModel, length: int, make: Callable[[PreTrainedModel, int], Cache] | None = None
    ):
        self.network = network
        self.cache = make(network, length) if make else StaticCache(config=network.config, max_cache_len=length)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.records = getattr(self.cache, "static", False) or all(type(x) is StaticLayer for x in self.cache.layers)
        if not self.records and network.device.type == "cuda":
            warnings.warn(
                "decoding runs without a CUDA graph: the model's cache is no plain one", Fallback, stacklevel=2
            )
        self.token_B1 = torch.empty(0)

    @torch.inference_mode()
    def prefill(self, prompt_BL: Tensor) -> Tensor:
        """The first new token (B, 1). prompt_BL: token ids, on the model's device."""
        self.cache.reset()
        token_B1 = self._next(prompt_BL)
        if self.token_B1.shape == token_B1.shape:
            # The graph reads and writes this one.
            self.token_B1.copy_(token_B1)
        else:
            self.token_B1, self.graph = token_B1, None
        return self.token_B1

    @torch.inference_mode()
    def step(self) -> Tensor:
        """The next token (B, 1), in a buffer that the step after it writes again."""
        if self.token_B1.is_cuda and self.graph is None and self.records:
            self._capture()
        if self.graph is not None:
            self.graph.replay()
        else:
            self.token_B1.copy_(self._next(self.token_B1))
        return self.token_B1

    def cache_bytes(self) -> int:
        """Memory that the cache takes."""
        return nbytes(self.cache)

    def _next(self, tokens_BL: Tensor) -> Tensor:
        out: Any = self.network(tokens_BL, **{CACHE: self.cache}, use_cache=True, logits_to_keep=1)
        token_B1: Tensor = out.logits[:, -1:].argmax(-1)
        return token_B1

    def _capture(self) -> None:
        """Record a step, and leave the cache and the token as they were."""
        layers: list[Any] = self.cache.layers
        # Positions behind the length are masked, whatever the warm-up writes there; the rest is put back.
        state = [t for x in layers for t in (x.state() if isinstance(x, KVLayer) else [x.cumulative_length])]
        before = [part.clone() for part in state]
        token_B1 = self.token_B1.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self._next(token_B1)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self.token_B1.copy_(self._next(self.token_B1))
            self.graph = graph
        except RuntimeError as error:
            self.records = False
            reason = str(error).partition("\n")[0]
            warnings.warn(f"decoding runs without a CUDA graph: {reason}", Fallback, stacklevel=2)
        for part, was in zip(state, before, strict=True):
            part.copy_(was)
        self.token_B1.copy_(token_B1)
