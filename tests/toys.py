"""Tiny random checkpoints of several architectures, and text for them, that tests share."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

SPECIAL = ("<unk>", "<s>", "</s>")
STEMS = ("river", "stone", "light", "winter", "garden", "paper", "silver", "engine", "letter", "mountain")
ENDS = ("", "s", "ed", "ing", "er", "ly")


def toy_text(words: int = 400, seed: int = 0) -> str:
    """Random words in sentences, the same for the same seed."""
    draw = random.Random(seed)
    chosen = [draw.choice(STEMS) + draw.choice(ENDS) for _ in range(words)]
    return "".join(word + (". " if draw.random() < 0.1 else " ") for word in chosen)


def toy_tokenizer(vocab: int = 384) -> Any:
    """A byte-level BPE tokenizer trained on a few hundred bytes; has at most `vocab` tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([toy_text(200, 1)], trainer)
    unk, bos, eos = SPECIAL
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=unk, bos_token=bos, eos_token=eos)


def toy_config(family: str = "llama", layers: int = 2, hidden: int = 128, vocab: int = 384, **extra: Any) -> Any:
    """A transformers config of a family: a key of `families` below. extra: more of its fields."""
    import transformers

    common = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
        "tie_word_embeddings": False,
    }
    gated = {**common, "intermediate_size": 2 * hidden, "num_key_value_heads": 2, "head_dim": hidden // 4}
    routed = {"moe_intermediate_size": hidden // 2, "num_experts_per_tok": 2}
    latent = {
        "num_key_value_heads": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 24,
        "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16, "head_dim": 8,
    }  # fmt: skip
    families: dict[str, tuple[str, dict[str, Any]]] = {
        "llama": ("LlamaConfig", gated),
        "qwen3": ("Qwen3Config", gated),
        "gemma": ("GemmaConfig", {**gated, "pad_token_id": 0, "tie_word_embeddings": True}),
        "opt": ("OPTConfig", {**common, "ffn_dim": 2 * hidden, "word_embed_proj_dim": hidden, "pad_token_id": 0}),
        "gpt_neox": ("GPTNeoXConfig", {**common, "intermediate_size": 2 * hidden}),
        "gpt2": ("GPT2Config", {**common, "n_positions": 256}),
        "falcon": ("FalconConfig", {**common, "new_decoder_architecture": True, "num_kv_heads": 2}),
        "granitemoe": ("GraniteMoeConfig", {**gated, "num_local_experts": 4, "num_experts_per_tok": 2}),
        "jamba": (
            "JambaConfig",
            {
                **gated,
                "num_experts": 4,
                "attn_layer_period": 2,
                "attn_layer_offset": 1,
                "expert_layer_period": 2,
                "mamba_d_state": 8,
                "mamba_dt_rank": 8,
                "use_mamba_kernels": False,
                "pad_token_id": 0,
            },
        ),
        "mixtral": ("MixtralConfig", {**gated, "num_local_experts": 4, "num_experts_per_tok": 2}),
        "qwen3_moe": ("Qwen3MoeConfig", {**gated, **routed, "num_experts": 4}),
        "qwen2_moe": (
            "Qwen2MoeConfig",
            {**gated, **routed, "num_experts": 4, "shared_expert_intermediate_size": hidden},
        ),
        "deepseek_v3": ("DeepseekV3Config", {**gated, **routed, **latent, "n_routed_experts": 4}),
        "afmoe": (
            "AfmoeConfig",
            {**gated, **routed, "num_experts": 4, "num_dense_layers": 0, "num_shared_experts": 1, "sliding_window": 32},
        ),
        "gpt_oss": ("GptOssConfig", {**gated, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 32}),
        "llama4": ("Llama4TextConfig", {**gated, "intermediate_size_mlp": 2 * hidden, "num_local_experts": 4}),
    }
    name, fields = families[family]
    return getattr(transformers, name)(**{**fields, **extra})


def toy_checkpoint(
    path: Path | str,
    family: str = "llama",
    layers: int = 2,
    hidden: int = 128,
    vocab: int = 384,
    seed: int = 0,
    dtype: str = "float32",
    **extra: Any,
) -> Path:
    """Save a random model of a family with a tokenizer into `path`, which is returned; the same for the same seed.

    Its weights are larger than at the start of a training, so that its logits tell tokens apart.
    """
    import torch
    from transformers import AutoModelForCausalLM

    path = Path(path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(toy_config(family, layers, hidden, vocab, **extra))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=parameter.shape[-1] ** -0.5)
    model.to(getattr(torch, dtype)).save_pretrained(path)
    toy_tokenizer(vocab).save_pretrained(path)
    return path


def rewritten(source: Path, to: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """Write a copy of a toy whose tensors, by name, are what `change` makes of them in place; returns `to`."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, to)
    tensors = load_file(to / "model.safetensors")
    change(tensors)
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to
