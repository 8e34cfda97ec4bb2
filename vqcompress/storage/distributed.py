"""The processes of one run, started by `torchrun` or `accelerate launch`.

Calibration batches are sharded whole and sums over them are float64, so that an artifact has the same bytes for any
number of processes. With one process every operation is the identity.

`torch.distributed` is called directly: `accelerate.PartialState` changes the number of threads of each process, which
changes sums in float32, and its utilities have neither an in-place reduction nor a maximum.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from vqcompress.errors import VQCompressError
from vqcompress.methods.statistics import Accumulator

T = TypeVar("T")
# How long a process waits for the others, one of which may read a block from a slow disk or encode a large weight.
TIMEOUT = timedelta(hours=2)


@dataclass(frozen=True)
class ProcessGroup:
    """rank: of this process. size: number of processes."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes."""
        return self.rank == 0

    def shard(self, items: Sequence[T]) -> list[T]:
        """This rank's contiguous part of a list; parts follow in the order of ranks and differ by at most one item."""
        start, end = (len(items) * r // self.size for r in (self.rank, self.rank + 1))
        return list(items[start:end])

    def all_reduce(self, tensor: Tensor, op: Any = dist.ReduceOp.SUM) -> None:
        """In-place all-reduce. In float64 the sum is bit-identical for any world size."""
        if self.size > 1:
            dist.all_reduce(tensor, op=op)

    def broadcast(self, rank: int, value: T | None) -> T:
        """The value of one rank, on every rank; its tensors must be on the CPU. Other ranks may pass None."""
        box: list[Any] = [value if self.rank == rank else None]
        if self.size > 1:
            dist.broadcast_object_list(box, src=rank)
        received: T = box[0]
        return received

    def all_gather(self, value: T) -> list[T]:
        """The values of all ranks, in the order of ranks, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values


ALONE = ProcessGroup()


def process_group(device: torch.device) -> ProcessGroup:
    """The group that the environment of `torchrun` describes, initialised; a group of one without it."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size < 2:
        return ALONE
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if not dist.is_initialized():
        try:
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
        except Exception as error:  # a port in use, a peer that never came, a missing backend
            raise VQCompressError(f"the {size} processes of this run cannot connect: {error}") from error
        # Threads of open connections would make the interpreter exit with an error.
        atexit.register(dist.destroy_process_group)
    return ProcessGroup(dist.get_rank(), size)


def reduce_statistics(group: ProcessGroup, accumulator: Accumulator) -> None:
    """Combine the accumulators of all ranks, in place on every rank."""
    for name, total in accumulator.sums.items():
        group.all_reduce(total, dist.ReduceOp.MAX if name == "absmax" else dist.ReduceOp.SUM)
    counts = group.all_gather((accumulator.tokens, accumulator.routed, accumulator.mass))
    accumulator.tokens, accumulator.routed, accumulator.mass = (sum(each) for each in zip(*counts, strict=True))
    if accumulator.sample is not None:
        rows = [batch.cpu() for batch in accumulator.sample] if group.size > 1 else accumulator.sample
        accumulator.sample = [batch.to(accumulator.device) for part in group.all_gather(rows) for batch in part]
