"""Tokens per second of `generate`: prefill, decode, time to first token, peak memory."""

from __future__ import annotations

import gc
import time
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel

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

    Greedy `generate` on random prompts. baseline: a second model, measured before in the same process; adds
    `baseline` and the speeds relative to it. kv_cache: a recipe with a `cache`, or `artifact`; not for the baseline.
    """
    sizes = prompt_tokens, new_tokens, batch
    other = speed(baseline, *sizes, None, device, cpu_weights) if baseline is not None else None
    # Memory of the baseline must not count in the model's peak.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    reset_peak_memory()
    network = load(model, device, cpu_weights=cpu_weights, kv_cache=kv_cache or False)
    vocabulary = network.config.get_text_config().vocab_size
    prompt_BL = torch.randint(vocabulary, (batch, prompt_tokens), generator=torch.Generator().manual_seed(0))
    # No token ends a text early, and no setting of the checkpoint makes a step dearer than a greedy one.
    assert network.generation_config is not None
    network.generation_config.update(eos_token_id=None, pad_token_id=0, num_beams=1, do_sample=False)
    rounds = [time_generate(network, prompt_BL.to(network.device), new_tokens) for _ in range(1 + ROUNDS)][1:]
    prefill, decode = median(r[0] for r in rounds), median(r[1] for r in rounds)
    found: dict[str, Any] = {
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
    if other is not None:
        found["baseline"] = other
        for kind in ("prefill", "decode"):
            rate = f"{kind}_tokens_per_second"
            found[f"{kind}_relative_to_baseline"] = round(found[rate] / other[rate], 3)
    return found


def time_generate(network: PreTrainedModel, prompt_BL: Tensor, new_tokens: int) -> tuple[float, float, int]:
    """Seconds until the first of `new_tokens` tokens, seconds for the others, and the bytes of the cache at the end."""
    times = [_now(prompt_BL.device)]

    def note_first_token(ids_BL: Tensor, scores_BV: Tensor) -> Tensor:
        if len(times) == 1:
            times.append(_now(prompt_BL.device))
        return scores_BV

    out: Any = network.generate(  # type: ignore[operator]
        prompt_BL,
        attention_mask=torch.ones_like(prompt_BL),
        max_new_tokens=new_tokens,
        logits_processor=LogitsProcessorList([note_first_token]),
        return_dict_in_generate=True,
    )
    start, first = times
    return first - start, _now(prompt_BL.device) - first, cache_nbytes(getattr(out, CACHE))


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
