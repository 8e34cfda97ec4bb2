"""A model larger than the memory that a process may take is compressed, evaluated and exported."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from processes import VQCOMPRESS, Processes
from synthetic import write_llama

import vqcompress

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits of address space are Linux's")

# Address space, of which Python with torch and transformers takes 0.9 GB before anything is read.
LIMIT = 1600 * 2**20
TEXT = Path(vqcompress.__file__).parent / "demo" / "calibration.txt"


def facts(processes: Processes, words: list[str], json_file: Path, limit: int = 0) -> dict[str, Any]:
    """The JSON that a command writes, in a process that may take at most `limit` bytes of address space."""
    done = processes.python(VQCOMPRESS, *words, "--json", json_file, limit=limit)
    assert done.returncode == 0, done.stderr[-1000:]
    found: dict[str, Any] = json.loads(json_file.read_text())
    return found


def everything(
    processes: Processes, model: Path, folder: Path, recipe: str, limit: int = 0, form: str = "dense"
) -> dict[str, int]:
    """Peak resident memory in bytes of quantize, eval and export, one after the other."""
    out, json_file, text = folder / "out", folder / "facts.json", folder / "text.txt"
    text.write_text(TEXT.read_text(encoding="utf-8")[:20_000], encoding="utf-8")
    rows = ["--samples", "2", "--seqlen", "64", "--states", "disk", "--calibration", str(text)]
    report = facts(processes, ["quantize", str(model), "-o", str(out), "--recipe", recipe, *rows], json_file, limit)
    words = ["--text", str(text), "--seqlen", "64", "--windows", "2"]
    scores = facts(processes, ["eval", "perplexity", str(out), *words], json_file, limit)
    assert scores["windows"] == 2
    export = facts(processes, ["export", str(out), "--format", form, "-o", str(folder / "export")], json_file, limit)
    assert export["bytes"] > 0.99 * report["source_bytes" if form == "dense" else "artifact_bytes"]
    return {"quantize": report["peak_rss_bytes"], "eval": scores["peak_rss_bytes"], "export": export["peak_rss_bytes"]}


@pytest.mark.timeout(900)
@pytest.mark.slow
def test_a_model_of_three_times_the_memory(tmp_path: Path, processes: Processes) -> None:
    size = write_llama(tmp_path / "model", layers=120, hidden=1024, inner=6144)
    assert size > 3 * LIMIT
    # The limit bites: reading the weights as a whole does not fit.
    plain = "import sys, transformers; transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])"
    assert processes.python(plain, tmp_path / "model", limit=LIMIT).returncode != 0
    # A copy in 16 bits would take twice as long to write.
    everything(processes, tmp_path / "model", tmp_path, "fp8-tile", LIMIT, "fp8")
    # pytest would keep its gigabytes for days.
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize("recipe", ["fp8-tile", "smoothquant-int8"])
@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_blocks(recipe: str, tmp_path: Path, processes: Processes) -> None:
    peaks = []
    for layers in (4, 16):
        folder = tmp_path / str(layers)
        write_llama(folder / "model", layers, hidden=256, inner=768)
        peaks.append(everything(processes, folder / "model", folder, recipe))
    for job, few in peaks[0].items():
        assert peaks[1][job] < 1.1 * few, (job, peaks)
