"""An artifact of dense weights whose cache is coded; what calibrating a cache costs; its processes; its speed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kills import sums
from safetensors.torch import load_file, save_file
from toys import toy_config
from transformers import AutoModelForCausalLM, DynamicCache
from typer.testing import CliRunner

from vqcompress.cli import tables as show
from vqcompress.cli.console import console
from vqcompress.cli.main import app
from vqcompress.errors import UsageError, VQCompressError
from vqcompress.evaluate.inspect import inspect
from vqcompress.evaluate.perplexity import perplexity
from vqcompress.evaluate.speed import cache_nbytes, speed
from vqcompress.evaluate.verify import verify
from vqcompress.kv_cache import calibrate as cache_calibration
from vqcompress.kv_cache.attention import CACHE
from vqcompress.model.stream import BlockStream
from vqcompress.pipeline import quantize as running
from vqcompress.pipeline.bit_allocation import make_plans
from vqcompress.pipeline.quantize import QuantizeOptions, dry_run, quantize
from vqcompress.runtime.load import load
from vqcompress.storage import distributed
from vqcompress.storage.artifact import HINT, KV_CACHE, open_checkpoint
from vqcompress.storage.checkpoint import Checkpoint
from vqcompress.storage.recipe import KVCacheConfig
from vqcompress.storage.recipe import load as load_recipe
from vqcompress.storage.writer import refresh_sums

Make = Callable[..., Path]
SMALL = "description: few rounds\ncache: {bits: 4, rounds: 2}\n"


def run(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words], prog_name="vqcompress")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("recipe") / "small.yaml"
    path.write_text(SMALL)
    return str(path)


@pytest.fixture(scope="module")
def coded(toy: Make, text: Path, small: str, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """coded(family) → an artifact of dense weights and codebooks."""
    made: dict[str, Path] = {}

    def make(family: str = "llama") -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp("coded") / "out"
            # Whatever mode the test is in that asks first.
            with torch.inference_mode(False):
                quantize(QuantizeOptions(str(toy(family)), made[family], small, [str(text)], samples=8, seqlen=64))
        return made[family]

    return make


@pytest.mark.parametrize("family", ["llama", "gemma", "mixtral", "gpt_oss"])
def test_a_recipe_of_a_cache_alone_copies_the_weights(family: str, coded: Make, toy: Make) -> None:
    """Under the checkpoint's names, experts and tied embeddings too; nothing is marked as compressed."""
    before, after = Checkpoint(toy(family)), Checkpoint(coded(family))
    assert after.tensors.keys() == before.tensors.keys()
    assert HINT not in after.tensors
    theirs = before.read(before.tensors)
    for name, tensor in after.read(after.tensors).items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor, theirs[name]), name
    assert len(load_file(coded(family) / KV_CACHE)) == 4


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt_oss"])
@torch.inference_mode()
def test_such_an_artifact_loads_everywhere(family: str, coded: Make, toy: Make) -> None:
    ids = torch.arange(3, 33)[None]
    expected = load(str(toy(family)))(ids).logits
    ours, theirs = load(coded(family)), AutoModelForCausalLM.from_pretrained(coded(family)).eval()
    assert torch.equal(ours(ids).logits, expected)
    torch.testing.assert_close(theirs(ids).logits, expected)


def test_transformers_alone_loads_its_weights_right(coded: Make, toy: Make) -> None:
    script = (
        "import sys, torch; from transformers import AutoModelForCausalLM as A\n"
        "ids = torch.arange(3, 33)[None]; a, b = (A.from_pretrained(p).eval()(ids).logits for p in sys.argv[1:])\n"
        "print('vqcompress' in sys.modules, torch.equal(a, b))"
    )
    words = [sys.executable, "-c", script, str(coded()), str(toy())]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


def test_it_is_said_how_a_cache_alone_is_measured(
    coded: Make, quantized: Make, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = quantized("fp8-tile")
    shown = run("compare", coded(), plain, "--text", text, "--seqlen", 32, "--windows", 1)
    assert "--kv-cache artifact" in shown.output
    alone, dense = (json.loads((folder / "report.json").read_text()) for folder in (coded(), plain))
    both = dense | {"kv_cache": alone["kv_cache"]}
    for report, ending in ((alone, "--kv-cache artifact"), (both, "--kv-cache artifact"), (dense, "--baseline demo")):
        show.quantized(console(), report, "out", "demo")
        assert capsys.readouterr().out.splitlines()[-1].endswith(ending)


def test_commands_cope_with_an_artifact_that_compresses_no_weight(coded: Make, toy: Make, tmp_path: Path) -> None:
    report = json.loads((coded() / "report.json").read_text())
    assert (report["bits_per_weight"], report["weights_quantized"], report["targets"]) == (None, 0, [])
    files = [*coded().glob("model-*.safetensors"), coded() / KV_CACHE]
    assert report["artifact_bytes"] == sum(path.stat().st_size for path in files)
    learned = report["blocks"]["(codebooks of keys and values)"]
    assert report["seconds"] / 2 < learned < report["seconds"]
    card = (coded() / "README.md").read_text()
    assert "size mismatch" not in card
    facts = inspect(str(coded()))
    assert (facts["bits_per_weight"], facts["files"], facts["kv_cache"]["bits"]) == (None, 4, 4)
    assert facts["artifact_bytes"] == report["artifact_bytes"]
    shown = run("inspect", coded())
    assert shown.exit_code == 0, shown.output
    checked = verify(str(coded()))
    assert (checked["targets"], checked["files"], checked["bytes"]) == (0, facts["files"], report["artifact_bytes"])
    done = run("export", coded(), "--format", "dense", "-o", tmp_path / "dense")
    assert done.exit_code == 0, done.output
    exported, original = Checkpoint(tmp_path / "dense"), Checkpoint(toy())
    assert "quantization_config" not in exported.config
    theirs = original.read(original.tensors)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in exported.read(exported.tensors).items())


