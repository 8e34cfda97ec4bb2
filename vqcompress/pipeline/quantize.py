"""One run of `quantize`: a checkpoint in, a compressed artifact out, block by block."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

import vqcompress
from vqcompress.errors import UsageError
from vqcompress.evaluate.model_card import documents
from vqcompress.kv_cache.calibrate import Books, cache_books
from vqcompress.model.device import check_fits, choose_device, model_dtype, release_freed_memory
from vqcompress.model.linear import decode_layers
from vqcompress.model.rotation import RotatedCheckpoint
from vqcompress.model.stream import BlockStream
from vqcompress.model.tokenizer import load_tokenizer, tokenize
from vqcompress.pipeline.bit_allocation import allocate, choose_recipe, make_plans
from vqcompress.pipeline.block import compress_block, entries_of, first_states, generator_for
from vqcompress.pipeline.distill import distill
from vqcompress.pipeline.estimate import cache_memory, cache_samples, estimate
from vqcompress.pipeline.plan import Plan
from vqcompress.pipeline.report import run_report
from vqcompress.runtime.load import load
from vqcompress.storage import recipe as recipes
from vqcompress.storage.artifact import (
    DRAFT,
    HINT,
    KV_CACHE,
    MARKER,
    SHARD,
    STAGED,
    STAGED_FILE,
    Entry,
    open_checkpoint,
    quantization_config,
    tensors_of,
)
from vqcompress.storage.checkpoint import Checkpoint, check_finite
from vqcompress.storage.distributed import ALONE, ProcessGroup, process_group
from vqcompress.storage.hidden_states import States, keep
from vqcompress.storage.recipe import Recipe
from vqcompress.storage.text import DEFAULT_SAMPLES, calibration_rows, fingerprint
from vqcompress.storage.writer import Shard, Writer

# Called with the name of an event ("measure", "plan", "block", "target", "done", "after") and what is known about it.
Progress = Callable[[str, dict[str, Any]], None]
NON_BLOCK = "(outside of the blocks)"
T = TypeVar("T")


@dataclass(frozen=True)
class QuantizeOptions:
    """The options of `quantize`, named as on the command line. texts: files or data sets to calibrate on.

    out: the directory of the artifact, unless the run is dry. states: where hidden states are kept, "memory" or "disk";
    the artifact is the same.
    """

    model: str
    out: Path | None = None
    recipe: str | None = None
    texts: Sequence[str] | None = None
    samples: int | None = None
    seqlen: int | None = None
    seed: int = 0
    device: str = "auto"
    overwrite: bool = False
    target_bits: float | None = None
    states: str = "memory"
    kv_cache: str | None = None


def calibration(source: Checkpoint, options: QuantizeOptions) -> Tensor:
    """The calibration rows (N, L) for a checkpoint; L is 2,048 or the model's context if that is shorter."""
    samples, length = options.samples, source.row_length(options.seqlen)
    if length < 2 or (samples is not None and samples < 1):
        raise UsageError(f"--seqlen {length} and --samples {samples} must be at least 2 and 1")
    tokenizer = load_tokenizer(source.path)
    texts = list(options.texts or [])
    return calibration_rows(texts, lambda text: tokenize(tokenizer, text), samples, length, options.seed)


def dry_run(options: QuantizeOptions) -> dict[str, Any]:
    """What `quantize` would do, as JSON: see `estimate`. Works from a config alone, writes and measures nothing."""
    recipe = choose_recipe(options.recipe, options.target_bits, options.kv_cache)
    device, source = choose_device(options.device), open_checkpoint(options.model, weights=False)
    stream = BlockStream(source, device, model_dtype(source.config, device))
    plans = make_plans(stream, recipe, options.target_bits)
    rows, length = 0, 0
    if plans[0].reads_text and source.tensors:
        rows, length = calibration(source, options).shape
    elif plans[0].reads_text:
        rows, length = options.samples or DEFAULT_SAMPLES, source.row_length(options.seqlen)
    facts = estimate(plans, stream, rows, length, options.states)
    return {"model": options.model, "seed": options.seed, **facts}


