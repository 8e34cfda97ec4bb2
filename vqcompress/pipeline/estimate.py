"""What a plan costs, from a config alone: bits and bytes that are stored, peak memory, tokens of calibration.

Memory is a bound for one process, by the phases of a run. Nothing is measured and nothing is written.
"""

from __future__ import annotations

from typing import Any

from vqcompress.kv_cache.calibrate import BATCH_TOKENS as CACHE_BATCH_TOKENS
from vqcompress.kv_cache.calibrate import TOKENS as CACHE_TOKENS
from vqcompress.kv_cache.codes import ENTRIES
from vqcompress.model.device import peak_rss_bytes
from vqcompress.model.stream import BATCH_TOKENS, BlockStream
from vqcompress.pipeline.plan import Plan
from vqcompress.storage import recipe as recipes
from vqcompress.storage.artifact import stored_bits
from vqcompress.storage.checkpoint import stored_dtype
from vqcompress.storage.targets import kind

# Bytes per weight while it is encoded: itself, a smoothed copy, what it decodes to, and the work of its method.
ENCODE_BYTES = 32
# Bytes per entry of a Hessian: sums in float64, means in float32, and the factors of the one that is in use.
HESSIAN_BYTES = 12


def estimate(plans: list[Plan], stream: BlockStream, rows: int, seqlen: int, states: str = "memory") -> dict[str, Any]:
    """JSON for `plan`, see docs/recipes.md. With a budget plans has one plan for each candidate.

    rows, seqlen: of the calibration; 0 rows if the recipe reads no text. states: where hidden states are kept.
    Bits are those of folded smoothing; where a fold cannot be proven, a vector per input is added.
    """
    bits = [sum(stored_bits(plan.entries).values()) for plan in plans]
    plan, spent = max(zip(plans, bits, strict=True), key=lambda pair: pair[1])
    weights, itemsize, budget = plan.weights, stored_dtype(stream.source.config).itemsize, plan.target_bits
    choice: dict[str, Any] = {}
    if budget is not None:
        spent = min(spent, budget * weights)
        names = (recipes.setting(p.methods[0]) for p in plans)
        per_weight = (b / p.weights for b, p in zip(bits, plans, strict=True))
        choice = {"target_bits": budget, "candidates": dict(zip(names, per_weight, strict=True))}
    parameters = _outside(stream) + sum(_sizes(stream))
    source = stream.source.bytes or parameters * itemsize
    embedding, head = stream.model.get_input_embeddings(), stream.model.get_output_embeddings()
    # Rotated, a head that was tied to the embeddings is stored by itself.
    untied = head.get_parameter("weight").numel() if plan.recipe.rotation and embedding.weight is head.weight else 0
    codebooks = cache_channels(stream) * ENTRIES * 2 if plan.learns_cache else 0
    cache = plan.recipe.cache
    return {
        "recipe": plan.recipe.name,
        "rotation": plan.recipe.rotation,
        "kv_cache": cache.model_dump(mode="json") if cache else None,
        "codebook_bytes": codebooks,
        "bits_per_weight": spent / weights if weights else None,
        "weights_quantized": weights,
        "parameters": parameters,
        "source_bytes": source,
        "artifact_bytes": source + (untied - weights) * itemsize + int(spent) // 8 + codebooks,
        **_memory(plan, stream, rows, seqlen, states),
        "calibration_tokens": rows * seqlen,
        "targets": _targets(plan),
        "left_dense": plan.left_dense,
        **choice,
    }


def _targets(plan: Plan) -> list[dict[str, Any]]:
    """A row for each target; with a budget its method is not known yet."""
    stored, open_ = stored_bits(plan.entries), plan.target_bits is not None
    return [
        {
            "name": entry.target.name,
            "method": None if open_ else entry.method.name,
            "shape": list(entry.target.shape),
            "bits_per_weight": None if open_ else stored[entry.target.name] / entry.target.weights,
        }
        for entry in plan.entries
    ]


def _sizes(stream: BlockStream) -> list[int]:
    """Parameters of each block."""
    return [sum(p.numel() for p in layer.parameters()) for layer in stream.skeletons]


def _outside(stream: BlockStream) -> int:
    """Parameters outside of the blocks."""
    return sum(p.numel() for p in stream.model.parameters())


