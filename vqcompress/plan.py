"""What a recipe will do to a model, from its config alone: targets, sizes, peak memory, time."""

from __future__ import annotations

import math
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from vqcompress.artifact import Entry, stored_bits
from vqcompress.blocks import BATCH_TOKENS, BlockStream
from vqcompress.checkpoint import stored_dtype
from vqcompress.errors import UsageError
from vqcompress.methods import Method
from vqcompress.recipe import Recipe, Rule
from vqcompress.runtime.device import peak_rss_bytes
from vqcompress.runtime.experts import Experts
from vqcompress.targets import Block, Target, gates


@dataclass(frozen=True)
class Plan:
    """Which target gets which method. rules: target name → rule, for every linear layer of the blocks.

    left_dense: what stays as it is although it is a large weight → why. target_bits: the budget, if there is one.
    """

    recipe: Recipe
    blocks: list[Block]
    rules: dict[str, Rule]
    left_dense: dict[str, str]
    target_bits: float | None = None

    def compressed(self, block: Block) -> list[Target]:
        """The targets of a block whose rule is more than to keep them."""
        return [t for t in block.targets if not self.rules[t.name].method.dense]

    def compensating(self, block: Block) -> set[str]:
        """Paths of the targets of a block that make good the errors before them, if they close it."""
        return {block.local(t) for t in self.compressed(block) if self.rules[t.name].method.compensates}

    @property
    def asks_for_truth(self) -> bool:
        """Whether the dense model's hidden states are needed too, to compensate or to tune blocks by."""
        tuned = self.recipe.tuning is not None and self.recipe.tuning.block_epochs > 0
        return tuned or any(self.compensating(block) for block in self.blocks)

    @property
    def targets(self) -> list[Target]:
        """All targets that will be compressed."""
        return [target for block in self.blocks for target in self.compressed(block)]

    @property
    def weights(self) -> int:
        """Number of weights that will be compressed."""
        return sum(target.weights for target in self.targets)

    @property
    def entries(self) -> list[Entry]:
        """How all targets will be stored if no smoothing is left for run time."""
        return [self.entry(block, target, False) for block in self.blocks for target in self.compressed(block)]

    @property
    def methods(self) -> list[Method]:
        """The distinct methods, in the order of the recipe; their places name shared parts on disk."""
        return list(dict.fromkeys(rule.method for rule in self.recipe.rules))

    @property
    def calibrated(self) -> bool:
        """Whether any target asks for statistics, or a budget for measurements; if not, the model is never run."""
        return self.target_bits is not None or any(self.rules[target.name].needs for target in self.targets)

    def entry(self, block: Block, target: Target, smoothed: bool) -> Entry:
        """How the target will be stored."""
        method = self.rules[target.name].method
        shared = f"{block.name}.shared_parts.{self.methods.index(method)}" if method.shared_layout() else None
        return Entry(target, method, smoothed, shared)


def make_plan(stream: BlockStream, recipe: Recipe) -> Plan:
    """The plan for a model; UsageError for a rule that matches nothing or a recipe that compresses nothing."""
    plan = Plan(recipe, stream.blocks, recipe.assign(stream.blocks), dense_weights(stream))
    if not plan.targets:
        raise UsageError(f"recipe {recipe.name} compresses nothing in this model")
    if recipe.experts and not any(isinstance(m, Experts) for layer in stream.skeletons for m in layer.modules()):
        why = stream.fused_because or "the model has no mixture of experts"
        raise UsageError(f"recipe {recipe.name}: 'experts' speaks of nothing here: {why}")
    if recipe.experts and not plan.calibrated:
        raise UsageError(f"recipe {recipe.name}: 'experts' calibrates nothing: its methods need no data")
    return plan


