"""A tiny random checkpoint of every type of language model that the installed transformers knows.

Configs are shrunk by the names of their fields; FIELDS holds what single types need beside that.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

DEMO = Path(__file__).resolve().parent.parent / "vqcompress" / "demo"
# Class of each type. People publish the class with the tower where a type has both.
CLASSES: dict[str, Any] = {**MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, **MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}
# Tokens of the demo's tokenizer; ids from there on are the special tokens of images and the like.
TOKENS, VOCAB = 2048, 2112
MOST_LAYERS, HEADS, ROTARY = 4, 4, 8
# Names of fields, or patterns of whole names, and their values in a toy; the first that fits counts.
SIZES: list[tuple[str, int]] = [
    (".*vocab_size.*|n_words", VOCAB),
    ("num_hidden_layers|num_layers|n_layers?|.*_layers|depth|.*_depth", 2),
    ("kv_n_heads|num_kv_heads|.*key_value_heads", 2),
    (".*num_(key|value)_heads|.*heads|n_head|.*num_heads", 4),
    (".*(moe|expert|experts)_(intermediate|hidden|ffn_hidden)_(size|dim)|expert_dim", 64),
    (
        ".*(intermediate|ffn|inner|mlp)_?(hidden)?_?(size|dim)\\w*|dff|d_inner|n_inner|dim_ff|d_ff|feed_forward_size",
        256,
    ),
    ("qk_rope_head_dim", ROTARY),
    ("rotary_dim", 16),
    ("(qk_nope|v)_head_dim|kv_lora_rank|index_head_dim|.*linear_(key|value)_head_dim", 16),
    ("q_lora_rank|o_lora_rank", 24),
    ("hidden_size_per_layer_input|laurel_rank", 16),
    ("altup_num_inputs", 2),
    ("(swa_|attention_|local_)?head_dim|attention_head_(dim|size)|kv_channels|d_head|d_kv|dim_head", 32),
    ("(n|num|moe_num|n_routed|num_local)_(local_)?(routed_)?experts", 4),
    ("(num_experts|moe_num_experts)_per_tok(en)?|moe_(k|topk|top_k)|num_selected_experts", 2),
    ("zero_expert_num|n_group|(mamba_)?n_?groups", 2),
    ("topk_group", 1),
    ("max_position_embeddings|n_positions|n_ctx|max_seq_len|context_length|seq_length|max_\\w*positions", 256),
    ("sliding_window(_size)?|local_attention|attention_window_size|window_size", 16),
    ("index_topk", 16),
    ("index_n_heads", 2),
    ("(mamba_)?chunk_size|block_size", 16),
    ("(mamba_d|ssm|mamba)?_?state(_size)?", 16),
    ("base_channels|latent_channels|adapter_rank", 32),
    ("image_size", 28),
    ("patch_size", 14),
    (
        ".*(hidden_size(_global)?|(embed|hidden|embedding|proj|projection|input|output|adapter_in|adapter_out)_dim|embedding_size)",
        128,
    ),
    ("adapter_input_size|d_model|n_embd|lru_width", 128),
]
SPECIAL = re.compile(r".*_(token_id|token_index|index|id|ids|offset)")
# Sizes that some configs leave to a checkpoint.
NEEDED = {"head_dim": 32, "n_routed_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 4}
THETA = {"rope_type": "default", "rope_theta": 10000.0}
VOCABULARY = {"<image>": 2100, "<reserved08707>": 2101, "<racm3:break>": 2102, "<eoss>": 2103, "<|extra_200|>": 2104}
VQ_TOWER = {"base_channels": 32, "latent_channels": 32, "channel_multiplier": [1, 1], "embed_dim": 32}
ATTENTIONS = ["sliding_attention", "full_attention"]
DECODER = {"is_decoder": True}
SHARED_KEYS = {"layer_types": ATTENTIONS * 2, "num_hidden_layers": 4, "num_kv_shared_layers": 2}
SLIDING_LATENT = {"num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 16}
SLIDING_LATENT |= {"head_dim": 24, "qk_nope_head_dim": 16, "v_head_dim": 16}


def mrope(*sections: int) -> dict[str, Any]:
    """Fields of a text config whose angles are divided among several positions of a token."""
    return {"rope_parameters": {**THETA, "mrope_section": list(sections)}}


# What a type needs beside the general rules; `...` takes a field away.
FIELDS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("bert", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert"), DECODER),
    **dict.fromkeys(("bert-generation", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer"), DECODER),
    **dict.fromkeys(("xlm-roberta", "xlm-roberta-xl"), DECODER),
    "apertus1p5": {
        "vision_config": {**VQ_TOWER, "codebook_size": 16},
        "audio_config": {"codebook_dim": 128, "codebook_size": 16},
        "image_token_offset": 2060,
        "audio_token_offset": 2076,
    },
    "blt": {"encoder_hash_byte_group_vocab": 500},
    "chameleon": {"vocabulary_map": VOCABULARY, "vq_config": VQ_TOWER},
    "cohere_compass": {"text_config": {"rope_parameters": {"full_attention": THETA}}},
    "cohere_compass_text": {"rope_parameters": {"full_attention": THETA}},
    "cosmos3_edge": {"text_config": mrope(8, 4, 4)},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", "sparse"]}},
    "diffusion_gemma": {"text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 64}},
    "dory": {
        "layer_types": [*ATTENTIONS, ATTENTIONS[0]],
        "num_hidden_layers": 3,
        "n_input_layers": 1,
        "n_output_layers": 1,
    },
    "dots1": {"n_shared_experts": 1},
    "emu3": {"vocabulary_map": VOCABULARY, "vq_config": VQ_TOWER},
    "ernie4_5_vl_moe": {"text_config": {**mrope(6, 6, 4), "moe_intermediate_size": [64, 64]}},
    "florence2": {
        "vision_config": {"depths": [1, 1], "embed_dim": [32, 64], "num_heads": [2, 2], "num_groups": [2, 2]}
    },
    "gemma3n_text": {**SHARED_KEYS, "activation_sparsity_pattern": [0.0] * 4, "intermediate_size": [256] * 4},
    "gemma4": {"text_config": {**SHARED_KEYS, "global_head_dim": 48}},
    "gemma4_text": {**SHARED_KEYS, "global_head_dim": 48},
    "gemma4_unified": {"text_config": {**SHARED_KEYS, "global_head_dim": 48}},
    "gemma4_unified_text": {**SHARED_KEYS, "global_head_dim": 48},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granite4_vision": {
        "deepstack_layer_map": [[0, 0], [1, 1]],
        "spatial_target_layers": [0, 1],
        "downsample_rate": "1/2",
    },
    **{name: {"text_config": mrope(8, 4, 4)} for name in ("glm46v", "glm4v", "glm_ocr", "glmga", "paddleocr_vl")},
    **{name: {"text_config": mrope(8, 4, 4)} for name in ("qwen2_vl", "qwen2_5_vl", "qwen2_5_omni_thinker")},
    "glm4v_moe": {
        "text_config": {"rope_parameters": mrope(4, 2, 2)["rope_parameters"] | {"partial_rotary_factor": 0.5}}
    },
    "hunyuan_vl": {"text_config": mrope(4, 4, 4, 4)},
    "hy_v4_vl": {"text_config": mrope(2, 1, 1)},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3, "num_dense_layers": 1},
    "mamba2": {"num_heads": 8},
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "reformer": {
        **DECODER,
        "attn_layers": ["local", "lsh"],
        "axial_pos_shape": [8, 32],
        "axial_pos_embds_dim": [64, 64],
    },
    "step3p7": {
        "text_config": {"layer_types": ATTENTIONS, "mlp_layer_types": ["dense", "sparse"], "sliding_window": 16}
    },
    "xmod": {**DECODER, "default_language": "en_XX"},
    "janus": {"vq_config": VQ_TOWER},
    "muse_spark": {"audio_config": {"hidden_sizes": [32, 32, 64, 64], "depths": [1, 1, 1, 1]}},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "qwen4_exp_text": {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 32, "indexer_budget": 16},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4},
}
# What a config needs to be built at all.
KEYLESS = {"model_type": "gemma4_text", "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
DEFAULTS = {"gemma4_assistant": {"text_config": KEYLESS}}
FIELDS["dots3_note_text"] = {f"swa_{name}": size for name, size in SLIDING_LATENT.items()}
FIELDS["dots3_note"] = {"text_config": FIELDS["dots3_note_text"]}
FIELDS["qwen4_exp_text"] |= {"indexer_compress_ratio": 4}
FIELDS["qwen4_exp"] = {"text_config": FIELDS["qwen4_exp_text"]}


def class_name(name: str) -> str:
    """The name of the class of a type."""
    named = CLASSES[name]
    return named if isinstance(named, str) else named[0]


def small_fields(default: PretrainedConfig) -> dict[str, Any]:
    """Arguments for the class of a default config that make a toy of it; nested configs likewise."""
    kind = type(default)
    # A field of two names is written under one of them.
    values = default.to_dict()
    values |= {known: values[own] for known, own in kind.attribute_map.items() if own in values}
    spelled = {own: known for known, own in kind.attribute_map.items()}
    heads = values.get("num_attention_heads")
    found: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        name, known = field.name, spelled.get(field.name, field.name)
        if field.default is None and values.get(name) is not None:
            # Computed from other fields.
            continue
        if field.default is None:
            small = None if "qk_rope_head_dim" in values and name == "head_dim" else NEEDED.get(name)
        elif name == "head_dim" and values[name] == values.get("qk_rope_head_dim"):
            small = ROTARY
        else:
            small = small_number(name, known, values.get(name))
        if known == "num_key_value_heads" and field.default == heads:
            small = small and HEADS
        if small is not None:
            found[name] = small
    found |= kinds_of_layers(values, kind)
    for name in kind.sub_configs:
        if isinstance(nested := getattr(default, name, None), PretrainedConfig):
            found[name] = {"model_type": nested.model_type, **own_values(nested), **small_fields(nested)}
    return found


def own_values(config: PretrainedConfig) -> dict[str, Any]:
    """Plain fields of a nested config that have other values than the class's own defaults."""
    defaults = {f.name: f.default for f in dataclasses.fields(config) if isinstance(f.default, int | float | str)}
    values = {name: value for name, value in vars(config).items() if name in defaults}
    return {name: value for name, value in values.items() if value != defaults[name]}


