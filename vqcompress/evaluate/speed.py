"""Tokens per second of `generate`: prefill, decode, time to first token, peak memory."""

from __future__ import annotations

import gc
import time
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from vqcompress.errors import UsageError
from vqcompress.kv_cache.attention import CACHE
from vqcompress.kv_cache.cache import KVCache
from vqcompress.model.device import peak_device_bytes, peak_rss_bytes, reset_peak_memory
from vqcompress.runtime.load import load

# Timed calls of `generate`, after one that is not; their median counts.
ROUNDS = 3


def speed(
    model: str,
    prompt_tokens: int = 128,
    new_tokens: int = 64,
    batch: int = 1,
    baseline: str | None = None,
    device: str = "auto",
    cpu_weights: str = "auto",
    kv_cache: str | None = None,
) -> dict[str, Any]:
    """Prefill and decode tokens per second, time to first token (s), bytes of the cache and peak memory; JSON.

    Greedy `generate` on random prompts. baseline: a second model, measured afterwards in the same process; adds
    `baseline` and the speeds relative to it. kv_cache: a recipe with a `cache`, or `artifact`; not for the baseline.
    """
    if min(prompt_tokens, batch) < 1 or new_tokens < 2:
        raise UsageError(
            f"--prompt-tokens {prompt_tokens} --batch {batch} --new-tokens {new_tokens}: need at least 1, 1 and 2"
        )
    found = _measure(model, (prompt_tokens, new_tokens, batch), device, cpu_weights, kv_cache)
    if baseline is not None:
        found["baseline"] = _measure(baseline, (prompt_tokens, new_tokens, batch), device, cpu_weights, None)
        for kind in ("prefill", "decode"):
            rate = f"{kind}_tokens_per_second"
            found[f"{kind}_relative_to_baseline"] = round(found[rate] / found["baseline"][rate], 3)
    return found


def _measure(
    model: str, sizes: tuple[int, int, int], device: str, cpu_weights: str, kv_cache: str | None
) -> dict[str, Any]:
    """The figures of one model. sizes: prompt tokens, new tokens, batch."""
    # Memory of a model that was measured before must not count in this one's peak.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    reset_peak_memory()
    prompt_tokens, new_tokens, batch = sizes
    network = load(model, device, cpu_weights=cpu_weights, kv_cache=kv_cache or False)
    vocabulary = network.config.get_text_config().vocab_size
    prompt_BL = torch.randint(vocabulary, (batch, prompt_tokens), generator=torch.Generator().manual_seed(0))
    prompt_BL = prompt_BL.to(network.device)
    # No token ends a text early, and no setting of the checkpoint makes a step dearer than a greedy one.
    assert network.generation_config is not None
    network.generation_config.update(eos_token_id=None, pad_token_id=0, num_beams=1, do_sample=False)
    rounds = [time_generate(network, prompt_BL, new_tokens) for _ in range(1 + ROUNDS)][1:]
    prefill, decode = median(r[0] for r in rounds), median(r[1] for r in rounds)
    return {
        "model": model,
        "device": str(network.device),
        "dtype": str(network.dtype).removeprefix("torch."),
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "batch": batch,
        "kv_cache": kv_cache,
        "cache_bytes": rounds[-1][2],
        "prefill_tokens_per_second": round(batch * prompt_tokens / prefill, 1),
        "decode_tokens_per_second": round(batch * (new_tokens - 1) / decode, 1),
        "time_to_first_token": round(prefill, 4),
        "peak_rss_bytes": peak_rss_bytes(),
        "peak_device_bytes": peak_device_bytes(),
    }


class _FirstToken(LogitsProcessor):
    """Notes when the logits of the first new token are there."""

    at: float | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The scores, unchanged."""
        if self.at is None:
            self.at = _now(scores.device)
        return scores


def time_generate(network: PreTrainedModel, prompt_BL: Tensor, new_tokens: int) -> tuple[float, float, int]:
    """Seconds until the first of `new_tokens` tokens, seconds for the others, and the bytes of the cache at the end."""
    first = _FirstToken()
    start = _now(prompt_BL.device)
    out: Any = network.generate(  # type: ignore[operator]
        prompt_BL,
        attention_mask=torch.ones_like(prompt_BL),
        max_new_tokens=new_tokens,
        logits_processor=LogitsProcessorList([first]),
        return_dict_in_generate=True,
    )
    end = _now(prompt_BL.device)
    assert first.at is not None
    return first.at - start, end - first.at, cache_nbytes(getattr(out, CACHE))


def _now(device: torch.device) -> float:
    """The time at which everything that was launched on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def cache_nbytes(cache: Any) -> int:
    """Bytes of the keys and values in a cache of transformers or a coded one."""
    if isinstance(cache, KVCache):
        return cache.nbytes()
    return sum(part.nbytes for layer in cache.layers if layer.is_initialized for part in (layer.keys, layer.values))
