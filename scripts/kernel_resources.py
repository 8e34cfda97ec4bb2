"""Registers, shared memory and spills of every kernel, compiled ahead of time for GPUs that need not be here.

Usage: python scripts/kernel_resources.py [--json FILE] [--markdown FILE]

A kernel is compiled as it would be launched for x (rows, 4096) times a weight (4096, 4096) in bfloat16, with the
config of the launch tables or, where there are none, the guess; of caches of keys and values, rows are those of a
batch. A stack above 0 means spilled registers.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ahead
import torch
from kernel_cases import CACHES, CASES, by_kernel, random_rows

from vqcompress.kv_cache import kernel as kv
from vqcompress.methods.fp8 import kernel as fp8
from vqcompress.methods.int8 import kernel as int8
from vqcompress.methods.triton import launch
from vqcompress.methods.vq import kernel_nearest as nearest
from vqcompress.methods.vq import viterbi_kernel as viterbi
from vqcompress.methods.vq.kernel_multiply import multiply

META, SHAPE = torch.device("meta"), (4096, 4096)


def calls_of(arch: int | str) -> Iterator[tuple[str, int, launch.Call]]:
    """What is launched, for what, and for how many rows."""
    for case in CASES:
        parts = case.parts(SHAPE, META, torch.bfloat16)
        for rows in (1, 16, 512):
            x_TI = random_rows(rows, SHAPE[1], META, torch.bfloat16)
            with launch.recording(arch) as calls:
                by_kernel(case)(x_TI, parts, SHAPE)
            yield from ((case.name, rows, call) for call in calls)
        method: Any = case.method
        experts, x_SI = 64, random_rows(512, SHAPE[1], META, torch.bfloat16)
        ends_E = torch.empty(experts, dtype=torch.int32, device=META)
        stacked = {name: part.expand(experts, *part.shape) for name, part in parts.items()}
        with launch.recording(arch) as calls:
            if method.name == "int8":
                int8.grouped(x_SI, ends_E, stacked["codes"], stacked["scale"])
            elif method.name == "fp8":
                fp8.grouped(x_SI, ends_E, stacked["codes"], stacked["scale"], False)
            else:
                multiply(x_SI, stacked["codes"], stacked["table"], SHAPE[0], method.form, ends_E)
        yield from ((f"{case.name}, 64 experts", 512, call) for call in calls)
    for cache in CACHES:
        with launch.recording(arch) as calls:
            kv.attend(*cache.parts(META, torch.bfloat16))
        turned = ", turned" if cache.turned else ""
        name = f"{cache.tokens} tokens, {cache.queries} / {cache.heads} heads of {cache.channels}, d {cache.d}{turned}"
        yield from ((name, cache.batch, call) for call in calls)
    with launch.recording(arch) as calls:
        for states in (12, 14, 16):
            viterbi.walks(torch.empty((16, 256), device=META), torch.empty(1 << states, device=META), states, 2, 32)
        nearest.best(torch.empty((4096, 4), device=META), torch.empty((256, 4), device=META), 1)
    yield from (("search", 0, call) for call in calls)


def rows_of(arch: int | str) -> list[dict[str, Any]]:
    """Every kernel, once for each of its config."""
    found: dict[str, dict[str, Any]] = {}
    for purpose, rows, call in calls_of(arch):
        name = f"{call.kernel.__module__.rpartition('.')[2]}.{call.kernel.__name__.strip('_')}"
        config = {k: v for k, v in call.config.items() if isinstance(v, int | str | tuple)}
        key = f"{name} {sorted(config.items())}"
        if key not in found:
            used = ahead.resources(ahead.compile_call(call, arch))
            gpu = {"registers": used.registers, "stack": used.stack, "shared": used.shared}
            found[key] = {"case": purpose, "rows": rows, "kernel": name, "arch": arch, **gpu, "config": config}
    return list(found.values())


def main() -> None:
    """Compile, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    a = parser.parse_args()
    table = [row for arch in ahead.ARCHS for row in rows_of(arch)]
    lines = ["| kernel | of | rows | device | registers | stack | shared bytes | warps |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for row in table:
        arch = row["arch"] if isinstance(row["arch"], str) else f"sm_{row['arch']}"
        used = f"{row['registers']} | {row['stack']} | {row['shared']} | {row['config'].get('num_warps', 4)}"
        lines.append(f"| {row['kernel']} | {row['case']} | {row['rows']} | {arch} | {used} |")
    print("\n".join(lines))
    if a.markdown:
        a.markdown.write_text("\n".join(lines) + "\n")
    if a.json:
        a.json.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
