"""Tiny models of an architecture with random weights, to try its code on."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import torch
import transformers

from vqcompress.errors import VQCompressError, one_line
from vqcompress.model.weights import auto_class
from vqcompress.storage.trust import trusted

LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "depth")
# Fields of a config, and their largest values in a toy.
SIZES = {"vocab_size": 512, "max_position_embeddings": 256, "n_positions": 256, "first_k_dense_replace": 1}
SIZES |= {"vocab_size_per_layer_input": 512}
SIZES |= {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
WIDTHS = {"hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 64, "ffn_dim": 256}
WIDTHS |= {"hidden_size_per_layer_input": 32}
WIDTHS |= {"num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4}
WIDTHS |= {"num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}
HEADS, HEAD_DIM = 4, 32


def toy_model(
    config: transformers.PretrainedConfig, narrow_only: bool = False, least: int = 2
) -> tuple[transformers.PreTrainedModel, transformers.PretrainedConfig]:
    """A small model of an architecture with random weights, and its config.

    It has `least` layers, or as many as show every type of layer once, and one in each tower. If no such model can be
    built, it keeps the depth of its towers, or its own and its vocabulary, or its widths unless narrow_only. Of a model
    with towers that has a class for its text alone, the model has none, but the config does.
    """
    attempts = [(True, True, True), (True, True, False), (False, True, True)]
    for depth, widths, towers in attempts + [(True, False, True)] * (not narrow_only):
        small = copy.deepcopy(config)
        torch.manual_seed(0)
        try:
            text = small.get_text_config()
            _shrink(text, least if depth else None, widths)
            for name in small.sub_configs if text is not small and towers else ():
                if (tower := getattr(small, name, None)) is not None and tower is not text:
                    _cut(tower, 1)
            # What transformers would refuse to read again.
            small = type(small).from_dict(small.to_dict())
            toy = auto_class(small).from_config(small, dtype=torch.float32, trust_remote_code=trusted()).eval()
        except Exception as error:  # sizes that do not fit together fail in as many ways as there are models
            reason = one_line(error)
            continue
        for parameter in toy.parameters():
            # Norms of one and biases of zero would hide a wrong fold.
            if parameter.dim() == 1:
                parameter.data += 0.2 * torch.randn_like(parameter)
        return toy, small
    raise VQCompressError(f"transformers cannot build a causal language model from a {config.model_type}: {reason}")


def _shrink(config: Any, depth: int | None, widths: bool) -> None:
    """Edit a config: depth and vocabulary unless None, widths if asked for. Keeps the ratio of query to key heads."""
    types = {name: kinds for name in ("layer_types", "mlp_layer_types") if (kinds := getattr(config, name, None))}
    layers = max([depth or 2, *(1 + kinds.index(kind) for kinds in types.values() for kind in set(kinds))])
    if depth:
        _cut(config, layers)
    sizes = dict(SIZES) if depth else {}
    heads, kv_heads = getattr(config, "num_attention_heads", None), getattr(config, "num_key_value_heads", None)
    sizes |= {name: SIZES["vocab_size"] for name in config.to_dict() if depth and "vocab_size" in name}
    if widths:
        sizes |= WIDTHS
        # In latent attention head_dim is the width of the rotary part, which keeps its size.
        sizes |= {} if hasattr(config, "qk_rope_head_dim") else {"head_dim": HEAD_DIM}
        if isinstance(heads, int):
            sizes["num_attention_heads"] = HEADS
            sizes["num_key_value_heads"] = max(1, HEADS * (kv_heads or heads) // max(heads, HEADS))
    for name, most in sizes.items():
        # A field that layers have of their own cannot be read, and stays as it is.
        with contextlib.suppress(RuntimeError, ValueError):
            if isinstance(value := getattr(config, name, None), int) and value > most:
                setattr(config, name, most)


def _cut(config: Any, layers: int) -> None:
    """Edit a config: at most this number of layers, and as many items in lists that have one for each layer."""
    counts = {name: n for name in LAYERS if isinstance(n := getattr(config, name, None), int)}
    for name, value in config.to_dict().items():
        if isinstance(value, list) and ("layer_types" in name or len(value) in counts.values()):
            # Some configs compute the types from the number of layers and refuse to be set.
            with contextlib.suppress(AttributeError):
                setattr(config, name, value[:layers])
    for name, count in counts.items():
        setattr(config, name, min(count, layers))
