"""Launch configs of kernels that are worth measuring, and a way to force one: for tune.py and for tests.

Shape legend: T rows, O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any
from unittest import mock

import triton

from vqcompress.kv_cache import kernel as kv
from vqcompress.methods.fp8 import kernel as fp8
from vqcompress.methods.hadamard import block_size
from vqcompress.methods.int8 import kernel as int8
from vqcompress.methods.triton import launch, rotate
from vqcompress.methods.triton import tiles as tiling
from vqcompress.methods.triton.launch import Config, DeviceProperties
from vqcompress.methods.vq import kernel_multiply as multiply
from vqcompress.methods.vq import viterbi_kernel as viterbi
from vqcompress.methods.vq.format import Format
from vqcompress.methods.vq.kernel_decode import tile_config


@contextmanager
def trying(kernel: str, config: Config | None) -> Iterator[None]:
    """Context in which a kernel is launched with this config, whatever its arguments; None: with its usual one."""
    ask = launch.get_config

    def chosen(asked: str, *place: Any) -> Config:
        return config if config and asked == kernel else ask(asked, *place)

    with mock.patch.object(launch, "get_config", chosen):
        yield


def distinct(*found: Iterable[Config]) -> list[Config]:
    """All configs, each once, in their order."""
    listed = [config for some in found for config in some]
    return [config for n, config in enumerate(listed) if config not in listed[:n]]


def _shapes(
    gpu: DeviceProperties, rows: int, sides_O: tuple[int, ...], per_thread: int
) -> Iterator[tuple[int, int, int]]:
    """(BLOCK_T, BLOCK_O, warps) with at most `per_thread` accumulators of a thread."""
    height = max(16, triton.next_power_of_2(rows))
    for block_T, block_O, warps in product((16, 32, 64, 128, 256), sides_O, (4, 8)):
        accumulators = block_T * block_O // (warps * gpu.warp)
        # Tensor cores from Hopper on want 64 rows, even if most are not there.
        high = block_T == height or 64 <= block_T <= max(64, height)
        most = per_thread // (1 if tiling.wide(gpu) else 2)
        if high and accumulators <= most and (warps == 4 or accumulators >= 32):
            yield block_T, block_O, warps


def _splits(
    gpu: DeviceProperties, block: tuple[int, int], rows: int, shape: tuple[int, int], block_I: int
) -> list[int]:
    """Numbers of splits: 1, and those for one or two programs on each processor. block: rows and outputs."""
    tiles = triton.cdiv(rows, block[0]) * triton.cdiv(shape[0], block[1])
    return sorted({1, *(tiling.split_for(gpu, n * tiles, rows, shape[1], block_I) for n in (1, 2))})


def of_int8(gpu: DeviceProperties, rows: int, outputs: int, inputs: int) -> Iterator[Config]:
    """Of INT8 products, all of which fit the shared memory; SPLIT is 1 for experts."""
    for block_T, block_O, warps in _shapes(gpu, rows, (32, 64, 128, 256), 128):
        for block_I in (128, 256):
            splits = _splits(gpu, (block_T, block_O), rows, (outputs, inputs), block_I)
            most = min(5, tiling.most_stages(gpu, (block_T + block_O) * block_I))
            for stages, split in product(range(2, most + 1), splits):
                yield int8.make_config(block_T, block_O, block_I, split, warps, stages)


def of_fp8(gpu: DeviceProperties, rows: int, outputs: int, inputs: int) -> Iterator[Config]:
    """Of FP8 products, as those of INT8."""
    for block_T, block_O, warps in _shapes(gpu, rows, (32, 64, 128), 64):
        splits = _splits(gpu, (block_T, block_O), rows, (outputs, inputs), fp8.SIDE)
        most = min(5, fp8.fitting_stages(gpu, block_T, block_O))
        for stages, split in product(range(2, most + 1), splits):
            yield fp8.make_config(block_T, block_O, split, warps, stages)


TILES = ((16, 128), (16, 256), (32, 128), (32, 256), (64, 64), (64, 128), (128, 64))


def of_multiply(
    gpu: DeviceProperties, rows: int, shape: tuple[int, int], form: Format, experts: int, element: int
) -> list[Config]:
    """Of `multiply` without hot entries, the default first; also with half as many slices."""
    heights: list[Config] = [{}]
    if rows > 1 or experts:
        most = max(16, triton.next_power_of_2(-(-rows // experts) if experts else rows))
        heights = [{"BT": height} for height in sorted({16, min(64, most), min(128, most)})]
    tried = [multiply.default_config(gpu, rows, shape, form, experts, element)]
    for height, (across, along), warps in product(heights, TILES, (4, 8)):
        # With 8 to 64 values of a thread.
        if 8 <= across * along // (32 * warps) <= 64:
            blocks = height | tile_config(form, across, along, warps)
            config = multiply.make_config(gpu, rows, shape, form, experts, blocks)
            tried += [config | {"SPLIT": split} for split in sorted({config["SPLIT"], max(1, config["SPLIT"] // 2)})]
    return distinct(tried)


def hot_entries(form: Format) -> list[int]:
    """Numbers of hottest entries that `gemv` may keep, most first: powers of two from 8 on."""
    # Codewords with idle lanes leave no registers for it, and a trellis has no entries.
    if not form.by_rows or form.weights != triton.next_power_of_2(form.weights):
        return []
    return [1 << k for k in range(form.bits, 2, -1)]


def of_dequantize(form: Format) -> list[Config]:
    """Of `dequantize`, the default first."""
    sizes = product((8, 16, 32, 64), (64, 128, 256, 512), (4, 8))
    # With 8 to 64 values of a thread.
    tried = [tile_config(form, a, along, w) for a, along, w in sizes if 256 <= a * along // w <= 2048]
    return distinct([tile_config(form, 16, 256, 4)], tried)


def of_rotate(gpu: DeviceProperties, columns: int) -> Iterator[Config]:
    """Of `rotate.rotate` and `rotate.finish`; of a large block at most 8 programs."""
    block = block_size(columns)
    for size in (256, 512, 1024, 2048, 4096, 8192):
        if block <= 8 * size <= 8 * max(rotate.LARGE, block):
            tried = (rotate.make_config(gpu, size, numbers) for numbers in (32, 16, 8))
            yield from {config["num_warps"]: config for config in tried}.values()


def of_attend(gpu: DeviceProperties, shape: tuple[int, ...], batch: int) -> Iterator[Config]:
    """Of `kv.attend`, its default config first."""
    yield kv.default_config(gpu, shape, batch)
    for size, threads in product((2048, 4096, 8192, 16384), (64, 128, 256)):
        if 16 <= size // threads <= 64:
            yield kv.default_config(gpu, shape, batch, size, threads)


def of_walks(gpu: DeviceProperties, states: int, k: int) -> list[Config]:
    """Of `viterbi.walks`, the guess first."""
    tiles, most = (viterbi.TILE, viterbi.TILE - 1, viterbi.TILE + 1), viterbi.OF_A_THREAD
    sizes = product(tiles if states > viterbi.IN_REGISTERS else (states,), (most, most // 2, most * 2))
    tried = [viterbi.make_config(gpu, states, k, *size) for size in sizes if 1 << k <= size[1] and 2 * k <= size[0]]
    return distinct(config for config in tried if config["num_warps"] * gpu.warp <= 1024)


def of_nearest(gpu: DeviceProperties, count: int, length: int) -> Iterator[Config]:
    """Of `nearest.best`."""
    for v, tile in product((1, 2, 4, 8, 16), (32, 64, 128, 256, 512)):
        if v * length <= 128 and v * tile <= 4096 and tile <= max(32, 2 * count):
            yield from ({"V": v, "E": tile, "num_warps": warps} for warps in (1, 2, 4, 8) if warps * gpu.warp <= tile)