def quantize(
    options: QuantizeOptions, progress: Progress = lambda event, facts: None, began: float | None = None
) -> dict[str, Any]:
    """Compress a model; returns the report.

    An unfinished run of the same inputs in `options.out` is continued, and ends in the same bytes. began: the reading
    of time.perf_counter from which the seconds of the report count, if not now.
    """
    start = time.perf_counter() if began is None else began
    recipe = choose_recipe(options.recipe, options.target_bits, options.kv_cache)
    stream, plans = _prepare(options, recipe)
    rows = calibration(stream.source, options) if plans[0].reads_text else None
    _check_memory(plans[0], stream, rows)
    with Run.open(options, stream, plans[0], rows, start) as run:
        run.prepare(plans, progress)
        for index in range(len(run.plan.blocks)):
            run.quantize_block(index)
        run.distill()
        return run.finish(run.calibrate_cache())


def _prepare(options: QuantizeOptions, recipe: Recipe) -> tuple[BlockStream, list[Plan]]:
    """The stream of a dense checkpoint, rotated if the recipe says so, and the plans for it."""
    device, source = choose_device(options.device), open_checkpoint(options.model)
    group, scratch = process_group(device), {"memory": None, "disk": options.out}[options.states]
    stream = BlockStream(source, device, model_dtype(source.config, device), group, scratch)
    plans = make_plans(stream, recipe, options.target_bits)
    if recipe.rotation:
        rotated = RotatedCheckpoint(stream, partial(generator_for, options.seed))
        stream = BlockStream(rotated, device, stream.dtype, group, scratch)
    return stream, plans


def _check_memory(plan: Plan, stream: BlockStream, rows: Tensor | None) -> None:
    """VQCompressError if memory is too small to calibrate a cache: now, not when all blocks are done."""
    if rows is not None and plan.learns_cache:
        instead = "take a recipe whose cache is fp8 or universal, which learn nothing"
        samples = cache_samples(plan, stream, rows.numel()) if stream.device.type == "cpu" else 0
        needed = cache_memory(plan, stream, *rows.shape) + samples
        check_fits(needed, stream.device, "to learn the codebooks of a cache", instead)


