"""Continues a prompt and prints the text as it comes."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import TextStreamer

from vqcompress.errors import UsageError
from vqcompress.model.tokenizer import check_ids, load_tokenizer
from vqcompress.runtime.load import load
from vqcompress.storage.checkpoint import Checkpoint, resolve


@torch.inference_mode()
def generate(
    model: str,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    cpu_weights: str = "auto",
    kv_cache: str | None = None,
) -> dict[str, Any]:
    """Print the continuation of a prompt; returns new_tokens and tokens_per_second, without the time of loading.

    temperature: below 1e-6 the likeliest token is taken. seed: of the draws otherwise. cpu_weights, kv_cache: see
    `load`.
    """
    if not prompt:
        raise UsageError("--prompt is empty: give some text to continue")
    folder = resolve(model)
    network: Any = load(folder, cpu_weights=cpu_weights, kv_cache=kv_cache or False)
    tokenizer: Any = load_tokenizer(folder)
    ids_BL = tokenizer(prompt, return_tensors="pt")["input_ids"].to(network.device)
    check_ids(ids_BL, network, tokenizer)
    context = Checkpoint(folder).context
    if context and ids_BL.shape[1] + max_new_tokens > context:
        length = f"--prompt has {ids_BL.shape[1]} tokens, with --max-new-tokens {max_new_tokens}"
        raise UsageError(f"{length} more than the model's context of {context}")
    # Sampling reads torch's global generator.
    torch.manual_seed(seed)
    sampling = {"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature >= 1e-6 else {}
    start = time.perf_counter()
    out_BL = network.generate(
        ids_BL,
        attention_mask=torch.ones_like(ids_BL),
        max_new_tokens=max_new_tokens,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        tokenizer=tokenizer,
        do_sample=bool(sampling),
        num_beams=1,
        num_return_sequences=1,
        return_dict_in_generate=False,
        **sampling,
    )
    new_tokens = out_BL.shape[1] - ids_BL.shape[1]
    return {"new_tokens": new_tokens, "tokens_per_second": round(new_tokens / (time.perf_counter() - start), 1)}
