"""Viterbi's algorithm for trellis-coded quantization, one program per sequence; its contract is `viterbi_numba.paths`.

A state s is (class q, way p) = (s >> k, s & (P − 1)); class q leads to the states q + u·Q, u < P. What is carried from
weight to weight is not the cost of every state but the least of every class, Q numbers: a state's cost is that of the
class that it comes from plus its own. So with q = u·J + j = i·P + p, a step is

    least'[u, j] = min over p of (least[p, j] + (x − word[p, u, j])²),  then  least[p, i] is least'[u, j].

Up to 2**14 states, words and costs stay in registers, and that renaming is the one exchange between threads of a step.
Above, a step goes in tiles, the costs lie in global memory twice, and the words come from the cache. Back pointers
always go to global memory. The operations are those of the CPU, in their order and without contraction to fused
multiply-adds (the launcher sees to it), so the codes are the same to the last bit.
Shape legend: N sequences, T weights of a sequence, S = 2**states, P = 2**k, Q = S / P, J = Q / P; B of J in a tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqcompress.methods.triton import launch

# States (as a power of two) that stay in the registers of one program, and those of a tile where there are more.
IN_REGISTERS, TILE = 14, 13
# States of a thread: at least all ways of a class, so that the minimum over them needs no other thread; and few enough
# for 1024 threads, whose 64 registers hold a word and a cost of each. 2**14 states are 1024 threads, a tile is 512.
OF_A_THREAD = 16
# Were the compiler told that these are aligned, it would give each thread neighbouring classes, to load and store them
# as one; the exchange between the threads would then take up to ten barriers of a step instead of two.
UNALIGNED = ["words_S", "back_NTQ"]
# Bytes of back pointers at a time; more sequences than fit there wait for the next launch.
SCRATCH = 1 << 29
# The bits of float32 1e30, more than any walk costs.
FAR = tl.constexpr(0x7149F2CA)
NEVER = tl.constexpr(0x7FFFFFFFFFFFFFFF)


@triton.jit
def _costs(least_PB, words_PPB, x):  # type: ignore[no-untyped-def]
    """Costs (P, P, B) of the states, float32, by way p, new bits u and j: from the bits of those of their classes."""
    rest_PPB = x - words_PPB
    return least_PB.to(tl.float32, bitcast=True)[:, None, :] + rest_PPB * rest_PPB


@triton.jit
def _best(cost_PPB, ways: tl.constexpr):  # type: ignore[no-untyped-def]
    """(P, B) by u and j: the bits of the least cost over the ways, the lowest k of them replaced by which it was."""
    way_P = tl.arange(0, ways)
    # Positive floats are in the order of their bits.
    number_PPB = (cost_PPB.to(tl.int32, bitcast=True) & -ways) | way_P[:, None, None]
    return tl.min(number_PPB, 0)


@triton.jit
def _last(cost_PPB, class_PB, wanted, any_class, ways: tl.constexpr, classes: tl.constexpr):  # type: ignore[no-untyped-def]
    """The least cost as bits · 2**32 + p · Q + q, so that of equals the first in that order wins."""
    place_PPB = tl.arange(0, ways)[:, None, None] * classes + class_PB[None, :, :]
    number_PPB = (cost_PPB.to(tl.int32, bitcast=True).to(tl.int64) << 32) | place_PPB
    allowed_PB = (class_PB == wanted) | any_class
    number_PPB = tl.where(allowed_PB[None, :, :], number_PPB, NEVER)
    return tl.min(tl.reshape(number_PPB, (ways * ways * class_PB.shape[1],)), 0)


@triton.jit
def _end_in_registers(  # type: ignore[no-untyped-def]
    words_PPB, x_T, back_TQ, class_PB, shared, any_class, count, ways: tl.constexpr, classes: tl.constexpr
):
    """`_last` of `count` weights, writing their back pointers; costs stay in registers."""
    J: tl.constexpr = classes // ways
    # By (p, i), where the class is i·P + p.
    from_PB = tl.arange(0, J)[None, :] * ways + tl.arange(0, ways)[:, None]
    least_PB = tl.where((from_PB == shared) | any_class, 0, FAR & -ways)
    for t in range(1, count):
        best_PB = _best(_costs(least_PB, words_PPB, tl.load(x_T + t - 1)), ways)
        tl.store(back_TQ + t * classes + class_PB, (best_PB & (ways - 1)).to(tl.uint8))
        least_PB = tl.trans(tl.reshape(best_PB, (J, ways)))
    cost_PPB = _costs(least_PB, words_PPB, tl.load(x_T + count - 1))
    return _last(cost_PPB, class_PB, shared, any_class, ways, classes)


@triton.jit
def _end_in_tiles(  # type: ignore[no-untyped-def]
    words_PPB, least_2Q, x_T, back_TQ, class_PB, shared, any_class, count, ways: tl.constexpr, classes: tl.constexpr
):
    """As `_end_in_registers`, tile by tile, with costs in global memory. words_PPB: pointers, of the first tile."""
    J: tl.constexpr = classes // ways
    B: tl.constexpr = class_PB.shape[1]
    for j in range(0, J, B):
        from_PB = (j + tl.arange(0, B)[None, :]) * ways + tl.arange(0, ways)[:, None]
        least_PB = tl.where((from_PB == shared) | any_class, 0, FAR & -ways)
        tl.store(least_2Q + classes + j + class_PB, least_PB)
    tl.debug_barrier()
    for t in range(1, count):
        x = tl.load(x_T + t - 1)
        for j in range(0, J, B):
            least_PB = tl.load(least_2Q + (t % 2) * classes + j + class_PB)
            best_PB = _best(_costs(least_PB, tl.load(words_PPB + j), x), ways)
            tl.store(back_TQ + t * classes + j + class_PB, (best_PB & (ways - 1)).to(tl.uint8))
            # Class i·P + p lies at (p, i).
            tl.store(least_2Q + (1 - t % 2) * classes + (j + class_PB) % ways * J + (j + class_PB) // ways, best_PB)
        tl.debug_barrier()
    x = tl.load(x_T + count - 1)
    end = tl.full((), NEVER, tl.int64)
    for j in range(0, J, B):
        cost_PPB = _costs(tl.load(least_2Q + (count % 2) * classes + j + class_PB), tl.load(words_PPB + j), x)
        end = tl.minimum(end, _last(cost_PPB, j + class_PB, shared, any_class, ways, classes))
    return end


@triton.jit(do_not_specialize=["length", "margin", "rows"], do_not_specialize_on_alignment=UNALIGNED)
def _walk(  # type: ignore[no-untyped-def]
    x_NL,
    words_S,
    back_NTQ,
    least_N2Q,
    codes_NT,
    length,
    margin,
    rows,
    K: tl.constexpr,
    STATES: tl.constexpr,
    B: tl.constexpr,
):
    """Codes of one sequence. x_NL: the 2 · margin weights around the seam, then all T. words_S: by (p, u, j).

    B: j of a tile; if it is J, costs stay in registers.
    """
    ways: tl.constexpr = 1 << K
    classes: tl.constexpr = 1 << (STATES - K)
    J: tl.constexpr = classes // ways
    n = tl.program_id(0)
    back_TQ = back_NTQ + n.to(tl.int64) * rows * classes
    way_P = tl.arange(0, ways)
    class_PB = way_P[:, None] * J + tl.arange(0, B)[None, :]
    words_PPB = words_S + way_P[:, None, None] * classes + class_PB[None, :, :]
    if B == J:
        # Not within the loop, where their addresses would take registers too.
        words_PPB = tl.load(words_PPB)
    shared = n * 0
    # The first turn chooses the bits that both ends share, by the weights around the seam; the second is exact.
    for turn in range(2):
        count = tl.where(turn == 0, 2 * margin, length)
        x_T = x_NL + n * (2 * margin + length) + turn * 2 * margin
        if B == J:
            end = _end_in_registers(words_PPB, x_T, back_TQ, class_PB, shared, turn == 0, count, ways, classes)
        else:
            least_2Q = least_N2Q + n * 2 * classes
            end = _end_in_tiles(words_PPB, least_2Q, x_T, back_TQ, class_PB, shared, turn == 0, count, ways, classes)
        # All back pointers are written before one is read.
        tl.debug_barrier()
        place = (end & 0x7FFFFFFF).to(tl.int32)
        state = (place % classes) * ways + place // classes
        for i in range(0, tl.where(turn == 0, margin, length)):
            t = count - 1 - i
            # The lowest bits of a state are the first that its window holds: those of its own weight.
            tl.store(codes_NT + n * length + t, state & (ways - 1), mask=turn == 1)
            back = tl.load(back_TQ + t * classes + state % classes, mask=t > 0, other=0)
            state = (state % classes) * ways + back.to(tl.int32)
        shared = state // ways
        # And all are read before the second turn writes its own.
        tl.debug_barrier()


def make_config(gpu: launch.DeviceProperties, states: int, k: int, tile: int, of_a_thread: int) -> launch.Config:
    """Config for tiles of 2**tile states, if they do not stay in registers, and that many states per thread."""
    tile = tile if states > IN_REGISTERS else states
    return {"B": 1 << (tile - 2 * k), "num_warps": max(gpu.warp, (1 << tile) // of_a_thread) // gpu.warp}


def walks(x_NT: Tensor, words_S: Tensor, states: int, k: int, margin: int) -> Tensor:
    """Codes (N, T), int32 below 2**k, of float32 sequences: what `viterbi_numba.paths` answers, on their device.

    words_S: float32 values of the states, there too. margin: weights on either side of the seam that choose its bits.
    """
    sequences, length = x_NT.shape
    margin, ways, classes = min(margin, length), 1 << k, 1 << (states - k)
    rows = max(length, 2 * margin)
    default = lambda gpu: make_config(gpu, states, k, TILE, OF_A_THREAD)  # noqa: E731
    config = launch.get_config("viterbi", x_NT.device, sequences, (1 << states, k), default)
    # Nothing is fused, so that costs are those of the CPU.
    constants = {"K": k, "STATES": states, "num_stages": 1, "enable_fp_fusion": False, **config}
    x_NL = torch.cat([x_NT[:, length - margin :], x_NT[:, :margin], x_NT], 1).float()
    words_S = words_S.view(classes, ways).T.contiguous()
    codes_NT = x_NT.new_empty((sequences, length), dtype=torch.int32)
    chunk = max(1, min(sequences, SCRATCH // (rows * classes)))
    back_NTQ = x_NT.new_empty((chunk, rows, classes), dtype=torch.uint8)
    least_N2Q = x_NT.new_empty((chunk if states > IN_REGISTERS else 0, 2, classes), dtype=torch.int32)
    for x_nL, codes_nT in zip(x_NL.split(chunk), codes_NT.split(chunk), strict=True):
        tensors = (x_nL, words_S, back_NTQ, least_N2Q, codes_nT)
        launch.run(_walk, (len(x_nL),), *tensors, length, margin, rows, **constants)
    return codes_NT
