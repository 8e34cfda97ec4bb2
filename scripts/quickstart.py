"""Compress a checkpoint with every packaged weight recipe, the quick ones first; in the end one table of them all.

Usage: python scripts/quickstart.py [MODEL] [--text FILE] [--calibration FILE] [--samples N] [--seqlen L] [--windows N]
                                    [--recipe NAME ...] [--keep DIR] [--json FILE]

Without arguments it takes the bundled demo checkpoint and its held-out text. `--recipe fp8-tile --recipe
smoothquant-int8` is enough for a first impression.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import transformers
from rich.console import Console
from rich.filesize import decimal as size
from rich.table import Table

from vqcompress.cli.progress import QuantizeProgress
from vqcompress.evaluate.perplexity import perplexity
from vqcompress.pipeline.quantize import QuantizeOptions, quantize
from vqcompress.storage import recipe as recipes
from vqcompress.storage.checkpoint import resolve


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--text", help="evaluation text; default: the demo's held-out text")
    parser.add_argument("--calibration", help="calibration text; default: the built-in one")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--windows", type=int)
    parser.add_argument("--recipe", action="append", help="may be repeated; default: every packaged weight recipe")
    parser.add_argument("--keep", type=Path, help="leave the artifacts in this directory")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def work(name: str) -> tuple[bool, bool, str]:
    """What recipes are put in order by, the quick ones first: those that tune last, before them vector quantization."""
    recipe = recipes.load(name)
    return recipe.tuning is not None, any(rule.method.name == "vq" for rule in recipe.rules), name


def main() -> None:
    """Compress, evaluate, print."""
    a = parse()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    text = a.text or str(resolve("demo") / "evaluation.txt")
    known = [name for name in recipes.packaged() if not name.startswith("kv-")]
    # Candidates need a budget, and measuring them takes as long as all the others.
    names = a.recipe or sorted((name for name in known if not recipes.load(name).candidates), key=work)
    console = Console(highlight=False)
    console.print(f"{a.model} as it is …", style="dim")
    original = perplexity(a.model, text, seqlen=a.seqlen, limit=a.windows)
    console.print(f"perplexity {original['perplexity']:.3f}")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            out = (a.keep or Path(folder)) / name
            console.print(f"{name} …", style="dim")
            start, cpu = time.perf_counter(), time.process_time()
            texts = [a.calibration] if a.calibration else []
            with QuantizeProgress() as watch:
                report = quantize(
                    QuantizeOptions(a.model, out, name, texts, a.samples, a.seqlen, overwrite=True), watch
                )
            seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
            figure = perplexity(str(out), text, seqlen=a.seqlen, limit=a.windows)["perplexity"]
            rows.append(
                {
                    "recipe": name,
                    "bits_per_weight": report["bits_per_weight"],
                    "artifact_bytes": report["artifact_bytes"],
                    "perplexity": figure,
                    "ratio": figure / original["perplexity"],
                    "seconds": round(seconds, 1),
                    "cpu_seconds": round(cpu, 1),
                }
            )
            bits, ratio = f"{report['bits_per_weight']:.3f} bits per weight", f"ratio {rows[-1]['ratio']:.4f}"
            console.print(
                f"{bits}, {size(report['artifact_bytes'])}, perplexity {figure:.3f}, {ratio}, {seconds:.1f} s"
            )
    table = Table("recipe", "bits", "artifact", "perplexity", "ratio", "seconds", "CPU s")
    for column in table.columns:
        column.no_wrap = True
    table.add_row("(original)", "16", size(report["source_bytes"]), f"{original['perplexity']:.3f}", "1", "", "")
    for r in rows:
        table.add_row(
            r["recipe"],
            f"{r['bits_per_weight']:.3f}",
            size(r["artifact_bytes"]),
            f"{r['perplexity']:.3f}",
            f"{r['ratio']:.4f}",
            str(r["seconds"]),
            str(r["cpu_seconds"]),
        )
    console.print(table)
    windows, seqlen = original["windows"], original["seqlen"]
    console.print("bits: all that is stored in place of the compressed weights, per weight")
    console.print(f"perplexity: {Path(text).name}, {windows} windows of {seqlen} tokens, no overlap, no BOS")
    if a.json:
        a.json.write_text(json.dumps({"model": a.model, "original": original, "recipes": rows}, indent=1))


if __name__ == "__main__":
    main()
