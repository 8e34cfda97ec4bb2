"""The processes of one run, started by `torchrun` or `accelerate launch`: their shares of the work, and what they know.

Calibration batches are shared out whole and sums over them are float64, so that the totals, and with them every byte of
an artifact, are those of one process. Alone, everything here gives back what it got.
"""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from vqcompress.errors import VQCompressError
from vqcompress.methods import PackedTensors
from vqcompress.methods.statistics import Accumulator
from vqcompress.storage.artifact import STAGED
from vqcompress.storage.writer import Shards, Writer, undisturbed

T = TypeVar("T")
# How long a process waits for the others: one may read a block from a slow disk, or encode the largest weight.
PATIENCE = timedelta(hours=2)


@dataclass(frozen=True)
class Team:
    """rank: of this process. size: how many there are."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """This process's part of a list: contiguous, in the order of ranks, equal but for one item."""
        start, end = (len(items) * r // self.size for r in (self.rank, self.rank + 1))
        return list(items[start:end])

    def mine(self, tasks: Sequence[T]) -> Sequence[T]:
        """This process's task of at most as many as there are processes; none for those who come later."""
        return tasks[self.rank : self.rank + 1]

    def add(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over all processes, in place; of float64 for the same bits in any number."""
        if self.size > 1:
            dist.all_reduce(tensor)

    def maximum(self, tensor: Tensor) -> None:
        """Replace a tensor by its largest elements over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)

    def from_rank(self, rank: int, value: T | None) -> T:
        """What one process has, for all; tensors on the CPU. value: counts on that process only."""
        box: list[Any] = [value if self.rank == rank else None]
        if self.size > 1:
            dist.broadcast_object_list(box, src=rank)
        found: T = box[0]
        return found

    def everyones(self, value: T) -> list[T]:
        """What each process has, in the order of ranks."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def to_rank(self, rank: int, value: T) -> list[T]:
        """What each process has, in the order of ranks, for one of them; nothing for the others."""
        if self.size == 1:
            return [value]
        found: list[Any] | None = [None] * self.size if self.rank == rank else None
        dist.gather_object(value, found, dst=rank)
        return found or []


ALONE = Team()


def join(device: torch.device) -> Team:
    """The processes that were started together, from the environment that `torchrun` sets; else this one alone."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size < 2:
        return ALONE
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if not dist.is_initialized():
        try:
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
        except Exception as error:  # an address that is taken, a peer that never came, a backend that is missing
            raise VQCompressError(f"the {size} processes of this run cannot find each other: {error}") from error
        # Threads of the connections that are still there when the interpreter goes would end the process with an error.
        atexit.register(_leave)
    return Team(dist.get_rank(), size)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def add_up(team: Team, accumulator: Accumulator) -> None:
    """Let an accumulator have seen what those of all processes have."""
    if accumulator.absmax_I is not None:
        team.maximum(accumulator.absmax_I)
    for total in (accumulator.sumsq_I, accumulator.hessian_II):
        if total is not None:
            team.add(total)
    counts = team.everyones((accumulator.tokens, accumulator.routed, accumulator.mass))
    accumulator.tokens, accumulator.routed, accumulator.mass = (sum(each) for each in zip(*counts, strict=True))
    if accumulator.sample is not None:
        samples = team.everyones([rows.cpu() for rows in accumulator.sample] if team.size > 1 else accumulator.sample)
        accumulator.sample = [rows.to(accumulator.device) for sample in samples for rows in sample]


class SharedWriter(Shards):
    """A `Writer` of the leader that all processes know the state of; the directory must be one that all of them see.

    A context manager, like the writer. done, measured: as the leader's. What is committed took the time since `lap`.
    """

    def __init__(
        self,
        team: Team,
        out: Path,
        inputs: dict[str, str],
        source_of: Callable[[str], str],
        overwrite: bool,
        start: float,
    ):
        super().__init__(out)
        self.team, self.mark = team, start
        self.writer = Writer(out, inputs, source_of, overwrite, start) if team.leads else None
        state = (self.writer.done, self.writer.measured) if self.writer else None
        self.done, self.measured = team.from_rank(0, state) or ({}, {})

    def __enter__(self) -> SharedWriter:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self.writer:
            self.writer.__exit__(kind, error, trace)

    def lap(self) -> float:
        """Seconds since this was asked last, or since the run began."""
        before, self.mark = self.mark, time.perf_counter()
        return round(self.mark - before, 3)

    @undisturbed()
    def commit(self, name: str, number: int, count: int, tensors: PackedTensors, record: dict[str, Any]) -> None:
        """`Writer.commit` of what all processes have."""
        facts = self.write_shard(number, count, tensors) | record if self.writer else None
        self._journal(name, self.team.from_rank(0, facts), self.lap())

    @undisturbed()
    def commit_all(self, found: dict[str, tuple[int, int, PackedTensors, dict[str, Any]]]) -> None:
        """`Writer.commit` of the blocks, by name, that any process has; of one that several have the first one's."""
        before = [name for names in self.team.everyones(list(found))[: self.team.rank] for name in names]
        facts = {
            name: self.write_shard(number, count, tensors) | record
            for name, (number, count, tensors, record) in found.items()
            if name not in before
        }
        every = [item for each in self.team.everyones(facts) for item in each.items()]
        seconds = self.lap()
        for name, record in every:
            self._journal(name, record, seconds / len(every))

    def _journal(self, name: str, record: dict[str, Any], seconds: float) -> None:
        record |= {"seconds": round(seconds, 3)}
        if self.writer:
            self.writer.journal(name, record)
        self.done[name] = record

    def note(self, name: str, record: dict[str, list[float]]) -> None:
        """`Writer.note` of what all processes have."""
        if self.writer:
            self.writer.note(name, record)
        self.measured[name] = record

    @undisturbed()
    def stage(self, tensors: PackedTensors) -> None:
        """`Writer.stage` of what all processes have."""
        if self.writer:
            self.writer.stage(tensors, self.lap())
        self.done[STAGED] = self.team.from_rank(0, self.writer.done[STAGED] if self.writer else None)

    def settle(self) -> None:
        """`Writer.settle`; nobody goes on before it is done."""
        if self.writer:
            self.writer.settle()
        self.team.from_rank(0, True)
