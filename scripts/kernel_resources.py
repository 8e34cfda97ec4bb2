"""Registers, shared memory and spills of every kernel, compiled ahead of time for GPUs that need not be here.

Usage: python scripts/kernel_resources.py [--json FILE] [--markdown FILE]

A kernel is compiled as it would be launched for x (rows, 4096) times a weight (4096, 4096) in bfloat16, with the
settings of the launch tables or, where there are none, the guess. A stack above 0 means spilled registers.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import ahead
import torch
from kernel_cases import CASES, by_kernel, random_rows

from vqcompress.kernels import launch

META, SHAPE = torch.device("meta"), (4096, 4096)


def rows_of(arch: int | str) -> list[dict[str, Any]]:
    """Every kernel that the cases launch, once for each of its settings."""
    found: dict[str, dict[str, Any]] = {}
    for case in CASES:
        parts = case.parts(SHAPE, META, torch.bfloat16)
        for rows in (1, 16, 512):
            with launch.recording(arch) as calls:
                by_kernel(case)(random_rows(rows, SHAPE[1], META, torch.bfloat16), parts, SHAPE)
            for call in calls:
                name = f"{call.kernel.__module__.rpartition('.')[2]}.{call.kernel.__name__.strip('_')}"
                settings = {k: v for k, v in call.settings.items() if isinstance(v, int | str)}
                key = f"{name} {sorted(settings.items())}"
                if key not in found:
                    used = ahead.resources(ahead.compile_call(call, arch))
                    facts = {"registers": used.registers, "stack": used.stack, "shared": used.shared}
                    found[key] = {"case": case.name, "rows": rows, "kernel": name, "arch": arch, **facts}
                    found[key]["settings"] = settings
    return list(found.values())


def main() -> None:
    """Compile, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    a = parser.parse_args()
    table = [row for arch in ahead.TARGETS for row in rows_of(arch)]
    lines = ["| kernel | of | rows | device | registers | stack | shared bytes | warps |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for row in table:
        arch = row["arch"] if isinstance(row["arch"], str) else f"sm_{row['arch']}"
        used = f"{row['registers']} | {row['stack']} | {row['shared']} | {row['settings'].get('num_warps', 4)}"
        lines.append(f"| {row['kernel']} | {row['case']} | {row['rows']} | {arch} | {used} |")
    print("\n".join(lines))
    if a.markdown:
        a.markdown.write_text("\n".join(lines) + "\n")
    if a.json:
        a.json.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
