"""Every kernel against cuBLAS in bfloat16 at the layer shapes of known models; a GPU, or --interpret for a dry run.

Usage: python scripts/bench_kernels.py [--models NAME ...] [--only CASE ...] [--rows N ...] [--json FILE]
       python scripts/bench_kernels.py --interpret

Prints the time of a call, its ratio to cuBLAS (above 1 is faster), and which share it is of what this GPU was measured
to move or multiply at best. What does not agree with the reference gets no time. With --interpret tiny shapes run on
the CPU in Triton's interpreter, for their correctness alone. --json appends a line per figure.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from gpu_clock import LEAST, copies, seconds
from kernel_cases import (
    CASES,
    EXPERTS,
    ROWS,
    SHAPES,
    TINY,
    TINY_EXPERTS,
    Case,
    Shape,
    by_kernel,
    grouped_by_kernel,
    random_rows,
    reference,
)

from vqcompress.methods import PackedTensors
from vqcompress.methods.base import by_expert
from vqcompress.methods.triton import launch

# Root mean square of the error of a right result, relative: operands are rounded to the type of x, as is the result.
TOLERANCE = {torch.bfloat16: 1.5e-2, torch.float32: 1e-4}


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative root mean square; infinite for NaN."""
    ratio = ((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)).item()
    return ratio if ratio == ratio else float("inf")


