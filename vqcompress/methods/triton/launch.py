"""Launches of kernels: the device, the config, and the recording of launches for a device that is not here.

Configs (block sizes, warps, stages) are measured offline by scripts/tune.py, which writes `launches/DEVICE.json`. No
table ships yet: a shape or device without an entry gets its kernel's default. Nothing is tuned while a model runs.
"""

from __future__ import annotations

import json
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

Config = dict[str, Any]
Shape = tuple[int, ...]
Table = dict[str, dict[str, Config]]
# Numbers of rows that configs are measured at; a product of other sizes takes the next larger one's.
BUCKETS = (1, 4, 16, 64, 256, 1024, 4096)


@dataclass(frozen=True)
class DeviceProperties:
    """Facts about a device that configs depend on. name: its maker's name for it; arch: 80, 90, 100 … or gfx942.

    processors: multiprocessors or compute units. warp: threads of a warp. shared: bytes that one program may have.
    Of a multiprocessor: memory, shared bytes; registers; threads.
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
        """Whether matrix products read float8_e4m3fn (gfx942 has another FP8)."""
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


class _Recorder:
    def __init__(self, gpu: DeviceProperties):
        self.gpu, self.calls = gpu, list[Call]()


_recorder: _Recorder | None = None


@contextmanager
def recording(device: int | str | DeviceProperties) -> Iterator[list[Call]]:
    """Launchers that are called inside behave as on this device and launch nothing; what they would is collected."""
    global _recorder
    before, _recorder = _recorder, _Recorder(device if isinstance(device, DeviceProperties) else DEVICES[device])
    try:
        yield _recorder.calls
    finally:
        _recorder = before


@cache
def _properties(device: torch.device) -> DeviceProperties:
    if device.type != "cuda":
        return DEVICES["cpu"]
    properties: Any = torch.cuda.get_device_properties(device)
    arch: int | str = properties.major * 10 + properties.minor
    if torch.version.hip:
        arch = properties.gcnArchName.partition(":")[0]
    shared = getattr(properties, "shared_memory_per_block_optin", 64 << 10)
    memory = max(shared, properties.shared_memory_per_multiprocessor)
    registers, threads = 1 << 17 if torch.version.hip else 1 << 16, properties.max_threads_per_multi_processor
    counts = properties.multi_processor_count, properties.warp_size
    return DeviceProperties(properties.name, arch, *counts, shared, memory, registers, threads)


def device_properties(device: torch.device) -> DeviceProperties:
    """The properties of a tensor's device, or of the one that launches are recorded for."""
    return _recorder.gpu if _recorder else _properties(device)


def table_name(gpu: DeviceProperties) -> str:
    """The file of a device, below the package of the kernels."""
    return f"launches/{gpu.name.replace(' ', '_')}.json"


@cache
def table(gpu: DeviceProperties) -> Table:
    """The configs measured on a device, read once: kernel → `key` → config. The tuner writes into it."""
    try:
        data = pkgutil.get_data(__package__, table_name(gpu))
    except FileNotFoundError:
        return {}
    measured: Table = json.loads(data or b"{}")
    return measured


def key(rows: int, shape: Shape) -> str:
    """Where a table has the config for x (rows, I) times a weight (O, I), or times those of experts (E, O, I).

    Of experts, rows are those of all together, which go four times as far.
    """
    factor = 4 if len(shape) == 3 else 1
    bucket = next((b for b in BUCKETS if rows <= b * factor), BUCKETS[-1])
    return "x".join(map(str, (bucket * factor, *shape)))


def get_config(
    kernel: str, device: torch.device, rows: int, shape: Shape, default: Callable[[DeviceProperties], Config]
) -> Config:
    """The config measured on a device at `key(rows, shape)`, or the kernel's default."""
    known = device_properties(device)
    return table(known).get(kernel, {}).get(key(rows, shape)) or default(known)


def run(kernel: Any, grid: Sequence[int], *arguments: Any, **config: Any) -> None:
    """Launch on the device of the first argument, or record the launch.

    A multiplication and an addition may become one unless the config has `enable_fp_fusion` False.
    """
    config = {"enable_fp_fusion": True, **config}
    if _recorder:
        _recorder.calls.append(Call(kernel, tuple(grid), arguments, config))
    elif all(grid):
        # Triton launches on the current device, which need not be that of the tensors.
        with torch.cuda.device_of(next(a for a in arguments if isinstance(a, Tensor))):
            kernel[tuple(grid)](*arguments, **config)
