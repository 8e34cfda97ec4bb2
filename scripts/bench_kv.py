"""Perplexity with a coded cache of keys and values: every token attends to the past as it is stored.

Usage: python scripts/bench_kv.py MODEL --calibration FILE --text FILE [--other FILE] [--windows N] [--json FILE]
       python scripts/bench_kv.py MODEL --memory TOKENS

Prints, for each way to store the cache, its bits per channel and the perplexity relative to a plain cache, once with
nothing in full precision and once with the newest tokens and the first ones. Bits count scales, and codebooks spread
over a context of 32,768 tokens. Scalar baselines are rounded as stored: per token in groups of channels, and as KIVI
(arXiv 2402.02750) does it, keys by channel in groups of tokens and values by token. --other: a text of another kind,
which nothing was calibrated on. --memory prints the bytes of a cache that holds so many tokens, measured, and those of
a plain one; MODEL may then be `random`, 32 layers with 8 heads of 128 channels.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

from vqcompress.evaluate.speed import cache_nbytes
from vqcompress.kv_cache import codes as kv
from vqcompress.kv_cache.attention import CACHE
from vqcompress.kv_cache.cache import KVCache, KVCacheSpec
from vqcompress.kv_cache.calibrate import calibrate
from vqcompress.kv_cache.quantizers import FP8, KVQuantizer, Learned
from vqcompress.kv_cache.rotary import find_rotary
from vqcompress.model.tokenizer import cut_rows, load_tokenizer, pack, tokenize
from vqcompress.runtime.load import load
from vqcompress.storage.checkpoint import resolve
from vqcompress.storage.recipe import KVCacheConfig

CONTEXT = 32768
GROUP = 64


@dataclass(frozen=True)
class Scalar(KVQuantizer):
    """Rounded to levels between the smallest and the largest of a group; both float16."""

    bits: int
    tokens: bool

    def encode(self, x_BHTD: Tensor) -> dict[str, Tensor]:
        """The rounded numbers."""
        return {"rounded": self._by_channel(x_BHTD) if self.tokens else self._rounded(x_BHTD)}

    def decode(self, parts: dict[str, Tensor]) -> Tensor:
        """The same."""
        return parts["rounded"].clone()

    def _rounded(self, x: Tensor) -> Tensor:
        groups = x.unflatten(-1, (-1, min(GROUP, x.shape[-1])))
        low, high = groups.amin(-1, keepdim=True).half().float(), groups.amax(-1, keepdim=True)
        step = ((high - low) / (2**self.bits - 1)).half().float().clamp(min=1e-7)
        return (((groups - low) / step).round().clamp(0, 2**self.bits - 1) * step + low).flatten(-2)

    def _by_channel(self, x_BHTD: Tensor) -> Tensor:
        x, tokens = x_BHTD.mT, x_BHTD.shape[2]
        x = torch.cat([x, x[..., -1:].expand(*x.shape[:3], -tokens % GROUP)], -1)
        return self._rounded(x)[..., :tokens].mT


def perplexity(model, windows_NL: Tensor, quantizers, rotary, window: int, sinks: int) -> float:
    """Of windows; quantizers None is the plain cache."""
    total = 0.0
    with torch.inference_mode():
        for batch in windows_NL.split(4):
            if quantizers is None:
                logits = model(batch, use_cache=False).logits
            else:
                cache = KVCache(model, KVCacheSpec(quantizers, rotary, window, sinks), strict=True)
                logits = model(batch, **{CACHE: cache}, use_cache=True).logits
            total += cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
    return math.exp(total / windows_NL[:, 1:].numel())


@torch.inference_mode()
def memory(name: str, tokens: int, window: int, sinks: int, json_file: Path | None) -> None:
    """Print the bytes of a cache for each way to store it, after one prompt; what is in codebooks does not matter."""
    if name == "random":
        sizes = {"hidden_size": 256, "intermediate_size": 256, "vocab_size": 256, "max_position_embeddings": tokens}
        heads = {"num_hidden_layers": 32, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 128}
        model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, **heads)).eval()
    else:
        model = load(name, "cpu")
    # What stays in full precision is then of 16 bits, too.
    model = model.to(torch.bfloat16)
    config, rotary = model.config.get_text_config(), find_rotary(model)
    heads, channels = config.num_key_value_heads, getattr(config, "head_dim", None)
    channels = channels or config.hidden_size // config.num_attention_heads
    prompt = torch.randint(config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        plain = DynamicCache()
        for layer in range(len(rotary)):
            plain.update(*torch.zeros(2, 1, heads, tokens, channels, dtype=dtype), layer)
        found[f"plain, {str(dtype).removeprefix('torch.')}"] = cache_nbytes(plain)
    ways: dict[str, KVQuantizer] = {"fp8": FP8()}
    for d in (2, 4, 8):
        ways[f"learned {d}x8"] = Learned(torch.randn(heads, channels // d, kv.ENTRIES, d).half())
    for way in (*found, *ways):
        if way in ways:
            turned = rotary if isinstance(ways[way], Learned) else [None] * len(rotary)
            config = KVCacheSpec([(ways[way], ways[way])] * len(rotary), turned, window, sinks)
            cache = KVCache(model, config)
            model(prompt, **{CACHE: cache}, use_cache=True, logits_to_keep=1)
            found[way] = cache.nbytes()
        share = round(found[way] / found["plain, bfloat16"], 4)
        print(json.dumps({"way": way, "bytes": found[way], "of_bfloat16": share}), flush=True)
    if json_file:
        facts = {"layers": len(rotary), "heads": heads, "channels": channels, "tokens": tokens, "window": window}
        json_file.write_text(json.dumps({**facts, "sinks": sinks, "bytes": found}, indent=1) + "\n")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration")
    parser.add_argument("--text")
    parser.add_argument("--memory", type=int, metavar="TOKENS")
    parser.add_argument("--other")
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--windows", type=int, default=60)
    parser.add_argument("--window", type=int, default=32)
    parser.add_argument("--sinks", type=int, default=4)
    parser.add_argument("--d", type=int, nargs="*", default=[2, 4, 8], help="channels of a code")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--uniform", action="store_true", help="without gradients")
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    if a.memory:
        memory(a.model, a.memory, a.window, a.sinks, a.json)
        return
    if not a.calibration or not a.text:
        parser.error("--calibration and --text are missing, or --memory")
    model, tokenizer = load(a.model, "cpu").float(), load_tokenizer(resolve(a.model))
    rows_NL = cut_rows(pack(tokenizer, [a.calibration]), a.samples, a.seqlen, a.seed, a.calibration)
    rotary = find_rotary(model)
    config = model.config.get_text_config()
    channels = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = config.num_key_value_heads
    texts = {name: Path(name).read_text(encoding="utf-8") for name in filter(None, (a.text, a.other))}
    cut = {n: tokenize(tokenizer, t)[: a.windows * a.seqlen].view(-1, a.seqlen) for n, t in texts.items()}
    dense = {name: perplexity(model, windows, None, rotary, 0, 0) for name, windows in cut.items()}
    plain = [None] * len(rotary)
    ways = {"fp8": (8 + 32 / channels, [(FP8(), FP8())] * len(rotary), plain)}
    for d in a.d:
        options = KVCacheConfig(bits=8 // d, weights="uniform" if a.uniform else "gradient")
        books, _ = calibrate(model, rows_NL, options, a.seed)
        bits = 8 / d + 16 * kv.ENTRIES / CONTEXT
        learned = [(Learned(books[f"{n}.keys"]), Learned(books[f"{n}.values"])) for n in range(len(rotary))]
        ways[f"learned {d}x8"] = (bits, learned, rotary)
    for bits in (4, 2):
        total = bits + 32 / min(GROUP, channels)
        ways[f"scalar {bits}, by token"] = (total, [(Scalar(bits, False), Scalar(bits, False))] * len(rotary), plain)
        ways[f"scalar {bits}, KIVI"] = (total, [(Scalar(bits, True), Scalar(bits, False))] * len(rotary), plain)
    found = []
    for name, (bits, quantizers, turned) in ways.items():
        row = {"way": name, "bits_per_channel": round(bits, 3)}
        for text, windows in cut.items():
            for kept in ((0, 0), (a.window, a.sinks)):
                ratio = perplexity(model, windows, quantizers, turned, *kept) / dense[text]
                row[f"{Path(text).name} {kept[0]}+{kept[1]}"] = round(ratio, 4)
        print(json.dumps(row), flush=True)
        found.append(row)
    facts = {"model": Path(a.model).name, "heads": heads, "channels": channels, "windows": a.windows, "seed": a.seed}
    if a.json:
        a.json.write_text(
            json.dumps({**facts, "seqlen": a.seqlen, "samples": a.samples, "ways": found}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