@dataclass
class Run:
    """A run of `quantize` and its state. hidden: the states that enter the next block, by batch.

    reference: those of the dense model, if a recipe corrects outputs. entries: of the blocks that are done. todo:
    numbers of the blocks that no earlier run has done. shards: makes the next of them, by name.
    """

    options: QuantizeOptions
    stream: BlockStream
    plan: Plan
    group: ProcessGroup
    rows: Tensor | None
    writer: Writer
    hashing: ThreadPoolExecutor
    progress: Progress = lambda event, facts: None
    hidden: States = field(default_factory=list)
    reference: States = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    todo: list[int] = field(default_factory=list)
    shards: Iterator[tuple[str, Shard]] = field(default_factory=lambda: iter(()))

    @classmethod
    def open(cls, options: QuantizeOptions, stream: BlockStream, plan: Plan, rows: Tensor | None, start: float) -> Run:
        """Begin a run, or continue an unfinished one, in the directory of the options."""
        assert options.out is not None
        group, inputs = stream.group, _inputs(options, stream, plan, rows)
        if not plan.calibrated:
            # No sums to exchange: each process encodes whole blocks by itself.
            stream.group = ALONE
        digest = partial(_digest, stream)
        writer = Writer(options.out, inputs, digest, options.overwrite, start, group)
        return cls(options, stream, plan, group, rows, writer, ThreadPoolExecutor(1))

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.hashing.shutdown()
        self.writer.__exit__(kind, error, trace)

    def prepare(self, plans: list[Plan], progress: Progress) -> None:
        """Choose settings within a budget, write the non-block weights, and embed the calibration rows."""
        self.progress, stream, writer = progress, self.stream, self.writer
        if self.plan.target_bits is not None and self.rows is not None:
            self.plan = allocate(stream, plans, self.rows, writer, self.options.seed, progress)
        blocks = self.plan.blocks
        progress("plan", {"plan": self.plan, "done": [b.name for b in blocks if b.name in writer.done]})
        if NON_BLOCK not in writer.done:
            self._commit_non_block_weights()
        # Start-up and skipped blocks are not charged to any block's time.
        writer.lap()
        if self.rows is not None and self.plan.calibrated:
            self.hidden = first_states(stream, self.rows)
        if self.plan.needs_reference:
            self.reference = keep(self.hidden, stream.scratch)
        self.todo = [i for i, block in enumerate(blocks) if block.name not in writer.done]
        # Without rows the processes take turns at whole blocks, and begin the next ones while one is written.
        mine = self.todo if self.hidden else self.todo[self.group.rank :: self.group.size]
        ahead = 0 if self.hidden else self.plan.ahead(stream.device)
        following = dict(zip(mine, mine[max(1, ahead) :], strict=False))
        self.shards = _ahead(lambda i: self._make_shard(i, following.get(i)), mine, ahead)

    def quantize_block(self, index: int) -> None:
        """Compress and store a block unless that is done, and run the hidden states through what was stored."""
        block, stream, last = self.plan.blocks[index], self.stream, index + 1 == len(self.plan.blocks)
        event = {"index": index, "count": len(self.plan.blocks), "name": block.name}
        if block.name not in self.writer.done:
            self.progress("block", event)
            # No name for the shard: it is freed before the next block is made.
            self.writer.commit(dict(islice(self.shards, 1)))
        elif self.reference and not last:
            stream.forward(stream.load_block(index), index, self.reference)
        record = self.writer.done[block.name]
        stored = entries_of(self.plan, block, record)
        self.entries += stored
        if self.hidden and not last:
            # The next block sees what was stored, so that it can correct these errors. No name for the module, either.
            tensors = tensors_of(self.writer.out / record["file"])
            stream.forward(stream.load_block(index, tensors, stored), index, self.hidden)
        release_freed_memory()
        if index not in self.todo:
            self.writer.lap()
        self.progress("done", {**event, "record": record})

    def distill(self) -> None:
        """Stage the tensors that distillation changes, unless the recipe has none or an earlier run has done so."""
        self.hidden.clear()
        self.reference.clear()
        tuning, stream = self.plan.recipe.tuning, self.stream
        if tuning is None or self.rows is None or STAGED in self.writer.done:
            return
        student = self._stored_model(torch.float32)
        teacher = load(self.options.model, stream.device.type).float()
        after = partial(self._after, "distilling, step")
        staged = distill(student, teacher, stream, self.entries, self.rows, tuning, self.options.seed, after)
        self.writer.commit({STAGED: (STAGED_FILE, staged, {"targets": []})})

    def calibrate_cache(self) -> Books | None:
        """The codebooks of a cache, learned by all processes from the stored model; None if the recipe has none."""
        cache = self.plan.recipe.cache
        if cache is None or self.rows is None or not self.plan.learns_cache:
            return None
        self.writer.apply_staged()
        model = self._stored_model(self.stream.dtype)
        decode_layers(model)
        return cache_books(model, self.rows, cache, self.options.seed, self.group, self._after)

    def finish(self, books: Books | None) -> dict[str, Any]:
        """Turn what was committed into an artifact; returns the report. The first process writes, the others wait."""
        seconds = self.writer.lap() if books is not None else None
        self.writer.apply_staged()
        return self.group.broadcast(0, self._write_artifact(books, seconds) if self.group.is_main else None)

    def _write_artifact(self, books: Books | None, cache_seconds: float | None) -> dict[str, Any]:
        writer, source = self.writer, self.stream.source
        settings = quantization_config(self.entries, vqcompress.__version__)
        if (cache := self.plan.recipe.cache) is not None:
            settings["kv_cache"] = cache.model_dump(mode="json")
        if books is not None:
            named, settings["kv_cache"]["before"] = books
            writer.write_extra(KV_CACHE, named)
        config = {**source.config, "quantization_config": settings}
        texts, seed = list(self.options.texts or []), self.options.seed
        report = run_report(self.options.model, self.plan, source, writer, self.rows, texts, seed, cache_seconds)
        choice = recipes.dump(self.plan.recipe) if self.plan.target_bits is not None else ""
        writer.finish(config, source.companions(), documents(report, writer.out.resolve().name), choice)
        return report

    def _make_shard(self, index: int, following: int | None) -> tuple[str, Shard]:
        """Compress a block; its name and its shard. Its weights are hashed, and the following block read, meanwhile."""
        block, blocks, stream = self.plan.blocks[index], self.plan.blocks, self.stream
        if following is not None:
            stream.source.prefetch(stream.names.under(blocks[following].name))
        digest = self.hashing.submit(_digest, stream, block.name)
        on_target = partial(self.progress, "target")
        tensors, facts = compress_block(
            stream, self.plan, index, self.hidden, self.reference, self.options.seed, on_target
        )
        return block.name, (self._file(index + 2), tensors, {**facts, "source": digest.result()})

    def _commit_non_block_weights(self) -> None:
        """Write the weights outside of the blocks, and the tensor that stops a loader that does not know the format."""
        tensors = self.stream.source.read(self.stream.non_block_weights) if self.group.is_main else {}
        check_finite(tensors)
        # A model of dense weights loads correctly without the package, too.
        tensors |= {HINT: MARKER} if self.plan.targets else {}
        record = {"targets": [], "source": _digest(self.stream, NON_BLOCK)}
        self.writer.commit({NON_BLOCK: (self._file(1), tensors, record)})

    def _file(self, number: int) -> str:
        """The name of a shard, or of its draft if distillation will change it."""
        file = SHARD.format(number, len(self.plan.blocks) + 1)
        return file if self.plan.recipe.tuning is None or self.rows is None else DRAFT + file

    def _stored_model(self, dtype: torch.dtype) -> PreTrainedModel:
        """The compressed model as it is stored."""
        tensors: dict[str, Tensor] = {}
        for name, record in self.writer.done.items():
            tensors |= tensors_of(self.writer.out / record["file"]) if name != STAGED else {}
        config = deepcopy(self.stream.config)
        if self.entries:
            config.quantization_config = quantization_config(self.entries, vqcompress.__version__)
        model: Any = type(self.stream.model).from_pretrained(None, config=config, state_dict=tensors, dtype=dtype)
        return model.eval().requires_grad_(False).to(self.stream.device)

    def _after(self, what: str, done: int, total: int) -> None:
        """Tell the progress of work that comes after the blocks."""
        self.progress("after", {"what": what, "done": done, "total": total})


