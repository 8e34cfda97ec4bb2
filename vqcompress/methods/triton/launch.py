"""Launches of Triton kernels: the launch settings, the device, and recording launches for another device.

The settings of a launch ("config": block sizes, warps, stages) come from `launches/DEVICE.json`, which scripts/tune.py
measures and writes. No table ships yet: without an entry, a kernel gets the `default_config` that stands beside it in
its own file. Nothing is tuned while a model runs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

Config = dict[str, Any]
Shape = tuple[int, ...]
Table = dict[str, dict[str, Config]]
# Numbers of rows that configs are measured at; a product with another number takes the next larger one's.
BUCKETS = (1, 4, 16, 64, 256, 1024, 4096)


@dataclass(frozen=True)
class DeviceProperties:
    """Properties of a device that configs depend on.

    name: the maker's. arch: 80, 90, 100 … or gfx942. processors: multiprocessors or compute units. warp: threads of a
    warp. shared: bytes of shared memory that one program may have. Of a multiprocessor: memory, bytes of shared memory;
    registers; threads.
    """

    name: str
    arch: int | str
    processors: int
    warp: int
    shared: int
    memory: int
    registers: int = 1 << 16
    threads: int = 2048

    @property
    def has_fp8(self) -> bool:
        """Whether matrix units read float8_e4m3fn (gfx942 has another FP8)."""
        return isinstance(self.arch, int) and self.arch >= 89


# Devices that kernels are compiled for ahead of time, and a stand-in for Triton's interpreter.
DEVICES: dict[int | str, DeviceProperties] = {
    80: DeviceProperties("NVIDIA A100", 80, 108, 32, 163 << 10, 164 << 10),
    90: DeviceProperties("NVIDIA H200", 90, 132, 32, 227 << 10, 228 << 10),
    100: DeviceProperties("NVIDIA B200", 100, 148, 32, 227 << 10, 228 << 10),
    "gfx942": DeviceProperties("AMD Instinct MI300X", "gfx942", 304, 64, 64 << 10, 64 << 10, 1 << 17),
    "cpu": DeviceProperties("interpreter", 90, 4, 32, 227 << 10, 228 << 10),
}


@dataclass(frozen=True)
class Call:
    """A launch that was recorded instead of made."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    config: Config


# The device that launches are recorded for, and the launches so far.
_recording: tuple[DeviceProperties, list[Call]] | None = None


@contextmanager
def recording(device: int | str | DeviceProperties) -> Iterator[list[Call]]:
    """Within the context, launchers behave as on this device and launch nothing; yields the list of their launches."""
    global _recording
    before = _recording
    _recording = device if isinstance(device, DeviceProperties) else DEVICES[device], []
    try:
        yield _recording[1]
    finally:
        _recording = before


@cache
def _properties(device: torch.device) -> DeviceProperties:
    if device.type != "cuda":
        return DEVICES["cpu"]
    found: Any = torch.cuda.get_device_properties(device)
    amd = bool(torch.version.hip)
    arch = found.gcnArchName.partition(":")[0] if amd else found.major * 10 + found.minor
    shared = 64 << 10 if amd else found.shared_memory_per_block_optin
    sizes = found.multi_processor_count, found.warp_size, shared, max(shared, found.shared_memory_per_multiprocessor)
    return DeviceProperties(found.name, arch, *sizes, 1 << (17 if amd else 16), found.max_threads_per_multi_processor)


def device_properties(device: torch.device) -> DeviceProperties:
    """The properties of a tensor's device, or of the one that launches are recorded for."""
    return _recording[0] if _recording else _properties(device)


def table_file(gpu: DeviceProperties) -> Any:
    """The packaged file of the configs measured on a device."""
    return files(__package__) / "launches" / f"{gpu.name.replace(' ', '_')}.json"


@cache
def table(gpu: DeviceProperties) -> Table:
    """The configs measured on a device, read once: kernel → `key` → config. The tuner writes into it."""
    return json.loads(table_file(gpu).read_text()) if table_file(gpu).is_file() else {}


def key(rows: int, shape: Shape) -> str:
    """The table's key for x (rows, I) times a weight (O, I) or those of experts (E, O, I).

    rows: of all experts together, whose buckets are four times as large.
    """
    factor = 4 if len(shape) == 3 else 1
    bucket = next((b for b in BUCKETS if rows <= b * factor), BUCKETS[-1])
    return "x".join(map(str, (bucket * factor, *shape)))


def get_config(
    kernel: str, device: torch.device, rows: int, shape: Shape, default: Callable[[DeviceProperties], Config]
) -> Config:
    """The config measured on a device at `key(rows, shape)`, or the kernel's default."""
    gpu = device_properties(device)
    return table(gpu).get(kernel, {}).get(key(rows, shape)) or default(gpu)


def run(kernel: Any, grid: Sequence[int], *arguments: Any, **config: Any) -> None:
    """Launch on the device of the first tensor, or record the launch.

    A multiplication and an addition may be fused unless the config has `enable_fp_fusion` False.
    """
    config = {"enable_fp_fusion": True, **config}
    if _recording:
        _recording[1].append(Call(kernel, tuple(grid), arguments, config))
    elif all(grid):
        # Triton launches on the current device, which may be another than that of the tensors.
        with torch.cuda.device_of(next(a for a in arguments if isinstance(a, Tensor))):
            kernel[tuple(grid)](*arguments, **config)