def small_number(name: str, known: str, value: Any) -> Any:
    """The value of a numeric field in a toy; None to leave it as it is. known: its name in transformers' own terms."""
    if isinstance(value, bool) or not isinstance(value, int):
        return None
    if name in ("vocab_size", "n_words"):
        # Fewer than the tokenizer's are too few.
        return VOCAB
    for pattern, size in SIZES:
        if re.fullmatch(pattern, known) or re.fullmatch(pattern, name):
            return size if value > size else None
    if SPECIAL.fullmatch(name) and value >= VOCAB:
        return TOKENS + sum(map(ord, name)) % (VOCAB - TOKENS)
    return None


def kinds_of_layers(values: dict[str, Any], kind: type[PretrainedConfig]) -> dict[str, Any]:
    """Fields that list something per layer, cut so that each kind of layer comes once."""
    layers = kind.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    names = sorted({field.name for field in dataclasses.fields(kind)} - {"architectures"})
    listed = {name: values[name] for name in names if isinstance(values.get(name), (list, tuple))}
    listed = {name: value for name, value in listed.items() if value and len(value) == values.get(layers)}
    if not listed:
        return {}
    rows = list(zip(*listed.values(), strict=True))
    first = sorted({repr(row): i for i, row in reversed(list(enumerate(rows)))}.values())[:MOST_LAYERS]
    chosen = first if len(first) > 1 else first * 2
    cut = {name: [_small_or_same(name, value[i]) for i in chosen] for name, value in listed.items()}
    return {**cut, layers: len(chosen)}