def _memory(plan: Plan, stream: BlockStream, rows: int, seqlen: int, where: str) -> dict[str, int]:
    """Upper bounds on the peaks of one process, on the host and on its GPU, and the bytes of hidden states in them."""
    on_gpu, stored = stream.device.type == "cuda", stored_dtype(stream.source.config).itemsize
    rotated, itemsize = bool(plan.recipe.rotation), stream.dtype.itemsize
    hidden = stream.model.config.get_text_config().hidden_size
    size, outside, targets = max(_sizes(stream)), _outside(stream), plan.targets
    width = max((max(t.shape) for t in targets), default=hidden)
    states = rows * seqlen * hidden * itemsize * (1 + plan.needs_reference) if plan.calibrated else 0
    # Both at once: the block as stored (a rotated one is float32, and turned in a copy), and its largest weight.
    read = size * (stored + 8 * rotated)
    work = max((t.weights for t in targets), default=0) * ENCODE_BYTES
    if plan.calibrated:
        batch = min(max(1, BATCH_TOKENS // seqlen), rows) * seqlen
        hessians = max(sum(channels**2 for channels in _hessian_inputs(plan, i)) for i in range(len(plan.blocks)))
        work += (size + batch * (4 * width + 8 * hidden)) * itemsize + hessians * HESSIAN_BYTES
        work += outside * itemsize + states * (where == "memory")
    if plan.recipe.tuning:
        # Two whole models in float32, gradients of one, and what all its layers keep of a batch.
        work = max(work, (size * len(plan.blocks) + outside) * 12 + BATCH_TOKENS * 4 * width * 4 * len(plan.blocks))
    if plan.learns_cache:
        work = max(work, cache_memory(plan, stream, rows, seqlen))
    samples = cache_samples(plan, stream, rows * seqlen) if plan.learns_cache else 0
    ahead = max(1, plan.ahead(stream.device))
    host = read + samples if on_gpu else ahead * (read + work) + samples
    host = peak_rss_bytes() + max(host, outside * stored * (1 + 4 * rotated))
    return {"peak_rss_bytes": host, "peak_device_bytes": work if on_gpu else 0, "states_bytes": states}


def _hessian_inputs(plan: Plan, index: int) -> list[int]:
    """Channels of every input of a block whose Hessian is gathered, as far as a config tells.

    Layers beside each other that are equally wide count as readers of one input, also those of all experts, but the
    last of its parent counts alone: it reads what the others made.
    """
    targets = plan.blocks[index].targets
    last = {target.name.rpartition(".")[0]: target.name for target in targets}
    found: dict[tuple[str, int], int] = {}
    for target in targets:
        parent, channels = target.name.rpartition(".")[0], target.shape[1]
        if "hessian" in plan.rules[target.name].needs:
            found[target.name if target.name == last[parent] else kind(parent), channels] = channels
    return list(found.values())


def cache_channels(stream: BlockStream) -> int:
    """Channels of the keys and values of one token, in all layers."""
    config = stream.model.config.get_text_config()
    if latent := getattr(config, "kv_lora_rank", None):
        # Latent attention keeps what keys and values are made of, and the part of keys that positions rotate.
        return len(stream.blocks) * int(latent + config.qk_rope_head_dim)
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return len(stream.blocks) * (getattr(config, "num_key_value_heads", None) or heads) * 2 * width


def cache_samples(plan: Plan, stream: BlockStream, tokens: int) -> int:
    """Bytes on the host of the keys and values (and gradients) that codebooks of a cache are learned from."""
    cache = plan.recipe.cache
    assert cache is not None
    return min(CACHE_TOKENS, tokens) * cache_channels(stream) * 4 * (1 + (cache.weights == "gradient"))


def cache_memory(plan: Plan, stream: BlockStream, rows: int, seqlen: int) -> int:
    """Bytes on the device to calibrate a cache: the whole model, and what its layers keep of a batch."""
    cache, config, itemsize = plan.recipe.cache, stream.model.config.get_text_config(), stream.dtype.itemsize
    assert cache is not None
    gradient = cache.weights == "gradient"
    width = max((t.shape[1] for block in stream.blocks for t in block.targets), default=0)
    tokens = min(max(1, CACHE_BATCH_TOKENS // seqlen), rows) * seqlen
    # For gradients all layers keep what entered their products.
    held = len(stream.blocks) if gradient else 1
    activations = tokens * itemsize * (4 * width + 6 * config.hidden_size) * held
    logits = tokens * config.vocab_size * (itemsize + 12 * gradient)
    return (_outside(stream) + sum(_sizes(stream))) * itemsize + activations + logits
