"""Text from a model, written as it comes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TextStreamer

from vqcompress.errors import UsageError
from vqcompress.kv_cache.cache import use_kv_cache
from vqcompress.model.tokenizer import load_tokenizer
from vqcompress.runtime.load import kv_cache_config, load_any
from vqcompress.storage.checkpoint import resolve


class _Streamer(TextStreamer):
    """Hands on text as soon as its characters are certain."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """What transformers calls with every new piece."""
        self.on_text(text)


@torch.inference_mode()
def generate(
    model: str,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    on_text: Callable[[str], None],
    cpu_weights: str = "auto",
    kv_cache: str | None = None,
) -> dict[str, Any]:
    """Continue a prompt with an artifact or a dense checkpoint; returns text, new_tokens, seconds, tokens_per_second.

    temperature: 0, or below 1e-6, takes the likeliest token. seed: of the draws otherwise. cpu_weights: see `load`.
    on_text: called with each new piece of text; the prompt is none. seconds: from the prompt to the last token, without
    loading. kv_cache: a recipe with a `cache`, or `artifact`.
    """
    if not prompt:
        raise UsageError("--prompt is empty: give some text to continue")
    if prompt != prompt.encode(errors="ignore").decode():
        raise UsageError(f"--prompt {prompt!r} is not UTF-8 text")
    if max_new_tokens < 1 or not 0 <= temperature < float("inf"):
        raise UsageError(f"--max-new-tokens {max_new_tokens} --temperature {temperature}: need at least 1, at least 0")
    network: Any = load_any(model, cpu_weights=cpu_weights)
    if kv_cache is not None:
        use_kv_cache(network, kv_cache_config(network, resolve(model), kv_cache))
    tokenizer = load_tokenizer(resolve(model))
    ids_BL = tokenizer(prompt, return_tensors="pt")["input_ids"].to(network.device)
    context = getattr(network.config.get_text_config(), "max_position_embeddings", None)
    if context and ids_BL.shape[1] >= context:
        length = f"--prompt has {ids_BL.shape[1]} tokens"
        raise UsageError(f"{length}, and the model's context of {context} leaves no room to continue; shorten it")
    if context and ids_BL.shape[1] + max_new_tokens > context:
        length = f"{ids_BL.shape[1]} tokens of prompt and {max_new_tokens} new ones"
        raise UsageError(f"{length} are more than the model's context of {context}; lower --max-new-tokens")
    # Sampling reads torch's global generator, and there is no other way to seed it.
    torch.manual_seed(seed)
    # Logits in float32 have no finer steps; divided by much less they would overflow.
    drawn = {"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature >= 1e-6 else {}
    settings = network.generation_config
    # One text, token by token, whatever the model says.
    settings.update(num_beams=1, num_return_sequences=1, return_dict_in_generate=False)
    pad = settings.eos_token_id if settings.pad_token_id is None else settings.pad_token_id
    start = time.perf_counter()
    out_BL = network.generate(
        ids_BL,
        attention_mask=torch.ones_like(ids_BL),
        max_new_tokens=max_new_tokens,
        # One row needs no padding, but transformers asks for the token all the same.
        pad_token_id=pad[0] if isinstance(pad, list) else pad,
        streamer=_Streamer(tokenizer, on_text),
        tokenizer=tokenizer,
        do_sample=bool(drawn),
        **drawn,
    )
    seconds = time.perf_counter() - start
    new = out_BL[0, ids_BL.shape[1] :]
    return {
        "text": tokenizer.decode(new, skip_special_tokens=True),
        "new_tokens": len(new),
        "seconds": round(seconds, 3),
        "tokens_per_second": round(len(new) / max(seconds, 1e-9), 1),
    }
