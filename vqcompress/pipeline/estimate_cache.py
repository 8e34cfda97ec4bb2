"""What it costs to learn the codebooks of a cache, from a config alone: bytes stored, memory, FLOPs.

Shape legend: T tokens that are learned from, D channels.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from vqcompress.kv_cache import codes as kv
from vqcompress.kv_cache.calibrate import BATCH_TOKENS, TOKENS
from vqcompress.model.stream import BlockStream
from vqcompress.pipeline.plan import Plan
from vqcompress.storage.recipe import CacheKnobs


@dataclass(frozen=True)
class CacheCosts:
    """Of the model of a stream, calibrated with so many rows of seqlen tokens."""

    stream: BlockStream
    knobs: CacheKnobs
    rows: int
    seqlen: int

    @classmethod
    def of(cls, plan: Plan, stream: BlockStream, rows: int, seqlen: int) -> CacheCosts | None:
        """Those of a plan, if it learns any codebooks."""
        knobs = plan.recipe.cache
        return cls(stream, knobs, rows, seqlen) if knobs and knobs.codebook == "learned" else None

    @property
    def _config(self) -> Any:
        return self.stream.model.config.get_text_config()

    @property
    def numbers(self) -> int:
        """Channels of the keys and values of a token in all layers."""
        config, layers = self._config, len(self.stream.blocks)
        if latent := getattr(config, "kv_lora_rank", None):
            # Latent attention: what keys and values are made of, and the part of keys that is turned.
            return layers * int(latent + config.qk_rope_head_dim)
        heads = config.num_attention_heads
        keys = getattr(config, "head_dim", None) or config.hidden_size // heads
        return layers * (getattr(config, "num_key_value_heads", None) or heads) * 2 * keys

    @property
    def stored(self) -> int:
        """Bytes of the codebooks: every channel has 256 entries of float16."""
        return self.numbers * kv.ENTRIES * 2

    @property
    def samples(self) -> int:
        """Bytes of the keys and values that are learned from, on the host."""
        kept = min(TOKENS, self.rows * self.seqlen)
        return kept * self.numbers * 4 * (1 + (self.knobs.weights == "gradient"))

    def memory(self, itemsize: int) -> int:
        """Bytes on the device: the whole model, and what its layers keep of a batch."""
        model, gradient = self.stream.model, self.knobs.weights == "gradient"
        parameters = sum(p.numel() for m in (model, *self.stream.skeletons) for p in m.parameters())
        width = max((t.shape[1] for block in self.stream.blocks for t in block.targets), default=0)
        tokens = min(max(1, BATCH_TOKENS // self.seqlen), self.rows) * self.seqlen
        # For gradients all layers keep what entered their products.
        held = len(self.stream.blocks) if gradient else 1
        activations = tokens * itemsize * (4 * width + 6 * self._config.hidden_size) * held
        logits = tokens * self._config.vocab_size * (itemsize + 12 * gradient)
        return parameters * itemsize + activations + logits

    def passes(self, forward: float) -> float:
        """FLOPs of running the rows. forward: of all blocks for a token. No weight asks for a gradient."""
        head = 2.0 * self._config.vocab_size * self._config.hidden_size
        return self.rows * self.seqlen * (forward + head) * (1 + (self.knobs.weights == "gradient"))

    @property
    def search(self) -> float:
        """FLOPs of k-means; drawing its first entries counts as one more round."""
        kept = min(TOKENS, self.rows * self.seqlen)
        return 2.0 * kept * kv.ENTRIES * self.numbers * (self.knobs.rounds + 1)

    def seconds(self, forward: float, product: float, encode_tflops: float | None, faster: float) -> float:
        """On one process. forward: as of `passes`. product: FLOPs a second. encode_tflops: of searches; None measures
        k-means here, on a device that is so many times `faster`."""
        rate = encode_tflops * 1e12 if encode_tflops else self._search_rate() * faster
        return self.passes(forward) / product + self.search / rate

    def _search_rate(self) -> float:
        """FLOPs of k-means in a second, measured on a few groups."""
        d, tokens = 8 // self.knobs.bits, 4096
        x_T1D = torch.randn(tokens, 1, 4 * d, generator=torch.Generator().manual_seed(0)).to(self.stream.device)
        start = time.perf_counter()
        kv.learn(x_T1D, None, d, self.knobs.rounds, torch.Generator().manual_seed(0)).cpu()
        return 2.0 * tokens * kv.ENTRIES * 4 * d * (self.knobs.rounds + 1) / (time.perf_counter() - start)
