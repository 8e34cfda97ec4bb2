"""The nearest entries of a codebook, for learning and encoding.

One stage of `learned.nearest` asks for the least |c|²/2 − x·c over K entries, for each of N vectors. In
torch that is a matrix (N, K), written and read again; here it never leaves the registers. A thread has two entries of
a tile, all vectors of its program, and the best that it has met of each pair; threads talk to each other once, at the
end. Half of the loop over the table are multiply-adds, and none of it waits. They go to the ordinary units: tensor
cores have no float32, and TF32 would choose other entries.

x·c is a chain of fused multiply-adds in the order of the coordinates. That is what MKL does, so it is torch's on a CPU,
to the last bit where this was tried. |c|²/2 is such a chain too, but torch adds it up in another order; hence codes are
those of a CPU except where float32 cannot tell which entry is nearer. Of equals in float32 the lowest wins.

Shape legend: N vectors, d their length, K entries, b of them wanted. Of a tile: V vectors, E entries.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqcompress.methods.triton import launch

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


def default_config(gpu: launch.DeviceProperties, vectors: int, count: int, length: int) -> launch.Config:
    """Config of `best`: vectors as registers hold their coordinates, two entries of a tile for each thread."""
    tile = min(256, max(32, triton.next_power_of_2(count)))
    most = min(16, 64 // triton.next_power_of_2(length))
    # As many vectors of a program, a power of two, as leave two programs for each processor.
    per_program = min(most, 1 << max(1, vectors // (2 * gpu.processors)).bit_length() - 1)
    return {"V": per_program, "E": tile, "num_warps": max(1, tile // (2 * gpu.warp))}


def best(x_Nd: Tensor, book_Kd: Tensor, beam: int) -> tuple[Tensor, Tensor]:
    """Numbers (N, b) int32 of the b = beam nearest entries, nearest first, and their |c|²/2 − x·c, (N, b) float32.

    With |x|²/2 added that is half the squared distance. A beam of b takes b times as long as the nearest alone. For the
    next stage of a residual search, give it the rests of all candidates as vectors and choose among what comes back.
    book_Kd: up to 65,536 entries of up to 16 numbers; it is transposed, at no cost if it is the transpose of a
    contiguous tensor.
    """
    (vectors, length), count = x_Nd.shape, len(book_Kd)
    code_Nb = x_Nd.new_empty((vectors, beam), dtype=torch.int32)
    score_Nb = x_Nd.new_empty((vectors, beam), dtype=torch.float32)
    # A beam has more to keep in registers.
    kernel, shape = "nearest" if beam == 1 else "nearest.beam", (count, length)
    config = launch.get_config(kernel, x_Nd.device, vectors, shape, lambda gpu: default_config(gpu, vectors, *shape))
    tensors = (x_Nd.float().contiguous(), book_Kd.float().T.contiguous(), code_Nb, score_Nb)
    constants = {"LENGTH": length, "BEAM": beam, "num_stages": 1}
    launch.run(_best, (triton.cdiv(vectors, config["V"]),), *tensors, vectors, count, **constants, **config)
    return code_Nb, score_Nb
