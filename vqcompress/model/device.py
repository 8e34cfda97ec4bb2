"""The device and the type that a model runs in, and the memory that it takes."""

from __future__ import annotations

import contextlib
import ctypes
import re
import resource
import sys
from pathlib import Path
from typing import Any

import psutil
import torch

from vqcompress.errors import UsageError, VQCompressError
from vqcompress.storage.checkpoint import stored_dtype


def choose_device(name: str) -> torch.device:
    """The device for `auto`, `cpu` or `cuda` (`auto` takes a GPU if there is one); UsageError if it is not there."""
    if name not in ("auto", "cpu", "cuda"):
        raise UsageError(f"--device {name}: choose auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no GPU here")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


def model_dtype(config: dict[str, Any], device: torch.device) -> torch.dtype:
    """The type to compute in: float32 on a CPU, the checkpoint's own 16-bit type on a GPU."""
    return torch.float32 if device.type == "cpu" else stored_dtype(config)


def peak_rss_bytes() -> int:
    """The peak resident set size of this process, since the last `reset_peak_memory` where the system can reset it."""
    status = Path("/proc/self/status")
    if status.exists():
        # getrusage would also count what the parent held when it forked.
        return int(re.findall(r"VmHWM:\s*(\d+) kB", status.read_text())[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def release_freed_memory() -> None:
    """Return freed memory to the system. glibc keeps it per thread, so that peaks of several threads would add up."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def reset_peak_memory() -> None:
    """Restart the measurement of peak memory, where the system can."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def available_bytes() -> int:
    """Bytes that this process may still take: free memory of the machine, or of its container if that is less."""
    limits = [psutil.virtual_memory().available]
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):
        # "max" where there is no limit.
        limits.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return min(limits)


def check_fits(needed: int, device: torch.device, job: str, advice: str) -> None:
    """VQCompressError naming the job if a device has fewer free bytes than needed. advice: what the user can do."""
    free = torch.cuda.mem_get_info()[0] if device.type == "cuda" else available_bytes()
    if needed > free:
        memory = f"the whole model in memory, about {needed / 1e9:.3g} GB, and {free / 1e9:.3g} GB are free"
        raise VQCompressError(f"{job} takes {memory}; {advice}")


def peak_device_bytes() -> int:
    """The most memory that torch has held on a GPU, 0 without one."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
