"""What `plan` shows, from a config alone: stored bits and bytes, peak memory, calibration tokens.

Memory is an upper bound for one process. Nothing is measured and nothing is written.
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
from vqcompress.storage.targets import Block, kind

# Bytes per weight while it is encoded: itself, a smoothed copy, what it decodes to, and the work of its method.
ENCODE_BYTES = 32
# Bytes per entry of a Hessian: sums in float64, means in float32, and the factors of the one that is in use.
HESSIAN_BYTES = 12
# Libraries that a run loads and a plan does not: numba and matplotlib.
LIBRARY_BYTES = 200_000_000
# Rows that are sampled from a model at once; fixed, since the rows depend on it.
SAMPLED_ROWS = 32


def estimate(
    plans: list[Plan], stream: BlockStream, rows: int, seqlen: int, states: str, sampled: bool
) -> dict[str, Any]:
    """JSON for `plan`, see docs/recipes.md. With a budget there is one plan for each candidate.

    rows, seqlen: of the calibration; 0 rows if the recipe reads no text. states: where hidden states are kept.
    sampled: whether the model writes rows itself.
    Smoothing is taken as folded; where a fold cannot be proven, the artifact has another vector per input.
    """
    bits = [sum(stored_bits(plan.entries).values()) for plan in plans]
    plan, spent = max(zip(plans, bits, strict=True), key=lambda pair: pair[1])
    weights, itemsize, budget, cache = plan.weights, _itemsize(stream), plan.target_bits, plan.recipe.cache
    stored = stored_bits(plan.entries)
    choice: dict[str, Any] = {}
    if budget is not None:
        spent = min(spent, budget * weights)
        settings = (recipes.setting(p.methods[0]) for p in plans)
        choice = {"target_bits": budget, "candidates": {n: b / weights for n, b in zip(settings, bits, strict=True)}}
    outside, blocks = _parameters(stream)
    parameters = outside + sum(blocks)
    dense = sum(info.bytes for info in stream.source.tensors.values()) or parameters * itemsize
    # Not all weights have the type that the config says.
    names = [stream.names.tensor.get(f"{entry.target.name}.weight", "") for entry in plan.entries]
    replaced = sum(t[n].bytes for n in names) if (t := stream.source.tensors) else weights * itemsize
    embedding, head = stream.model.get_input_embeddings(), stream.model.get_output_embeddings()
    # Rotated, a head that was tied to the embeddings is stored by itself.
    untied = head.get_parameter("weight").numel() if plan.recipe.rotation and embedding.weight is head.weight else 0
    codebooks = _cache_channels(stream) * ENTRIES * 2 if plan.learned_cache else 0
    return {
        "recipe": plan.recipe.name,
        "rotation": plan.recipe.rotation,
        "kv_cache": cache.model_dump(mode="json") if cache else None,
        "codebook_bytes": codebooks,
        "bits_per_weight": spent / weights if weights else None,
        "weights_quantized": weights,
        "parameters": parameters,
        # A compressed checkpoint is smaller than what is decoded of it.
        "source_bytes": stream.source.bytes or dense,
        "artifact_bytes": dense + untied * itemsize - replaced + int(spent) // 8 + codebooks,
        **_memory(plan, stream, (rows, seqlen), states, sampled),
        "calibration_tokens": rows * seqlen,
        "targets": [
            {
                "name": entry.target.name,
                # With a budget it is not known yet.
                "method": entry.method.name if budget is None else None,
                "shape": list(entry.target.shape),
                "bits_per_weight": stored[entry.target.name] / entry.target.weights if budget is None else None,
            }
            for entry in plan.entries
        ],
        "left_dense": plan.left_dense,
        **choice,
    }


def _itemsize(stream: BlockStream) -> int:
    return stored_dtype(stream.source.config).itemsize


def _parameters(stream: BlockStream) -> tuple[int, list[int]]:
    """Number of parameters outside of the blocks, and of each block."""
    outside, *blocks = (sum(p.numel() for p in m.parameters()) for m in (stream.model, *stream.skeletons))
    return outside, blocks


def ends_bytes(stream: BlockStream) -> int:
    """Bytes to run a block, see `verify.run_ends`: it and what lies outside of the blocks, as stored and computed."""
    outside, blocks = _parameters(stream)
    return (outside + max(blocks)) * (stream.dtype.itemsize + _itemsize(stream))


def _memory(plan: Plan, stream: BlockStream, shape: tuple[int, int], where: str, sampled: bool) -> dict[str, int]:
    """Upper bounds on the peaks of one process, on the host and on its GPU, and the bytes of hidden states in them."""
    rows, seqlen = shape
    on_gpu, rotated, itemsize = stream.device.type == "cuda", bool(plan.recipe.rotation), stream.dtype.itemsize
    (outside, blocks), hidden = _parameters(stream), stream.model.config.get_text_config().hidden_size
    size = max(blocks)
    width = max((max(t.shape) for t in plan.targets), default=hidden)
    states = rows * seqlen * hidden * itemsize * (1 + plan.needs_reference) if plan.calibrated else 0
    # Both at once: the block as stored (a rotated one also in float32, twice), and its largest weight.
    read = size * (_itemsize(stream) + 8 * rotated)
    work = max((t.weights for t in plan.targets), default=0) * ENCODE_BYTES
    if plan.calibrated:
        batch = min(max(1, BATCH_TOKENS // seqlen), rows) * seqlen
        hessians = max(_hessian_entries(plan, block) for block in plan.blocks)
        work += (size + outside + batch * (4 * width + 8 * hidden)) * itemsize + hessians * HESSIAN_BYTES
        work += states * (where == "memory")
    sampling = sampling_memory(stream, shape) if sampled else 0
    whole = max(cache_memory(plan, stream, rows * seqlen), sampling)
    if plan.recipe.tuning:
        # Two whole models in float32, gradients of one, and the activations of all layers for a batch.
        whole = max(whole, (sum(blocks) + outside) * 12 + BATCH_TOKENS * 4 * width * 4 * len(blocks))
    whole = max(whole, ends_bytes(stream))
    # Without calibration, a CPU encodes the next block while one is written.
    ahead = 1 if plan.calibrated or on_gpu else 2
    host = max(ahead * read, sampling) if on_gpu else max(ahead * (read + work), whole)
    host = peak_rss_bytes() + LIBRARY_BYTES + max(host, outside * _itemsize(stream) * (1 + 4 * rotated))
    return {"peak_rss_bytes": host, "peak_device_bytes": max(work, whole) if on_gpu else 0, "states_bytes": states}


def _hessian_entries(plan: Plan, block: Block) -> int:
    """Entries of all Hessians that are gathered for a block, as far as a config tells.

    Layers beside each other that are equally wide count as readers of one input, also those of all experts, but the
    last of its parent counts alone: it reads what the others made.
    """
    last = {target.name.rpartition(".")[0]: target.name for target in block.targets}
    inputs = set()
    for target in block.targets:
        parent, channels = target.name.rpartition(".")[0], target.shape[1]
        if "hessian" in plan.rules[target.name].needs:
            inputs.add((target.name if target.name == last[parent] else kind(parent), channels))
    return sum(channels**2 for _, channels in inputs)


def _cache_channels(stream: BlockStream) -> int:
    """Channels of the keys and values of one token, in all layers."""
    config = stream.model.config.get_text_config()
    # Gemma 4 has heads of two sizes.
    layers = config.per_layer_config if config.is_heterogeneous else [config] * len(stream.blocks)
    return sum(map(_channels_of_layer, layers))


def _channels_of_layer(config: Any) -> int:
    if latent := getattr(config, "kv_lora_rank", None):
        # Latent attention keeps what keys and values are made of, and the part of keys that is rotated by position.
        return int(latent + config.qk_rope_head_dim)
    heads = getattr(config, "num_attention_heads", None) or 0
    width = getattr(config, "head_dim", None) or config.hidden_size // max(heads, 1)
    return (getattr(config, "num_key_value_heads", None) or heads) * 2 * int(width)


def sampling_memory(stream: BlockStream, shape: tuple[int, int]) -> int:
    """A bound on the bytes to sample rows of a shape (N, L) from a model: all of it, and keys and values of a batch."""
    outside, blocks = _parameters(stream)
    numbers = outside + sum(blocks) + min(SAMPLED_ROWS, shape[0]) * shape[1] * _cache_channels(stream)
    return numbers * stream.dtype.itemsize


def cache_memory(plan: Plan, stream: BlockStream, tokens: int) -> int:
    """A bound on the bytes to learn codebooks of a cache: the whole model, a batch with gradients, and the samples."""
    if plan.learned_cache is None:
        return 0
    (outside, blocks), itemsize = _parameters(stream), stream.dtype.itemsize
    config = stream.model.config.get_text_config()
    width = max((t.shape[1] for block in stream.blocks for t in block.targets), default=0)
    layers = len(blocks) * itemsize * (4 * width + 6 * config.hidden_size)
    batch = min(CACHE_BATCH_TOKENS, tokens) * (layers + config.vocab_size * (itemsize + 12))
    return (outside + sum(blocks)) * itemsize + batch + min(CACHE_TOKENS, tokens) * _cache_channels(stream) * 8
