"""The main job: a checkpoint in, a compressed artifact out, block by block."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from torch import Tensor

import vqcompress
from vqcompress.errors import UsageError
from vqcompress.evaluate.model_card import documents
from vqcompress.kv_cache.calibrate import Books, cache_books
from vqcompress.methods import PackedTensors
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
from vqcompress.runtime.load import build_model, load_any
from vqcompress.storage import recipe as recipes
from vqcompress.storage.artifact import (
    HINT,
    KV_CACHE,
    MARKER,
    STAGED,
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
from vqcompress.storage.writer import Writer

Watch = Callable[[str, dict[str, Any]], None]
REST = "(outside of the blocks)"
# Number and count of a shard, its tensors, its record.
Made = tuple[int, int, PackedTensors, dict[str, Any]]
T = TypeVar("T")


def calibration(source: Checkpoint, texts: list[str], samples: int | None, seqlen: int | None, seed: int) -> Tensor:
    """The calibration rows (N, L) for a checkpoint; L is 2,048 or the model's context if that is shorter."""
    length = seqlen if seqlen is not None else source.default_seqlen
    if length < 2 or (samples is not None and samples < 1):
        raise UsageError(f"--seqlen {length} and --samples {samples} must be at least 2 and 1")
    source.check_length(length)
    tokenizer = load_tokenizer(source.path)
    return calibration_rows(texts, lambda text: tokenize(tokenizer, text), samples, length, seed)


def dry_run(
    model: str,
    recipe: str | None,
    texts: list[str] | None = None,
    samples: int | None = None,
    seqlen: int | None = None,
    seed: int = 0,
    device: str = "auto",
    target_bits: float | None = None,
    states: str = "memory",
    kv_cache: str | None = None,
) -> dict[str, Any]:
    """What `quantize` would do, as JSON: see `estimate`. Works from a config alone, writes and measures nothing."""
    wanted, chosen = choose_recipe(recipe, target_bits, kv_cache), choose_device(device)
    source = open_checkpoint(model, weights=False)
    stream = BlockStream(source, chosen, model_dtype(source.config, chosen))
    plans = make_plans(stream, wanted, target_bits)
    rows, length = 0, 0
    if plans[0].reads_text:
        if source.tensors:
            rows, length = calibration(source, texts or [], samples, seqlen, seed).shape
        else:
            rows, length = samples or DEFAULT_SAMPLES, seqlen or source.default_seqlen
    return {"model": model, "seed": seed, **estimate(plans, stream, rows, length, states)}