def dense_weights(stream: BlockStream) -> dict[str, str]:
    """The large weights that no recipe reaches → why; names of blocks have a * for their number."""
    found: dict[str, str] = {}
    for module, role in (
        (stream.model.get_input_embeddings(), "read by lookup"),
        (stream.model.get_output_embeddings(), "the output head stays dense"),
    ):
        name = next((name for name, m in stream.model.named_modules() if m is module), None)
        if name is not None:
            found[f"{name}.weight"] = role
    counts: Counter[str] = Counter()
    for block, layer in zip(stream.blocks, stream.skeletons, strict=True):
        known = {f"{block.local(target)}.weight" for target in block.targets}
        deciding = gates(layer)
        for path, tensor in layer.named_parameters():
            if tensor.dim() > 1 and path not in known:
                name = f"{block.name.rpartition('.')[0]}.*.{path}"
                counts[name] += tensor.numel()
                why = stream.fused_because or "their structure is another than gate, up and down"
                fused = f"the experts of a mixture are one parameter: {why}"
                module = path.rpartition(".")[0]
                plain = "routes or gates" if module in deciding else "not an nn.Linear"
                one = sum(p.dim() == 3 for p in layer.get_submodule(module).parameters(recurse=False)) == 2
                found[name] = f"{fused if one else plain} ({counts[name]:,} weights)"
    return found


def summary(plan: Plan, stream: BlockStream, rows: int, seqlen: int) -> dict[str, Any]:
    """JSON for `plan`: sizes before and after, bits per weight, and estimates of peak memory and time.

    Bits are those of folded smoothing; where a fold cannot be proven, a vector per input is added.
    rows, seqlen: of the calibration, 0 rows for a data-free recipe.
    """
    itemsize = stored_dtype(stream.source.config).itemsize
    parameters = sum(p.numel() for p in stream.model.parameters())
    parameters += sum(p.numel() for layer in stream.skeletons for p in layer.parameters())
    source = stream.source.bytes or parameters * itemsize
    entries, weights = plan.entries, plan.weights
    stored, routed = stored_bits(entries), _routed(stream)
    bits = sum(stored.values())
    embedding, head = stream.model.get_input_embeddings(), stream.model.get_output_embeddings()
    # Rotated, a head that was tied to the embeddings is stored by itself.
    untied = head.get_parameter("weight").numel() if plan.recipe.rotation and embedding.weight is head.weight else 0
    targets = [
        {
            "name": entry.target.name,
            "method": entry.method.name,
            "shape": list(entry.target.shape),
            "experts": None,
            "bits_per_weight": stored[entry.target.name] / entry.target.weights,
        }
        for entry in entries
    ]
    return {
        "recipe": plan.recipe.name,
        "rotation": plan.recipe.rotation,
        "bits_per_weight": bits / weights,
        "weights_quantized": weights,
        "source_bytes": source,
        "artifact_bytes": source + (untied - weights) * itemsize + int(bits) // 8,
        "peak_rss_bytes": _peak_bytes(plan, stream, rows * seqlen, routed),
        "seconds": _seconds(plan, stream, rows * seqlen, routed),
        "calibration_tokens": rows * seqlen,
        "targets": targets,
        "left_dense": plan.left_dense,
    }


def _routed(stream: BlockStream) -> dict[str, tuple[float, float]]:
    """Target in a mixture → the share of the tokens that pass it, and the share that statistics count for it alone."""
    per_token = getattr(stream.model.config.get_text_config(), "num_experts_per_tok", None)
    found: dict[str, tuple[float, float]] = {}
    for block, layer in zip(stream.blocks, stream.skeletons, strict=True):
        for path, module in layer.named_modules():
            if isinstance(module, Experts):
                leaves = module.leaves()
                share = min(1.0, (per_token or len(leaves)) / len(leaves))
                for number, (heads, last) in enumerate(leaves):
                    found[f"{block.name}.{path}.{last}"] = share, share
                    for head in heads:
                        # They all read one input, which is counted once.
                        found[f"{block.name}.{path}.{head}"] = share, float(number == 0 and head == heads[0])
    return found