def _ahead(make: Callable[[int], T], places: list[int], ahead: int) -> Iterator[T]:
    """make(j) for each place, in order; up to `ahead` later ones are made while the caller uses one."""
    threads = torch.get_num_threads()
    workers = min(ahead, threads)
    if not workers:
        yield from map(make, places)
        return
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(threads // workers,)) as pool:
        begun = deque(pool.submit(make, j) for j in places[:workers])
        for j in [*places[workers:], *[None] * len(begun)]:
            wait([begun[0]])
            if j is not None:
                begun.append(pool.submit(make, j))
            # Without a name here, so that it is not held.
            yield begun.popleft().result()
    # A worker sets the number for threads to come too.
    torch.set_num_threads(threads)


def _digest(stream: BlockStream, name: str) -> str:
    """The fingerprint of the weights of a block, or of those outside of the blocks."""
    return stream.source.digest(stream.non_block_weights if name == NON_BLOCK else stream.names.under(name))


def _inputs(options: QuantizeOptions, stream: BlockStream, plan: Plan, rows: Tensor | None) -> dict[str, str]:
    """All that determines the bytes of an artifact, by the name that an error will show."""
    source, gpu = stream.source, f" {torch.cuda.get_device_name()}" if stream.device.type == "cuda" else ""
    return {
        # Settings within a budget depend on all weights at once; without one each block's are hashed as it is made.
        "checkpoint": source.fingerprint() + ("" if plan.target_bits is None else source.digest(source.tensors)),
        "recipe": plan.recipe.fingerprint(),
        "target bits": str(plan.target_bits),
        "calibration": "none" if rows is None else fingerprint(rows),
        "seed": str(options.seed),
        "device": f"{stream.device.type}{gpu} {stream.dtype}",
        "version of vqcompress": vqcompress.__version__,
        "version of torch": torch.__version__,
        "version of transformers": transformers.__version__,
    }
