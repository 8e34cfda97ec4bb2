"""The hidden states that calibration rows become.

Shape legend: N rows, L tokens of a row.
"""

from __future__ import annotations

from torch import Tensor

from vqcompress.errors import UsageError
from vqcompress.model.stream import BlockStream
from vqcompress.storage.hidden_states import States, keep

PROBE_TOKENS = 64


def check_batches(stream: BlockStream, rows_NL: Tensor) -> None:
    """UsageError if there are more processes than batches of calibration rows."""
    if (count := len(stream.batches(rows_NL))) < stream.group.size:
        few = f"{count} batches of calibration rows are too few for {stream.group.size} processes"
        raise UsageError(f"{few}; start fewer, or give more --samples")


def first_states(stream: BlockStream, rows_NL: Tensor) -> States:
    """The hidden states that enter the first block, by batch; each of several processes has some of the batches."""
    # Also learns how blocks are called with the few tokens of `BlockContext.probe`.
    stream.embed(rows_NL[:1, :PROBE_TOKENS])
    own = stream.group.shard(stream.batches(rows_NL))
    return keep((stream.embed(batch) for batch in own), stream.scratch)