class Figures:
    """Figures of one device, printed as they come."""

    def __init__(self, a: argparse.Namespace):
        self.a, self.wrong, self.start = a, list[str](), time.perf_counter()
        self.device = torch.device("cpu" if a.interpret else "cuda")
        self.dtype = torch.float32 if a.interpret else torch.bfloat16
        self.name, self.bandwidth, self.dense = (
            launch.device_properties(self.device).name,
            1.0,
            dict[tuple[int, ...], float](),
        )
        self.facts = {"device": self.name, "torch": torch.__version__, "triton": triton.__version__}
        if not a.interpret:
            big = torch.zeros(1 << 30, device=self.device)
            self.bandwidth = big.numel() * 4 / seconds(torch.sum, [big] * LEAST)
            print(f"{self.name}: reads {self.bandwidth / 1e12:.2f} TB/s")

    def right(self, label: str, wrong: float) -> bool:
        """Whether an error is small enough; said where there is no time to print, or where it is not."""
        right = wrong <= TOLERANCE[self.dtype]
        if not right:
            self.wrong.append(label)
        if self.a.interpret or not right:
            print(f"{label}: {'right' if right else 'WRONG'}, relative error {wrong:.1e}", flush=True)
        return right

    def write(self, figure: dict[str, Any]) -> None:
        """A line of the file, if there is one."""
        if self.a.json:
            with self.a.json.open("a", encoding="utf-8") as file:
                file.write(json.dumps(figure | self.facts) + "\n")

    def work(self, jobs: list[Callable[[], None]]) -> None:
        """One after the other, until the time is over; ends the process if anything was wrong."""
        for done, job in enumerate(jobs):
            if time.perf_counter() - self.start > self.a.limit:
                print(f"{len(jobs) - done} of {len(jobs)} not reached within {self.a.limit:.0f} s")
                break
            job()
        if self.wrong:
            sys.exit(f"{len(self.wrong)} are wrong: {'; '.join(self.wrong[:5])}")


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line with what every benchmark of kernels takes; starts anew in the interpreter if asked to."""
    parser.add_argument("--interpret", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--limit", type=float, default=300, help="seconds; what is not reached by then is left out")
    a = parser.parse_args()
    if a.interpret and os.environ.get("TRITON_INTERPRET") != "1":
        # Triton reads it when it is imported.
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "TRITON_INTERPRET": "1"})
    return a


class Bench(Figures):
    """Products."""

    def __init__(self, a: argparse.Namespace):
        super().__init__(a)
        self.peak = 1.0
        if not a.interpret:
            square = torch.randn(8192, 8192, device=self.device, dtype=torch.bfloat16)
            self.peak = 2 * 8192**3 / seconds(lambda x: x @ square, [square] * LEAST)
            print(f"{self.name}: multiplies bfloat16 at {self.peak / 1e12:.0f} TFLOP/s")

    def clock(self, call: Callable[[Any], Any], arguments: list[Any]) -> float:
        """Seconds of a call; 0 in the interpreter."""
        return 0.0 if self.a.interpret else seconds(call, arguments)

    def cublas(self, rows: int, shape: Shape, experts: int = 1) -> float:
        """Seconds of the dense product, of a batched one for experts."""
        key = (rows, *shape, experts)
        if key not in self.dense and not self.a.interpret:
            size = (experts, *shape)
            x = random_rows(experts * rows, shape[1], self.device, self.dtype).view(experts, rows, shape[1])
            weights = [
                torch.randn(size, device=self.device, dtype=self.dtype)
                for _ in range(copies(2 * torch.Size(size).numel()))
            ]
            call = (lambda w: x[0] @ w[0].T) if experts == 1 else (lambda w: torch.bmm(x, w.transpose(1, 2)))
            self.dense[key] = self.clock(call, weights)
        return self.dense.get(key, 0.0)

    def products(self, case: Case, model: str, shape: Shape, rows: int) -> None:
        """One case at one shape."""
        x_TI = random_rows(rows, shape[1], self.device, self.dtype)
        parts = case.parts(shape, self.device, self.dtype)
        run = by_kernel(case)
        label = f"{case.name}, {rows} rows, {model} {shape[0]} × {shape[1]}"
        if not self.right(label, error(run(x_TI, parts, shape), reference(case, x_TI, parts, shape))):
            return
        weights = [case.parts(shape, self.device, self.dtype, seed) for seed in range(copies(case.bytes(shape)))]
        if self.a.interpret:
            weights = weights[:1]
        took = self.clock(lambda p: run(x_TI, p, shape), weights)
        self._figure(label, case, model, shape, rows, took, self.cublas(rows, shape), case.bytes(shape))

    def library(self, model: str, shape: Shape, rows: int) -> None:
        """What torch itself has for bytes: `_int_mm` and `_scaled_mm`, without the scales of activations."""
        if rows <= 16 or shape[0] % 16 or shape[1] % 16:
            return
        rows_i8 = torch.randint(-127, 128, (rows, shape[1]), device=self.device, dtype=torch.int8)
        weight_i8 = torch.randint(-127, 128, shape, device=self.device, dtype=torch.int8)
        calls = {"torch._int_mm": (lambda w: torch._int_mm(rows_i8, w.T), weight_i8)}
        if launch.device_properties(self.device).has_fp8:
            rows_f8, weight_f8 = rows_i8.to(torch.float8_e4m3fn), weight_i8.to(torch.float8_e4m3fn)
            one = torch.ones((), device=self.device)
            scaled = {"scale_a": one, "scale_b": one, "out_dtype": self.dtype}
            calls["torch._scaled_mm"] = (lambda w: torch._scaled_mm(rows_f8, w.T, **scaled), weight_f8)
        for name, (call, weight) in calls.items():
            label = f"{name}, {rows} rows, {model} {shape[0]} × {shape[1]}"
            took = self.clock(call, [weight.clone() for _ in range(copies(shape[0] * shape[1]))])
            self._figure(label, None, model, shape, rows, took, self.cublas(rows, shape), shape[0] * shape[1])

    def experts(self, case: Case, model: str, size: tuple[int, int, int], chosen: int, rows: int) -> None:
        """The product of a mixture: rows · chosen rows, spread over the experts as evenly as can be."""
        count, *rest = size
        shape, total = (rest[0], rest[1]), rows * chosen
        ends_E = (torch.arange(1, count + 1, device=self.device) * total // count).int()
        x_SI = random_rows(total, shape[1], self.device, self.dtype)
        stacked, grouped = case.stacked(count, shape, self.device, self.dtype), grouped_by_kernel(case)

        def one_by_one(x_TI: torch.Tensor, e: int) -> torch.Tensor:
            return reference(case, x_TI, {name: part[e] for name, part in stacked.items()}, shape)

        def run(parts: PackedTensors) -> torch.Tensor:
            return grouped(x_SI, ends_E, parts)

        expected = by_expert(x_SI.float(), ends_E, shape[0], one_by_one)
        label = f"{case.name}, {rows} tokens, {model}: {count} experts of {shape[0]} × {shape[1]}"
        if self.right(label, error(run(stacked), expected)):
            # The launch of a graph is shared by a few calls; a mixture is larger than any cache.
            took = self.clock(run, [stacked] * LEAST)
            used = min(count, total)
            dense = self.cublas(max(1, total // used), shape, used)
            self._figure(label, case, model, shape, total, took, dense, case.bytes(shape) * used)

    def _figure(
        self, label: str, case: Case | None, model: str, shape: Shape, rows: int, took: float, dense: float, size: int
    ) -> None:
        if self.a.interpret:
            return
        moved, multiplied = size / took / self.bandwidth, 2 * rows * shape[0] * shape[1] / took / self.peak
        shares = f"{moved:.0%} of bandwidth, {multiplied:.0%} of peak"
        print(f"{label}: {took * 1e6:.1f} µs, {dense / took:.2f} × cuBLAS, {shares}", flush=True)
        figure = {"figure": label, "case": case.name if case else label.partition(",")[0], "model": model}
        figure |= {"rows": rows, "shape": shape, "microseconds": round(took * 1e6, 2), "ratio": round(dense / took, 3)}
        figure |= {"of_bandwidth": round(moved, 3), "of_peak": round(multiplied, 3)}
        self.write(figure)

    def run(self) -> None:
        """All that was asked for, what matters most first: few rows, then many."""
        shapes = TINY if self.a.interpret else SHAPES
        mixtures = TINY_EXPERTS if self.a.interpret else EXPERTS
        cases = [case for case in CASES if not self.a.only or case.name in self.a.only]
        jobs: list[Callable[[], None]] = []
        for rows in self.a.rows or ((1, 3) if self.a.interpret else ROWS):
            for model in shapes:
                for shape in shapes[model] if not self.a.models or model in self.a.models else ():
                    jobs += [lambda c=c, m=model, s=shape, r=rows: self.products(c, m, s, r) for c in cases]
                    if not self.a.interpret:
                        jobs.append(lambda m=model, s=shape, r=rows: self.library(m, s, r))
            for model, (sizes, chosen) in mixtures.items():
                few = rows in (1, 3, 16, 512) and (not self.a.models or model in self.a.models)
                for size in sizes if few else ():
                    jobs += [lambda c=c, m=model, s=size, k=chosen, r=rows: self.experts(c, m, s, k, r) for c in cases]
        self.work(jobs)


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+")
    parser.add_argument("--only", nargs="+", metavar="CASE")
    parser.add_argument("--rows", nargs="+", type=int)
    a = parse(parser)
    with torch.inference_mode():
        Bench(a).run()


if __name__ == "__main__":
    main()