@pytest.mark.parametrize(
    "recipe", ["kv-fp8", "rules: [{match: '*', method: keep}]\ncache: {bits: 2, codebook: universal}"]
)
def test_a_cache_that_needs_no_data_needs_none(recipe: str, toy: Make, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(recipe)
    name = recipe if recipe == "kv-fp8" else str(tmp_path / "recipe.yaml")
    done = run("quantize", toy(), "-o", tmp_path / "out", "--recipe", name)
    assert done.exit_code == 0, done.output
    assert not (tmp_path / "out" / KV_CACHE).exists()
    assert verify(str(tmp_path / "out"))["files"] == 3
    found = perplexity(str(tmp_path / "out"), str(Path(__file__)), seqlen=32, limit=2, kv_cache="kv-fp8")
    assert found["perplexity"] > 1


def test_nothing_at_all_is_still_refused(toy: Make, tmp_path: Path) -> None:
    (tmp_path / "keep.yaml").write_text("rules: [{match: '*', method: keep}]")
    with pytest.raises(UsageError, match="compresses nothing in this model"):
        quantize(QuantizeOptions(str(toy()), tmp_path / "out", str(tmp_path / "keep.yaml")))


@pytest.mark.parametrize(("name", "change"), [("1.keys", "nan"), ("1.keys", "gone"), ("2.keys", "new")])
def test_verify_looks_into_the_codebooks(name: str, change: str, coded: Make, tmp_path: Path) -> None:
    shutil.copytree(coded(), tmp_path / "out")
    books = load_file(tmp_path / "out" / KV_CACHE)
    book = books.pop(name, books["0.keys"].clone())
    books |= {} if change == "gone" else {name: book * (torch.nan if change == "nan" else 1)}
    save_file(books, tmp_path / "out" / KV_CACHE)
    refresh_sums(tmp_path / "out", [KV_CACHE])
    with pytest.raises(VQCompressError, match=f"the codebook {name} is missing or damaged"):
        verify(str(tmp_path / "out"))


def test_a_run_that_died_while_it_learned_goes_on(
    toy: Make, text: Path, small: str, coded: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = (str(toy()), tmp_path / "out", small, [str(text)], 8, 64)

    def die(*words: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(running, "cache_books", die)
        with pytest.raises(KeyboardInterrupt):
            quantize(QuantizeOptions(*job))
    assert not (tmp_path / "out" / "config.json").exists()
    quantize(QuantizeOptions(*job))
    assert sums(tmp_path / "out") == sums(coded())


@pytest.mark.parametrize("recipe", ["smoothquant-int8", "vq-small"])
def test_codebooks_are_learned_beside_weights_without_gradients(
    recipe: str, toy: Make, text: Path, recipe_file: Callable[[str], str], small: str, tmp_path: Path
) -> None:
    """INT8 rounds its activations, and no kernel has a gradient."""
    job = (str(toy("mixtral")), tmp_path / "out", recipe_file(recipe), [str(text)])
    quantize(QuantizeOptions(*job, samples=8, seqlen=64, kv_cache=small))
    books = load_file(tmp_path / "out" / KV_CACHE)
    assert all(book.isfinite().all() and book.std() > 0 for book in books.values())


def test_every_process_learns_its_share_of_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What this process of three hands out is what it was asked for, and it learns the layers that are its own."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(toy_config(layers=4, hidden=64)).eval()
    rows = torch.randint(3, 384, (12, 64), generator=torch.Generator().manual_seed(0))
    alone = cache_calibration.calibrate(model, rows, KVCacheConfig(bits=2, rounds=1), [None] * 4)
    learned: list[dict[int, Any]] = []
    group = distributed.ProcessGroup(1, 3)
    monkeypatch.setattr(distributed.ProcessGroup, "shard", lambda self, items: list(items))
    monkeypatch.setattr(distributed.ProcessGroup, "gather", lambda self, rank, value: [value] if rank == 1 else [])
    known = dict(enumerate(alone))
    monkeypatch.setattr(distributed.ProcessGroup, "all_gather", lambda self, value: (learned.append(value), [known])[1])
    cache_calibration.calibrate(model, rows, KVCacheConfig(bits=2, rounds=1), [None] * 4, group=group)
    assert [list(each) for each in learned] == [[1]]
    assert all(torch.equal(a, b) for a, b in zip(learned[0][1], alone[1], strict=True))


@pytest.mark.parametrize("family", ["llama", "deepseek_v3", "opt"])
def test_the_codebooks_that_are_planned_are_those_that_are_written(
    family: str, toy: Make, text: Path, small: str, tmp_path: Path
) -> None:
    plan = dry_run(QuantizeOptions(str(toy(family)), None, small, [str(text)], 8, 64))
    quantize(QuantizeOptions(str(toy(family)), tmp_path / "out", small, [str(text)], 8, 64))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert plan["codebook_bytes"] == sum(book.nbytes for book in load_file(tmp_path / "out" / KV_CACHE).values())
    # But for headers.
    assert plan["artifact_bytes"] == pytest.approx(report["artifact_bytes"], rel=0.05)


def test_a_cache_is_planned_from_a_config_alone(tmp_path: Path) -> None:
    config = {
        "model_type": "llama", "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "torch_dtype": "bfloat16",
        "max_position_embeddings": 131072, "tie_word_embeddings": False,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = {name: dry_run(QuantizeOptions(str(tmp_path), None, name)) for name in ("kv-vq-4bit", "kv-fp8", "fp8-tile")}
    cached, plain = found["kv-vq-4bit"], found["kv-fp8"]
    # 2 · 8 heads of 128 channels in 32 layers, 256 entries of 2 bytes each.
    assert cached["codebook_bytes"] == 32 * 2 * 8 * 128 * 256 * 2
    assert cached["artifact_bytes"] == cached["source_bytes"] + cached["codebook_bytes"]
    assert (cached["bits_per_weight"], cached["targets"], cached["kv_cache"]["bits"]) == (None, [], 4)
    # The whole model in float32 and more; one block without.
    assert cached["peak_rss_bytes"] > 4 * cached["parameters"] > 4 * plain["peak_rss_bytes"]
    assert (plain["codebook_bytes"], plain["calibration_tokens"]) == (0, 0)
    assert found["fp8-tile"]["kv_cache"] is None
    stream = BlockStream(open_checkpoint(str(tmp_path), weights=False), torch.device("cpu"), torch.float32)
    assert make_plans(stream, load_recipe("kv-vq-4bit"), None)[0].targets == []


def test_too_little_memory_is_said_before_the_work(
    toy: Make, text: Path, coded: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = str(coded())
    monkeypatch.setattr("vqcompress.model.device.available_bytes", lambda: 100_000)
    message = "to learn the codebooks of a cache takes the whole model in memory, about .* GB are free; take a recipe"
    with pytest.raises(VQCompressError, match=message):
        quantize(QuantizeOptions(str(toy()), tmp_path / "out", "kv-vq-4bit", [str(text)], 8, 64))
    assert not (tmp_path / "out").exists()
    with pytest.raises(
        VQCompressError, match=r"eval perplexity --kv-cache takes the whole model .*; without --kv-cache"
    ):
        perplexity(out, str(text), seqlen=32, limit=2, kv_cache="kv-fp8")
    perplexity(out, str(text), seqlen=32, limit=2)


@pytest.mark.parametrize("baseline", [False, True])
def test_progress_counts_the_work_that_is_done(baseline: bool, coded: Make, toy: Make, text: Path) -> None:
    told: list[tuple[int, int]] = []
    original = str(toy()) if baseline else None
    perplexity(
        str(coded()),
        str(text),
        seqlen=32,
        limit=4,
        baseline=original,
        kv_cache="kv-fp8",
        progress=lambda *w: told.append(w),
    )
    done, total = zip(*told, strict=True)
    assert len(set(total)) == 1
    assert list(done) == sorted(done)
    assert done[-1] == total[-1]


def test_speed_with_a_coded_cache_and_its_memory(coded: Make, small: str) -> None:
    found = speed(str(coded()), 32, 8, baseline=str(coded()), kv_cache=small)
    other = found["baseline"]
    assert (found["kv_cache"], other["kv_cache"]) == (small, None)
    # Keys and values of 2 layers with 2 heads of 16 channels, float32; the last token is never fed.
    assert other["cache_bytes"] == 2 * 2 * 2 * 16 * 39 * 4
    assert 0 < found["cache_bytes"] != other["cache_bytes"]
    assert found["decode_relative_to_baseline"] > 0
    result = run("eval", "speed", coded(), "--prompt-tokens", 8, "--new-tokens", 3, "--kv-cache", "kv-fp8")
    assert result.exit_code == 0, result.output
    assert "kv-fp8" in result.stdout


def test_memory_of_a_plain_cache_is_counted(toy: Make) -> None:
    cache, model = DynamicCache(), load(str(toy()))
    assert cache_nbytes(cache) == 0
    with torch.inference_mode():
        model(torch.arange(10)[None], **{CACHE: cache}, use_cache=True)
    assert cache_nbytes(cache) == 2 * 2 * 2 * 16 * 10 * 4
