"""Codewords of vector quantization on the unit Gaussian: their error beside Shannon's bound, and the search's time.

Usage: python scripts/bench_codebooks.py [--samples N] [--json FILE]

The error is the mean squared error of N fixed pseudo-random weights, normalized to mean 0 and variance 1, without
Hessian, scales or rotation. Learned codebooks are learned from another sample, with the default options.
CPU seconds are those of the search (learning left out), one thread, compiled beforehand.
A trellis of 16 bits takes a quarter of N.
The last line is JSON. Exits with 1 if a target is missed; targets hold for the default N.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from vqcompress.methods.statistics import Statistics
from vqcompress.methods.vq import bitshift
from vqcompress.methods.vq.codebook import Codebook
from vqcompress.methods.vq.learned import nearest

# The scalar quantizer with the least error on the unit Gaussian (Max 1960), by bits.
LLOYD_MAX = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497}
# By name: the error that the codewords may have.
TARGETS = {
    "learned<4,8,1>": 0.099,
    "trellis 2, states 14": 0.072,
    "trellis 3, states 14": 1.2 * 4.0**-3,
    "trellis 4, states 14": 1.2 * 4.0**-4,
}
# Whole sequences of a trellis, and whole vectors of everything else.
UNIT = bitshift.SEQUENCE


@dataclass(frozen=True)
class Codewords:
    """A family at one size. quantize: the codewords (N, d) nearest to vectors (N, d). share: of the sample."""

    name: str
    bits: float
    d: int
    quantize: Callable[[Tensor], Tensor]
    share: float = 1.0


def gaussian(samples: int, seed: int) -> Tensor:
    """Weights (samples,) float32, with mean 0 and variance 1 to the last digit."""
    x_N = torch.randn(samples, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return ((x_N - x_N.mean()) / x_N.std(correction=0)).float()


def entries(book_Kd: Tensor) -> Callable[[Tensor], Tensor]:
    """The search in a table."""
    return lambda x_Nd: book_Kd[nearest(x_Nd, book_Kd[None], 1)[:, 0]]


def learned(d: int, bits: int, samples: int) -> Codewords:
    """A codebook that the method learns from a sample of its own, as it is stored."""
    method = Codebook(d=d, bits=bits)
    train_OI = gaussian(samples, 1).view(-1, UNIT)
    parts = method.fit_shared([train_OI], [Statistics()], torch.Generator().manual_seed(0))
    book_Kd = (parts["codebook"].float() * parts["step"][:, None, None])[0]
    return Codewords(f"learned<{d},{bits},1>", bits / d, d, entries(book_Kd))


def families(samples: int) -> Iterator[Codewords]:
    """Every family that is measured; learns the codebooks."""
    for d, bits in ((4, 8), (2, 6), (2, 8)):
        yield learned(d, bits, samples)
    for state_bits in (12, 14, 16):
        for bits in (1, 2, 3, 4):
            yield Codewords(
                f"trellis {bits}, states {state_bits}",
                bits,
                UNIT,
                lambda x_NT, b=bits, s=state_bits: bitshift.decode(bitshift.PathSearch(b, s).paths(x_NT), b, s),
                0.25 if state_bits == 16 else 1.0,
            )


def measure(codewords: Codewords, samples: int) -> dict[str, object]:
    """Error and search of a family."""
    count = max(round(samples * codewords.share) // UNIT, 1) * UNIT
    x_Nd = gaussian(count, 0).view(-1, codewords.d)
    # Compiles, and fills caches.
    codewords.quantize(x_Nd[:2])
    start = time.process_time()
    value_Nd = codewords.quantize(x_Nd)
    seconds = time.process_time() - start
    error = (x_Nd - value_Nd).double().square().mean().item()
    target = TARGETS.get(codewords.name)
    return {
        "name": codewords.name,
        "bits": codewords.bits,
        "samples": count,
        "error": error,
        "over_bound": error * 4.0**codewords.bits,
        "cpu_seconds_per_million": seconds / count * 1e6,
        "target": target,
        "met": None if target is None else error <= target,
    }


def main() -> None:
    """Measure, print, and fail if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1 << 19, help="weights; default 524,288")
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    if a.samples < UNIT:
        parser.error(f"--samples {a.samples}: at least {UNIT}")
    a.samples -= a.samples % UNIT
    torch.set_num_threads(1)
    console = Console(width=None if sys.stdout.isatty() else 110)
    table = Table("codewords", "bits", "error", "bound", "error / bound", "Lloyd–Max", "CPU s / M", "target")
    for column in table.columns:
        column.no_wrap = True
    rows = []
    for codewords in families(a.samples):
        row = measure(codewords, a.samples)
        rows.append(row)
        print(f"{codewords.name}: {row['error']:.5f}", file=sys.stderr, flush=True)
        table.add_row(
            codewords.name,
            f"{codewords.bits:g}",
            f"{row['error']:.5f}",
            f"{4.0**-codewords.bits:.5f}",
            f"{row['over_bound']:.3f}",
            f"{LLOYD_MAX[int(codewords.bits)]:.5f}" if codewords.bits in LLOYD_MAX else "",
            f"{row['cpu_seconds_per_million']:.2f}",
            "" if row["target"] is None else f"{row['target']:.5f} {'met' if row['met'] else 'MISSED'}",
        )
    console.print(table)
    console.print("CPU s / M: of the search, per million weights, one thread")
    missed = [row["name"] for row in rows if row["met"] is False]
    result = {"samples": a.samples, "codewords": rows, "missed": missed}
    if a.json:
        a.json.write_text(json.dumps(result, indent=1))
    print(json.dumps(result))
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
