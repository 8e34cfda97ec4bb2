"""A killed run loses nothing: resumed, it ends in the bytes of an uninterrupted one, and never looks finished early."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kills import Killed, contents
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from vqcompress.errors import VQCompressError
from vqcompress.model.stream import BlockStream
from vqcompress.pipeline.quantize import QuantizeOptions, quantize
from vqcompress.storage import artifact, writer
from vqcompress.storage.artifact import Artifact

# Forks once per kill, so that torch is imported once. Dies of SIGKILL before the n-th call that changes the directory;
# a file that was written but not synced loses its second half first, as after a power cut.
DRIVER = """
import json, os, signal, stat, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from vqcompress.storage import artifact
from vqcompress.cli import tables as show
from vqcompress.storage import writer
from vqcompress.storage.artifact import Artifact
from vqcompress.model.stream import BlockStream
from vqcompress.errors import VQCompressError
from vqcompress.pipeline.quantize import QuantizeOptions, quantize
model, recipe, text, folder, chain = sys.argv[1:]
# What each life would load anew.
quantize(QuantizeOptions(model, Path(folder) / "000", recipe, [text], samples=2, seqlen=16))

def run(out, limit):
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    calls = 0
    def mortal(function):
        def call(first, *args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == limit:
                if isinstance(first, int) and stat.S_ISREG(os.fstat(first).st_mode):
                    os.truncate(f"/proc/self/fd/{first}", os.fstat(first).st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            return function(first, *args, **kwargs)
        return call
    os.fsync, Path.replace, Path.unlink = mortal(os.fsync), mortal(Path.replace), mortal(Path.unlink)
    writer.save_file = mortal(writer.save_file)
    try:
        quantize(QuantizeOptions(model, Path(out), recipe, [text], samples=2, seqlen=16))
    except BaseException as error:
        print(f"limit {limit}: {error!r}", flush=True)
        os._exit(3)
    os._exit(0)

def taken_for_an_artifact(out):
    try:
        Artifact(Path(out))
    except VQCompressError:
        return False
    return True

log = []
if chain == "chain":
    # One directory, killed again and again, ever later.
    for limit in range(1, 200):
        status = run(f"{folder}/chain", limit)
        log.append([limit, status, 0, taken_for_an_artifact(f"{folder}/chain")])
        if status != signal.SIGKILL:
            break
else:
    for limit in range(1, 200):
        out = f"{folder}/{limit:03d}"
        killed = run(out, limit)
        if killed != signal.SIGKILL:
            log.append([limit, killed, 0, True])
            break
        early = taken_for_an_artifact(out)
        if early:
            # Then it must be whole already: what follows only tidies up.
            os.system(f"cp -r {out} {folder}/early-{limit:03d}")
        resumed = run(out, 0)
        log.append([limit, killed, resumed, early])
print(json.dumps(log))
"""


@pytest.fixture
def job(toy: Callable[..., Path], recipe_file: Callable[[str], str], text: Path) -> Callable[..., dict[str, Any]]:
    """Quantize a toy with the mixed recipe into a directory; any argument of `quantize` can be replaced."""

    def run(out: Path, **changes: Any) -> dict[str, Any]:
        arguments: dict[str, Any] = {"model": str(toy()), "recipe": recipe_file("mixed"), "texts": [str(text)]}
        progress, began = changes.pop("progress", lambda event, facts: None), changes.pop("began", None)
        options = QuantizeOptions(**{**arguments, "out": out, "samples": 4, "seqlen": 32, **changes})
        return quantize(options, progress, began)

    return run


@pytest.fixture
def unfinished(job: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that was stopped with the rest and the first block on disk."""
    out = tmp_path / "unfinished"
    save, saved = writer.save_file, []

    def save_two(*args: Any, **kwargs: Any) -> None:
        if len(saved) == 2:
            raise Killed
        saved.append(1)
        save(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(writer, "save_file", save_two)
        with pytest.raises(Killed):
            job(out)
    return out


@pytest.mark.parametrize("chain", [pytest.param("each", marks=pytest.mark.slow), "chain"])
def test_killed_at_every_write_and_resumed_gives_the_same_bytes(
    chain: str,
    toy: Callable[..., Path],
    recipe_file: Callable[[str], str],
    text: Path,
    tmp_path: Path,
) -> None:
    arguments = [str(toy()), recipe_file("mixed"), str(text), str(tmp_path), chain]
    done = subprocess.run([sys.executable, "-c", DRIVER, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    log = json.loads(done.stdout.splitlines()[-1])
    assert log[-1][1] == 0, done.stdout[-2000:]
    assert all(resumed == 0 for _, _, resumed, _ in log), done.stdout[-2000:]
    assert len(log) > 20
    folders = sorted(path for path in tmp_path.iterdir() if not path.name.startswith("early"))
    quantize(
        QuantizeOptions(str(toy()), tmp_path / "straight", recipe_file("mixed"), [str(text)], samples=2, seqlen=16)
    )
    expected = contents(tmp_path / "straight")
    for folder in folders:
        assert contents(folder) == expected, folder.name
    # A directory that is taken for an artifact is one in full, at most its journal is still there.
    for folder in tmp_path.glob("early-*"):
        assert {name: digest for name, digest in contents(folder).items() if name != artifact.JOURNAL} == expected


# Forks once per life, so that torch is imported once; each is killed at a random moment and resumed by the next. Logs
# how many blocks the journal had at each kill, and whether it had what tuning staged.
LIVES = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from vqcompress.storage.artifact import JOURNAL, STAGED
from vqcompress.pipeline.quantize import QuantizeOptions, quantize
model, recipe, text, folder, states, kills = sys.argv[1:]

def live(out):
    child = os.fork()
    if not child:
        try:
            quantize(QuantizeOptions(model, out, recipe, [text], samples=4, seqlen=32, states=states))
        except BaseException as error:
            print(repr(error), flush=True)
            os._exit(3)
        os._exit(0)
    return child

def journalled(out):
    try:
        names = json.loads((out / JOURNAL).read_text())["blocks"]
    except FileNotFoundError:
        return [0, False]
    return [sum(".layers." in name for name in names), STAGED in names]

def over(child):
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT)

# What each life would load anew.
quantize(QuantizeOptions(model, Path(folder) / "0", recipe, [text], samples=4, seqlen=32, states=states))
start = time.perf_counter()
assert os.waitpid(live(Path(folder) / "1"), 0)[1] == 0
whole, draw, log, number, lives = time.perf_counter() - start, random.Random(0), [], 2, 0
while len(log) < int(kills):
    out, start = Path(folder) / str(number), time.perf_counter()
    before, child, lives = journalled(out), live(out), lives + 1
    # Every second life of a directory first gets further than the one before it, so that all parts of a run are met
    # however fast the machine is now; the others end wherever they are, the very first one early.
    while lives % 2 == 0 and journalled(out) == before and not over(child):
        time.sleep(0.001)
    time.sleep(draw.uniform(0, 0.03 if lives % 2 == 0 else 0.5 if lives > 1 else 0.2) * whole)
    os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), status
    if status == 0 and lives == 1:
        # The machine is faster now.
        whole = time.perf_counter() - start
    # A kill may come after the last write, which leaves nothing to resume.
    finished = status == 0 or (out / "config.json").exists() and not (out / JOURNAL).exists()
    if not finished:
        log.append(journalled(out))
    else:
        # What is over is left as it is, and the next directory is begun.
        number, lives = number + 1, 0
assert lives == 0 or os.waitpid(live(Path(folder) / str(number)), 0)[1] == 0
print(json.dumps({"log": log, "directories": number - (lives == 0)}))
"""
TUNED = (
    "rules:\n"
    "  - {match: '*.down_proj', method: vq, codebook: trellis, state_bits: 8}\n"
    "  - {match: '*', method: int8, smoothing: {alpha: 0.5}}\n"
    "tuning: {distill_epochs: 1}\n"
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "states", "kills"), [(TUNED, "memory", 25), (TUNED, "disk", 25), ("fp8-tile", "memory", 10)]
)
def test_killed_at_any_moment_and_resumed_gives_the_same_bytes(
    recipe: str,
    states: str,
    kills: int,
    toy: Callable[..., Path],
    recipe_file: Callable[[str], str],
    text: Path,
    tmp_path: Path,
) -> None:
    """60 kills together."""
    arguments = [str(toy("llama", layers=3)), recipe_file(recipe), str(text), str(tmp_path), states, str(kills)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", LIVES, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-1000:]
    facts = json.loads(done.stdout.splitlines()[-1])
    assert len(facts["log"]) == kills
    assert len({count > 0 for count, _ in facts["log"]}) == 2, f"kills before and after the first block: {facts}"
    expected = contents(tmp_path / "0")
    for number in range(1, facts["directories"] + 1):
        assert contents(tmp_path / str(number)) == expected, number


def test_an_unfinished_run_is_no_artifact(unfinished: Path) -> None:
    with pytest.raises(VQCompressError, match="unfinished run"):
        Artifact(unfinished)


def test_what_a_kill_leaves_without_a_name_is_cleared_away(
    unfinished: Path, job: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """safetensors writes under such a name first."""
    shutil.copytree(unfinished, tmp_path / "out")
    (tmp_path / "out" / ".tmprU4IlF").write_bytes(b"half a shard")
    job(tmp_path / "out")
    assert not (tmp_path / "out" / ".tmprU4IlF").exists()


def test_a_resumed_run_does_not_encode_again_what_is_done(
    unfinished: Path, job: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    encoded: list[str] = []
    job(unfinished, progress=lambda event, facts: encoded.append(facts["name"]) if event == "block" else None)
    assert encoded == ["model.layers.1"]


def test_what_blocks_take_adds_up_and_runs_too(
    unfinished: Path,
    job: Callable[..., dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    journal = json.loads((unfinished / artifact.JOURNAL).read_text())
    # But for what rounding adds.
    assert journal["seconds"] + 0.01 >= sum(record["seconds"] for record in journal["blocks"].values()) > 0
    (unfinished / artifact.JOURNAL).write_text(json.dumps(journal | {"seconds": 1000.0}))
    forward = BlockStream.forward
    monkeypatch.setattr(BlockStream, "forward", lambda *words: (time.sleep(0.2), forward(*words))[1])
    whole, rest = job(tmp_path / "whole"), job(unfinished, began=time.perf_counter() - 300)
    # To move on to the second block is its time too; what leads to the first one that a run makes is none's.
    assert whole["blocks"]["model.layers.1"] >= 0.2
    assert sum(whole["blocks"].values()) <= whole["seconds"] + 0.01 < sum(whole["blocks"].values()) + 60
    assert (whole["seconds_before"], rest["seconds_before"]) == (0, 1000)
    assert rest["blocks"]["model.layers.1"] < 100


@pytest.mark.parametrize("what", ["seed", "recipe", "calibration", "checkpoint"])
def test_a_resume_with_other_inputs_is_refused_and_names_the_difference(
    what: str,
    unfinished: Path,
    job: Callable[..., dict[str, Any]],
    toy: Callable[..., Path],
    recipe_file: Callable[[str], str],
) -> None:
    changes: dict[str, dict[str, Any]] = {
        "seed": {"seed": 1},
        "recipe": {"recipe": recipe_file("vq-small")},
        "calibration": {"seqlen": 16},
        "checkpoint": {"model": str(toy("llama", seed=1))},
    }
    before = contents(unfinished)
    # Another seed draws other rows of the same text.
    with pytest.raises(VQCompressError, match=f"another {what}[;:]"):
        job(unfinished, **changes[what])
    assert contents(unfinished) == before


def test_an_unfinished_run_of_other_inputs_is_replaced_with_overwrite(
    unfinished: Path, job: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    (unfinished / "kv_cache.safetensors.partial").write_text("half")
    job(unfinished, seed=1, overwrite=True)
    job(tmp_path / "fresh", seed=1)
    assert contents(unfinished) == contents(tmp_path / "fresh")


def test_a_finished_artifact_is_refused_without_overwrite(job: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    job(tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(VQCompressError, match="finished artifact"):
        job(tmp_path / "out")
    assert contents(tmp_path / "out") == before
    job(tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_directory_of_others_is_refused(overwrite: bool, job: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "sub").mkdir(parents=True)
    (out / "README.md").write_text("of my project")
    with pytest.raises(VQCompressError, match=r"/out holds"):
        job(out, overwrite=overwrite)
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "sub"]
    assert (out / "README.md").read_text() == "of my project"


def test_only_what_a_run_wrote_is_deleted(
    unfinished: Path, job: Callable[..., dict[str, Any]], toy: Callable[..., Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Whatever the names of others, and wherever a run ended; README.md is the artifact's."""
    model, write = tmp_path / "model", writer.Shards.write
    shutil.copytree(toy("llama"), model)
    (model / "LICENSE").write_text("of the model")
    mine = ["eval_mine.py", "LICENSE-notes.txt", "tokenizer_experiments.ipynb", "notes.json.partial"]
    for name in mine:
        (unfinished / name).write_text("mine")
    (unfinished / "sub").mkdir()
    (unfinished / "sub" / "model-00001-of-00002.safetensors").write_text("mine too")

    def kill(shards: writer.Shards, name: str, data: bytes) -> None:
        if name == "config.json":
            raise Killed
        write(shards, name, data)

    with monkeypatch.context() as patch:
        patch.setattr(writer.Shards, "write", kill)
        with pytest.raises(Killed):
            job(unfinished, model=str(model))
    assert (unfinished / "LICENSE").exists()
    for seed in (1, 2):
        job(unfinished, seed=seed, overwrite=True)
        job(tmp_path / str(seed), seed=seed)
        assert {path.read_text() for path in map(unfinished.joinpath, mine)} == {"mine"}
        found = {path.name for path in unfinished.iterdir()} - {"sub", *mine}
        assert found == {path.name for path in (tmp_path / str(seed)).iterdir()}
    assert (unfinished / "sub" / "model-00001-of-00002.safetensors").read_text() == "mine too"


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_plain_checkpoint_is_never_cleared_away(
    overwrite: bool, toy: Callable[..., Path], job: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """-o MODEL instead of -o OUT must not cost anybody the model."""
    out = tmp_path / "precious"
    out.mkdir()
    for path in toy().iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    before = contents(out)
    with pytest.raises(VQCompressError):
        job(out, model=str(out), overwrite=overwrite)
    assert contents(out) == before


def test_a_file_in_the_place_of_the_directory_is_refused(job: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(VQCompressError, match="is a file"):
        job(tmp_path / "out", overwrite=True)
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "gone"])
def test_a_damaged_shard_of_an_unfinished_run_is_made_again(
    number: int, damage: str, unfinished: Path, job: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    shard = unfinished / f"model-0000{number}-of-00003.safetensors"
    data = bytearray(shard.read_bytes())
    if damage == "gone":
        shard.unlink()
    else:
        data[-5] ^= 1
        shard.write_bytes(data if damage == "flipped" else data[: len(data) // 2])
    job(unfinished)
    job(tmp_path / "straight")
    assert contents(unfinished) == contents(tmp_path / "straight")


@pytest.mark.parametrize(
    "journal",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"{}",
        b'{"format_version": 1}',
        b'{"inputs": 3, "blocks": {}}',
        b"\xff\xfe",
        "blocks-missing",
        "blocks-list",
        "record-empty",
        "record-path",
    ],
    ids=str,
)
def test_a_damaged_journal_is_a_named_error_or_a_fresh_start(
    journal: bytes | str, unfinished: Path, job: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    path = unfinished / artifact.JOURNAL
    if isinstance(journal, str):
        data = json.loads(path.read_text())
        if journal == "blocks-missing":
            del data["blocks"]
        elif journal == "blocks-list":
            data["blocks"] = []
        elif journal == "record-empty":
            data["blocks"] = {name: {} for name in data["blocks"]}
        else:
            data["blocks"] = {name: {**record, "file": "../../x"} for name, record in data["blocks"].items()}
        journal = json.dumps(data).encode()
    path.write_bytes(journal)
    try:
        job(unfinished)
    except VQCompressError:
        # What the message proposes must work.
        job(unfinished, overwrite=True)
    job(tmp_path / "straight")
    assert contents(unfinished) == contents(tmp_path / "straight")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=["ENOSPC", "EDQUOT", "safetensors"],
)
def test_a_full_disk_is_said_clearly_and_the_run_can_be_continued(
    error: Exception, job: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, save, saved = tmp_path / "out", writer.save_file, []

    def save_two(tensors: dict[str, torch.Tensor], path: Path, **kwargs: Any) -> None:
        if len(saved) == 2:
            Path(path).write_bytes(b"half a sh")
            raise error
        saved.append(1)
        save(tensors, path, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(writer, "save_file", save_two)
        with pytest.raises(VQCompressError, match=r"no space left.*needs \d+ bytes and \d+ are free"):
            job(out)
    assert not list(out.glob("*.partial")), "what was written of a shard still takes up the space that is needed"
    job(out)
    job(tmp_path / "straight")
    assert contents(out) == contents(tmp_path / "straight")


def test_nan_in_a_late_block_is_named_and_once_mended_the_run_goes_on(
    toy: Callable[..., Path], job: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    source, model, name = toy("llama", layers=18), tmp_path / "model", "model.layers.17.mlp.down_proj.weight"
    shutil.copytree(source, model)
    tensors = load_file(model / "model.safetensors")
    sound = tensors[name].clone()
    tensors[name][3, 5] = torch.nan
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    out, seen = tmp_path / "out", []
    with pytest.raises(VQCompressError, match=f"{name} holds NaN"):
        job(out, model=str(model))
    assert sum(name in json.loads((out / artifact.JOURNAL).read_text())["blocks"] for name in blocks_named(18)) == 17
    tensors[name] = sound
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    job(out, model=str(model), progress=lambda event, facts: seen.append(facts["name"]) if event == "block" else None)
    assert seen == ["model.layers.17"]
    job(tmp_path / "straight", model=str(source))
    assert contents(out) == contents(tmp_path / "straight")


def blocks_named(count: int) -> list[str]:
    """The names of a toy's blocks."""
    return [f"model.layers.{i}" for i in range(count)]


def test_ctrl_c_during_a_commit_counts_when_it_is_done(
    job: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, saved = writer.save_file, []

    def save_and_press(*args: Any, **kwargs: Any) -> None:
        saved.append(1)
        if len(saved) == 2:
            signal.raise_signal(signal.SIGINT)
        save(*args, **kwargs)

    # A shell that starts the tests in its background lets them ignore the signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(writer, "save_file", save_and_press)
            with pytest.raises(KeyboardInterrupt):
                job(tmp_path / "out")
    finally:
        signal.signal(signal.SIGINT, before)
    assert "model.layers.0" in json.loads((tmp_path / "out" / artifact.JOURNAL).read_text())["blocks"]
    job(tmp_path / "out")
    job(tmp_path / "straight")
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")


def test_a_directory_that_cannot_be_written_is_a_named_error(
    job: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(VQCompressError):
        job(tmp_path / "file" / "out")
