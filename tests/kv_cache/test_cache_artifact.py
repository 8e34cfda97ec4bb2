"""Artifacts with codebooks of a cache, beside compressed weights or alone: made, planned, loaded, measured, damaged."""

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
from transformers import AutoModelForCausalLM, DynamicCache
from typer.testing import CliRunner

from vqcompress.cli.main import app
from vqcompress.errors import UsageError, VQCompressError
from vqcompress.evaluate.inspect import inspect
from vqcompress.evaluate.perplexity import perplexity
from vqcompress.evaluate.speed import speed
from vqcompress.evaluate.verify import verify
from vqcompress.kv_cache.attention import CACHE
from vqcompress.kv_cache.cache import KVCache
from vqcompress.pipeline import quantize as running
from vqcompress.pipeline.quantize import QuantizeOptions, dry_run, quantize
from vqcompress.runtime.load import load
from vqcompress.storage.artifact import HINT, KV_CACHE
from vqcompress.storage.checkpoint import Checkpoint
from vqcompress.storage.recipe import dump, parse
from vqcompress.storage.writer import refresh_sums

Make = Callable[..., Path]


def command(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words], prog_name="vqcompress")


@pytest.fixture(scope="module")
def small(recipe_file: Callable[[str], str]) -> str:
    return recipe_file("description: few rounds\ncache: {bits: 4, rounds: 2}\n")


@pytest.fixture(scope="module")
def coded(toy: Make, text: Path, small: str, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """coded(family) → an artifact of dense weights and codebooks."""
    made: dict[str, Path] = {}

    def make(family: str = "llama") -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp("coded") / "out"
            quantize(QuantizeOptions(str(toy(family)), made[family], small, [str(text)], samples=8, seqlen=64))
        return made[family]

    return make


@pytest.mark.parametrize("family", ["llama", "gemma", "gpt_oss"])
def test_a_recipe_of_a_cache_alone_copies_the_weights(family: str, coded: Make, toy: Make) -> None:
    """Under the checkpoint's names, experts and tied embeddings too; and the artifact loads everywhere."""
    before, after = Checkpoint(toy(family)), Checkpoint(coded(family))
    assert after.tensors.keys() == before.tensors.keys()
    assert HINT not in after.tensors
    theirs = before.read(before.tensors)
    for name, tensor in after.read(after.tensors).items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor, theirs[name]), name
    ids = torch.arange(3, 33)[None]
    with torch.inference_mode():
        expected = load(str(toy(family)))(ids).logits
        assert torch.equal(load(coded(family))(ids).logits, expected)
        plain = AutoModelForCausalLM.from_pretrained(coded(family)).eval()
        torch.testing.assert_close(plain(ids).logits, expected)


@pytest.mark.slow
def test_transformers_alone_loads_its_weights_right(coded: Make, toy: Make) -> None:
    script = (
        "import sys, torch; from transformers import AutoModelForCausalLM as A\n"
        "ids = torch.arange(3, 33)[None]; a, b = (A.from_pretrained(p).eval()(ids).logits for p in sys.argv[1:])\n"
        "print('vqcompress' in sys.modules, torch.equal(a, b))"
    )
    words = [sys.executable, "-c", script, str(coded()), str(toy())]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


def test_the_codebooks_and_settings_of_an_artifact(coded: Make) -> None:
    books = load_file(coded() / KV_CACHE)
    assert {name: tuple(book.shape) for name, book in books.items()} == {
        f"{n}.{kind}": (2, 8, 256, 2) for n in range(2) for kind in ("keys", "values")
    }
    settings = json.loads((coded() / "config.json").read_text())["quantization_config"]["kv_cache"]
    assert (settings["bits"], settings["codebook"], settings["before"]) == (4, "learned", [True, True])
    assert KV_CACHE in (coded() / "SHA256SUMS").read_text()


def test_commands_work_on_an_artifact_without_compressed_weights(coded: Make, toy: Make, tmp_path: Path) -> None:
    report = json.loads((coded() / "report.json").read_text())
    assert (report["bits_per_weight"], report["weights_quantized"], report["targets"]) == (None, 0, [])
    files = [*coded().glob("model-*.safetensors"), coded() / KV_CACHE]
    assert report["artifact_bytes"] == sum(path.stat().st_size for path in files)
    facts, checked = inspect(str(coded())), verify(str(coded()))
    assert (facts["bits_per_weight"], facts["files"], facts["kv_cache"]["bits"]) == (None, 4, 4)
    assert (checked["targets"], checked["files"], checked["bytes"]) == (0, 4, report["artifact_bytes"])
    assert command("inspect", coded()).exit_code == 0
    done = command("export", coded(), "--format", "dense", "-o", tmp_path / "dense")
    assert done.exit_code == 0, done.output
    exported, original = Checkpoint(tmp_path / "dense"), Checkpoint(toy())
    assert "quantization_config" not in exported.config
    theirs = original.read(original.tensors)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in exported.read(exported.tensors).items())


