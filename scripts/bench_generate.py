"""Decode speed of artifacts as a ratio to the dense model, in one process, turn by turn: absolute times drift.

Usage: python scripts/bench_generate.py MODEL WAY [WAY ...] [--prompt-tokens N] [--new-tokens N] [--rounds R]

A WAY is an artifact, or a model and how its keys and values are kept: ARTIFACT@kv-vq-4bit, MODEL@kv-fp8.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
import transformers

from vqcompress.runtime.load import load


def load_way(way: str) -> transformers.PreTrainedModel:
    """The model of a WAY."""
    name, _, recipe = way.partition("@")
    return load(name, kv_cache=recipe or False)


def tokens_per_second(model: transformers.PreTrainedModel, prompt_tokens: int, new_tokens: int) -> float:
    """Greedy decoding after a prompt, one row, `generate` as users call it."""
    prompt = torch.randint(model.config.vocab_size, (1, prompt_tokens), generator=torch.Generator().manual_seed(0))
    settings = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
    start = time.perf_counter()
    model.generate(prompt.to(model.device), attention_mask=torch.ones_like(prompt).to(model.device), **settings)
    return new_tokens / (time.perf_counter() - start)


def main() -> None:
    """Print one JSON line: tokens per second of the dense model, and the median ratio of each way to it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("way", nargs="+")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    a = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    models = {name: load_way(name) for name in (a.model, *a.way)}
    for model in models.values():
        tokens_per_second(model, a.prompt_tokens, 4)
    sizes = a.prompt_tokens, a.new_tokens
    rounds = [{name: tokens_per_second(m, *sizes) for name, m in models.items()} for _ in range(a.rounds)]
    print(
        json.dumps(
            {
                "tokens_per_second": statistics.median(r[a.model] for r in rounds),
                "ratio": {name: statistics.median(r[name] / r[a.model] for r in rounds) for name in a.way},
            }
        )
    )


if __name__ == "__main__":
    main()
