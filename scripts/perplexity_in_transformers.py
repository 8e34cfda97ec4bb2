"""Perplexity of exports as transformers reads and runs them, under the protocol of `vqcompress eval perplexity`.

Usage: python scripts/perplexity_in_transformers.py EXPORT ... --text FILE [--seqlen L] [--windows N]

In float32 on a CPU. AQLM's product there has a race, so its layers run with the weights that its own function decodes.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
from pathlib import Path

import torch
import transformers
from torch.nn.functional import cross_entropy

from vqcompress.evaluate.perplexity import windows
from vqcompress.export.aqlm import REFERENCE
from vqcompress.model.tokenizer import load_tokenizer, read_text, tokenize


@torch.inference_mode()
def main() -> None:
    """Print a line for each export."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("exports", nargs="+", type=Path)
    parser.add_argument("--text", required=True)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--windows", type=int, default=20)
    a = parser.parse_args()
    transformers.logging.set_verbosity_error()
    if importlib.util.find_spec("aqlm"):
        exec(REFERENCE, {"torch": torch})
    for path in a.exports:
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        tokenizer = load_tokenizer(path)
        rows_NL = windows(tokenize(tokenizer, read_text(tokenizer, a.text)), a.seqlen, a.seqlen, a.windows)
        losses = [cross_entropy(model(row_L[None]).logits[0, :-1], row_L[1:]).item() for row_L in rows_NL]
        print(f"{path}: {math.exp(sum(losses) / len(losses)):.4f} over {len(losses)} windows of {a.seqlen} tokens")


if __name__ == "__main__":
    main()
