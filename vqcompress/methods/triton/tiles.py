"""Tiles of a matrix product: which tile a program computes, and the size and number of tiles.

Grouped products read rows that are sorted by expert. The number of rows of each expert is known on the device only, and
no launch waits for it: the grid has the largest number of tiles that the rows can need, and surplus programs return at
once. Shape legend: T rows of a tile, E experts.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vqcompress.methods.triton.launch import DeviceProperties


@triton.jit
def tile_of(outputs, BLOCK_O: tl.constexpr, GROUP: tl.constexpr):  # type: ignore[no-untyped-def]
    """This program's tile of rows and tile of outputs: down GROUP tiles of rows, then the next outputs.

    Programs that run at the same time then read neighbouring tiles, which are still in the L2 cache.
    """
    tiles_O = tl.cdiv(outputs, BLOCK_O)
    tiles_T = tl.num_programs(0) // tiles_O
    in_group = GROUP * tiles_O
    first = tl.program_id(0) // in_group * GROUP
    height = tl.minimum(tiles_T - first, GROUP)
    inside = tl.program_id(0) % in_group
    return first + inside % height, inside // height


@triton.jit
def rows_of(tile, ends_E, rows, T: tl.constexpr, EXPERTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """A tile's expert, its first row, and the end of the expert's rows; 0, 0, 0 for a surplus tile.

    EXPERTS: (count, padded count), see `padded_experts`; (0, 0) for a weight without experts, where `ends_E` is None.
    """
    E: tl.constexpr = EXPERTS[0]
    PADDED: tl.constexpr = EXPERTS[1]
    if E == 0:
        expert, first, last = 0, tile * T, rows
    else:
        e_E = tl.arange(0, PADDED)
        end_E = tl.load(ends_E + e_E, mask=e_E < E, other=0)
        begin_E = tl.load(ends_E + e_E - 1, mask=(e_E > 0) & (e_E < E), other=0)
        tiles_E = (end_E - begin_E + T - 1) // T
        after_E = tl.cumsum(tiles_E, 0)
        # True for one expert at most; experts without rows have no tile.
        mine_E = (after_E > tile) & (after_E - tiles_E <= tile)
        expert = tl.sum(tl.where(mine_E, e_E, 0), 0)
        first = tl.sum(tl.where(mine_E, begin_E + (tile - after_E + tiles_E) * T, 0), 0)
        last = tl.sum(tl.where(mine_E, end_E, 0), 0)
    return expert, first, last


@triton.jit
def absmax(x, axis: tl.constexpr):  # type: ignore[no-untyped-def]
    """The largest magnitude along an axis of float32 numbers; NaN if one is NaN."""
    # Bits of magnitudes are ordered as the magnitudes, with NaN on top; a maximum of floats would drop NaN.
    return tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis).to(tl.float32, bitcast=True)


def padded_experts(experts: int) -> tuple[int, int]:
    """The constant EXPERTS of a kernel: the number of experts, and the next power of two; (0, 0) without experts."""
    return experts, triton.next_power_of_2(experts) if experts else 0


def tiles_of(rows: int, block_T: int, experts: int) -> int:
    """The largest number of tiles that `rows` rows can need, whichever expert each belongs to."""
    # Each expert has at most one tile that is not full, and none that is empty.
    return min(rows, rows // block_T + experts) if experts else triton.cdiv(rows, block_T)


def split_for(gpu: DeviceProperties, tiles: int, rows: int, inputs: int, block_I: int) -> int:
    """The number of programs that share the inputs of each of `tiles` tiles, aiming at two programs per processor.

    Each program gets at least two blocks, and the partial sums (written and read again, 8 bytes a row) stay below half
    of the weight's bytes.
    """
    blocks = triton.cdiv(inputs, block_I)
    most = min(triton.cdiv(2 * gpu.processors, tiles), inputs // (16 * rows), blocks // 2)
    # Fewer programs if the longest share stays the same: then none is empty.
    return triton.cdiv(blocks, triton.cdiv(blocks, max(1, most)))


def wide(gpu: DeviceProperties) -> bool:
    """Whether the accumulators of a product may take half of a thread's registers.

    From Hopper on operands come from shared memory, and AMD's threads have twice the registers.
    """
    return not isinstance(gpu.arch, int) or gpu.arch >= 90


def most_stages(gpu: DeviceProperties, bytes_of_a_block: int) -> int:
    """Stages of the loop whose blocks of loads fit the shared memory; on AMD one more lies in registers."""
    return gpu.shared // bytes_of_a_block + (gpu.warp == 64)