def _peak_bytes(plan: Plan, stream: BlockStream, tokens: int, routed: dict[str, tuple[float, float]]) -> int:
    """The process as it is, what lies outside of the blocks, one block and what its encoding needs, the states."""
    now = peak_rss_bytes()
    width = max(t.shape[1] for t in plan.targets)
    largest = max(sum(p.numel() for p in layer.parameters()) for layer in stream.skeletons)
    # With a rotation, embeddings and head before and after it.
    rest = sum(p.numel() for p in stream.model.parameters()) * (4 if plan.recipe.rotation else 1)
    hidden = stream.model.config.get_text_config().hidden_size
    # A block in its stored type and in float32, its encoded parts, and the work of encoding one weight.
    block = largest * (2 + 4 + 2) + max(t.weights for t in plan.targets) * 4 * 4
    block += max(rule.method.encode_bytes for rule in plan.rules.values())
    if not tokens:
        return now + rest * 2 + block
    statistics = 0
    if any("hessian" in plan.rules[t.name].method.needs for t in plan.targets):
        # Hessians of the inputs of one block (about four distinct ones), and the factorization in float64; then one for
        # the last layer of every expert.
        own = [[t for t in b.targets if 0 < routed.get(t.name, (1, 1))[1] < 1] for b in plan.blocks]
        experts = max(sum(t.shape[1] ** 2 * (8 + 4) for t in targets) for targets in own)
        # Added up in float64, read in float32.
        statistics = 4 * width * width * (8 + 4) + 3 * width * width * 8 + experts
    activations = BATCH_TOKENS * (width * 4 + hidden * 6) * 4
    states = tokens * hidden * 4 * (2 if plan.asks_for_truth else 1)
    tuned = 0
    if (tuning := plan.recipe.tuning) is not None:
        # For gradients every activation of a batch stays, of one block or, to distill two whole models, of all.
        tuned = 4 * activations + largest * 4
        if tuning.distill_epochs:
            inside = sum(p.numel() for layer in stream.skeletons for p in layer.parameters())
            logits = BATCH_TOKENS * stream.model.config.get_text_config().vocab_size * 4 * 4
            tuned = 2 * (inside + rest) * 4 + inside * 4 + len(plan.blocks) * activations + logits
    return now + rest * 4 + block + statistics + activations + states + tuned


def _seconds(plan: Plan, stream: BlockStream, tokens: int, routed: dict[str, tuple[float, float]]) -> float:
    """Arithmetic over the speed of a matrix product measured now, at the share of it that such runs reach."""
    a = torch.ones(768, 768)
    fastest = math.inf
    for _ in range(8):
        start = time.perf_counter()
        a @ a
        fastest = min(fastest, time.perf_counter() - start)
    rate = 0.4 * 2 * 768**3 / fastest
    work = sum(plan.rules[t.name].method.encode_flops(t.shape) for t in plan.targets)
    if tokens:
        # Forward: to measure, to move on; in the dense model and to compensate; a step of tuning is about three more.
        passes = 4 if plan.asks_for_truth else 2
        if (tuning := plan.recipe.tuning) is not None:
            passes += 3 * tuning.block_epochs + 4 * tuning.distill_epochs
        shares = [t.weights * routed.get(t.name, (1, 1))[0] for b in plan.blocks for t in b.targets]
        work += 2 * passes * tokens * sum(shares)
        everyone = plan.recipe.experts is not None and plan.recipe.experts.calibrate == "all"
        if everyone:
            # Once more through those that the router did not choose.
            passed = [t.weights * (1 - routed.get(t.name, (1, 1))[0]) for b in plan.blocks for t in b.targets]
            work += 2 * tokens * sum(passed)
        hessians = [t for t in plan.targets if "hessian" in plan.rules[t.name].method.needs]
        counted = {t.name: routed.get(t.name, (1, 1))[1] for t in hessians}
        shares = [math.ceil(counted[t.name]) if everyone else counted[t.name] for t in hessians]
        work += sum(2 * t.shape[1] ** 2 * tokens * share for t, share in zip(hessians, shares, strict=True))
    return work / rate + 1.0