def _small_or_same(name: str, value: Any) -> Any:
    """The value of a layer; numbers of layers, in lists that point at layers, stay."""
    small = None if name.endswith("layers") else small_number(name, name, value)
    return value if small is None else small


def toy_config(name: str) -> PretrainedConfig:
    """The config of a toy of a type."""
    kind, fields = CONFIG_MAPPING[name], FIELDS.get(name, {})
    return kind(**merged(small_fields(kind(**DEFAULTS.get(name, {}))), fields))


def merged(fields: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Fields with others added or put in their place, in nested configs too; those that are `...` are left out."""
    found = dict(fields)
    for key, value in more.items():
        both = isinstance(value, dict) and isinstance(found.get(key), dict)
        found[key] = merged(found[key], value) if both else value
    return {key: value for key, value in found.items() if value is not ...}


def fill(parameters: Iterable[tuple[str, torch.nn.Parameter]], seed: int) -> None:
    """Random weights of unit gain, norms and biases off their usual one and zero: wrong arithmetic then shows."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in parameters:
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() in (2, 3) and "conv" not in name and "A_log" not in name:
            parameter.data = noise * parameter.shape[-1] ** -0.5
        elif parameter.dim() == 1 and not re.search(r"A_log|dt_bias|\.D$|decay|time_", name):
            parameter.data += 0.2 * noise


def toy_model(name: str, seed: int = 0) -> PreTrainedModel:
    """A toy of a type in float32, with weights that bfloat16 holds."""
    config = toy_config(name)
    kind = getattr(transformers, class_name(name))
    torch.manual_seed(seed)
    model = kind._from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        fill(model.named_parameters(), seed)
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(tensor.to(torch.bfloat16))
    return model


def save(model: PreTrainedModel, folder: Path) -> None:
    """Write a toy in bfloat16 with the demo's tokenizer; the model is then in bfloat16."""
    model.to(torch.bfloat16).save_pretrained(folder)
    for file in DEMO.glob("tokenizer*"):
        shutil.copy(file, folder)
