"""A killed run loses nothing: resumed, it ends in the bytes of an uninterrupted one, and never looks finished early."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kills
import pytest
import torch
from kills import Killed, contents
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from vqcompress.errors import VQCompressError
from vqcompress.pipeline.quantize import QuantizeOptions, quantize
from vqcompress.storage import writer
from vqcompress.storage.artifact import DRAFT, JOURNAL, SHARD, Artifact

Job = Callable[..., list[str]]
TUNED = """
rules:
  - {match: '*.down_proj', method: vq, codebook: trellis, state_bits: 8}
  - {match: '*', method: int8, smoothing: {alpha: 0.5}}
tuning: {distill_epochs: 1}
"""


@pytest.fixture(scope="module")
def job(toy: Callable[..., Path], recipe_file: Callable[[str], str], text: Path) -> Job:
    """Quantize a toy with the mixed recipe, or with changed options, into a directory; the names of blocks encoded."""

    def run(out: Path, recipe: str = "mixed", **changes: Any) -> list[str]:
        encoded: list[str] = []
        options = {"model": str(toy()), "texts": [str(text)], "samples": 4, "seqlen": 32, **changes}
        quantize(
            QuantizeOptions(out=out, recipe=recipe_file(recipe), **options),
            lambda event, facts: encoded.append(facts["name"]) if event == "block" else None,
        )
        return encoded

    return run


@pytest.fixture(scope="module")
def straight(job: Job, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The contents of an uninterrupted run."""
    job(out := tmp_path_factory.mktemp("straight"))
    return contents(out)


def interrupted(job: Job, out: Path, error: BaseException, **changes: Any) -> None:
    """Let a run raise an error when half of its third shard is written."""
    save, saved = writer.save_file, []

    def save_two(tensors: dict[str, torch.Tensor], path: Path, **kwargs: Any) -> None:
        saved.append(1)
        if len(saved) == 3:
            path.write_bytes(b"half a shard")
            raise error
        save(tensors, path, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "save_file", save_two)
        job(out, **changes)


