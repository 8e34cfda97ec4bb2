"""What a plan costs: bytes stored, memory of each process, FLOPs, bytes on disk, and time on any number of processes.

Work is shared out as `quantize` does it: batches of calibration rows, weights of about equal cost at once, whole blocks
of a data-free recipe; what every process does for itself does not get faster with more of them. What processes send
each other is not counted. Shape legend: O output rows, I input channels.
"""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch

from vqcompress.errors import UsageError
from vqcompress.methods import Method
from vqcompress.methods.statistics import SAMPLE_TOKENS, Accumulator
from vqcompress.model.device import peak_rss_bytes
from vqcompress.model.experts import Experts
from vqcompress.model.stream import BATCH_TOKENS, BlockStream
from vqcompress.pipeline.estimate_cache import CacheCosts
from vqcompress.pipeline.plan import Plan
from vqcompress.storage.artifact import stored_bits
from vqcompress.storage.checkpoint import stored_dtype
from vqcompress.storage.targets import Block, Target

# Of what a lone matrix product reaches, the share that a forward pass does.
REACHED = 0.6
# Bytes written, rows of a weight and FLOPs of its encoding to measure a rate by.
DISK_PROBE, PROBE_ROWS, PROBE_FLOPS = 32 << 20, 1024, 2e9


@dataclass(frozen=True)
class Site:
    """Where a run is planned for. gpus: processes with a GPU each; None is one process on the device of the stream.

    What each process reaches: tflops in products, encode_tflops in searches of codes, disk_gbps; None is measured here,
    the disk by writing. Searches then take the share of tflops that they have of products here. states: where hidden
    states are kept.
    """

    gpus: int | None = None
    tflops: float | None = None
    encode_tflops: float | None = None
    disk_gbps: float | None = None
    states: str = "memory"


def summary(plan: Plan, stream: BlockStream, rows: int, seqlen: int, site: Site) -> dict[str, Any]:
    """JSON for `plan`, see docs/recipes.md: sizes, bits per weight, and estimates of memory, work and time.

    Bits are those of folded smoothing; where a fold cannot be proven, a vector per input is added.
    rows, seqlen: of the calibration, 0 rows for a data-free recipe. UsageError for more processes than batches.
    """
    itemsize = stored_dtype(stream.source.config).itemsize
    on_gpu, on_disk = site.gpus is not None or stream.device.type == "cuda", site.states == "disk"
    knobs, cached = plan.recipe.cache, CacheCosts.of(plan, stream, rows, seqlen)
    job = _Job(plan, stream, rows if plan.calibrated else 0, seqlen, site.gpus or 1, on_gpu, on_disk, cached)
    entries, weights = plan.entries, plan.weights
    stored, bits = stored_bits(entries), 0.0
    targets = []
    for entry in entries:
        name, share = entry.target.name, stored[entry.target.name]
        bits += share
        row = {"name": name, "method": entry.method.name, "shape": list(entry.target.shape), "experts": None}
        targets.append(row | {"bits_per_weight": share / entry.target.weights})
    embedding, head = stream.model.get_input_embeddings(), stream.model.get_output_embeddings()
    # Rotated, a head that was tied to the embeddings is stored by itself.
    untied = head.get_parameter("weight").numel() if plan.recipe.rotation and embedding.weight is head.weight else 0
    source = stream.source.bytes or (job.rest + sum(job.sizes)) * itemsize
    books = cached.stored if cached else 0
    artifact = source + (untied - weights) * itemsize + int(bits) // 8 + books
    read, written = job.disk(source, artifact, itemsize)
    memory, rates = job.memory(itemsize, stored), _Rates(site, stream, job.on_gpu)
    seconds = job.seconds(rates) | {"disk": (read + written) / rates.disk}
    searched = [(t.method.encode_flops(t.target.shape), rates.cost(t.method, t.target.shape)[0]) for t in entries]
    reached = sum(work for work, _ in searched) / sum(took for _, took in searched) / 1e12 if searched else None
    speeds = {"tflops": rates.product / 1e12, "encode_tflops": site.encode_tflops or reached}
    return {
        "recipe": plan.recipe.name,
        "rotation": plan.recipe.rotation,
        "kv_cache": knobs.model_dump(mode="json") if knobs else None,
        "codebook_bytes": books,
        "bits_per_weight": bits / weights if weights else None,
        "weights_quantized": weights,
        "parameters": job.rest + sum(job.sizes),
        "source_bytes": source,
        "artifact_bytes": artifact,
        "processes": job.processes,
        **memory,
        "disk_read_bytes": read,
        "disk_written_bytes": written,
        "flops": job.flops(),
        "rates": speeds | {"disk_gbps": rates.disk / 1e9},
        "seconds": sum(seconds.values()) + 1.0,
        "seconds_by": seconds,
        "calibration_tokens": rows * seqlen,
        "targets": targets,
        "left_dense": plan.left_dense,
    }


