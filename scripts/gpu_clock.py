"""Times on a GPU with a cold cache: calls over many copies of the weights, recorded as one graph.

A graph leaves out the time that Python takes for a launch, as decoding with graphs does. Its calls read more bytes than
a cache holds, so every call reads its weights from memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# Least bytes of weights in a round; several times the cache of any GPU.
ROUND = 256 << 20
# Bounds of the number of copies: with few, the launch of the graph would count.
LEAST, MOST = 4, 256


def copies(size: int) -> int:
    """Number of copies of a weight of `size` bytes in a round."""
    return max(LEAST, min(MOST, -(-ROUND // size)))


def seconds(call: Callable[[Any], Any], arguments: list[Any]) -> float:
    """The median time of one call, over rounds of a call for each argument."""
    import triton

    call(arguments[0])
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call(arguments[0])
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for argument in arguments:
            call(argument)
    milliseconds: float = triton.testing.do_bench(graph.replay, warmup=5, rep=30, return_mode="median")
    return milliseconds / 1e3 / len(arguments)