@pytest.fixture(scope="module")
def stopped(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped with the first block on disk; do not write into it."""
    out = tmp_path_factory.mktemp("stopped")
    with pytest.raises(Killed):
        interrupted(job, out, Killed())
    return out


@pytest.fixture
def unfinished(stopped: Path, tmp_path: Path) -> Path:
    """A copy of the stopped run."""
    return shutil.copytree(stopped, tmp_path / "unfinished")


def test_a_resumed_run_encodes_the_rest_and_ends_in_the_same_bytes(
    unfinished: Path, job: Job, straight: dict[str, str]
) -> None:
    with pytest.raises(VQCompressError, match="unfinished"):
        Artifact(unfinished)
    # What safetensors writes before it gives a file its name.
    (unfinished / ".tmprU4IlF").write_bytes(b"half a shard")
    assert job(unfinished) == ["model.layers.1"]
    assert contents(unfinished) == straight


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["mixed", TUNED], ids=["mixed", "tuned"])
def test_killed_at_any_write_and_resumed_gives_the_same_bytes(
    recipe: str, toy: Callable[..., Path], recipe_file: Callable[[str], str], text: Path, tmp_path: Path
) -> None:
    words = [sys.executable, kills.__file__, str(toy()), recipe_file(recipe), str(text), str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    folders = sorted(tmp_path.iterdir())
    assert len(folders) > 10
    for folder in folders:
        assert contents(folder) == contents(tmp_path / "000"), folder.name


@pytest.mark.parametrize("what", ["seed", "recipe", "calibration", "checkpoint"])
def test_a_resume_with_other_inputs_is_refused_and_names_the_difference(
    what: str, stopped: Path, job: Job, toy: Callable[..., Path]
) -> None:
    changes: dict[str, dict[str, Any]] = {
        "seed": {"seed": 1},
        "recipe": {"recipe": "vq-small"},
        "calibration": {"seqlen": 16},
        "checkpoint": {"model": str(toy("llama", seed=1))},
    }
    before = contents(stopped)
    with pytest.raises(VQCompressError, match=what):
        job(stopped, **changes[what])
    assert contents(stopped) == before


def test_two_runs_do_not_write_into_one_directory(
    unfinished: Path, toy: Callable[..., Path], recipe_file: Callable[[str], str], text: Path
) -> None:
    options = QuantizeOptions(str(toy()), unfinished, recipe_file("mixed"), [str(text)], samples=4, seqlen=32)
    with pytest.raises(VQCompressError, match="another process"):
        quantize(options, lambda event, facts: quantize(options) and None)


def test_overwrite_deletes_what_a_run_wrote_and_nothing_else(unfinished: Path, job: Job, tmp_path: Path) -> None:
    mine = ["eval_mine.py", "LICENSE-notes.txt", "notes.json.partial"]
    for name in mine:
        (unfinished / name).write_text("mine")
    (unfinished / "sub").mkdir()
    (unfinished / "sub" / SHARD.format(1, 2)).write_text("mine too")
    (unfinished / "kv_cache.safetensors.partial").write_text("half")
    for seed in (1, 2):
        # An unfinished run of other inputs, then a finished one.
        with pytest.raises(VQCompressError, match="--overwrite"):
            job(unfinished, seed=seed)
        job(unfinished, seed=seed, overwrite=True)
        job(tmp_path / str(seed), seed=seed)
        assert {path.read_text() for path in map(unfinished.joinpath, mine)} == {"mine"}
        found = {path.name for path in unfinished.iterdir()} - {"sub", *mine}
        assert found == {path.name for path in (tmp_path / str(seed)).iterdir()}
    assert (unfinished / "sub" / SHARD.format(1, 2)).read_text() == "mine too"


@pytest.mark.parametrize("overwrite", [False, True])
def test_other_directories_and_files_are_refused(
    overwrite: bool, job: Job, toy: Callable[..., Path], tmp_path: Path
) -> None:
    """-o MODEL instead of -o OUT must not cost anybody the model."""
    project, model, file = tmp_path / "project", shutil.copytree(toy(), tmp_path / "model"), tmp_path / "file"
    project.mkdir()
    (project / "README.md").write_text("of my project")
    file.write_text("mine")
    before = [contents(project), contents(model)]
    for out in (project, model, file, file / "out"):
        with pytest.raises(VQCompressError, match=out.name):
            job(out, model=str(model), overwrite=overwrite)
    assert [contents(project), contents(model)] == before
    assert (project / "README.md").read_text() == "of my project"
    assert file.read_text() == "mine"


@pytest.mark.parametrize(("number", "damage"), [(1, "flipped"), (2, "truncated"), (2, "gone")])
def test_a_damaged_shard_of_an_unfinished_run_is_made_again(
    number: int, damage: str, unfinished: Path, job: Job, straight: dict[str, str]
) -> None:
    shard = unfinished / SHARD.format(number, 3)
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data if damage == "flipped" else data[: len(data) // 2])
    if damage == "gone":
        shard.unlink()
    job(unfinished)
    assert contents(unfinished) == straight


def test_a_shard_damaged_after_distillation_makes_a_run_begin_again(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Earlier shards have their distilled values then, so a later block cannot be made again as it was."""
    write, out = writer.Shards.write_shard, tmp_path / "out"

    def stop(shards: writer.Shards, file: str, tensors: Any) -> Any:
        if file == SHARD.format(3, 3):
            raise Killed
        return write(shards, file, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(writer.Shards, "write_shard", stop)
        with pytest.raises(Killed):
            job(out, TUNED)
    draft = out / (DRAFT + SHARD.format(3, 3))
    draft.write_bytes(draft.read_bytes()[:-1])
    assert len(job(out, TUNED)) == 2
    job(tmp_path / "straight", TUNED)
    assert contents(out) == contents(tmp_path / "straight")


@pytest.mark.parametrize("damage", ["{", "no blocks", "empty records"])
def test_a_damaged_journal_is_named_and_can_be_overwritten(
    damage: str, unfinished: Path, job: Job, straight: dict[str, str]
) -> None:
    journal = json.loads((unfinished / JOURNAL).read_text())
    if damage == "no blocks":
        damage = json.dumps({**journal, "blocks": None})
    elif damage == "empty records":
        damage = json.dumps({**journal, "blocks": {name: {} for name in journal["blocks"]}})
    (unfinished / JOURNAL).write_text(damage)
    with pytest.raises(VQCompressError, match=JOURNAL):
        job(unfinished)
    job(unfinished, overwrite=True)
    assert contents(unfinished) == straight


def test_files_beside_the_weights_are_not_read_into_memory(tmp_path: Path) -> None:
    (tmp_path / "beside").write_bytes(bytes(2**24))
    companions = dict.fromkeys(("first", "second"), tmp_path / "beside")
    with writer.Writer(tmp_path / "out", {}, lambda name: "", False, 0.0) as found:
        tracemalloc.start()
        found.finish({}, companions, {}, "")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 2**23
    assert (tmp_path / "out" / "second").stat().st_size == 2**24
    assert set(companions) < writer.read_sums(tmp_path / "out").keys()


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), SafetensorError("os error 28")])
def test_a_full_disk_is_an_error_and_the_run_can_be_continued(
    error: Exception, job: Job, straight: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(VQCompressError, match=SHARD.format(3, 3)):
        interrupted(job, out, error)
    assert not list(out.glob("*.partial")), "half a shard takes up the space that is needed"
    assert job(out) == ["model.layers.1"]
    assert contents(out) == straight


def test_nan_is_named_and_once_mended_the_run_goes_on(toy: Callable[..., Path], job: Job, tmp_path: Path) -> None:
    """In a block that is not tried before the run."""
    model, out, name = tmp_path / "model", tmp_path / "out", "model.layers.1.mlp.down_proj.weight"
    shutil.copytree(toy("llama", layers=3), model)
    tensors = load_file(model / "model.safetensors")
    sound = tensors[name].clone()
    tensors[name][3, 5] = torch.nan
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VQCompressError, match=name):
        job(out, model=str(model))
    save_file(tensors | {name: sound}, model / "model.safetensors", metadata={"format": "pt"})
    assert job(out, model=str(model)) == ["model.layers.1", "model.layers.2"]
    job(tmp_path / "straight", model=str(model))
    assert contents(out) == contents(tmp_path / "straight")