@dataclass(frozen=True)
class _Job:
    """A plan with its calibration (rows: 0 unless weights have one) and its number of processes. on_gpu: each has one.
    on_disk: its hidden states. cache: of codebooks for it, if any are learned."""

    plan: Plan
    stream: BlockStream
    rows: int
    seqlen: int
    processes: int
    on_gpu: bool
    on_disk: bool
    cache: CacheCosts | None

    @property
    def tokens(self) -> int:
        """Of the calibration, 0 of a data-free recipe."""
        return self.rows * self.seqlen

    @cached_property
    def rest(self) -> int:
        """Parameters outside of the blocks."""
        return sum(p.numel() for p in self.stream.model.parameters())

    @cached_property
    def sizes(self) -> list[int]:
        """Parameters of each block."""
        return [sum(p.numel() for p in layer.parameters()) for layer in self.stream.skeletons]

    @cached_property
    def routed(self) -> dict[str, tuple[float, float]]:
        """Target in a mixture → the share of the tokens that pass it, and what its own statistics count of them."""
        found: dict[str, tuple[float, float]] = {}
        for block, layer in zip(self.plan.blocks, self.stream.skeletons, strict=True):
            for path, module in layer.named_modules():
                if isinstance(module, Experts):
                    leaves = module.leaves()
                    share = self._chosen(len(leaves))
                    for number, (heads, last) in enumerate(leaves):
                        found[f"{block.name}.{path}.{last}"] = share, 1.0 if self._everyone else share
                        for head in heads:
                            # They all read one input, which is counted once.
                            found[f"{block.name}.{path}.{head}"] = share, float(number == 0 and head == heads[0])
        return found

    @property
    def _everyone(self) -> bool:
        """Whether all tokens pass all experts for the statistics."""
        return self.plan.recipe.experts is not None and self.plan.recipe.experts.calibrate == "all"

    def _chosen(self, experts: int) -> float:
        """The share of the tokens that one of so many experts sees."""
        per_token = getattr(self._config, "num_experts_per_tok", None)
        return min(1.0, (per_token or experts) / experts)

    @property
    def _config(self) -> Any:
        return self.stream.model.config.get_text_config()

    @property
    def share(self) -> float:
        """Of the calibration batches, the largest part that one process has."""
        batches = math.ceil(self.rows / self.batch_rows)
        if self.rows and batches < self.processes:
            raise UsageError(f"--gpus {self.processes}: {batches} batches of calibration rows are too few for so many")
        return math.ceil(batches / self.processes) / batches if self.rows else 1.0

    @property
    def batch_rows(self) -> int:
        """Rows that run through a block at once."""
        return min(max(1, BATCH_TOKENS // max(self.seqlen, 1)), max(self.rows, 1))

    def inputs(self, block: Block) -> list[tuple[int, float]]:
        """Channels of every input of a block whose Hessian is gathered, and the share of the tokens that it sees.

        Nobody has watched the block yet: layers beside each other with as many channels count as readers of one input,
        but the last, which reads what the others made.
        """
        readers: dict[tuple[str, int, bool], list[Target]] = {}
        last = {target.name.rpartition(".")[0]: target for target in block.targets}
        for target in block.targets:
            parent = target.name.rpartition(".")[0]
            readers.setdefault((parent, target.shape[1], target is last[parent]), []).append(target)
        found = []
        for (_, channels, _), targets in readers.items():
            share = max(self.routed.get(t.name, (1.0, 1.0))[1] for t in targets)
            if share and any("hessian" in self.plan.rules[t.name].method.needs for t in targets):
                found.append((channels, share))
        return found

    def closing(self, block: Block) -> Target | None:
        """The target that makes good the errors before it, as far as a config tells."""
        targets = self.plan.compressed(block)
        last = targets[-1] if targets and self.tokens else None
        return last if last and last.name not in self.routed and self.plan.compensating(block) else None

    def passes(self, block: Block) -> float:
        """How often the calibration passes a block: to measure, to move on, in the dense model, to compensate."""
        count = 2.0 + self.plan.asks_for_truth + (self.closing(block) is not None)
        if (tuning := self.plan.recipe.tuning) is not None:
            # A step with gradients is about three; to distill, the dense model runs too.
            count += 3 * tuning.block_epochs + 4 * tuning.distill_epochs
        return count

    def forward(self) -> list[float]:
        """FLOPs of each block for one token."""
        config = self._config
        heads = getattr(config, "num_attention_heads", None) or 0
        width = getattr(config, "qk_head_dim", None) or getattr(config, "head_dim", None)
        width = width or config.hidden_size // max(heads, 1)
        # Half of the products of queries with keys, and of those with values: a token sees those before it.
        attention = self.seqlen * heads * (width + (getattr(config, "v_head_dim", None) or width))
        found = []
        for block, layer, size in zip(self.plan.blocks, self.stream.skeletons, self.sizes, strict=True):
            idle = sum(t.weights * (1 - self.routed.get(t.name, (1, 1))[0]) for t in block.targets)
            if self.stream.fused_reason:
                idle += sum(p.numel() * (1 - self._chosen(len(p))) for p in layer.parameters() if p.dim() == 3)
            found.append(2 * (size - idle) + attention)
        return found

    def _statistics(self, block: Block) -> float:
        """FLOPs of a block's Hessians, for one token; with all experts also what the router did not choose."""
        work = sum(2.0 * channels**2 * share for channels, share in self.inputs(block))
        if self._everyone:
            work += sum(2.0 * t.weights * (1 - self.routed.get(t.name, (1, 1))[0]) for t in block.targets)
        closing = self.closing(block)
        return work + (2.0 * closing.shape[1] * sum(closing.shape) if closing else 0.0)

    def _trials(self, target: Target) -> int:
        """How often a weight is encoded to find how much to smooth."""
        smoothing = self.plan.rules[target.name].smoothing
        return len(smoothing.grid) + 1 if smoothing and smoothing.alpha == "auto" else 0

    def _trial_flops(self, target: Target) -> float:
        """FLOPs of the products with the sample that tell those trials apart."""
        return self._trials(target) * 4.0 * min(SAMPLE_TOKENS, self.tokens) * target.weights

    def flops(self) -> dict[str, float]:
        """Arithmetic of the whole job: of forward passes, of statistics, of encoding with what is fitted for it."""
        forward = sum(self.passes(b) * work for b, work in zip(self.plan.blocks, self.forward(), strict=True))
        encode = 0.0
        for target in self.plan.targets:
            method = self._method(target)
            encode += method.encode_flops(target.shape) * (1 + self._trials(target)) + method.fit_flops(target.shape)
            encode += self._trial_flops(target)
        statistics = sum(map(self._statistics, self.plan.blocks))
        cache = self.cache.passes(sum(self.forward())) + self.cache.search if self.cache else 0.0
        forward, statistics = self.tokens * forward, self.tokens * statistics
        return {"forward": forward, "statistics": statistics, "encode": encode, "cache": cache}

    def seconds(self, rates: _Rates) -> dict[str, float]:
        """Time by kind of work. decode: what every process does to read the stored blocks back."""
        total = dict.fromkeys(("forward", "statistics", "encode", "decode", "cache"), 0.0)
        alone = []
        for block, work in zip(self.plan.blocks, self.forward(), strict=True):
            closing, targets = self.closing(block), self.plan.compressed(block)
            costs = [(t, *rates.cost(self._method(t), t.shape)) for t in targets]
            if not self.tokens:
                alone.append(sum(encode for _, encode, _, _ in costs))
                continue
            passed = self.tokens * self.share / rates.product
            total["forward"] += passed * self.passes(block) * work
            total["statistics"] += passed * self._statistics(block)
            total["decode"] += sum(decode for _, _, decode, _ in costs) * (1 + (closing is not None))
            ordered = sorted((encode for t, encode, _, _ in costs if t is not closing), reverse=True)
            # The dearest weights at once. All processes make the last one, fit what is shared, and try out smoothing.
            total["encode"] += sum(ordered[:: self.processes])
            total["encode"] += sum(fit + encode * (t is closing) for t, encode, _, fit in costs)
            total["encode"] += sum(
                self._trials(t) * encode + self._trial_flops(t) / rates.product for t, encode, _, _ in costs
            )
        if self.cache:
            # Every process decodes the whole model; then they share the rows and the layers.
            total["decode"] += sum(rates.cost(self._method(t), t.shape)[2] for t in self.plan.targets)
            speeds = rates.product, rates.given, rates.faster
            total["cache"] = self.cache.seconds(sum(self.forward()), *speeds) / self.processes
        # Without sums each process has whole blocks for itself.
        total["encode"] += sum(max(alone[k : k + self.processes]) for k in range(0, len(alone), self.processes))
        return total

    def _method(self, target: Target) -> Method:
        return self.plan.rules[target.name].method

    def disk(self, source: int, artifact: int, itemsize: int) -> tuple[int, int]:
        """Bytes that one process reads, and that are written."""
        stored = artifact if self.cache else 0
        if not self.tokens:
            return source // self.processes + stored, artifact
        tuning = self.plan.recipe.tuning
        read = (source + artifact) * (2 if tuning and tuning.distill_epochs else 1) + stored
        # With a budget each process first takes a fingerprint of everything.
        read += source if self.plan.target_bits is not None else 0
        # Hidden states are measured in a block and moved on; what comes out is written.
        moved = self._states(itemsize) * len(self.plan.blocks) if self.on_disk else 0
        return read + 2 * moved, artifact + self.processes * moved

    def _states(self, itemsize: int) -> int:
        """Bytes of one process's hidden states, with those of the dense model where they are followed too."""
        dense = itemsize if self.on_gpu else 4
        return round(self.tokens * self.share) * self._config.hidden_size * dense * (1 + self.plan.asks_for_truth)

    def memory(self, itemsize: int, stored: dict[str, float]) -> dict[str, int]:
        """JSON: peaks of one process on the host and on its GPU, and what of them are hidden states.

        The largest of the phases: what lies outside of the blocks is copied; the inputs of a block are measured; its
        weights are encoded; its last one is compensated; it is tuned; the whole model runs for codebooks of a cache.
        """
        plan, targets, now = self.plan, self.plan.targets, peak_rss_bytes()
        dense, rotated = itemsize if self.on_gpu else 4, bool(plan.recipe.rotation)
        states = self._states(itemsize)
        held = 0 if self.on_disk else states
        size = max(self.sizes)
        # As stored; a rotated block is float32, and is turned in a module of its own.
        read, module = size * (itemsize + 8 * rotated), size * dense
        largest = max(p.numel() for p in self.stream.model.parameters())
        rest, loaded = self.rest * (itemsize + 16 * rotated) + 5 * largest, self.rest * dense if self.tokens else 0
        hessians = [[channels**2 for channels, _ in self.inputs(block)] for block in plan.blocks]
        squares, square = max(map(sum, hessians)), max((max(each, default=0) for each in hessians), default=0)
        width = max((t.shape[1] for t in targets), default=0)
        chosen = getattr(self._config, "num_experts_per_tok", None) or 0
        activations = self.batch_rows * self.seqlen * dense * (4 * width + (6 + 2 * chosen) * self._config.hidden_size)
        # Added up in float64, read in float32, with one quotient between them.
        gather = module + activations + 12 * squares + 8 * square if self.tokens else 0
        parts = round(max(sum(stored[t.name] for t in plan.compressed(block)) for block in plan.blocks) / 8)
        # A weight, what smoothing makes of it, and the work of its method.
        wide = 8 if self.tokens else 4
        encode = max((wide * t.weights + self._method(t).encode_bytes(t.shape) for t in targets), default=0)
        encode += parts + 4 * squares
        closing = [c for b in plan.blocks if (c := self.closing(b))]
        # The stored block, decoded; sums, their inverse and the solution in float64.
        solve = max((24 * c.shape[1] ** 2 + 28 * c.weights for c in closing), default=0)
        compensate = module + activations + 4 * squares + solve if closing else 0
        work = max(gather, encode, compensate, self._tuned_bytes(activations, size))
        cache, samples = (self.cache.memory(dense), self.cache.samples) if self.cache else (0, 0)
        if self.on_gpu:
            host, device = now + max(rest, read + 2 * parts, samples), max(loaded + held + work, cache)
        else:
            # Without rows some blocks are made at once, while one is written.
            made = max(1, plan.ahead(self.stream.device))
            host, device = now + max(rest, loaded + held + made * (read + work) + (parts if made > 1 else 0)), 0
            host += max((self._method(t).compiled_bytes for t in targets), default=0)
            host = max(host, now + cache + samples)
        return {"peak_rss_bytes": host, "peak_device_bytes": device, "states_bytes": states}

    def _tuned_bytes(self, activations: int, size: int) -> int:
        """For gradients every activation of a batch stays, of one block or, to distill two whole models, of all."""
        tuning = self.plan.recipe.tuning
        if tuning is None:
            return 0
        if not tuning.distill_epochs:
            return 5 * activations + size * 12
        logits = BATCH_TOKENS * self._config.vocab_size * 4 * 4
        inside = sum(self.sizes)
        return 2 * (inside + self.rest) * 4 + inside * 4 + (len(self.sizes) + 4) * activations + logits


class _Rates:
    """What one process reaches, in FLOPs and bytes a second: as given, or measured now on the device."""

    def __init__(self, site: Site, stream: BlockStream, on_gpu: bool):
        device = stream.device
        here = _product_rate(device) if site.tflops is None or site.encode_tflops is None else math.inf
        self.product = here if site.tflops is None else site.tflops * 1e12
        self.disk = _disk_rate(stream.source.path) if site.disk_gbps is None else site.disk_gbps * 1e9
        self.given, self.faster, self._device, self._on_gpu = site.encode_tflops, self.product / here, device, on_gpu
        self._known: dict[tuple[int, tuple[int, int]], tuple[float, float, float]] = {}

    def cost(self, method: Method, shape: tuple[int, int]) -> tuple[float, float, float]:
        """Seconds to encode and check a weight, to decode it for a CPU, and to fit what it shares with others."""
        # By identity, since to hash the knobs of a method for each of 45,000 weights takes seconds.
        if (key := (id(method), shape)) not in self._known:
            small = _probe_shape(method)
            work, more = method.encode_flops(small), shape[0] * shape[1] / (small[0] * small[1])
            encode, decode = (work / (self.given * 1e12), 0.0) if self.given else _probe(method, small, self._device)
            if not self.given:
                encode, decode = encode / self.faster, decode / self.faster
            # What grows faster than the weight is feedback and factorization: products.
            products = max(0.0, method.encode_flops(shape) - more * work) / self.product
            fit = encode * method.fit_flops(shape) / work
            # Kernels of a GPU multiply by codes.
            self._known[key] = (encode + decode) * more + products, 0.0 if self._on_gpu else decode * more, fit
        return self._known[key]


def _fastest(run: Callable[[], Any], device: torch.device, times: int) -> float:
    """Seconds of the fastest of some runs."""
    found = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return max(min(found), 1e-9)


def _product_rate(device: torch.device) -> float:
    """FLOPs a second of products as forward passes make them."""
    rows, columns = (8192, 8192) if device.type == "cuda" else (1024, 1024)
    a = torch.ones(rows, columns, device=device, dtype=torch.float32 if device.type == "cpu" else torch.bfloat16)
    return REACHED * 2 * rows * columns**2 / _fastest(lambda: a @ a[:columns], device, 5)


def _disk_rate(checkpoint: Path) -> float:
    """Bytes a second that arrive on the disk of a checkpoint; where it cannot be written to, of the current directory.

    The last resort is the folder of temporary files, which may be in memory.
    """
    # Some disks compress, and keep no zeros at all.
    noise = os.urandom(DISK_PROBE)
    for folder in (checkpoint, ".", None):
        with contextlib.suppress(OSError), tempfile.TemporaryFile(dir=folder) as file:
            start = time.perf_counter()
            file.write(noise)
            file.flush()
            os.fsync(file.fileno())
            return DISK_PROBE / (time.perf_counter() - start)
    raise UsageError("--disk-gbps: there is no folder to measure it in; say how fast the disk is")


def _probe_shape(method: Method) -> tuple[int, int]:
    """A weight that takes about a second to encode at most."""
    return PROBE_ROWS, min(256, max(16, int(PROBE_FLOPS / method.encode_flops((PROBE_ROWS, 1)))))


@cache
def _probe(method: Method, shape: tuple[int, int], device: torch.device) -> tuple[float, float]:
    """Seconds to encode and to decode a random weight of a shape, measured."""
    draw = torch.Generator().manual_seed(0)
    weight_OI, sample_SI = (torch.randn(rows, shape[1], generator=draw).to(device) for rows in (shape[0], 256))
    accumulator = Accumulator(method.needs, shape[1], len(sample_SI), device)
    accumulator.add(sample_SI)
    facts = accumulator.statistics(0)
    shared = method.fit_shared([weight_OI], [facts], draw) if method.shared_layout() else {}
    # The first time compiles what is to be compiled.
    parts = method.encode(weight_OI, facts, draw, shared) | shared
    encode = _fastest(lambda: method.encode(weight_OI, facts, draw, shared), device, 1)
    return encode, _fastest(lambda: method.decode(parts, shape), device, 2)
