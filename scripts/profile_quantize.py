"""A profile of `quantize` on a random Llama of 300 M parameters: the table of docs/performance.md.

Usage: python scripts/profile_quantize.py RECIPE … [--samples N] [--seqlen L] [--top N]

Each recipe runs twice in processes of their own: as it is, for seconds, processor seconds, page faults and peak memory,
then under cProfile (of the first thread). PYTHONPATH chooses the version that is measured.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from synthetic import write_llama

RUN = """
import cProfile, json, pstats, resource, sys, time
from pathlib import Path
from vqcompress.cli import main as cli
cli.set_up_memory()
from vqcompress.pipeline.quantize import QuantizeOptions, quantize
import vqcompress.pipeline.block
before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
profile = cProfile.Profile()
if {top}:
    profile.enable()
options = QuantizeOptions(
    {model!r}, Path({out!r}), {recipe!r}, None, {samples}, {seqlen}, device="cpu", overwrite=True
)
report = quantize(options)
if {top}:
    profile.disable()
    pstats.Stats(profile, stream=sys.stderr).sort_stats("tottime").print_stats({top})
took, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps({{
    "seconds": round(took, 1), "user": round(after.ru_utime - before.ru_utime, 1),
    "system": round(after.ru_stime - before.ru_stime, 1), "faults": after.ru_minflt - before.ru_minflt,
    "peak_mb": report["peak_rss_bytes"] // 10**6,
}}))
"""


def main() -> None:
    """Write the model, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+", metavar="RECIPE")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--top", type=int, default=15)
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model, out = str(Path(folder) / "model"), str(Path(folder) / "out")
        write_llama(Path(model), layers=6, hidden=2048, inner=6144)
        for recipe in a.recipes:
            options = {"model": model, "out": out, "recipe": recipe, "samples": a.samples, "seqlen": a.seqlen}
            for top in (0, a.top):
                code = RUN.format(**options, top=top)
                done = subprocess.run(
                    [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=folder
                )
                if done.returncode:
                    sys.exit(done.stderr)
                print(done.stderr if top else f"{recipe}: {json.loads(done.stdout)}", flush=True)


if __name__ == "__main__":
    main()
