"""Launching kernels: on which device, with which settings, and what would be launched on a device that is not here.

Settings (block sizes, warps, stages) are measured offline by scripts/tune.py, which writes `launches/DEVICE.json`. No
table ships yet: a shape or device without one gets its kernel's guess. Nothing is ever tuned while a model runs.
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

Settings = dict[str, Any]
Shape = tuple[int, ...]
Table = dict[str, dict[str, Settings]]
# Numbers of rows that settings are measured at; a product of other sizes takes the next larger one's.
BUCKETS = (1, 4, 16, 64, 256, 1024, 4096)


@dataclass(frozen=True)
class Facts:
    """What settings depend on. name: of the device as its maker calls it; arch: 80, 90, 100 … or gfx942.

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
KNOWN: dict[int | str, Facts] = {
    80: Facts("NVIDIA A100", 80, 108, 32, 163 << 10, 164 << 10),
    90: Facts("NVIDIA H200", 90, 132, 32, 227 << 10, 228 << 10),
    100: Facts("NVIDIA B200", 100, 148, 32, 227 << 10, 228 << 10),
    "gfx942": Facts("AMD Instinct MI300X", "gfx942", 304, 64, 64 << 10, 64 << 10, 1 << 17),
    "cpu": Facts("interpreter", 90, 4, 32, 227 << 10, 228 << 10),
}


@dataclass(frozen=True)
class Call:
    """A launch that was recorded instead of made."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    settings: Settings


class _Recorder:
    def __init__(self, facts: Facts):
        self.facts, self.calls = facts, list[Call]()


_recorder: _Recorder | None = None


@contextmanager
def recording(device: int | str | Facts) -> Iterator[list[Call]]:
    """Launchers that are called inside behave as on this device and launch nothing; what they would is collected."""
    global _recorder
    before, _recorder = _recorder, _Recorder(device if isinstance(device, Facts) else KNOWN[device])
    try:
        yield _recorder.calls
    finally:
        _recorder = before


@cache
def _facts(device: torch.device) -> Facts:
    if device.type != "cuda":
        return KNOWN["cpu"]
    properties: Any = torch.cuda.get_device_properties(device)
    arch: int | str = properties.major * 10 + properties.minor
    if torch.version.hip:
        arch = properties.gcnArchName.partition(":")[0]
    shared = getattr(properties, "shared_memory_per_block_optin", 64 << 10)
    memory = max(shared, properties.shared_memory_per_multiprocessor)
    registers, threads = 1 << 17 if torch.version.hip else 1 << 16, properties.max_threads_per_multi_processor
    counts = properties.multi_processor_count, properties.warp_size
    return Facts(properties.name, arch, *counts, shared, memory, registers, threads)


def facts(device: torch.device) -> Facts:
    """What is known of a tensor's device."""
    return _recorder.facts if _recorder else _facts(device)


def table_name(facts: Facts) -> str:
    """The file of a device, below the package of the kernels."""
    return f"launches/{facts.name.replace(' ', '_')}.json"


@cache
def table(facts: Facts) -> Table:
    """What was measured on a device, read once: kernel → `key` → settings. A tuner writes into it."""
    try:
        data = pkgutil.get_data(__package__, table_name(facts))
    except FileNotFoundError:
        return {}
    measured: Table = json.loads(data or b"{}")
    return measured


def key(rows: int, shape: Shape) -> str:
    """Where a table has the settings for x (rows, I) times a weight (O, I), or times those of experts (E, O, I).

    Of experts, rows are those of all together, which go four times as far.
    """
    factor = 4 if len(shape) == 3 else 1
    bucket = next((b for b in BUCKETS if rows <= b * factor), BUCKETS[-1])
    return "x".join(map(str, (bucket * factor, *shape)))


def settings(
    kernel: str, device: torch.device, rows: int, shape: Shape, guess: Callable[[Facts], Settings]
) -> Settings:
    """The settings that were measured on a device at `key(rows, shape)`, or the guess."""
    known = facts(device)
    return table(known).get(kernel, {}).get(key(rows, shape)) or guess(known)


def run(kernel: Any, grid: Sequence[int], *arguments: Any, **settings: Any) -> None:
    """Launch on the device of the first argument, or record the launch.

    A multiplication and an addition may become one unless the settings say `enable_fp_fusion` False.
    """
    settings = {"enable_fp_fusion": True, **settings}
    if _recorder:
        _recorder.calls.append(Call(kernel, tuple(grid), arguments, settings))
    elif all(grid):
        # Triton launches on the current device, which need not be that of the tensors.
        with torch.cuda.device_of(next(a for a in arguments if isinstance(a, Tensor))):
            kernel[tuple(grid)](*arguments, **settings)
