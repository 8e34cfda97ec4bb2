"""One run of `quantize`: a checkpoint in, a compressed artifact out, block by block."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from functools import partial
from itertools import islice
from typing import Any

import torch
from transformers import PreTrainedModel

import vqcompress
from vqcompress.evaluate.model_card import documents
from vqcompress.kv_cache.calibrate import Books, calibrate
from vqcompress.methods import PackedTensors
from vqcompress.model.device import check_fits, choose_device, model_dtype, release_freed_memory
from vqcompress.model.linear import decode_layers
from vqcompress.model.rotation import RotatedCheckpoint
from vqcompress.model.stream import BlockStream
from vqcompress.model.tokenizer import fingerprint, load_tokenizer
from vqcompress.pipeline.bit_allocation import allocate, choose_recipe, make_plans
from vqcompress.pipeline.block import compress_block
from vqcompress.pipeline.calibration import check_batches, first_states
from vqcompress.pipeline.context import BlockContext, generator_for
from vqcompress.pipeline.distill import distill
from vqcompress.pipeline.estimate import cache_memory, estimate
from vqcompress.pipeline.options import QuantizeOptions
from vqcompress.pipeline.plan import Plan, Progress, silent
from vqcompress.pipeline.preflight import check_plan, try_blocks
from vqcompress.pipeline.report import VERSIONS, run_report
from vqcompress.pipeline.rows import DEFAULT_SAMPLES, calibration_rows
from vqcompress.runtime.load import load
from vqcompress.storage import artifact
from vqcompress.storage import recipe as recipes
from vqcompress.storage.artifact import STAGED, Entry
from vqcompress.storage.checkpoint import check_finite
from vqcompress.storage.distributed import ALONE, process_group
from vqcompress.storage.hidden_states import States, keep
from vqcompress.storage.text import SELF, split_share
from vqcompress.storage.writer import Shard, Writer

NON_BLOCK = "(outside of the blocks)"


def quantize(options: QuantizeOptions, progress: Progress = silent, began: float | None = None) -> dict[str, Any]:
    """Compress a model; returns the report.

    An unfinished run of the same inputs in `options.out` is continued, and ends in the same bytes. began: the reading
    of time.perf_counter from which the seconds of the report count, if not now.
    """
    run = Run(options, progress, time.perf_counter() if began is None else began)
    with run.writer:
        run.prepare()
        for index in range(len(run.plan.blocks)):
            run.quantize_block(index)
        run.distill()
        return run.finish(run.calibrate_cache())


def dry_run(options: QuantizeOptions) -> dict[str, Any]:
    """The sizes and memory of a run from a config alone, as JSON: see `estimate`. Writes and measures nothing."""
    stream, plans = _open(options, weights=False)
    rows = (options.samples or DEFAULT_SAMPLES) if plans[0].reads_text else 0
    if rows and stream.source.tensors:
        load_tokenizer(stream.source.path)
    length, given = stream.source.row_length(options.seqlen), map(split_share, options.texts or ())
    facts = estimate(plans, stream, rows, length, options.states, rows > 0 and SELF in dict(given))
    return {"model": options.model, "seed": options.seed, **facts}


def _open(options: QuantizeOptions, weights: bool = True) -> tuple[BlockStream, list[Plan]]:
    """The stream of a dense checkpoint, rotated if the recipe says so, and its plans, see `make_plans`."""
    recipe = choose_recipe(options.recipe, options.target_bits, options.kv_cache)
    device, source = choose_device(options.device), artifact.open_checkpoint(options.model, weights=weights)
    group, scratch = process_group(device), options.out if options.states == "disk" else None
    stream = BlockStream(source, device, model_dtype(source.config, device), group, scratch)
    plans = make_plans(stream, recipe, options.target_bits)
    check_plan(stream, plans[0])
    if recipe.rotation and weights:
        rotated = RotatedCheckpoint(stream, partial(generator_for, options.seed))
        stream = BlockStream(rotated, device, stream.dtype, group, scratch)
    return stream, plans


class Run:
    """A run of `quantize` and its state: begun, or continued from an unfinished one, in the directory of the options.

    plan: the first of `plans`, until `prepare` chooses within a budget. rows: of calibration, None if none are needed.
    calibration: JSON about the rows. hidden: the states that enter the next block, by batch. reference: those of the
    dense model, if a recipe corrects outputs. entries: of the blocks that are done. shards: makes those of the other
    blocks, by name.
    """

    def __init__(self, options: QuantizeOptions, progress: Progress, began: float):
        self.options, self.progress = options, progress
        self.stream, self.plans = _open(options)
        try_blocks(self.stream)
        self.plan, self.group = self.plans[0], self.stream.group
        self.companions, self.left_out = self.stream.source.companions()
        self.rows = self.calibration = None
        if self.plan.reads_text:
            self.rows, self.calibration = calibration_rows(self.stream, options, progress)
            needed = cache_memory(self.plan, self.stream, self.rows.numel())
            # Now, and not after the blocks.
            instead = "take a recipe whose cache is fp8, which learns nothing"
            check_fits(needed, self.stream.device, "to learn the codebooks of a cache", instead)
        if self.rows is not None and self.plan.calibrated:
            # Before anything is written.
            self.stream.require()
            check_batches(self.stream, self.rows)
        else:
            # No sums to exchange: each process encodes whole blocks by itself.
            self.stream.group = ALONE
        self.hidden: States = []
        self.reference: States = []
        self.entries: list[Entry] = []
        self.shards: Iterator[tuple[str, Shard]] = iter(())
        assert options.out is not None
        self.writer = Writer(options.out, self._inputs(), self._digest, options.overwrite, began, self.group)

    def _inputs(self) -> dict[str, str]:
        """Everything that determines the bytes of an artifact, by the name that an error will show."""
        stream, plan = self.stream, self.plan
        source, gpu = stream.source, f" {torch.cuda.get_device_name()}" if stream.device.type == "cuda" else ""
        return {
            # A budget is shared out over all weights at once; otherwise each block's are hashed as it is encoded.
            "checkpoint": source.fingerprint() + ("" if plan.target_bits is None else source.digest(source.tensors)),
            "recipe": plan.recipe.fingerprint(),
            "target bits": str(plan.target_bits),
            "calibration": "none" if self.rows is None else fingerprint(self.rows),
            "seed": str(self.options.seed),
            "format version": str(artifact.FORMAT_VERSION),
            "device": f"{stream.device.type}{gpu} {stream.dtype}",
            **{f"version of {name}": version for name, version in VERSIONS.items()},
        }

    def _digest(self, name: str) -> str:
        """The fingerprint of the weights of a block, or of those outside of the blocks."""
        stream = self.stream
        return stream.source.digest(stream.non_block_weights if name == NON_BLOCK else stream.names.under(name))

    def prepare(self) -> None:
        """Choose settings within a budget, write the non-block weights, and embed the calibration rows."""
        stream, writer, group, seed = self.stream, self.writer, self.group, self.options.seed
        if self.plan.target_bits is not None and self.rows is not None:
            self.plan = allocate(stream, self.plans, self.rows, writer, seed, self.progress)
        names = [block.name for block in self.plan.blocks]
        self.progress("plan", {"plan": self.plan, "done": [name for name in names if name in writer.done]})
        if NON_BLOCK not in writer.done:
            self._commit_non_block_weights()
        # Start-up and skipped blocks are not charged to any block's time.
        writer.lap()
        if self.rows is not None and self.plan.calibrated:
            self.hidden = first_states(stream, self.rows)
        if self.plan.needs_reference:
            self.reference = keep(self.hidden, stream.scratch)
        todo = [i for i, name in enumerate(names) if name not in writer.done]
        todo = todo if self.hidden else todo[group.rank :: group.size]
        # Each thread has a current GPU of its own, so only a CPU works ahead in another thread.
        ahead = _one_ahead if not self.hidden and stream.device.type == "cpu" else map
        self.shards = ahead(self._make_shard, todo)

    def quantize_block(self, index: int) -> None:
        """Compress and store a block unless that is done, and run the hidden states through the stored block."""
        block, stream, is_last = self.plan.blocks[index], self.stream, index + 1 == len(self.plan.blocks)
        event = {"index": index, "count": len(self.plan.blocks), "name": block.name}
        done_before = block.name in self.writer.done
        if not done_before:
            self.progress("block", event)
            # Without a variable for the shard, it is freed before the next block is encoded.
            self.writer.commit(dict(islice(self.shards, 1)))
        elif self.reference and not is_last:
            stream.forward(stream.load_block(index), index, self.reference)
        record = self.writer.done[block.name]
        stored = self.plan.entries_of(block, record["smoothed"])
        self.entries += stored
        if self.hidden and not is_last:
            # The next block sees the stored weights, so that it can correct their errors.
            tensors = stream.from_stored(artifact.tensors_of(self.writer.out / record["file"]))
            stream.forward(stream.load_block(index, tensors, stored), index, self.hidden)
        release_freed_memory()
        if done_before:
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
        changed = distill(student, teacher, stream, self.entries, self.rows, tuning, self.options.seed, after)
        self.writer.commit({STAGED: (artifact.STAGED_FILE, changed, {"targets": []})})

    def calibrate_cache(self) -> Books | None:
        """The codebooks of a cache, learned by all processes from the stored model; None if the recipe has none."""
        cache = self.plan.learned_cache
        if cache is None or self.rows is None:
            return None
        self.writer.apply_staged()
        model = self._stored_model(self.stream.dtype)
        decode_layers(model)
        return calibrate(model, self.rows, cache, self.options.seed, self.group, self._after)

    def finish(self, books: Books | None) -> dict[str, Any]:
        """Complete the artifact; returns the report. The first process writes, the others wait."""
        cache_seconds = self.writer.lap() if books is not None else None
        self.writer.apply_staged()
        return self.group.broadcast(0, self._write_artifact(books, cache_seconds) if self.group.is_main else None)

    def _write_artifact(self, books: Books | None, cache_seconds: float | None) -> dict[str, Any]:
        writer, source, options = self.writer, self.stream.source, self.options
        settings = artifact.quantization_config(self.entries, vqcompress.__version__)
        if (cache := self.plan.recipe.cache) is not None:
            settings["kv_cache"] = cache.model_dump(mode="json")
        if books is not None:
            named, settings["kv_cache"]["before"] = books
            writer.write_extra(artifact.KV_CACHE, named)
        config = {**source.config, "quantization_config": settings}
        report = run_report(options, self.plan, source, writer, self.calibration, cache_seconds)
        report |= {"left_out": self.left_out}
        choice = recipes.dump(self.plan.recipe) if self.plan.target_bits is not None else ""
        writer.finish(config, self.companions, documents(report, writer.out.resolve().name), choice)
        return report

    def _make_shard(self, index: int) -> tuple[str, Shard]:
        """Compress a block; its name and its shard."""
        few = self.calibration is not None and "few_tokens" in self.calibration
        context = BlockContext(self.stream, self.plan, index, self.hidden, self.options.seed, self.reference, few)
        name = context.block.name
        tensors, facts = compress_block(context, self.progress)
        return name, (self._file(index + 2), tensors, {**facts, "source": self._digest(name)})

    def _commit_non_block_weights(self) -> None:
        """Write the weights outside of the blocks, and the tensor that stops a loader that does not know the format."""
        source, tensors = self.stream.source, dict[str, torch.Tensor]()
        # Weights that were compressed come in float32, and a draft layer is as large as a block: one by one.
        names = self.stream.non_block_weights if self.group.is_main else []
        for some in [[name] for name in names] if source.format else [names]:
            found = source.read(some)
            check_finite(found)
            tensors |= {name: tensor.to(source.tensors[name].dtype) for name, tensor in found.items()}
        for parameter, other in self.stream.model.all_tied_weights_keys.items():
            twice, once = (self.stream.names.tensor.get(name, "") for name in (parameter, other))
            if {twice, once} <= tensors.keys() and torch.equal(tensors[twice], tensors[once]):
                # An equal head is stored once, as transformers does.
                del tensors[twice]
        # A model of dense weights loads correctly without the package, too.
        tensors |= {artifact.HINT: artifact.MARKER} if self.plan.targets else {}
        record = {"targets": [], "source": self._digest(NON_BLOCK)}
        self.writer.commit({NON_BLOCK: (self._file(1), tensors, record)})

    def _file(self, number: int) -> str:
        """The name of a shard, or of its draft if distillation will change it."""
        file = artifact.SHARD.format(number, len(self.plan.blocks) + 1)
        return file if self.plan.recipe.tuning is None or self.rows is None else artifact.DRAFT + file

    def _stored_model(self, dtype: torch.dtype) -> PreTrainedModel:
        """The compressed model as it is stored."""
        tensors: PackedTensors = {}
        for name, record in self.writer.done.items():
            tensors |= artifact.tensors_of(self.writer.out / record["file"]) if name != STAGED else {}
        config = deepcopy(self.stream.model.config)
        if self.entries:
            config.quantization_config = artifact.quantization_config(self.entries, vqcompress.__version__)
        model: Any = type(self.stream.model).from_pretrained(None, config=config, state_dict=tensors, dtype=dtype)
        return model.eval().requires_grad_(False).to(self.stream.device)

    def _after(self, what: str, done: int, total: int) -> None:
        """Report the progress of work that comes after the blocks."""
        self.progress("after", {"what": what, "done": done, "total": total})


def _one_ahead(make: Callable[[int], tuple[str, Shard]], indices: list[int]) -> Iterator[tuple[str, Shard]]:
    """make(i) for each index, in order; a thread makes the next one while the caller uses one."""
    with ThreadPoolExecutor(1) as pool:
        begun = []
        for i in indices:
            begun.append(pool.submit(make, i))
            if len(begun) > 1:
                yield begun.pop(0).result()
        yield from (future.result() for future in begun)
