"""Speed-up of `quantize` by several processes on this machine: seconds of one and of more, in turns.

Usage: python scripts/bench_distributed.py MODEL --calibration FILE [--recipe NAME] [--processes N] [--rounds R]
                                           [--samples N] [--seqlen L] [--json FILE]

Prints the parallel efficiency: the time of one process over N times that of N, each with one thread; loading of Python
and torch included in both. The artifacts must be equal byte by byte.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def run(arguments: list[str], processes: int, out: Path) -> tuple[float, str]:
    """Seconds, and a digest of the shards."""
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    )
    command = [sys.executable, *launcher, "-m", "vqcompress", "quantize", *arguments, "-o", str(out), "--overwrite"]
    start = time.perf_counter()
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True)
    seconds = time.perf_counter() - start
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(out.glob("*.safetensors"))))
    return seconds, digest.hexdigest()


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--recipe", default="vq-2bit")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--samples", default="128")
    parser.add_argument("--seqlen", default="512")
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    arguments = [a.model, "--recipe", a.recipe, "--device", "cpu", "--calibration", a.calibration]
    arguments += ["--samples", a.samples, "--seqlen", a.seqlen]
    times: dict[int, list[float]] = {1: [], a.processes: []}
    digests = set()
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(a.rounds):
            for processes, found in times.items():
                seconds, digest = run(arguments, processes, Path(folder) / "artifact")
                found.append(seconds)
                digests.add(digest)
                print(f"{processes} processes: {seconds:.1f} s", flush=True)
    one, many = statistics.median(times[1]), statistics.median(times[a.processes])
    efficiency = one / (a.processes * many)
    print(f"speed-up {one / many:.2f}, parallel efficiency {efficiency:.0%}")
    result = {"model": Path(a.model).name, "recipe": a.recipe, "processes": a.processes, "seconds": times}
    result |= {"efficiency": efficiency, "equal": len(digests) == 1}
    if a.json:
        a.json.write_text(json.dumps(result, indent=1) + "\n")
    if len(digests) != 1:
        sys.exit("the artifacts differ")


if __name__ == "__main__":
    main()
