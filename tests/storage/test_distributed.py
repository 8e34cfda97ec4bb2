"""Several processes make the bytes of one, share the work, and end together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_jobs import BATCH_TOKENS
from kills import sums

from vqcompress.kv_cache import calibrate as cache_calibration
from vqcompress.methods.statistics import Accumulator
from vqcompress.model import stream as blocks
from vqcompress.pipeline.quantize import QuantizeOptions, quantize
from vqcompress.storage.distributed import ALONE, ProcessGroup, reduce_statistics

Make = Callable[..., Path]
SCRIPT = Path(__file__).parent.parent / "distributed_jobs.py"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
TUNED = "tuning: {distill_epochs: 1}\nrules:\n  - {match: '*', method: vq, codebook: trellis, state_bits: 8}\n"
MIXED = "candidates:\n  - {method: vq, codebook: trellis, state_bits: 8}\n"
MIXED += "  - {method: vq, codebook: trellis, bits: 4, state_bits: 8}\n"
EXPERTS = "rules:\n  - {match: '*.experts.*', method: vq, d: 2, bits: 4, iterations: 2, codebook_updates: 0}\n"
SMOOTHED = (
    "experts: {calibrate: all}\nrules:\n  - {match: '*', method: int8, smoothing: {grid: [0.4, 0.6], mlp: fold}}\n"
)
# Recipe, family of the toy, and further arguments of quantize.
JOBS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "fp8": ("fp8-tile", "llama", {}),
    "smoothed": ("smoothquant-int8", "llama", {}),
    "learned": ("vq-small", "qwen3", {}),
    "tuned": (TUNED, "llama", {}),
    "for a budget": (MIXED, "llama", {"target_bits": 3.0}),
    "experts": ("vq-small", "mixtral", {}),
    "weighted experts": (f"experts: {{calibrate: weighted}}\n{EXPERTS}", "gpt_oss", {}),
    "smoothed experts": (SMOOTHED, "mixtral", {}),
    # The cache of an odd number of batches and of one batch; beside compressed weights, and alone.
    "cache": ("kv-small", "qwen3", {"samples": 40}),
    "cache of one batch": ("kv-small", "llama", {"samples": 8}),
    "cache beside": ("vq-small", "llama", {"samples": 40, "kv_cache": "kv-small"}),
    "rotated": ("rotation: fold\nrules:\n  - {match: '*', method: int8}\n", "llama", {}),
}


@pytest.fixture(scope="module")
def job(toy: Make, recipe_file: Callable[[str], str], text: Path) -> Callable[..., dict[str, Any]]:
    def make(name: str, out: Path) -> dict[str, Any]:
        recipe, family, more = JOBS[name]
        more |= {key: recipe_file(value) for key, value in more.items() if key == "kv_cache"}
        facts = {"texts": [str(text)], "samples": 48, "seqlen": 64, "device": "cpu", **more}
        return {"model": str(toy(family)), "out": str(out), "recipe": recipe_file(recipe), **facts}

    return make


@pytest.fixture(scope="module", autouse=True)
def small_batches() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BATCH_TOKENS", BATCH_TOKENS)
        patch.setattr(cache_calibration, "BATCH_TOKENS", BATCH_TOKENS)
        yield


@pytest.fixture(scope="module")
def alone(
    job: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, str]]:
    """Name of a job → what one process makes of it."""
    made: dict[str, dict[str, str]] = {}

    def make(name: str) -> dict[str, str]:
        if name not in made:
            out = tmp_path_factory.mktemp("alone") / "artifact"
            arguments = job(name, out)
            quantize(QuantizeOptions(arguments.pop("model"), Path(arguments.pop("out")), **arguments))
            made[name] = sums(out)
        return made[name]

    return make


@pytest.fixture(scope="module")
def several(
    job: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[int, Path], dict[int, list[int]], str]:
    """What two and three processes make of all jobs, by their number; their exit statuses; and what they said.

    Two more, under the number 0, have too few rows.
    """
    folders, words = {size: tmp_path_factory.mktemp("several") for size in (2, 3, 0)}, []
    for size, folder in folders.items():
        all_of_them = (
            [job(name, folder / name) for name in JOBS]
            if size
            else [job("learned", folder / "learned") | {"samples": 2}]
        )
        (folder / "jobs").write_text("\n".join(map(json.dumps, all_of_them)))
        words += [str(size or 2), str(folder / "jobs")]
    done = subprocess.run([sys.executable, str(SCRIPT), *words], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folders, dict(zip(folders, json.loads(done.stdout.splitlines()[-1]), strict=True)), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_many_processes_make_the_bytes_of_one(
    size: int, several: tuple[Any, ...], alone: Callable[[str], dict[str, str]]
) -> None:
    folders, statuses, said = several
    assert statuses[size] == [0] * size, said
    for name in JOBS:
        assert sums(folders[size] / name) == alone(name), name


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(
    job: Callable[..., dict[str, Any]], alone: Callable[[str], dict[str, str]], tmp_path: Path
) -> None:
    """A process that dies ends the run; what was committed stays."""
    out = tmp_path / "artifact"
    (tmp_path / "jobs").write_text(json.dumps(job("learned", out)))
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT)]
    process = subprocess.Popen(
        [sys.executable, *words, str(tmp_path / "jobs")],
        env=ENVIRONMENT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    while process.poll() is None and len(list(out.glob("model-0000[12]*.safetensors"))) < 2:
        time.sleep(0.01)
    # One of the workers: the last child of the launcher.
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    if children:
        os.kill(int(children[-1]), 9)
    said, _ = process.communicate(timeout=120)
    if process.returncode != 0:
        assert (out / "journal.json").is_file(), said
    arguments = job("learned", out)
    if (out / "journal.json").is_file():
        quantize(QuantizeOptions(arguments.pop("model"), Path(arguments.pop("out")), **arguments))
    assert sums(out) == alone("learned")


@pytest.mark.slow
def test_too_few_rows_for_all_are_refused(several: tuple[Any, ...]) -> None:
    folders, statuses, said = several
    assert all(statuses[0])
    assert not (folders[0] / "learned").exists()
    assert "1 batches of calibration rows are too few for 2 processes" in said


def test_a_group_shards_everything_once() -> None:
    items = list(range(11))
    for size in (1, 2, 3, 11):
        groups = [ProcessGroup(rank, size) for rank in range(size)]
        assert [item for group in groups for item in group.shard(items)] == items
        assert max(len(group.shard(items)) for group in groups) <= -(-len(items) // size)
    assert ALONE.all_gather(5) == [5]
    value = torch.ones(2)
    ALONE.all_reduce(value)
    assert value.tolist() == [1, 1]


def test_a_sample_that_only_others_took_is_where_the_weight_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """An expert to which none of this process's tokens came."""
    accumulator, rows = Accumulator(frozenset({"sample"}), 8, 4, "meta"), torch.ones(4, 8)

    def all_gather(group: ProcessGroup, value: Any) -> list[Any]:
        return [value, [rows] if isinstance(value, list) else (4, 4, 4.0)]

    monkeypatch.setattr(ProcessGroup, "all_gather", all_gather)
    reduce_statistics(ProcessGroup(0, 2), accumulator)
    sample_SI = accumulator.statistics().sample_SI
    assert sample_SI is not None
    assert (sample_SI.device.type, sample_SI.shape) == ("meta", rows.shape)