def test_a_cache_that_learns_nothing_needs_no_text(toy: Make, tmp_path: Path) -> None:
    done = command("quantize", toy(), "-o", tmp_path / "out", "--recipe", "kv-fp8")
    assert done.exit_code == 0, done.output
    assert not (tmp_path / "out" / KV_CACHE).exists()
    assert verify(str(tmp_path / "out"))["files"] == 3


def test_commands_turn_the_cache_on(coded: Make, text: Path, recipe_file: Callable[[str], str]) -> None:
    out, ratios = coded(), {}
    for name in (recipe_file("cache: {window: 0, sinks: 0}"), "kv-fp8", "artifact"):
        told: list[tuple[int, int]] = []
        given = {"seqlen": 64, "limit": 3, "baseline": str(out), "progress": lambda *counts, t=told: t.append(counts)}
        found = perplexity(str(out), str(text), kv_cache=name, **given)  # type: ignore[arg-type]
        assert found["kv_cache"] == name
        ratios[name] = found["ratio"]
        assert [done for done, _ in told] == list(range(1, told[0][1] + 1))
    assert len(set(ratios.values())) == 3
    assert all(0.9 < ratio < 1.1 for ratio in ratios.values())
    words = ("--prompt", "river stone", "--max-new-tokens", 5, "--kv-cache", "artifact")
    assert command("generate", out, *words).exit_code == 0


def test_a_loaded_model_generates_with_codes(coded: Make) -> None:
    ids = torch.arange(3, 63)[None]
    settings = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    for given, cache, expected in (
        ({"kv_cache": True}, {}, True),
        ({"kv_cache": "kv-fp8"}, {CACHE: DynamicCache()}, False),
        ({}, {}, False),
    ):
        found = load(coded(), **given).generate(ids, **cache, **settings)  # type: ignore[arg-type, operator]
        assert isinstance(found.past_key_values, KVCache) == expected
        assert torch.equal(found.sequences[:, :60], ids)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("OUT", "--kv-cache", "kv-vq-2bit"), ("kv-vq-2bit", "kv-fp8")),
        (("OUT", "--kv-cache", "fp8-tile"), ("kv-vq-4bit",)),
        (("OUT", "--kv-cache", "kv-vq-4bits"), ("'kv-vq-4bits'", "'kv-vq-4bit'")),
        (("OUT", "--kv-cache", "cache: {keys: after}"), ("kv-fp8",)),
        (("SOURCE", "--kv-cache", "kv-vq-4bit"), ("kv-vq-4bit", "kv-fp8")),
        (("SOURCE", "--kv-cache", "artifact"), ("kv-fp8",)),
    ],
)
def test_a_cache_without_its_codebooks_is_refused(
    coded: Make, toy: Make, words: tuple[str, ...], named: tuple[str, ...], recipe_file: Callable[[str], str]
) -> None:
    places = {"OUT": coded(), "SOURCE": toy()}
    done = command("generate", *(places.get(word, recipe_file(word)) for word in words), "--prompt", "river")
    assert done.exit_code == 2, done.output
    assert all(name in done.stderr for name in named)


@pytest.mark.parametrize("change", ["short", "nan", "gone"])
def test_damaged_codebooks_are_named(change: str, coded: Make, tmp_path: Path) -> None:
    shutil.copytree(coded(), tmp_path / "out")
    books = load_file(tmp_path / "out" / KV_CACHE)
    book = books.pop("1.keys")
    if change != "gone":
        books["1.keys"] = {"short": book[:, :, :100].contiguous(), "nan": book * torch.nan}[change]
    save_file(books, tmp_path / "out" / KV_CACHE)
    with pytest.raises(VQCompressError, match=KV_CACHE):
        load(tmp_path / "out", kv_cache=True)
    refresh_sums(tmp_path / "out", [KV_CACHE])
    if change == "nan":
        with pytest.raises(VQCompressError, match=r"1\.keys"):
            verify(str(tmp_path / "out"))
    else:
        with pytest.raises(VQCompressError, match=r"1\.keys"):
            load(tmp_path / "out", kv_cache=True)
        (tmp_path / "out" / KV_CACHE).unlink()
        with pytest.raises(VQCompressError, match=KV_CACHE):
            load(tmp_path / "out", kv_cache=True)


