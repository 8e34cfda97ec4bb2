"""A Llama-shaped checkpoint of random weights, as large as the disk allows, written in little memory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

import vqcompress

DEMO = Path(vqcompress.__file__).parent / "demo"
VOCABULARY = 4096


def write_llama(
    folder: Path, layers: int, hidden: int, inner: int, vocabulary: int = VOCABULARY, different: int = 2
) -> int:
    """Write a bfloat16 Llama with the demo's tokenizer, one file per block; returns the bytes of its weights.

    different: blocks with weights of their own, which the others repeat, since drawing them takes longer than writing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    heads = hidden // 64
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 4),
        "head_dim": 64,
        "vocab_size": vocabulary,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    for file in DEMO.glob("tokenizer*"):
        shutil.copy(file, folder)
    draw = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=draw) * columns**-0.5).bfloat16()

    def block() -> dict[str, torch.Tensor]:
        narrow = 64 * max(1, heads // 4)
        shapes = {"q_proj": (hidden, hidden), "k_proj": (narrow, hidden), "v_proj": (narrow, hidden)}
        tensors = {f"self_attn.{name}.weight": matrix(*shape) for name, shape in shapes.items()}
        tensors["self_attn.o_proj.weight"] = matrix(hidden, hidden)
        tensors |= {f"mlp.{name}.weight": matrix(inner, hidden) for name in ("gate_proj", "up_proj")}
        tensors["mlp.down_proj.weight"] = matrix(hidden, inner)
        norms = ("input_layernorm", "post_attention_layernorm")
        return tensors | {f"{name}.weight": torch.ones(hidden, dtype=torch.bfloat16) for name in norms}

    outside = {"model.embed_tokens.weight": matrix(vocabulary, hidden)}
    outside["model.norm.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    drawn = [block() for _ in range(min(different, layers))]
    files = [outside] + [{f"model.layers.{i}.{n}": t for n, t in drawn[i % len(drawn)].items()} for i in range(layers)]
    weight_map, total = {}, 0
    for number, tensors in enumerate(files, 1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total
