"""Checks of an architecture on a tiny model of it with random weights; takes seconds and needs only config.json."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from vqcompress.errors import one_line
from vqcompress.model.coverage import dense_weights
from vqcompress.model.folds import Input, find_inputs
from vqcompress.model.stream import BlockStream
from vqcompress.model.toy import toy_model
from vqcompress.storage.artifact import open_checkpoint
from vqcompress.storage.checkpoint import Checkpoint

TOKENS = 48


def examine(model: str) -> dict[str, Any]:
    """JSON: checks of MODEL's architecture, its folds, and which weights stay dense and why. Reads only config.json.

    ok: running block by block equals the model's own forward, and some weights can be compressed. coverage: share of
    the blocks' weights that can be. folds: the module that smoothing of each input is folded into, None if it is
    applied at run time.
    """
    real = BlockStream(open_checkpoint(model, weights=False), torch.device("cpu"), torch.float32)
    inputs: list[Input] = []
    refusal = ""
    with tempfile.TemporaryDirectory() as folder:
        try:
            toy, stream = _toy(real, Path(folder))
            difference, largest, inputs = _compare(toy, stream)
            refusal = stream.calls.refusal
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
    if refusal:
        detail = f"{refusal}; recipes without calibration, as fp8-tile, can"
        checks.append({"name": "recipes with calibration can run it", "ok": False, "detail": detail})
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


def _toy(real: BlockStream, folder: Path) -> tuple[transformers.PreTrainedModel, BlockStream]:
    """A toy that has every kind of block that the model has, saved, and its stream."""
    kinds = [_kind(layer) for layer in real.skeletons]
    least = 1 + max(kinds.index(kind) for kind in set(kinds))
    for layers in (max(2, least), len(kinds)):
        try:
            toy, config = toy_model(real.config, least=layers)
            toy.save_pretrained(folder)
            config.save_pretrained(folder)
            stream = BlockStream(Checkpoint(folder), torch.device("cpu"), torch.float32)
        except Exception:  # a config that says something of each layer fits its own number of them alone
            if layers == len(kinds):
                raise
            continue
        if set(kinds) <= {_kind(layer) for layer in stream.skeletons}:
            break
    return toy, stream


def _kind(layer: nn.Module) -> frozenset[tuple[str, str]]:
    """The modules of a block by name and class, whatever their sizes and numbers."""
    return frozenset((re.sub(r"\d+", "#", name), type(module).__name__) for name, module in layer.named_modules())


@torch.no_grad()
def _compare(toy: transformers.PreTrainedModel, stream: BlockStream) -> tuple[float, float, list[Input]]:
    """The largest difference between streamed and direct logits over two batches, the largest logit, and the inputs of
    the last block."""
    vocabulary = toy.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(vocabulary, (2, TOKENS), generator=generator) for _ in range(2)]
    inputs: list[Input] = []
    calls = stream.learn()
    states = [] if calls.refusal else [stream.embed(batch) for batch in batches]
    for i in () if calls.refusal else calls.order:
        block = stream.load_block(i)
        if i == calls.order[-1]:
            inputs = find_inputs(block, stream.blocks[i], lambda m: stream.outputs(m, calls.order[-1], states[0]))
        stream.forward(block, i, states)
    difference = largest = 0.0
    for k, batch in enumerate(batches):
        direct = toy(batch, use_cache=False).logits
        found = stream.logits(states[k]) if states else stream.whole(batch)
        difference = max(difference, (found - direct).abs().max().item())
        largest = max(largest, direct.abs().max().item())
    return difference, largest, inputs