@pytest.mark.parametrize(
    ("text", "named"),
    [("cache: {bits: 3}", "bits=3"), ("cache: {bits: 8}", "fp8"), ("cache: {windows: 3}", r"cache\.windows")],
)
def test_options_of_a_cache_that_mean_nothing_are_refused(text: str, named: str) -> None:
    with pytest.raises(UsageError, match=named):
        parse(text, "test")


def test_a_recipe_of_weights_may_hold_options_of_a_cache() -> None:
    recipe = parse("cache: {bits: 2, sinks: 1}\nrules: [{match: '*', method: fp8}]", "both")
    assert recipe.cache is not None
    assert (recipe.cache.bits, recipe.cache.sinks, len(recipe.rules)) == (2, 1, 1)
    assert parse(dump(recipe), "again").cache == recipe.cache
    assert parse("cache: {bits: 4}\nrules: [{match: '*', method: fp8}]", "both").fingerprint() != recipe.fingerprint()


def test_a_run_that_died_while_it_learned_goes_on(
    toy: Make, text: Path, small: str, coded: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = (str(toy()), tmp_path / "out", small, [str(text)], 8, 64)

    def die(*words: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(running, "calibrate", die)
        with pytest.raises(KeyboardInterrupt):
            quantize(QuantizeOptions(*job))
    assert not (tmp_path / "out" / "config.json").exists()
    quantize(QuantizeOptions(*job))
    assert sums(tmp_path / "out") == sums(coded())


@pytest.mark.slow
def test_codebooks_are_learned_beside_weights_without_gradients(
    toy: Make, text: Path, small: str, tmp_path: Path
) -> None:
    """INT8 rounds its activations, and no kernel has a gradient."""
    job = (str(toy("mixtral")), tmp_path / "out", "smoothquant-int8", [str(text)])
    quantize(QuantizeOptions(*job, samples=8, seqlen=64, kv_cache=small))
    books = load_file(tmp_path / "out" / KV_CACHE)
    assert all(book.isfinite().all() and book.std() > 0 for book in books.values())


@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
def test_the_planned_codebooks_are_those_that_are_written(
    family: str, coded: Make, toy: Make, text: Path, small: str
) -> None:
    plan = dry_run(QuantizeOptions(str(toy(family)), None, small, [str(text)], 8, 64))
    report = json.loads((coded(family) / "report.json").read_text())
    assert plan["codebook_bytes"] == sum(book.nbytes for book in load_file(coded(family) / KV_CACHE).values())
    # But for headers.
    assert plan["artifact_bytes"] == pytest.approx(report["artifact_bytes"], rel=0.05)


def test_a_cache_is_planned_from_a_config_alone(tmp_path: Path) -> None:
    config = {
        "model_type": "llama", "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "torch_dtype": "bfloat16",
        "max_position_embeddings": 131072, "tie_word_embeddings": False,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    cached, plain = (dry_run(QuantizeOptions(str(tmp_path), None, name)) for name in ("kv-vq-4bit", "kv-fp8"))
    # 2 · 8 heads of 128 channels in 32 layers, 256 entries of 2 bytes each.
    assert cached["codebook_bytes"] == 32 * 2 * 8 * 128 * 256 * 2
    assert cached["artifact_bytes"] == cached["source_bytes"] + cached["codebook_bytes"]
    assert (cached["bits_per_weight"], cached["targets"], cached["kv_cache"]["bits"]) == (None, [], 4)
    # The whole model in float32 and more; a block, embeddings and head without.
    assert cached["peak_rss_bytes"] > 4 * cached["parameters"] > 3 * plain["peak_rss_bytes"]
    assert (plain["codebook_bytes"], plain["calibration_tokens"]) == (0, 0)


def test_too_little_memory_is_said_before_the_work(
    toy: Make, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vqcompress.model.device.available_bytes", lambda: 100_000)
    with pytest.raises(VQCompressError, match="codebooks"):
        quantize(QuantizeOptions(str(toy()), tmp_path / "out", "kv-vq-4bit", [str(text)], 8, 64))
    assert not (tmp_path / "out").exists()


def test_speed_with_a_coded_cache_and_its_memory(coded: Make, small: str) -> None:
    found = speed(str(coded()), 32, 8, baseline=str(coded()), kv_cache=small)
    other = found["baseline"]
    assert (found["kv_cache"], other["kv_cache"]) == (small, None)
    # Keys and values of 2 layers with 2 heads of 16 channels, float32; the last token is never fed.
    assert other["cache_bytes"] == 2 * 2 * 2 * 16 * 39 * 4
    assert 0 < found["cache_bytes"] != other["cache_bytes"]
