"""Make two real models, compress them with every packaged weight recipe, and print one table.

Usage: python scripts/real.py DIR [--model NAME ...] [--recipe NAME ...] [--samples N] [--seqlen L] [--windows N]
                                  [--text FILE] [--calibration FILE]

DIR holds the models, the artifacts and the results; what it has is not made again. Each `quantize` and each `eval
perplexity --baseline` is a process of its own, so its peak memory is its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from quickstart import work
from real_models import MODELS

from vqcompress.storage import recipe as recipes
from vqcompress.storage.checkpoint import resolve

HEADS = [
    "model",
    "recipe",
    "bits per weight",
    "whole model",
    "perplexity",
    "ratio",
    "KL divergence",
    "seconds",
    "memory",
]


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--model", action="append", choices=MODELS, help="may be repeated; default: both")
    parser.add_argument("--recipe", action="append", help="may be repeated; default: every one that needs no budget")
    parser.add_argument("--samples", type=int, default=128, help="calibration rows")
    parser.add_argument("--seqlen", type=int, default=512, help="tokens of a calibration row and of a window")
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--text", help="evaluation text; default: the demo's held-out text")
    parser.add_argument("--calibration", help="calibration text; default: the built-in one")
    return parser.parse_args()


def command(*words: str | Path) -> str:
    """Run a command of vqcompress; its error message, or "" if it succeeded."""
    print("+ vqcompress", *words, file=sys.stderr)
    done = subprocess.run([sys.executable, "-m", "vqcompress", *map(str, words)], stderr=subprocess.PIPE, text=True)
    return "" if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


def measure(a: argparse.Namespace, model: str, recipe: str, text: Path) -> dict[str, Any]:
    """The report and the evaluation of a recipe on a model, or an error; made now unless the directory has them."""
    out = a.folder / f"{a.samples}x{a.seqlen}" / f"{model}-{recipe}"
    result = out.with_name(f"{out.name}-{text.stem}-{a.windows}.json")
    original = a.folder / model
    size = ["--seqlen", str(a.seqlen)]
    calibration = ["--calibration", a.calibration] if a.calibration else []
    quantize = ["quantize", original, "-o", out, "--recipe", recipe, "--samples", str(a.samples), *size, *calibration]
    if not (out / "config.json").exists() and (error := command(*quantize)):
        return {"error": error}
    windows = [*size, "--windows", str(a.windows), "--json", result]
    if not result.exists() and (
        error := command("eval", "perplexity", out, "--baseline", original, "--text", text, *windows)
    ):
        return {"error": error}
    return {"report": json.loads((out / "report.json").read_text()), "eval": json.loads(result.read_text())}


def row(model: str, recipe: str, found: dict[str, Any]) -> list[str]:
    """Cells of the table."""
    if "error" in found:
        return [model, f"`{recipe}`", found["error"].replace("|", "\\|"), *[""] * 6]
    report, result = found["report"], found["eval"]
    return [
        model,
        f"`{recipe}`",
        f"{report['bits_per_weight']:.3f}",
        f"{report['artifact_bytes'] / 1e6:.1f} MB",
        f"{result['perplexity']:.3f}",
        f"{result['ratio']:.4f}",
        f"{result['kl_divergence']['mean']:.4f}",
        f"{report['seconds']:.0f}",
        f"{report['peak_rss_bytes'] / 1e9:.2f} GB",
    ]


def main() -> None:
    """Make, compress, evaluate, print."""
    a = parse()
    text = Path(a.text) if a.text else resolve("demo") / "evaluation.txt"
    known = [name for name in recipes.packaged() if not name.startswith("kv-")]
    names = a.recipe or sorted((name for name in known if not recipes.load(name).candidates), key=work)
    table, protocols = [HEADS, ["---"] * len(HEADS)], set()
    for model in a.model or MODELS:
        if not (a.folder / model / "config.json").exists():
            script = Path(__file__).with_name("real_models.py")
            subprocess.run([sys.executable, script, model, a.folder / model], check=True)
        baseline = None
        for recipe in names:
            found = measure(a, model, recipe, text)
            if "eval" in found:
                result = found["eval"]
                baseline = baseline or found
                bos = "a BOS token" if result["bos"] else "no BOS token"
                protocols.add(f"{model}: {result['windows']} windows of {result['seqlen']} tokens, {bos}")
            table.append(row(model, recipe, found))
        if baseline:
            whole = f"{baseline['report']['source_bytes'] / 1e6:.1f} MB"
            original = [
                model,
                "(original)",
                "16",
                whole,
                f"{baseline['eval']['baseline']['perplexity']:.3f}",
                "1",
                "0",
                "",
                "",
            ]
            table.insert(len(table) - len(names), original)
    print(*(f"| {' | '.join(cells)} |" for cells in table), sep="\n")
    print(f"\nPerplexity of {text.name} ({'; '.join(sorted(protocols))}).")
    print(f"Calibration: {a.samples} rows of {a.seqlen} tokens. Seconds and memory: of `quantize` alone.")
    print("Bits: all that is stored in place of the compressed weights, per weight.")


if __name__ == "__main__":
    main()
