"""End to end: a Llama-shaped model of random parameters is written, compressed and decoded, beside the dense one.

Usage: python scripts/bench_model.py [--recipes NAME ...] [--layers N] [--hidden N] [--device D] [--json FILE]

By default about 1.2 billion parameters (Llama-3.2-1B's shape) in bfloat16, with the tokenizer and the calibration text
of the packaged demo. Prints the seconds of `quantize` and tokens per second at batch 1 of both models, measured in one
process one after the other; on a GPU a decoding step is a CUDA graph. --json appends a line per recipe.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers

import vqcompress
from vqcompress.evaluate.speed import speed
from vqcompress.methods.triton import launch
from vqcompress.model.device import choose_device
from vqcompress.pipeline.quantize import QuantizeOptions, quantize

DEMO = Path(vqcompress.__file__).parent / "demo"


def write_model(folder: Path, layers: int, hidden: int, device: torch.device) -> int:
    """A random Llama in bfloat16 with four times as many inner channels as hidden ones; returns its parameters."""
    heads = hidden // 64
    config = transformers.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        head_dim=64,
        vocab_size=128256 if hidden >= 1024 else 4096,
        tie_word_embeddings=True,
        max_position_embeddings=8192,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    for file in DEMO.glob("tokenizer*"):
        shutil.copy(file, folder)
    return sum(parameter.numel() for parameter in model.parameters())


def main() -> None:
    """Write, compress, decode, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=["vq-2bit", "fp8-tile", "smoothquant-int8"])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    device = choose_device(a.device)
    with tempfile.TemporaryDirectory() as temporary:
        model, out = Path(temporary) / "model", Path(temporary) / "artifact"
        parameters = write_model(model, a.layers, a.hidden, device)
        facts: dict[str, Any] = {
            "parameters": parameters,
            "device": launch.device_properties(device).name if device.type == "cuda" else device.type,
        }
        facts |= {"torch": torch.__version__, "transformers": transformers.__version__}
        print(f"{parameters:,} parameters on {facts['device']}", flush=True)
        for recipe in a.recipes:
            start = time.perf_counter()
            report = quantize(
                QuantizeOptions(str(model), out, recipe, [str(DEMO / "calibration.txt")], 16, 512, 0, a.device, True)
            )
            took = time.perf_counter() - start
            read = report["source_bytes"] / took / 1e6
            print(f"{recipe}: {took:.1f} s for {report['bits_per_weight']:.3f} bits, {read:.0f} MB/s", flush=True)
            found = speed(str(out), 128, a.new_tokens, 1, str(model), a.device)
            ratios = {kind: found[f"{kind}_relative_to_baseline"] for kind in ("prefill", "decode")}
            decode = f"{found['decode_tokens_per_second']:.1f} tokens/s, dense"
            dense = found["baseline"]["decode_tokens_per_second"]
            print(f"  decode {decode} {dense:.1f}; relative: {ratios}", flush=True)
            if a.json:
                with a.json.open("a", encoding="utf-8") as file:
                    line = {"figure": f"{recipe} end to end", "quantize_seconds": round(took, 1), **ratios, **facts}
                    file.write(json.dumps(line | {"tokens_per_second": found["decode_tokens_per_second"]}) + "\n")


if __name__ == "__main__":
    main()
