"""What surrounds a product with rotated weights: y = diag(scale) · H · V · H · diag(signs) · x, where V are the words.

H is the orthonormal block Walsh–Hadamard transform of `methods.hadamard`. `rotate` answers H · diag(signs) · x, the
kernel of the product leaves S partial sums of V · that, and `finish` adds them up, transforms them and scales.

A transform of 2**k numbers is k stages of sums and differences of two. Each stage takes neighbours, by the lowest bit
of their place, and puts the sum into the lower half and the difference into the upper one: places rotate by a bit, and
after k stages all are home. The stages are the same code, and Triton has numbers change threads only when the lowest
bit is not within a thread, and then as many bits at once as a thread has: for 4096 numbers, 16 of a thread, that is
three exchanges through shared memory, for 12 stages. The sums are float32 in a fixed order, log₂ b of a number;
matrices of ±1 on tensor cores would need as many exchanges, and each number in two or three parts to be as exact.

A block that is large, or alone, is shared by several programs: since H_b = H_a ⊗ H_n, program p takes row p of H_a. It
adds the a pieces of its block up, with signs, as it reads them, and transforms the n sums. Each reads the whole block,
most of them from the cache, and none waits for another.
Shape legend: T rows, I input columns, O output columns, S partial sums, B bytes; columns come in blocks of b, the
largest power of two that divides them. Of a tile, which is what a program has: G blocks, if they are small, N numbers
of each, C bytes of their signs with W signs of a byte; M = G · N.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqcompress.methods.hadamard import block_size
from vqcompress.methods.triton import launch

# Numbers of a tile: while processors are idle, where blocks are small, and at most.
SMALLEST, LARGE, LARGEST = 256, 4096, 8192
# Programs of a block that a guess goes up to.
SHARES = 4
# Partial sums that a thread loads before it adds the first.
AHEAD = 4


@triton.jit
def _hadamard(x_GN, BLOCK: tl.constexpr, STAGES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows of 2**STAGES numbers times Sylvester's matrix, over √BLOCK; without stages x itself."""
    SIZE: tl.constexpr = x_GN.numel
    x_M = tl.reshape(x_GN, (SIZE,))
    for _ in tl.static_range(STAGES):
        even, odd = tl.split(tl.reshape(x_M, (SIZE // 2, 2)))
        x_M = tl.reshape(tl.trans(tl.join(even + odd, even - odd)), (SIZE,))
    if STAGES > 0:
        # The number of the row has gone from the highest bits to the lowest.
        x_GN = tl.trans(tl.reshape(x_M, (x_GN.shape[1], x_GN.shape[0]))) * BLOCK**-0.5
    return x_GN


@triton.jit
def _sign(i, j):  # type: ignore[no-untyped-def]
    """Entry (i, j) of Sylvester's matrix of up to 256 rows, as a float: −1 to the number of bits they share."""
    shared = i & j
    shared ^= shared >> 4
    shared ^= shared >> 2
    shared ^= shared >> 1
    return 1.0 - 2.0 * (shared & 1)


# A thread then loads the byte of its own 8 numbers; aligned bytes would come 2 at a time, and through shared memory.
@triton.jit(do_not_specialize_on_alignment=["signs_EB"])
def _transform(  # type: ignore[no-untyped-def]
    x_STI,
    signs_EB,
    scale_EI,
    expert_T,
    y_TI,
    parts,
    columns,
    rows,
    sums,
    BLOCK: tl.constexpr,
    N: tl.constexpr,
    G: tl.constexpr,
    STAGES: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """scale · H(Σ_s x · signs) of a tile; without signs or scale where they are None. parts: programs of a row."""
    row, part = (tl.program_id(0) // parts).to(tl.int64), tl.program_id(0) % parts
    share, first_G1 = part % (BLOCK // N), (part // (BLOCK // N) * G + tl.arange(0, G)[:, None]) * BLOCK
    expert = tl.load(expert_T + row) if expert_T is not None else 0
    W: tl.constexpr = min(N, 8)
    n_N = tl.arange(0, N)[None, :]
    sum_GN = tl.zeros((G, N), tl.float32)
    count = sums * (BLOCK // N)
    for first in range(0, count, AHEAD):
        # AHEAD loads are under way at once; the compiler would take as many as there are, and spill.
        for i in tl.static_range(AHEAD):
            piece, s = (first + i) // sums, (first + i) % sums
            valid_G1 = first_G1 < tl.where(first + i < count, columns, 0)
            x_GN = x_STI + (s * rows + row) * columns + first_G1 + piece * N + n_N
            x_GN = tl.load(x_GN, mask=valid_G1, other=0).to(tl.float32)
            if signs_EB is not None:
                i_GC = first_G1 + piece * N + W * tl.arange(0, N // W)[None, :]
                byte_GC = signs_EB + expert * ((columns + 7) // 8) + (i_GC >> 3)
                byte_GC = tl.load(byte_GC, mask=valid_G1, other=0).to(tl.uint32)
                # Bit i % 8 of the byte to where a float has its sign.
                shift_GCW = 31 - (i_GC & 7)[:, :, None] - tl.arange(0, W)[None, None, :]
                flip_GN = tl.reshape((byte_GC[:, :, None] << shift_GCW.to(tl.uint32)) & 0x80000000, (G, N))
                x_GN = (x_GN.to(tl.uint32, bitcast=True) ^ flip_GN).to(tl.float32, bitcast=True)
            sum_GN += _sign(share, piece) * x_GN
    y_GN, i_GN, valid_G1 = _hadamard(sum_GN, BLOCK, STAGES), first_G1 + share * N + n_N, first_G1 < columns
    if scale_EI is not None:
        y_GN *= tl.load(scale_EI + expert * columns + i_GN, mask=valid_G1, other=0).to(tl.float32)
    tl.store(y_TI + row * columns + i_GN, y_GN.to(y_TI.dtype.element_ty), mask=valid_G1)


def default_config(gpu: launch.DeviceProperties, rows: int, columns: int, rotated: bool = True) -> launch.Config:
    """Config of either kernel: a tile is a block, or several small ones, or less while processors are idle."""
    block = block_size(columns)
    size = max(LARGE, min(block, LARGEST))
    # Without a rotation there is nothing to share: any piece of a block is by itself.
    shares = SHARES if rotated else block
    while size > SMALLEST and rows * columns < size * gpu.processors and block < size * shares:
        size //= 2
    return make_config(gpu, size, 8 if size < 2048 else 16)


def make_config(gpu: launch.DeviceProperties, size: int, numbers: int) -> launch.Config:
    """Config of either kernel. size: numbers of a tile; numbers: of a thread."""
    return {"SIZE": size, "num_warps": max(1, size // numbers // gpu.warp), "num_stages": 1, "enable_fp_fusion": True}


def rotate(x_TI: Tensor, signs_EB: Tensor, expert_T: Tensor | None = None) -> Tensor:
    """H(x · signs), (T, I) in the type of x; computed in float32 and rounded once.

    x_TI: of a floating type of 16 or 32 bits. signs_EB: uint8 (E, ceil(I / 8)) as `packing.pack` stores them, where a
    set bit is −1. expert_T: int32, which of several signs a row has. QuIP# (arXiv 2402.04396), section 3.
    """
    return _launch(x_TI[None], signs_EB.contiguous(), None, x_TI.dtype, True, expert_T)


def finish(
    partial_STO: Tensor, scale_EO: Tensor, dtype: torch.dtype, rotated: bool, expert_T: Tensor | None = None
) -> Tensor:
    """scale · H(Σ_s partial), (T, O) of a type, without H if not rotated; in float32 and rounded once.

    partial_STO: float32, added in the order of s. scale_EO: of a floating type, (O,) without experts. expert_T: int32,
    which of several scales a row has.
    """
    return _launch(partial_STO, None, scale_EO.contiguous(), dtype, rotated, expert_T)


def _launch(
    x_STI: Tensor,
    signs_EB: Tensor | None,
    scale_EI: Tensor | None,
    dtype: torch.dtype,
    rotated: bool,
    expert_T: Tensor | None,
) -> Tensor:
    """(T, I) of a type by `_transform`."""
    sums, rows, columns = x_STI.shape
    y_TI = x_STI.new_empty((rows, columns), dtype=dtype)
    # Each of the three compiles to another kernel.
    name = "rotate" if scale_EI is None else "finish" if rotated else "finish.plain"
    default = lambda gpu: default_config(gpu, rows, columns, rotated)  # noqa: E731
    options = dict(launch.get_config(name, y_TI.device, rows, (columns, sums), default))
    block, size = block_size(columns), options.pop("SIZE")
    if not rotated:
        block = min(block, size)
    n = min(block, size)
    parts = triton.cdiv(columns, max(block, size)) * (block // n)
    constants = {"BLOCK": block, "N": n, "G": size // n, "STAGES": n.bit_length() - 1 if rotated else 0}
    constants["AHEAD"] = min(AHEAD, triton.next_power_of_2(sums * block // n))
    tensors = (x_STI.contiguous(), signs_EB, scale_EI, expert_T, y_TI)
    launch.run(_transform, (rows * parts,), *tensors, parts, columns, rows, sums, **constants, **options)
    return y_TI