def quantize(
    model: str,
    out: Path,
    recipe: str | None,
    texts: list[str] | None = None,
    samples: int | None = None,
    seqlen: int | None = None,
    seed: int = 0,
    device: str = "auto",
    overwrite: bool = False,
    target_bits: float | None = None,
    watch: Watch = lambda event, facts: None,
    states: str = "memory",
    kv_cache: str | None = None,
    began: float | None = None,
) -> dict[str, Any]:
    """Compress MODEL into the directory `out`; returns the report. Arguments as the command line's.

    A directory that holds an unfinished run of the same inputs is continued, and ends in the same bytes. watch: called
    with "measure", "plan", "block", "target", "done" and "after" (the blocks), and what is known about each. states:
    "memory" or "disk", where the hidden states of the calibration rows are kept; the bytes are the same. began: by
    time.perf_counter, from when on the seconds count, if not from now.
    """
    start = time.perf_counter() if began is None else began
    wanted, chosen = choose_recipe(recipe, target_bits, kv_cache), choose_device(device)
    stream, (plan, *others) = _prepare(model, out, wanted, target_bits, chosen, seed, states)
    source, group = stream.source, stream.group
    rows = calibration(source, texts or [], samples, seqlen, seed) if plan.reads_text else None
    _check_memory(plan, stream, rows)
    if not plan.calibrated:
        # Nothing to add up: each process has whole blocks for itself.
        stream.group = ALONE

    def source_of(name: str) -> str:
        """The fingerprint of a block's weights."""
        return source.digest(stream.non_block_weights if name == REST else stream.names.under(name))

    inputs = _inputs(source, plan, rows, seed, stream)
    with Writer(out, inputs, source_of, overwrite, start, group) as writer, ThreadPoolExecutor(1) as aside:
        if plan.target_bits is not None and rows is not None:
            plan = allocate(stream, [plan, *others], rows, writer, seed, watch)
        watch("plan", {"plan": plan, "done": [b.name for b in plan.blocks if b.name in writer.done]})
        blocks, tick, after = plan.blocks, partial(watch, "target"), partial(_tell, watch)
        if REST not in writer.done:
            _commit_rest(writer, stream, plan, source_of(REST))
        # What it takes to come to the first block, and to the first that is not done, is no block's.
        writer.lap()
        hidden: States = first_states(stream, rows) if rows is not None and plan.calibrated else []
        # A second stream, of the dense model, where the difference is made good.
        truth: States = keep(hidden, stream.scratch) if plan.asks_for_truth else []

        todo = [j for j, block in enumerate(blocks) if block.name not in writer.done]
        # Without rows each process has every so many blocks, and they do not wait for what is written.
        mine, ahead = (todo, 0) if hidden else (todo[group.rank :: group.size], plan.ahead(chosen))
        following = dict(zip(mine, mine[max(1, ahead) :], strict=False))

        def make(j: int) -> tuple[str, Made]:
            """Block j's name, and number and count of its shard, tensors and record; meanwhile weights are hashed."""
            if j in following:
                source.prefetch(stream.names.under(blocks[following[j]].name))
            digest = aside.submit(source_of, blocks[j].name)
            tensors, facts = compress_block(stream, plan, j, hidden, truth, seed, tick)
            return blocks[j].name, (j + 2, len(blocks) + 1, tensors, {**facts, "source": digest.result()})

        making = _ahead(make, mine, ahead)
        entries = []
        for i, block in enumerate(blocks):
            if block.name not in writer.done:
                watch("block", {"index": i, "count": len(blocks), "name": block.name})
                # Nothing that was made of this block is held while the next one is.
                writer.commit_all(dict(islice(making, 1)))
            elif truth and i + 1 < len(blocks):
                stream.forward(stream.load_block(i), i, truth)
            record = writer.done[block.name]
            stored = entries_of(plan, block, record)
            entries += stored
            if hidden and i + 1 < len(blocks):
                # What the next block sees is what was stored: its errors are made up for where they can still be.
                # The block has no name here, so that it is gone before the next one comes.
                stream.forward(stream.load_block(i, tensors_of(out / record["file"]), stored), i, hidden)
            release_freed_memory()
            if i not in todo:
                writer.lap()
            watch("done", {"index": i, "count": len(blocks), "name": block.name, "record": record})
        hidden.clear()
        truth.clear()
        _distill(plan, stream, model, writer, entries, rows, seed, partial(after, "distilling, step"))
        books = _cache_books(plan, stream, group, writer, entries, rows, seed, after)
        finish = partial(_finish, model, plan, stream, entries=entries, rows=rows, seed=seed, learned=writer.lap())
        writer.apply_staged()
        return group.broadcast(0, finish(writer, texts=texts or [], books=books) if group.is_main else None)


def _prepare(
    model: str,
    out: Path,
    recipe: Recipe,
    target_bits: float | None,
    device: torch.device,
    seed: int,
    states: str,
) -> tuple[BlockStream, list[Plan]]:
    """The stream of a dense checkpoint, rotated if the recipe says so, and the plans for it."""
    source, group, scratch = open_checkpoint(model), process_group(device), {"memory": None, "disk": out}[states]
    stream = BlockStream(source, device, model_dtype(source.config, device), group, scratch)
    plans = make_plans(stream, recipe, target_bits)
    if recipe.rotation:
        rotated = RotatedCheckpoint(stream, partial(generator_for, seed))
        stream = BlockStream(rotated, device, stream.dtype, group, scratch)
    return stream, plans


def _commit_rest(writer: Writer, stream: BlockStream, plan: Plan, digest: str) -> None:
    """Write what lies outside of the blocks, and what stops a loader that does not know the format."""
    rest = stream.source.read(stream.non_block_weights) if writer.group.is_main else {}
    check_finite(rest)
    # A model of dense weights loads right without the import, too.
    marked = rest | ({HINT: MARKER} if plan.targets else {})
    writer.commit(REST, 1, len(plan.blocks) + 1, marked, {"targets": [], "seconds": 0.0, "source": digest})


