"""Speed of data-free `fp8-tile`, beside reading a checkpoint and writing half of it with safetensors.

Usage: python scripts/bench_io.py [--layers N] [--hidden N] [--rounds N] [--folder DIR] [--json FILE]

Writes a random Llama (about 1 GB by default), then both in turns, each beginning with files that are not in the
system's cache. The plain copy reads every file and writes the upper half of every number; its time is given without
syncing what it wrote and with it. `quantize` also hashes what it reads and writes, checks every number, measures the
error of every weight and syncs each file.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from synthetic import write_llama

from vqcompress.cli.main import set_up_memory
from vqcompress.pipeline.quantize import QuantizeOptions, quantize

# As the command line does, before torch takes memory.
set_up_memory()


def forget(model: Path) -> None:
    """Let the system's cache forget a model's files, which must be on the disk for that."""
    for file in model.glob("*.safetensors"):
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy_half(model: Path, out: Path, sync: bool) -> float:
    """Seconds to read all and write half."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    forget(model)
    start = time.perf_counter()
    for file in sorted(model.glob("*.safetensors")):
        tensors = {name: tensor.view(torch.uint8) for name, tensor in load_file(file).items()}
        save_file({name: tensor[..., 1::2].contiguous() for name, tensor in tensors.items()}, out / file.name)
        if sync:
            with (out / file.name).open("rb+") as stream:
                os.fsync(stream.fileno())
    return time.perf_counter() - start


def compress(model: Path, out: Path) -> float:
    """Seconds of `quantize`."""
    shutil.rmtree(out, ignore_errors=True)
    forget(model)
    start = time.perf_counter()
    quantize(QuantizeOptions(str(model), out, "fp8-tile", device="cpu"))
    return time.perf_counter() - start


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write; default: the system's temporary folder")
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=a.folder) as temporary:
        model, out = Path(temporary) / "model", Path(temporary) / "out"
        size = write_llama(model, a.layers, a.hidden, 3 * a.hidden)
        # The first round pays for what torch sets up.
        times = [(copy_half(model, out, False), copy_half(model, out, True), compress(model, out))
                 for _ in range(a.rounds + 1)][1:]  # fmt: skip
        copied, synced, ours = (statistics.median(column) for column in zip(*times, strict=True))
    found = {
        "figure": "fp8-tile against a plain copy",
        "bytes": size,
        "seconds": round(ours, 3),
        "copy_seconds": round(copied, 3),
        "synced_copy_seconds": round(synced, 3),
        "speed_relative_to_copy": round(copied / ours, 3),
        "speed_relative_to_synced_copy": round(synced / ours, 3),
        "rounds": a.rounds,
        "cores": os.cpu_count(),
        "torch": torch.__version__,
    }
    print(json.dumps(found, indent=1))
    if a.json:
        with a.json.open("a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
