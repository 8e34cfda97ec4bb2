"""Measures the settings of kernels on this GPU and writes them into the launch table that comes with the package.

Usage: python scripts/tune.py [--only CASE ...] [--rows N ...] [--limit SECONDS]

For every product of kernel_cases.py and every number of rows the candidates are timed and the fastest is kept, then the
ways to multiply (tiles, look-ups on codes, a decoded weight and cuBLAS) are timed with it. The table is written after
every shape, so a run that is cut off keeps what it has; a later one goes on where settings are missing.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from gpu_clock import copies, seconds
from kernel_cases import CASES, SHAPES, Case, Shape, by_kernel, random_rows

from vqcompress.kernels import fp8, int8, launch, rotate, words

Table = dict[str, dict[str, Any]]
# Settings of one kernel that are tried at one place: each takes a second to compile.
MOST = 24


class Tuner:
    """The table of one device, and the time that is left."""

    def __init__(self, limit: float, again: bool):
        self.device, self.end, self.again = torch.device("cuda"), time.perf_counter() + limit, again
        self.facts = launch.facts(self.device)
        self.file = Path(launch.__file__).parent / launch.table_name(self.facts)
        self.table: Table = json.loads(self.file.read_text()) if self.file.is_file() else {}

    def best(self, kernel: str, rows: int, shape: Shape, options: Iterable[Any], call: Callable[[Any], float]) -> None:
        """Keep the fastest of the options. call: seconds with one; what cannot be launched has none."""
        place = self.table.setdefault(kernel, {})
        if launch.key(rows, shape) in place and not self.again:
            return
        found = []
        for option in options:
            try:
                found.append((call(option), len(found), option))
            except Exception as error:
                # Out of registers or of shared memory: not for this device.
                print(f"  {kernel} {option}: {type(error).__name__}")
        if found:
            took, _, option = min(found)
            place[launch.key(rows, shape)] = option
            print(f"{kernel} {launch.key(rows, shape)}: {took * 1e6:.1f} µs, {option} of {len(found)}", flush=True)

    def try_all(
        self,
        kernel: str,
        rows: int,
        shape: Shape,
        options: Iterable[Any],
        call: Callable[[Any], Any],
        weights: list[Any],
    ) -> None:
        """Keep the fastest settings of a kernel for a call."""

        options = list(options)
        # Every so many of a long list.
        options = options[:: -(-len(options) // MOST)]

        def clock(option: Any) -> float:
            with launch.trying(kernel, option):
                return seconds(call, weights)

        self.best(kernel, rows, shape, options, clock)

    def tune(self, case: Case, shape: Shape, rows: int) -> None:
        """Settings of one product, and of what comes before and after it."""
        x_TI = random_rows(rows, shape[1], self.device, torch.bfloat16)
        number = copies(case.bytes(shape))
        four = [case.parts(shape, self.device, torch.bfloat16, seed) for seed in range(min(number, 4))]
        weights = [{n: p.clone() if n == "codes" else p for n, p in four[k % len(four)].items()} for k in range(number)]
        method: Any = case.method
        if method.name in ("int8", "fp8"):
            kernels: Any = int8 if method.name == "int8" else fp8
            options = kernels.candidates(self.facts, rows, *shape)
            self.try_all(
                f"{method.name}.linear", rows, shape, options, lambda w: by_kernel(case)(x_TI, w, shape), weights
            )
            return
        form = method.form
        if rows <= 1024:
            options = words.candidates(self.facts, rows, shape, form)
            # With what adds the slices up.
            multiply = lambda w: by_kernel(case, "multiply")(x_TI, w, shape)  # noqa: E731
            self.try_all(f"words.{form.name}", rows, shape, options, multiply, weights)
        if method.rotation:
            turn = lambda w: rotate.rotate(x_TI, w["signs"])  # noqa: E731
            options = rotate.candidates(self.facts, rows, shape[1])
            self.try_all("rotate", rows, (1, shape[1]), options, turn, weights[:4])
        self.write()
        ways = ["dequantize"] + (["multiply"] if rows <= 1024 else [])
        ways += ["on_codes"] if form.by_rows and form.bits <= 10 and rows <= 4 else []
        self.best(
            f"words.path.{form.name}",
            rows,
            shape,
            [{"path": way} for way in ways],
            lambda option: seconds(lambda w: by_kernel(case, option["path"])(x_TI, w, shape), weights),
        )

    def write(self) -> None:
        """The table, for all that run after this."""
        self.file.parent.mkdir(exist_ok=True)
        kept = {kernel: dict(sorted(places.items())) for kernel, places in sorted(self.table.items()) if places}
        self.file.write_text(json.dumps(kept, indent=1) + "\n")
        launch.forget()

    def run(self, cases: list[Case], rows: list[int]) -> None:
        """All cases at all shapes, few rows first."""
        shapes = dict.fromkeys(shape for model in SHAPES.values() for shape in model)
        for count in rows:
            for shape in shapes:
                for case in cases:
                    if time.perf_counter() > self.end:
                        print("out of time")
                        return
                    self.tune(case, shape, count)
                    self.write()


def main() -> None:
    """Tune."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="CASE")
    parser.add_argument("--rows", nargs="+", type=int, default=list(launch.BUCKETS))
    parser.add_argument("--limit", type=float, default=540)
    parser.add_argument("--again", action="store_true", help="also what the table has")
    a = parser.parse_args()
    with torch.inference_mode():
        Tuner(a.limit, a.again).run([c for c in CASES if not a.only or c.name in a.only], a.rows)


if __name__ == "__main__":
    main()
