"""Quality and time of settings of `vq`, beside scalar quantization with error feedback (GPTQ) at 4 bits.

Usage: python scripts/bench_vq.py MODEL --text FILE --calibration FILE [--samples N] [--seqlen L] [--windows N]
                                  [--only NAME ...] [--json FILE]
       python scripts/bench_vq.py … --seeds N [--recipe NAME]

All settings run in this process, after everything is compiled. Per setting: bits per weight, perplexity relative to the
original, CPU seconds (user and system, all threads) of `quantize`, calibration included, the same as a multiple of the
yardstick's, and the peak of resident memory while it ran (so far, where Linux does not let it be reset).
With --seeds a recipe is quantized with the seeds 0 to N − 1, and the perplexities should lie within 2 %.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from rich.console import Console
from rich.filesize import decimal as size
from rich.table import Table

from vqcompress.evaluate.perplexity import perplexity
from vqcompress.methods import make
from vqcompress.methods.statistics import Statistics
from vqcompress.pipeline.quantize import QuantizeOptions, quantize

YARDSTICK = "scalar GPTQ"
# By name the options of `vq`, as in a recipe.
SETTINGS: dict[str, dict[str, Any]] = {
    YARDSTICK: {"d": 1, "bits": 4},
    "2 learned": {"d": 4, "bits": 8},
    "2 trellis": {"codebook": "trellis", "bits": 2},
    "3 learned": {"d": 2, "bits": 6},
    "3 trellis": {"codebook": "trellis", "bits": 3},
    "4 learned": {"d": 2, "bits": 8},
    "4 trellis": {"codebook": "trellis", "bits": 4},
    # Without, or with another choice of, one part of the method.
    "2 trellis, no rotation": {"codebook": "trellis", "bits": 2, "rotation": False},
    "2 trellis, no feedback": {"codebook": "trellis", "bits": 2, "feedback": False},
    "2 trellis, no order": {"codebook": "trellis", "bits": 2, "activation_order": False},
    "2 learned, no order": {"d": 4, "bits": 8, "activation_order": False},
    "2 trellis, no compensation": {"codebook": "trellis", "bits": 2, "compensate": False},
    "2 trellis, states 12": {"codebook": "trellis", "bits": 2, "state_bits": 12},
    "2 trellis, states 16": {"codebook": "trellis", "bits": 2, "state_bits": 16},
    "2 learned, rotation": {"d": 4, "bits": 8, "rotation": True},
    "2 learned, no training": {"d": 4, "bits": 8, "iterations": 0, "codebook_updates": 0},
    "2 learned, no codebook_updates": {"d": 4, "bits": 8, "codebook_updates": 0},
    "2 learned, stages, greedy": {"d": 8, "bits": 8, "stages": 2, "beam": 1},
    "2 learned, stages, beam 8": {"d": 8, "bits": 8, "stages": 2, "beam": 8},
}
SPREAD = 0.02


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", required=True, help="evaluation text")
    parser.add_argument("--calibration", required=True, help="calibration text")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--windows", type=int)
    parser.add_argument("--only", nargs="+", choices=SETTINGS, metavar="NAME", help="beside the yardstick")
    parser.add_argument("--seeds", type=int, help="quantize one recipe with as many seeds instead")
    parser.add_argument("--recipe", default="vq-2bit", help="for --seeds")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def compile_all() -> None:
    """Encode a small matrix with every family, so that no setting pays for numba's compiler."""
    weight_OI = torch.randn((64, 64), generator=torch.Generator().manual_seed(0))
    for family in ("learned", "trellis"):
        method, generator = make("vq", {"codebook": family}), torch.Generator().manual_seed(0)
        shared = method.fit_shared([weight_OI], [Statistics()], generator)
        parts = method.encode(weight_OI, Statistics(), generator, shared)
        method.decode(parts | shared, (64, 64))


def cpu_seconds() -> float:
    """User and system time of this process so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def forget_peak() -> None:
    """Let the peak of resident memory start anew, where the kernel can."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


class Bench:
    """The jobs of a command line, and the original that they are measured against."""

    def __init__(self, a: argparse.Namespace, folder: Path):
        self.a, self.folder = a, folder
        self.original = self._perplexity(a.model)

    def _perplexity(self, model: str) -> float:
        figure: float = perplexity(model, self.a.text, seqlen=self.a.seqlen, limit=self.a.windows)["perplexity"]
        return figure

    def run(self, recipe: str, seed: int = 0) -> dict[str, Any]:
        """Quantize with a recipe and measure."""
        a, out = self.a, self.folder / "artifact"
        forget_peak()
        start = cpu_seconds()
        report = quantize(
            QuantizeOptions(a.model, out, recipe, [a.calibration], a.samples, a.seqlen, seed, overwrite=True)
        )
        seconds = cpu_seconds() - start
        figure = self._perplexity(str(out))
        return {
            "bits_per_weight": report["bits_per_weight"],
            "perplexity": figure,
            "ratio": figure / self.original,
            "cpu_seconds": round(seconds, 2),
            "peak_rss_bytes": report["peak_rss_bytes"],
        }

    def settings(self, console: Console) -> dict[str, Any]:
        """Every setting, the yardstick first."""
        rows: list[dict[str, Any]] = []
        table = Table("setting", "bits", "ratio", "CPU s", "× scalar", "peak memory")
        for column in table.columns:
            column.no_wrap = True
        for name in dict.fromkeys((YARDSTICK, *(self.a.only or SETTINGS))):
            recipe = self.folder / "recipe.yaml"
            recipe.write_text(yaml.safe_dump({"rules": [{"match": "*", "method": "vq", **SETTINGS[name]}]}))
            row = {"name": name, **self.run(str(recipe))}
            rows.append(row)
            row["multiple"] = row["cpu_seconds"] / rows[0]["cpu_seconds"]
            cells = f"{row['bits_per_weight']:.3f}", f"{row['ratio']:.4f}", f"{row['cpu_seconds']:.1f}"
            table.add_row(name, *cells, f"{row['multiple']:.2f}", size(row["peak_rss_bytes"]))
            console.print(f"{name}: {', '.join(cells)}", style="dim")
        console.print(table)
        return {"settings": rows}

    def seeds(self, console: Console) -> dict[str, Any]:
        """One recipe with many seeds."""
        rows = []
        for seed in range(self.a.seeds):
            row = self.run(self.a.recipe, seed)
            rows.append({"seed": seed, **row})
            console.print(f"seed {seed}: {row['perplexity']:.4f}, {row['ratio']:.4f} of the original")
        figures = [row["perplexity"] for row in rows]
        mean, spread = statistics.mean(figures), max(figures) / min(figures) - 1
        verdict = "met" if spread < SPREAD else "MISSED"
        console.print(f"{self.a.recipe}: mean {mean:.4f}, spread {spread:.2%} (target: below {SPREAD:.0%}, {verdict})")
        return {"recipe": self.a.recipe, "seeds": rows, "mean": mean, "spread": spread, "met": spread < SPREAD}


def main() -> None:
    """Quantize, evaluate, print."""
    a = parse()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    console = Console()
    compile_all()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(a, Path(folder))
        console.print(f"original: perplexity {bench.original:.4f}")
        result = bench.seeds(console) if a.seeds else bench.settings(console)
    result = {"model": a.model, "original": bench.original, **result}
    if a.json:
        a.json.write_text(json.dumps(result, indent=1))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
