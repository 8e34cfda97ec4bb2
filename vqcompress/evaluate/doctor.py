"""Checks of an architecture on a tiny model of it with random weights; takes seconds and needs only config.json."""

from __future__ import annotations

import contextlib
import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM

from vqcompress.errors import VQCompressError
from vqcompress.model.coverage import dense_weights
from vqcompress.model.folds import find_inputs
from vqcompress.model.stream import BlockStream
from vqcompress.model.weights import load_config
from vqcompress.storage.artifact import open_checkpoint
from vqcompress.storage.checkpoint import Checkpoint
from vqcompress.storage.trust import trusted

# Config fields, and their largest values in a toy. The ratio of query heads to key heads is kept.
LAYERS = ("num_hidden_layers", "n_layer", "num_layers")
CAPS = {"vocab_size": 512, "max_position_embeddings": 256, "n_positions": 256}
WIDTHS = {"hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 64, "ffn_dim": 256}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4}
ROUTING = {"num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}
TOKENS = 48
# What modeling code raises if the sizes of a config do not fit together.
MISFITS: tuple[type[Exception], ...] = (ArithmeticError, AssertionError, AttributeError, LookupError)
MISFITS += (RuntimeError, TypeError, ValueError, StrictDataclassError)
FAILURES: tuple[type[Exception], ...] = (VQCompressError, *MISFITS)


def toy_config(config: transformers.PretrainedConfig) -> transformers.PretrainedConfig:
    """The config with small widths and two layers, or as many as show every type of layer once.

    If the architecture cannot be built with small widths, only depth and vocabulary shrink.
    """
    for widths in (True, False):
        toy = _shrink(copy.deepcopy(config), widths)
        try:
            AutoModelForCausalLM.from_config(toy, trust_remote_code=trusted())
        except MISFITS:
            continue
        return toy
    raise VQCompressError(f"transformers cannot build a causal language model from a {config.model_type} config")


def _shrink(config: transformers.PretrainedConfig, widths: bool) -> transformers.PretrainedConfig:
    """The config itself, edited. widths: shrink the widths too."""

    def cap(name: str, most: int) -> None:
        value = getattr(config, name, None)
        if isinstance(value, int) and value > most:
            setattr(config, name, most)

    types = {name: kinds for name in ("layer_types", "mlp_layer_types") if (kinds := getattr(config, name, None))}
    layers = max([2, *(1 + max(kinds.index(kind) for kind in set(kinds)) for kinds in types.values())])
    for name, kinds in types.items():
        # Some configs compute the types from the number of layers and refuse to be set.
        with contextlib.suppress(AttributeError):
            setattr(config, name, kinds[:layers])
    dense_first = getattr(config, "first_k_dense_replace", 0)
    if isinstance(dense_first, int) and dense_first > 1:
        config.first_k_dense_replace = 1
    for name in LAYERS:
        cap(name, layers)
    for name, most in CAPS.items():
        cap(name, most)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if isinstance(getattr(config, name, None), int) and getattr(config, name) >= CAPS["vocab_size"]:
            setattr(config, name, 0)
    if not widths:
        return config
    heads, kv = getattr(config, "num_attention_heads", 4), getattr(config, "num_key_value_heads", None)
    for name, most in {**WIDTHS, **EXPERTS, **ROUTING}.items():
        cap(name, most)
    if isinstance(heads, int) and heads > 4:
        config.num_attention_heads = 4
        if isinstance(kv, int):
            config.num_key_value_heads = max(1, 4 * kv // heads)
    # In latent attention head_dim is the width of the rotary part, which keeps its size.
    if isinstance(getattr(config, "head_dim", None), int) and not hasattr(config, "qk_rope_head_dim"):
        cap("head_dim", 32)
    return config


def examine(model: str) -> dict[str, Any]:
    """JSON: checks of MODEL's architecture, its folds, and which weights stay dense and why. Reads only config.json.

    ok: running block by block equals the model's own forward, and some weights can be compressed. coverage: share of
    the blocks' weights that can be. folds: the module that smoothing of each input is folded into, None if it is
    applied at run time.
    """
    source = open_checkpoint(model, weights=False)
    config = load_config(source.path)
    real = BlockStream(source, torch.device("cpu"), torch.float32)
    checks: list[dict[str, Any]] = []
    folds: list[dict[str, str | None]] = []
    with tempfile.TemporaryDirectory() as folder:
        toy = _write_toy(toy_config(config), Path(folder))
        stream = BlockStream(Checkpoint(Path(folder)), torch.device("cpu"), torch.float32)
        try:
            difference, scale = _compare(toy, stream)
            detail = f"largest difference of logits {difference:.1e} of {scale:.1e}, {len(stream.blocks)} toy blocks"
            checks.append({"name": "block by block equals forward", "ok": difference <= 1e-4 * scale, "detail": detail})
            folds = _folds(stream)
        except FAILURES as error:
            reason = " ".join(str(error).split())[:200]
            checks.append({"name": "block by block equals forward", "ok": False, "detail": reason})
    covered = sum(t.weights for block in real.blocks for t in block.targets)
    matrices = sum(p.numel() for layer in real.skeletons for p in layer.parameters() if p.dim() > 1)
    left = dense_weights(real)
    coverage = covered / max(matrices, 1)
    checks.append(
        {
            "name": "the blocks have weights to compress",
            "ok": coverage > 0,
            "detail": f"{coverage:.1%} of the blocks' weights can be compressed",
        }
    )
    return {
        "model": model,
        "architecture": type(real.model).__name__,
        "ok": all(check["ok"] for check in checks),
        "checks": checks,
        "blocks": len(real.blocks),
        "targets": sum(len(block.targets) for block in real.blocks),
        "coverage": coverage,
        "folds": folds,
        "left_dense": left,
    }


def _write_toy(config: transformers.PretrainedConfig, folder: Path) -> transformers.PreTrainedModel:
    """A model with random weights, saved in a folder."""
    torch.manual_seed(0)
    config = type(config).from_dict({k: v for k, v in config.to_dict().items() if k != "quantization_config"})
    toy = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=trusted()).eval()
    for parameter in toy.parameters():
        # Norms of one and biases of zero would hide a wrong fold.
        if parameter.dim() == 1:
            parameter.data += 0.2 * torch.randn_like(parameter)
    toy.save_pretrained(folder)
    return toy


@torch.inference_mode()
def _compare(toy: transformers.PreTrainedModel, stream: BlockStream) -> tuple[float, float]:
    """The largest difference between streamed and direct logits over two batches, and the largest logit."""
    vocabulary = toy.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(vocabulary, (2, TOKENS), generator=generator) for _ in range(2)]
    states = [stream.embed(batch) for batch in batches]
    for i in range(len(stream.blocks)):
        stream.forward(stream.load_block(i), i, states)
    difference = scale = 0.0
    for batch, state in zip(batches, states, strict=True):
        direct = toy(batch, use_cache=False).logits
        difference = max(difference, (stream.logits(batch, state) - direct).abs().max().item())
        scale = max(scale, direct.abs().max().item())
    return difference, scale


def _folds(stream: BlockStream) -> list[dict[str, str | None]]:
    """For each input of the last toy block, the module that smoothing folds into, or None (applied at run time)."""
    vocabulary = stream.model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    states = [stream.embed(ids)]
    last = len(stream.blocks) - 1
    for i in range(last):
        stream.forward(stream.load_block(i), i, states)
    inputs = find_inputs(stream.load_block(last), stream.blocks[last], lambda m: stream.run(m, last, states[0]))
    return [
        {"input": ", ".join(entrance.consumers), "producer": entrance.producer.module if entrance.producer else None}
        for entrance in inputs
    ]
