"""Checks of an architecture on a tiny model of it with random weights; takes seconds and needs only config.json."""

from __future__ import annotations

import contextlib
import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

from vqcompress.errors import VQCompressError, one_line
from vqcompress.model.coverage import dense_weights
from vqcompress.model.folds import Input, find_inputs
from vqcompress.model.stream import BlockStream
from vqcompress.model.weights import auto_class
from vqcompress.storage.artifact import open_checkpoint
from vqcompress.storage.checkpoint import Checkpoint
from vqcompress.storage.trust import trusted

LAYERS = ("num_hidden_layers", "n_layer", "num_layers")
# Fields of a config, and their largest values in a toy.
SIZES = {"vocab_size": 512, "max_position_embeddings": 256, "n_positions": 256, "first_k_dense_replace": 1}
SIZES |= {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
WIDTHS = {"hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 64, "ffn_dim": 256}
WIDTHS |= {"num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4}
WIDTHS |= {"num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}
HEADS, HEAD_DIM = 4, 32
TOKENS = 48


def examine(model: str) -> dict[str, Any]:
    """JSON: checks of MODEL's architecture, its folds, and which weights stay dense and why. Reads only config.json.

    ok: running block by block equals the model's own forward, and some weights can be compressed. coverage: share of
    the blocks' weights that can be. folds: the module that smoothing of each input is folded into, None if it is
    applied at run time.
    """
    real = BlockStream(open_checkpoint(model, weights=False), torch.device("cpu"), torch.float32)
    inputs: list[Input] = []
    with tempfile.TemporaryDirectory() as folder:
        toy = toy_model(real.config)
        toy.save_pretrained(folder)
        stream = BlockStream(Checkpoint(Path(folder)), torch.device("cpu"), torch.float32)
        try:
            difference, largest, inputs = _compare(toy, stream)
            same = difference <= 1e-4 * largest
            detail = f"largest difference of logits {difference:.1e} of {largest:.1e}, {len(stream.blocks)} toy blocks"
        except Exception as error:  # the code of an architecture that is not supported may raise anything
            same, detail = False, one_line(error)
    covered = sum(target.weights for block in real.blocks for target in block.targets)
    matrices = sum(p.numel() for layer in real.skeletons for p in layer.parameters() if p.dim() > 1)
    coverage = covered / max(matrices, 1)
    share = f"{coverage:.1%} of the blocks' weights can be compressed"
    checks = [
        {"name": "block by block equals forward", "ok": same, "detail": detail},
        {"name": "the blocks have weights to compress", "ok": coverage > 0, "detail": share},
    ]
    return {
        "model": model,
        "architecture": type(real.model).__name__,
        "ok": all(check["ok"] for check in checks),
        "checks": checks,
        "blocks": len(real.blocks),
        "targets": sum(len(block.targets) for block in real.blocks),
        "coverage": coverage,
        "folds": [{"input": ", ".join(i.consumers), "producer": i.producer and i.producer.module} for i in inputs],
        "left_dense": dense_weights(real),
    }


def toy_model(config: transformers.PretrainedConfig) -> transformers.PreTrainedModel:
    """A small model of an architecture with random weights.

    It has two layers, or as many as show every type of layer once. If it cannot be built with small widths, only depth
    and vocabulary shrink.
    """
    for widths in (True, False):
        small = copy.deepcopy(config)
        torch.manual_seed(0)
        try:
            _shrink(small.get_text_config(), widths)
            toy = auto_class(small).from_config(small, dtype=torch.float32, trust_remote_code=trusted()).eval()
        except Exception as error:  # sizes that do not fit together fail in as many ways as there are models
            reason = one_line(error)
            continue
        for parameter in toy.parameters():
            # Norms of one and biases of zero would hide a wrong fold.
            if parameter.dim() == 1:
                parameter.data += 0.2 * torch.randn_like(parameter)
        return toy
    raise VQCompressError(f"transformers cannot build a causal language model from a {config.model_type}: {reason}")


def _shrink(config: Any, widths: bool) -> None:
    """Edit a config: depth, vocabulary, and widths if asked for. The ratio of query heads to key heads is kept."""
    types = {name: kinds for name in ("layer_types", "mlp_layer_types") if (kinds := getattr(config, name, None))}
    layers = max([2, *(1 + kinds.index(kind) for kinds in types.values() for kind in set(kinds))])
    for name, kinds in types.items():
        # Some configs compute the types from the number of layers and refuse to be set.
        with contextlib.suppress(AttributeError):
            setattr(config, name, kinds[:layers])
    sizes = dict.fromkeys(LAYERS, layers) | SIZES
    heads, kv_heads = getattr(config, "num_attention_heads", None), getattr(config, "num_key_value_heads", None)
    if widths:
        sizes |= WIDTHS
        # In latent attention head_dim is the width of the rotary part, which keeps its size.
        sizes |= {} if hasattr(config, "qk_rope_head_dim") else {"head_dim": HEAD_DIM}
        if isinstance(heads, int):
            sizes["num_attention_heads"] = HEADS
            sizes["num_key_value_heads"] = max(1, HEADS * (kv_heads or heads) // max(heads, HEADS))
    for name, most in sizes.items():
        value = getattr(config, name, None)
        if isinstance(value, int) and value > most:
            setattr(config, name, most)


@torch.no_grad()
def _compare(toy: transformers.PreTrainedModel, stream: BlockStream) -> tuple[float, float, list[Input]]:
    """The largest difference between streamed and direct logits over two batches, the largest logit, and the inputs of
    the last block."""
    vocabulary = toy.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(vocabulary, (2, TOKENS), generator=generator) for _ in range(2)]
    states = [stream.embed(batch) for batch in batches]
    last = len(stream.blocks) - 1
    for i in range(last):
        stream.forward(stream.load_block(i), i, states)
    block = stream.load_block(last)
    inputs = find_inputs(block, stream.blocks[last], lambda module: stream.outputs(module, last, states[0]))
    stream.forward(block, last, states)
    difference = largest = 0.0
    for batch, state in zip(batches, states, strict=True):
        direct = toy(batch, use_cache=False).logits
        difference = max(difference, (stream.logits(state) - direct).abs().max().item())
        largest = max(largest, direct.abs().max().item())
    return difference, largest, inputs
