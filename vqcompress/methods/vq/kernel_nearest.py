"""Searches of quantization itself: the nearest entries of a table, and the nearest word of the E8 lattice.

What `codebooks.learned.nearest` asks of one stage is the least |c|²/2 − x·c over K entries, for each of N vectors. In
torch that is a matrix (N, K), written and read again; here it never leaves the registers. A thread has two entries of
a tile, all vectors of its program, and the best that it has met of each pair; threads talk to each other once, at the
end. Half of the loop over the table are multiply-adds, and none of it waits. They go to the ordinary units: tensor
cores have no float32, and TF32 would choose other entries.

x·c is a chain of fused multiply-adds in the order of the coordinates. That is what MKL does, so it is torch's on a CPU,
to the last bit where this was tried. |c|²/2 is such a chain too, but torch adds it up in another order; hence codes are
those of a CPU except where float32 cannot tell which entry is nearer. Of equals in float32 the lowest wins.

`nearest_e8p` takes the steps of `codebooks.compiled.e8p` in their order and without fused multiply-adds: its codes are
the same to the last bit.
Shape legend: N vectors, d their length, K entries, b of them wanted, P = 256 patterns. Of a tile: V vectors, E entries.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqcompress.methods.triton import launch

LONGEST, MOST, PATTERNS = 16, 1 << 16, 256
NO_ENTRY = tl.constexpr(0x7FFFFFFF)


# Unaligned, or each thread would load neighbouring entries as one, and a tile would go through shared memory to get
# from there to the threads that multiply. Coalesced as they are, 32 bits a thread lose no bandwidth.
@triton.jit(do_not_specialize_on_alignment=["x_Nd", "book_dK"])
def _best(  # type: ignore[no-untyped-def]
    x_Nd,
    book_dK,
    code_Nb,
    score_Nb,
    rows,
    count,
    LENGTH: tl.constexpr,
    BEAM: tl.constexpr,
    V: tl.constexpr,
    E: tl.constexpr,
):
    n_V, e_E = tl.program_id(0) * V + tl.arange(0, V), tl.arange(0, E)
    valid_V, n_V = n_V < rows, n_V.to(tl.int64)
    last_V, last_code_V = tl.full((V,), -float("inf"), tl.float32), tl.full((V,), -1, tl.int32)
    for place in range(BEAM):
        least_VE, first_VE = tl.full((V, E), float("inf"), tl.float32), tl.zeros((V, E), tl.int32)
        for first in range(0, count, E):
            there_E = first + e_E < count
            dot_VE, square_E = tl.zeros((V, E), tl.float32), tl.zeros((E,), tl.float32)
            for i in tl.static_range(LENGTH):
                # The same in every turn: these stay in registers.
                x_V = tl.load(x_Nd + n_V * LENGTH + i, mask=valid_V, other=0)
                entry_E = tl.load(book_dK + i * count + first + e_E, mask=there_E, other=0)
                dot_VE += x_V[:, None] * entry_E[None, :]
                square_E += entry_E * entry_E
            score_VE = tl.where(there_E, square_E * 0.5, float("inf"))[None, :] - dot_VE
            if BEAM > 1:
                # Only what comes after the last one found. The scores are computed anew, and the same.
                later_VE = (score_VE == last_V[:, None]) & ((first + e_E)[None, :] > last_code_V[:, None])
                score_VE = tl.where((score_VE > last_V[:, None]) | later_VE, score_VE, float("inf"))
            better_VE = score_VE < least_VE
            least_VE = tl.where(better_VE, score_VE, least_VE)
            first_VE = tl.where(better_VE, first, first_VE)
        last_V = tl.min(least_VE, 1)
        last_code_V = tl.min(tl.where(least_VE == last_V[:, None], first_VE + e_E[None, :], NO_ENTRY), 1)
        tl.store(code_Nb + n_V * BEAM + place, last_code_V, mask=valid_V)
        tl.store(score_Nb + n_V * BEAM + place, last_V, mask=valid_V)


@triton.jit(do_not_specialize_on_alignment=["x_N8", "pattern_8P"])
def _e8p(x_N8, pattern_8P, code_N, rows, V: tl.constexpr, P: tl.constexpr):  # type: ignore[no-untyped-def]
    n_V, p_P = tl.program_id(0) * V + tl.arange(0, V), tl.arange(0, P)
    valid_V, n_V = n_V < rows, n_V.to(tl.int64)
    norm_P, sum_P = tl.zeros((P,), tl.float32), tl.zeros((P,), tl.float32)
    for i in tl.static_range(8):
        pattern_P = tl.load(pattern_8P + i * P + p_P)
        norm_P += pattern_P * pattern_P * 0.5
        sum_P += pattern_P
    least_V, code_V = tl.full((V,), float("inf"), tl.float32), tl.zeros((V,), tl.int32)
    for minus in tl.static_range(2):
        square_V, minuses_V = tl.zeros((V,), tl.float32), tl.zeros((V,), tl.int32)
        gain_VP = tl.zeros((V, P), tl.float32) - norm_P[None, :]
        cheapest_VP = tl.full((V, P), float("inf"), tl.float32)
        for i in tl.static_range(8):
            y_V = tl.load(x_N8 + n_V * 8 + i, mask=valid_V, other=0) - (0.25 - 0.5 * minus)
            square_V += y_V * y_V * 0.5
            minuses_V |= (y_V < 0).to(tl.int32) << i
            # With the signs of y the product is as large as can be.
            product_VP = tl.abs(y_V)[:, None] * tl.load(pattern_8P + i * P + p_P)[None, :]
            gain_VP += product_VP
            cheapest_VP = tl.minimum(cheapest_VP, product_VP)
        # If they break the parity, the cheapest one flips.
        odd_V = minuses_V ^ (minuses_V >> 4)
        odd_V = odd_V ^ (odd_V >> 2)
        odd_V = odd_V ^ (odd_V >> 1)
        flips_VP = (odd_V[:, None] ^ sum_P.to(tl.int32)[None, :]) & 1
        gain_V, index_V = tl.max(tl.where(flips_VP != 0, gain_VP - 2 * cheapest_VP, gain_VP), 1, return_indices=True)
        cheapest_V, flip_V, sum_V = tl.full((V,), float("inf"), tl.float32), index_V * 0, gain_V * 0
        for i in tl.static_range(8):
            y_V = tl.load(x_N8 + n_V * 8 + i, mask=valid_V, other=0) - (0.25 - 0.5 * minus)
            pattern_V = tl.load(pattern_8P + i * P + index_V)
            sum_V += pattern_V
            flip_V = tl.where(tl.abs(y_V) * pattern_V < cheapest_V, 1 << i, flip_V)
            cheapest_V = tl.minimum(cheapest_V, tl.abs(y_V) * pattern_V)
        minuses_V = tl.where((odd_V ^ sum_V.to(tl.int32)) & 1 != 0, minuses_V ^ flip_V, minuses_V)
        better_V = square_V - gain_V < least_V
        code_V = tl.where(better_V, index_V | (minuses_V & 127) << 8 | minus << 15, code_V)
        least_V = tl.where(better_V, square_V - gain_V, least_V)
    tl.store(code_N + n_V, code_V, mask=valid_V)


def default_config(gpu: launch.DeviceProperties, vectors: int, count: int, length: int) -> launch.Config:
    """Config of `best`: vectors as registers hold their coordinates, two entries of a tile for each thread."""
    tile = min(256, max(32, triton.next_power_of_2(count)))
    most = min(16, 64 // triton.next_power_of_2(length))
    return _settings(vectors, most, 2 * gpu.processors) | {"E": tile, "num_warps": max(1, tile // (2 * gpu.warp))}


def default_e8p_config(gpu: launch.DeviceProperties, vectors: int) -> launch.Config:
    """Config of `nearest_e8p`: programs of one warp, so that nobody waits for another."""
    return _settings(vectors, 4, 4 * gpu.processors) | {"num_warps": 1}


def _settings(vectors: int, most: int, programs: int) -> launch.Config:
    """As many vectors of a program, a power of two, as leave that many programs."""
    return {"V": min(most, 1 << max(1, vectors // programs).bit_length() - 1)}


def best(x_Nd: Tensor, book_Kd: Tensor, beam: int) -> tuple[Tensor, Tensor]:
    """Numbers (N, b) int32 of the b = beam nearest entries, nearest first, and their |c|²/2 − x·c, (N, b) float32.

    With |x|²/2 added that is half the squared distance. A beam of b takes b times as long as the nearest alone. For the
    next stage of a residual search, give it the rests of all candidates as vectors and choose among what comes back.
    book_Kd is transposed, at no cost if it is the transpose of a contiguous tensor. ValueError for vectors of another
    length than the entries or longer than 16, for no or over 65,536 entries, and for a beam that is not 1 to K.
    """
    (vectors, length), (count, of_book) = x_Nd.shape, book_Kd.shape
    if length != of_book or not 1 <= length <= LONGEST or not 1 <= count <= MOST or not 1 <= beam <= count:
        found = f"{vectors} of {length}, {count} of {of_book}, {beam}"
        raise ValueError(f"vectors, entries, beam are {found}; up to {MOST} entries of up to {LONGEST} can be searched")
    code_Nb = x_Nd.new_empty((vectors, beam), dtype=torch.int32)
    score_Nb = x_Nd.new_empty((vectors, beam), dtype=torch.float32)
    if vectors:
        # A beam has more to keep in registers.
        kernel, shape = "nearest" if beam == 1 else "nearest.beam", (count, length)
        config = launch.get_config(
            kernel, x_Nd.device, vectors, shape, lambda gpu: default_config(gpu, vectors, *shape)
        )
        tensors = (x_Nd.float().contiguous(), book_Kd.float().T.contiguous(), code_Nb, score_Nb)
        constants = {"LENGTH": length, "BEAM": beam, "num_stages": 1, "enable_fp_fusion": True}
        grid = (triton.cdiv(vectors, config["V"]),)
        launch.run(_best, grid, *tensors, vectors, count, **constants, **config)
    return code_Nb, score_Nb


def nearest_e8p(x_N8: Tensor, pattern_8P: Tensor) -> Tensor:
    """Codes (N,) int32 of the E8P words nearest to float32 vectors, those of `codebooks.lattice.nearest_e8p`.

    pattern_8P: `codebooks.lattice.patterns()` transposed, float32 (8, 256). ValueError for other shapes.
    """
    if x_N8.shape[1:] != (8,) or pattern_8P.shape != (8, PATTERNS):
        found = f"{tuple(x_N8.shape)} and {tuple(pattern_8P.shape)}"
        raise ValueError(f"vectors and patterns are {found}; they must be (N, 8) and {(8, PATTERNS)}")
    code_N = x_N8.new_empty((len(x_N8),), dtype=torch.int32)
    if len(x_N8):
        vectors, shape = len(x_N8), (PATTERNS, 8)
        config = launch.get_config(
            "nearest_e8p", x_N8.device, vectors, shape, lambda gpu: default_e8p_config(gpu, vectors)
        )
        tensors = (x_N8.float().contiguous(), pattern_8P.float().contiguous(), code_N)
        constants = {"P": PATTERNS, "num_stages": 1, "enable_fp_fusion": False}
        launch.run(_e8p, (triton.cdiv(len(x_N8), config["V"]),), *tensors, len(x_N8), **constants, **config)
    return code_N
