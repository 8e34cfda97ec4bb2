"""Kernels compiled ahead of time for devices that are not here, and the resources that they take.

Also: which configs fit a device, and how many entries of a codebook a program may keep in registers.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import RLock
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import create_function_from_signature

from vqcompress.methods.triton.launch import Call, DeviceProperties

# The architectures of the table of resources.
ARCHS: list[int | str] = [80, 90, 100, "gfx942"]
# Compiled kernel → its resources.
_known: dict[str, Resources] = {}
_parsing = RLock()


class _Source(triton.compiler.ASTSource):
    """Triton's source of a launch, parsed by one thread at a time.

    Threads of Python 3.11 share the depth that its parser counts to: SystemError, wherever a collection of garbage
    lets another one in (CPython issue 106905).
    """

    def hash(self) -> str:
        with _parsing:
            return str(super().hash())

    def make_ir(self, *arguments: Any, **more: Any) -> Any:
        with _parsing:
            return super().make_ir(*arguments, **more)


@dataclass(frozen=True)
class Resources:
    """Of a thread: registers, and bytes on the stack, where spilled registers go. Of a program: shared bytes, warps."""

    registers: int
    stack: int
    shared: int
    warps: int

    def resident(self, gpu: DeviceProperties) -> int:
        """Programs that a multiprocessor holds at once; 0 if not even one.

        NVIDIA's occupancy calculator: a warp has its registers on one of four sides, in units of 8 a thread, and a
        program takes 1 kB of shared memory for the system. At most 32 programs, which only those of a warp could pass.
        """
        of_a_warp = -(-max(self.registers, 1) // 8) * 8 * gpu.warp
        by_registers = gpu.registers // 4 // of_a_warp * 4 // self.warps
        reserved = 1024 if isinstance(gpu.arch, int) else 0
        by_memory = gpu.memory // max(self.shared + reserved, 1) if self.shared <= gpu.shared else 0
        return min(by_registers, by_memory, gpu.threads // (self.warps * gpu.warp), 32)


def source_of(call: Call, arch: int | str) -> tuple[Any, dict[str, Any]]:
    """Triton's source of a recorded launch and its options.

    Specialized by Triton's own steps of a launch, since what it specializes on differs from version to version.
    """
    kernel, backend = call.kernel, triton.compiler.make_backend(target_of(arch))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialized, options = bind(*call.arguments, **call.config)
    parsed, signature, constants, attributes = kernel._pack_args(
        backend, dict(call.config), bound, specialized, options
    )
    return _Source(kernel, signature, constants, attributes), parsed.__dict__


def target_of(arch: int | str) -> GPUTarget:
    """Triton's name of a device."""
    return GPUTarget("cuda", arch, 32) if isinstance(arch, int) else GPUTarget("hip", arch, 64)


def compile_call(call: Call, arch: int | str) -> Any:
    """The compiled kernel of a recorded launch. A launch on such a device then finds it in Triton's cache."""
    source, options = source_of(call, arch)
    return triton.compile(source, target=target_of(arch), options=options)


def resources(compiled: Any) -> Resources:
    """What a compiled kernel takes."""
    if compiled.hash not in _known:
        used = _of_amd(compiled.asm["amdgcn"]) if "amdgcn" in compiled.asm else _of_nvidia(compiled.asm["cubin"])
        _known[compiled.hash] = Resources(*used, compiled.metadata.shared, compiled.metadata.num_warps)
    return _known[compiled.hash]


def _of_amd(text: str) -> list[int]:
    return [int(re.findall(rf"\.{name}:\s*(\d+)", text)[0]) for name in ("vgpr_count", "private_segment_fixed_size")]


def _of_nvidia(binary: bytes) -> list[int]:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(binary)
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin)]
        text = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "LC_ALL": "C"})
    return [int(re.findall(rf"{name}:(\d+)", text.stdout)[0]) for name in ("REG", "STACK")]


def compile_all(launches: Iterable[Sequence[Call]], arch: int | str) -> list[list[Resources] | None]:
    """What the kernels of each row of launches take, compiled at once; None for a row that does not compile."""

    def one(calls: Sequence[Call]) -> list[Resources] | None:
        try:
            return [resources(compile_call(call, arch)) for call in calls]
        except Exception as error:
            # Compilers refuse in as many ways as there are devices: it is no candidate then.
            print(f"  {calls[-1].config}: {type(error).__name__}")
            return None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(one, launches))


def fitting(launches: Sequence[Sequence[Call]], gpu: DeviceProperties) -> list[int]:
    """Which rows of launches fit a device and spill no more than those do that spill least."""
    found = compile_all(launches, gpu.arch)
    spilled = {
        n: max(used.stack for used in row)
        for n, row in enumerate(found)
        if row and all(used.resident(gpu) for used in row)
    }
    return [n for n, stack in spilled.items() if stack == min(spilled.values())]


def hot_entries(splits: Sequence[int], launch_with: Callable[[int], Call], gpu: DeviceProperties) -> int:
    """The most of some numbers of hottest entries that cost nothing: as many programs are resident, and nothing spills.

    splits: numbers of entries, most first. launch_with: such a number → the launch of the product with it. 0 if the
    registers and the shared memory that are left hold none of them. VQ-LLM (arXiv 2503.02236), section 4.
    """
    rows = compile_all([[launch_with(hot)] for hot in (0, *splits)], gpu.arch)
    if rows[0] is None:
        return 0
    (without,) = rows[0]
    for hot, row in zip(splits, rows[1:], strict=True):
        if row and not row[0].stack and row[0].resident(gpu) >= without.resident(gpu):
            return hot
    return 0
