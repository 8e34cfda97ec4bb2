"""Tiles of rows that are sorted by expert: which expert a tile is of, found by the program itself.

How many rows each expert has is known on the device only, and no launch waits for it: there are as many programs as
rows could need at most, and those too many end at once. Shape legend: T rows of a tile, E experts.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rows_of(tile, ends_E, experts, tokens, T: tl.constexpr, EXPERTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """A tile's expert, its first row, and the row after the last that it may have; 0, 0, 0 for a tile too many.

    EXPERTS: a power of two, at least `experts`; 0 if the weight has none, and then `ends_E` is not looked at.
    """
    if EXPERTS == 0:
        expert, first, last = 0, tile * T, tokens
    else:
        e_E = tl.arange(0, EXPERTS)
        end_E = tl.load(ends_E + e_E, mask=e_E < experts, other=0)
        begin_E = tl.load(ends_E + e_E - 1, mask=(e_E > 0) & (e_E < experts), other=0)
        tiles_E = (end_E - begin_E + T - 1) // T
        after_E = tl.cumsum(tiles_E, 0)
        # True for one expert at most; those without rows have no tile either.
        mine_E = (after_E > tile) & (after_E - tiles_E <= tile)
        expert = tl.sum(tl.where(mine_E, e_E, 0), 0)
        first = tl.sum(tl.where(mine_E, begin_E + (tile - after_E + tiles_E) * T, 0), 0)
        last = tl.sum(tl.where(mine_E, end_E, 0), 0)
    return expert, first, last


def tiles_of(rows: int, block_T: int, experts: int) -> int:
    """How many tiles `rows` rows can have at most, whatever expert each is of; 0 experts: that they have."""
    # Of each expert one tile may not be full, and none is empty.
    return min(rows, rows // block_T + experts) if experts else triton.cdiv(rows, block_T)
