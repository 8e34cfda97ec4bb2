"""The device and the type that a model runs in, and the memory that it takes."""

from __future__ import annotations

import contextlib
import ctypes
import re
import sys
from pathlib import Path
from typing import Any

import psutil
import torch

from vqcompress.errors import UsageError, VQCompressError
from vqcompress.storage.checkpoint import stored_dtype

# Where a container sees the memory that it may take.
CGROUPS = Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/memory")
# Files of the limit and of what is used, and the line of memory.stat for cache that the system can drop.
CGROUP_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


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
    # Sandboxes such as gVisor have the file without this line. getrusage would also count what the parent held.
    if status.exists() and (found := re.search(r"VmHWM:\s*(\d+) kB", status.read_text())):
        return int(found[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        memory = psutil.Process().memory_info()
        return int(getattr(memory, "peak_wset", memory.rss))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def release_freed_memory() -> None:
    """Return freed memory to the system. glibc keeps it per thread, so that peaks of several threads would add up."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def reset_peak_memory() -> None:
    """Restart the measurement of peak memory, where the system can."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def available_bytes() -> int:
    """Bytes that this process may still take: free memory of the machine, or of its container if that is less."""
    limits = [left for left in map(cgroup_bytes, CGROUPS) if left is not None]
    return min([psutil.virtual_memory().available, *limits])


def cgroup_bytes(folder: Path) -> int | None:
    """Bytes that a control group, of version 1 or 2, leaves; None without a limit. Page cache is no used memory."""
    for limit, used, cache in CGROUP_FILES:
        with contextlib.suppress(OSError, ValueError):
            # "max" where there is no limit.
            left = int((folder / limit).read_text()) - int((folder / used).read_text())
            found = re.search(rf"^{cache} (\d+)$", (folder / "memory.stat").read_text(), re.M)
            return left + (int(found[1]) if found else 0)
    return None


def free_bytes(device: torch.device) -> int:
    """Bytes that this process may still take on a device."""
    return torch.cuda.mem_get_info()[0] if device.type == "cuda" else available_bytes()


def check_fits(needed: int, device: torch.device, job: str, advice: str) -> None:
    """VQCompressError naming the job if a device has fewer free bytes than needed. advice: what the user can do."""
    free = free_bytes(device)
    if needed > free:
        memory = f"the whole model in memory, about {needed / 1e9:.3g} GB, and {free / 1e9:.3g} GB are free"
        raise VQCompressError(f"{job} takes {memory}; {advice}")


def peak_device_bytes() -> int:
    """The most memory that torch has held on a GPU, 0 without one."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
