"""Kernels compiled ahead of time, for devices that are not here: what tests and the table of resources look at."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from vqcompress.kernels.launch import Call

TARGETS: dict[int | str, GPUTarget] = {
    80: GPUTarget("cuda", 80, 32),
    90: GPUTarget("cuda", 90, 32),
    100: GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
}
OPTIONS = {"num_warps", "num_stages", "enable_fp_fusion", "num_ctas", "maxnreg", "waves_per_eu"}


@dataclass(frozen=True)
class Resources:
    """Of a thread: registers, and bytes on the stack, where spilled registers go. Of a program: shared bytes."""

    registers: int
    stack: int
    shared: int


def compile_call(call: Call, arch: int | str) -> Any:
    """The compiled kernel of a recorded launch, specialized as the launch would be."""
    names = call.kernel.arg_names
    given = dict(zip(names, call.arguments, strict=False)) | {k: v for k, v in call.settings.items() if k in names}
    constants = {p.name for p in call.kernel.params if p.is_constexpr}
    fixed = {p.name for p in call.kernel.params if p.do_not_specialize}
    unaligned = {p.name for p in call.kernel.params if p.do_not_specialize_on_alignment}
    signature, values, attributes = {}, {}, {}
    for n, name in enumerate(names):
        value = given[name]
        if isinstance(value, Tensor):
            signature[name] = f"*{TYPES[value.dtype]}"
        elif name in constants or value is None or (value == 1 and type(value) is int and name not in fixed):
            signature[name], values[(n,)] = "constexpr", value
            continue
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
        aligned = isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0 and name not in fixed)
        if aligned and name not in unaligned:
            attributes[(n,)] = [["tt.divisibility", 16]]
    source = triton.compiler.ASTSource(call.kernel, signature=signature, constexprs=values, attrs=attributes)
    options = {name: value for name, value in call.settings.items() if name in OPTIONS}
    return triton.compile(source, target=TARGETS[arch], options=options)


def resources(compiled: Any) -> Resources:
    """What a compiled kernel takes."""
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]
        registers, scratch = (
            int(re.findall(rf"\.{name}:\s*(\d+)", text)[0]) for name in ("vgpr_count", "private_segment_fixed_size")
        )
        return Resources(registers, scratch, compiled.metadata.shared)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin)]
        text = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "LC_ALL": "C"})
    registers, stack = (int(re.findall(rf"{name}:(\d+)", text.stdout)[0]) for name in ("REG", "STACK"))
    return Resources(registers, stack, compiled.metadata.shared)