def _check_memory(plan: Plan, stream: BlockStream, rows: Tensor | None) -> None:
    """VQCompressError if a cache could not be calibrated for want of memory: now, not when all blocks are done."""
    if rows is not None and plan.learns_cache:
        instead = "take a recipe whose cache is fp8 or universal, which learn nothing"
        samples = cache_samples(plan, stream, rows.numel()) if stream.device.type == "cpu" else 0
        needed = cache_memory(plan, stream, *rows.shape) + samples
        check_fits(needed, stream.device, "to learn the codebooks of a cache", instead)


def _distill(
    plan: Plan,
    stream: BlockStream,
    model: str,
    writer: Writer,
    entries: list[Entry],
    rows: Tensor | None,
    seed: int,
    tell: Callable[[int, int], None],
) -> None:
    """Stage what a recipe that distills changes in the model as it is stored, unless an earlier run has done so."""
    tuning = plan.recipe.tuning
    if tuning and rows is not None and STAGED not in writer.done:
        files = [record["file"] for record in writer.done.values()]
        student = build_model(stream.config, entries, writer.out, files, torch.float32, stream.device)
        teacher = load_any(model, stream.device.type).float()
        writer.stage(distill(student, teacher, stream, entries, rows, tuning, seed, tell))


def _cache_books(
    plan: Plan,
    stream: BlockStream,
    group: ProcessGroup,
    writer: Writer,
    entries: list[Entry],
    rows: Tensor | None,
    seed: int,
    tell: Callable[[str, int, int], None],
) -> Books | None:
    """The codebooks of a cache that is to be calibrated, learned by all processes from the model as it is stored."""
    knobs = plan.recipe.cache
    if knobs is None or rows is None or not plan.learns_cache:
        return None
    writer.apply_staged()
    files = [record["file"] for name, record in writer.done.items() if name != STAGED]
    network = build_model(stream.config, entries, writer.out, files, stream.dtype, stream.device)
    decode_layers(network)
    return cache_books(network, rows, knobs, seed, group, tell)


def _finish(
    model: str,
    plan: Plan,
    stream: BlockStream,
    writer: Writer,
    entries: list[Entry],
    rows: Tensor | None,
    texts: list[str],
    books: Books | None,
    seed: int,
    learned: float,
) -> dict[str, Any]:
    """Make what was committed an artifact; returns the report. learned: the seconds that the books took."""
    source, settings = stream.source, quantization_config(entries, vqcompress.__version__)
    if (knobs := plan.recipe.cache) is not None:
        settings["kv_cache"] = knobs.model_dump(mode="json")
    if books is not None:
        named, settings["kv_cache"]["before"] = books
        writer.write_extra(KV_CACHE, named)
    config = {**source.config, "quantization_config": settings}
    report = run_report(model, plan, source, writer, rows, texts, seed, learned if books is not None else None)
    choice = recipes.dump(plan.recipe) if plan.target_bits is not None else ""
    writer.finish(config, source.companions(), documents(report, writer.out.resolve().name), choice)
    return report


def _ahead(make: Callable[[int], T], places: list[int], ahead: int) -> Iterator[T]:
    """What is made of each place, in order; up to so many of the next are made while one is looked at."""
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


def _tell(watch: Watch, what: str, done: int, total: int) -> None:
    watch("after", {"what": what, "done": done, "total": total})


def _inputs(source: Checkpoint, plan: Plan, rows: Tensor | None, seed: int, stream: BlockStream) -> dict[str, str]:
    """All that determines the bytes of an artifact, by the name that an error will show."""
    gpu = f" {torch.cuda.get_device_name()}" if stream.device.type == "cuda" else ""
    return {
        # Settings within a budget depend on all weights at once; otherwise each block's are looked at in their turn.
        "checkpoint": source.fingerprint() + ("" if plan.target_bits is None else source.digest(source.tensors)),
        "recipe": plan.recipe.fingerprint(),
        "target bits": str(plan.target_bits),
        "calibration": "none" if rows is None else fingerprint(rows),
        "seed": str(seed),
        "device": f"{stream.device.type}{gpu} {stream.dtype}",
        "version of vqcompress": vqcompress.__version__,
        "version of torch": torch.__version__,
        "version of transformers": transformers.__version__,
    }
