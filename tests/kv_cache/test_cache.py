"""A cache of codes behaves as a cache, and every token attends to what is stored."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from toys import toy_checkpoint, toy_config, toy_text
from transformers import AutoModelForCausalLM, DynamicCache
from typer.testing import CliRunner

from vqcompress.cli.main import app
from vqcompress.errors import UsageError, VQCompressError
from vqcompress.kv_cache import codes as kv
from vqcompress.kv_cache.attention import CACHE, decoding, find_rotary
from vqcompress.kv_cache.cache import KVCache, KVCacheSpec
from vqcompress.kv_cache.calibrate import calibrate
from vqcompress.kv_cache.quantizers import FP8, KVQuantizer, Learned, Universal
from vqcompress.pipeline.quantize import QuantizeOptions, quantize
from vqcompress.runtime.load import load
from vqcompress.storage.artifact import KV_CACHE
from vqcompress.storage.recipe import KVCacheConfig, dump, parse

FAMILIES = ["llama", "qwen3", "gemma", "opt", "gpt_neox", "mixtral", "gpt_oss", "deepseek_v3"]


class Plain(KVQuantizer):
    """Stores what it gets, so that all but the codes can be compared with a plain cache."""

    def encode(self, x_BHTD: Tensor) -> dict[str, Tensor]:
        return {"x": x_BHTD.float()}

    def decode(self, parts: dict[str, Tensor]) -> Tensor:
        return parts["x"].clone()


def model_of(family: str, **extra: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(toy_config(family, **extra)).float().eval()


def rough(model: Any, d: int = 4) -> list[tuple[KVQuantizer, KVQuantizer]]:
    """KVQuantizers that lose something, for the layers of a toy."""
    return [(Universal(d), Universal(d))] * model.config.num_hidden_layers


def plain(model: Any) -> list[tuple[KVQuantizer, KVQuantizer]]:
    return [(Plain(), Plain()) for _ in range(model.config.num_hidden_layers)]


def ids_of(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 384, shape, generator=torch.Generator().manual_seed(seed))


def new_cache(model: Any, quantizers: Any, rotary: Any, window: int, sinks: int, **options: Any) -> KVCache:
    return KVCache(model, KVCacheSpec(quantizers, rotary, window, sinks), **options)


def gaussian(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_an_embedding_that_is_turned_back_is_gone() -> None:
    x = gaussian(2, 3, 5, 8)
    angle = gaussian(1, 5, 4).repeat(1, 1, 2)
    cos, sin = 1.5 * angle.cos(), 1.5 * angle.sin()
    turned = kv.apply_rope(x, cos, sin)
    assert (turned - x).norm() > x.norm() / 2
    torch.testing.assert_close(kv.apply_rope(turned, cos, sin, inverse=True), x)


@pytest.mark.parametrize("d", [2, 4, 8])
def test_codes_are_those_of_the_nearest_entry(d: int) -> None:
    book = gaussian(3, 16 // d, 256, d).half()
    x = gaussian(2, 3, 7, 16)
    codes = kv.encode(x, book)
    assert codes.shape == (2, 3, 7, 16 // d)
    assert codes.dtype == torch.uint8
    groups = x.unflatten(-1, (-1, d)).double()
    distance = (groups[..., None, :] - book.double()[None, :, None]).square().sum(-1)
    assert torch.equal(codes.long(), distance.argmin(-1))
    assert torch.equal(
        kv.decode(codes, book),
        torch.gather(
            book.float()[None, :, None].expand(2, 3, 7, -1, -1, -1),
            4,
            codes.long()[..., None, None].expand(-1, -1, -1, -1, 1, d),
        ).flatten(-3),
    )


@pytest.mark.parametrize(("d", "most"), [(2, 0.012), (4, 0.13), (8, 0.42)])
def test_what_needs_no_calibration_loses_what_a_gaussian_does(d: int, most: float) -> None:
    """Distortion of the unit Gaussian at 4, 2 and 1 bits, with a channel a hundred times as loud as the others."""
    x = gaussian(1, 2, 500, 64) * torch.where(torch.arange(64) == 5, 100.0, 1.0)
    universal = Universal(d)
    back = universal.decode(universal.encode(x))
    assert (back - x).square().sum() <= most * x.square().sum()
    assert not universal.decode(universal.encode(0 * x)).isnan().any()


def test_e4m3_loses_a_sixteenth_at_most() -> None:
    x = gaussian(1, 2, 50, 64) * 1e3
    back = FP8().decode(FP8().encode(x))
    assert ((back - x).abs() <= x.abs() / 16 + x.abs().amax(-1, keepdim=True) / 448 / 512).all()


def test_codebooks_are_learned_from_what_weighs() -> None:
    """Two clouds of vectors; the one that weighs nothing gets next to no entries."""
    x = torch.cat([gaussian(4000, 1, 4), gaussian(4000, 1, 4) + 50])
    heavy = torch.cat([torch.ones(4000, 1, 4), torch.zeros(4000, 1, 4)])
    draw = torch.Generator().manual_seed(0)
    book = kv.learn(x, heavy, 4, 8, draw)
    assert book.shape == (1, 1, 256, 4)
    near = (book[0, 0].float().norm(dim=1) < 20).sum()
    both = (kv.learn(x, None, 4, 8, draw)[0, 0].float().norm(dim=1) < 20).sum()
    assert near > 230
    assert 80 < both < 180


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_are_seen_before_their_embedding_where_that_is_proven(family: str) -> None:
    """Not where there is none, it covers a part of a head, it has half the numbers, or keys are put together later."""
    found = find_rotary(model_of(family))
    assert len(found) == 2
    assert [module is not None for module in found] == [family not in ("opt", "gpt_neox", "gpt_oss", "deepseek_v3")] * 2


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kept", [(0, 0), (8, 2)])
def test_generate_goes_as_with_a_plain_cache(family: str, kept: tuple[int, int]) -> None:
    """Rows that are padded on the left, and more tokens than sliding windows hold."""
    model = model_of(family)
    ids, mask = ids_of(3, 20), torch.ones(3, 20, dtype=torch.long)
    mask[1, :7] = mask[2, :1] = 0
    settings = {
        "attention_mask": mask,
        "max_new_tokens": 24,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    expected = model.generate(ids, **{CACHE: DynamicCache(config=model.config)}, **settings)
    cache = new_cache(model, plain(model), find_rotary(model), *kept)
    assert torch.equal(model.generate(ids, **{CACHE: cache}, **settings), expected)
    assert cache.get_seq_length() == 43


def test_beams_are_reordered() -> None:
    model = model_of("llama")
    settings = {"max_new_tokens": 16, "do_sample": False, "num_beams": 3, "pad_token_id": 0, "eos_token_id": None}
    ids, mask = ids_of(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[1, :5] = 0
    expected = model.generate(ids, attention_mask=mask, **settings)
    cache = new_cache(model, plain(model), find_rotary(model), 4, 2)
    assert torch.equal(model.generate(ids, attention_mask=mask, **{CACHE: cache}, **settings), expected)


@torch.inference_mode()
def step_by_step(model: Any, cache: KVCache, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    found = []
    for n in range(ids.shape[1]):
        seen = None if mask is None else mask[:, : n + 1]
        places = None if mask is None else (seen.cumsum(1) - 1).clamp(min=0)[:, -1:]  # type: ignore[union-attr]
        found.append(
            model(ids[:, n : n + 1], attention_mask=seen, position_ids=places, **{CACHE: cache}, use_cache=True).logits
        )
    return torch.cat(found, 1)


@pytest.mark.parametrize("family", ["llama", "gemma", "opt"])
@pytest.mark.parametrize("kept", [(0, 0), (1, 0), (6, 3), (100, 0)])
@torch.inference_mode()
def test_one_pass_measures_what_decoding_token_by_token_would(family: str, kept: tuple[int, int]) -> None:
    model = model_of(family)
    ids, rotary = ids_of(2, 40), find_rotary(model)
    steps = step_by_step(model, new_cache(model, rough(model), rotary, *kept), ids)
    with decoding(model):
        once = model(ids, **{CACHE: new_cache(model, rough(model), rotary, *kept, strict=True)}, use_cache=True).logits
    dense = model(ids, use_cache=False).logits
    torch.testing.assert_close(once, steps, atol=2e-4, rtol=1e-3)
    assert ((once - dense).abs().max() > 1e-3) == (kept != (100, 0))


@torch.inference_mode()
def test_a_prompt_attends_in_full_precision() -> None:
    model = model_of("llama")
    ids = ids_of(2, 40)
    cache = new_cache(model, rough(model), find_rotary(model), 0, 0)
    torch.testing.assert_close(model(ids, **{CACHE: cache}, use_cache=True).logits, model(ids, use_cache=False).logits)


@torch.inference_mode()
def test_a_padded_row_reads_what_it_would_alone() -> None:
    """Its first tokens are kept, not the padding."""
    model = model_of("llama")
    short = ids_of(1, 30)
    ids = torch.cat([torch.zeros(1, 9, dtype=torch.long), short], 1)
    mask = (torch.arange(39) >= 9).long()[None]
    alone = step_by_step(model, new_cache(model, rough(model), find_rotary(model), 5, 3), short)
    cache = new_cache(model, rough(model), find_rotary(model), 5, 3)
    places = (mask.cumsum(1) - 1).clamp(min=0)
    model(ids[:, :12], attention_mask=mask[:, :12], position_ids=places[:, :12], **{CACHE: cache}, use_cache=True)
    last = [
        model(
            ids[:, n : n + 1], attention_mask=mask[:, : n + 1], position_ids=places[:, n : n + 1],
            **{CACHE: cache}, use_cache=True,
        ).logits
        for n in range(12, 39)
    ]  # fmt: skip
    torch.testing.assert_close(torch.cat(last, 1)[:, -10:], alone[:, -10:], atol=5e-3, rtol=5e-2)


@torch.inference_mode()
def test_what_is_cropped_was_never_there() -> None:
    model = model_of("llama")
    ids, rotary = ids_of(1, 30), find_rotary(model)
    once = new_cache(model, rough(model), rotary, 0, 3)
    model(ids[:, :20], **{CACHE: once}, use_cache=True)
    expected = step_by_step(model, once, ids[:, 20:])
    cropped = new_cache(model, rough(model), rotary, 0, 3)
    model(torch.cat([ids[:, :20], ids_of(1, 7, seed=1)], 1), **{CACHE: cropped}, use_cache=True)
    cropped.crop(-7)
    assert cropped.get_seq_length() == 20
    torch.testing.assert_close(step_by_step(model, cropped, ids[:, 20:]), expected)


@torch.inference_mode()
def test_the_newest_tokens_are_read_as_they_are_after_a_crop() -> None:
    """Those that the ring still has; it has lost the others to what was cropped."""
    model = model_of("llama")
    ids, rotary = ids_of(1, 30), find_rotary(model)
    expected = step_by_step(model, DynamicCache(config=model.config), ids)  # type: ignore[arg-type]
    cache = new_cache(model, plain(model), rotary, 8, 0)
    model(torch.cat([ids[:, :20], ids_of(1, 5, seed=1)], 1), **{CACHE: cache}, use_cache=True)
    cache.crop(-5)
    torch.testing.assert_close(step_by_step(model, cache, ids[:, 20:]), expected[:, 20:], atol=1e-5, rtol=1e-4)


@torch.inference_mode()
def test_memory_is_of_codes() -> None:
    """4 bits: about a quarter of 16; and no room is left over where the length is known."""
    model = model_of("llama", hidden=256).to(torch.bfloat16)
    ids = ids_of(2, 250)
    dense = 2 * 2 * ids.numel() * 2 * 64 * 2
    cache = new_cache(model, rough(model, 2), [None, None], 0, 0, length=250)
    model(ids, **{CACHE: cache}, use_cache=True)
    assert cache.nbytes() <= 0.3 * dense
    cache.reset()
    assert cache.nbytes() == 0
    assert cache.get_seq_length() == 0


def test_codebooks_of_a_model_lose_less_than_the_universal_one() -> None:
    model = model_of("qwen3", hidden=64)
    rows, rotary = ids_of(24, 128), find_rotary(model)
    for weights in ("gradient", "uniform"):
        options = KVCacheConfig(bits=2, weights=weights, rounds=6)
        books = calibrate(model, rows, options, rotary)
        assert [(k.shape, v.dtype) for k, v in books] == [((2, 4, 256, 4), torch.float16)] * 2
        again = calibrate(model, rows, options, rotary)
        assert all(
            torch.equal(a, b)
            for pair, other in zip(books, again, strict=True)
            for a, b in zip(pair, other, strict=True)
        )
        assert all(p.requires_grad for p in model.parameters())
        errors = []
        for coders in ([(Learned(k), Learned(v)) for k, v in books], rough(model)):
            with torch.inference_mode(), decoding(model):
                cache = new_cache(model, coders, rotary, 0, 0, strict=True)
                logits = model(rows[:4], **{CACHE: cache}, use_cache=True).logits
            with torch.inference_mode():
                errors.append((logits - model(rows[:4], use_cache=False).logits).square().mean().item())
        assert errors[0] < errors[1]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A toy, text for it, and its artifact with codebooks for a cache of 4 bits."""
    folder = tmp_path_factory.mktemp("cache")
    source = toy_checkpoint(folder, "llama", hidden=64)
    text = folder / "text.txt"
    text.write_text(toy_text(3000))
    quantize(
        QuantizeOptions(
            str(source), folder / "out", "fp8-tile", [str(text)], samples=24, seqlen=64, kv_cache="kv-vq-4bit"
        )
    )
    return source, text, folder / "out"


def command(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def test_quantize_writes_codebooks_and_says_how_to_use_them(artifact: tuple[Path, Path, Path], tmp_path: Path) -> None:
    source, text, out = artifact
    books = load_file(out / KV_CACHE)
    assert {name: tuple(book.shape) for name, book in books.items()} == {
        f"{n}.{kind}": (2, 8, 256, 2) for n in range(2) for kind in ("keys", "values")
    }
    settings = json.loads((out / "config.json").read_text())["quantization_config"]["kv_cache"]
    assert (settings["bits"], settings["codebook"], settings["before"]) == (4, "learned", [True, True])
    assert json.loads((out / "report.json").read_text())["kv_cache"]["window"] == settings["window"]
    assert "kv_cache.safetensors" in (out / "SHA256SUMS").read_text()
    again = quantize(
        QuantizeOptions(str(source), tmp_path, "fp8-tile", [str(text)], samples=24, seqlen=64, kv_cache="kv-vq-4bit")
    )
    assert again["kv_cache"]["bits"] == 4
    for name in (KV_CACHE, "config.json"):
        assert (out / name).read_bytes() == (tmp_path / name).read_bytes()


def test_commands_turn_the_cache_on(artifact: tuple[Path, Path, Path]) -> None:
    _, text, out = artifact
    ratios = {}
    for name in ("kv-vq-4bit", "kv-fp8", "artifact"):
        words = ("--text", text, "--seqlen", 64, "--windows", 4, "--kv-cache", name, "--baseline", out, "--json", "-")
        done = command("eval", "perplexity", out, *words)
        assert done.exit_code == 0, done.output
        found = json.loads(done.stdout)
        assert found["kv_cache"] == name
        ratios[name] = found["ratio"]
    assert ratios["kv-fp8"] != ratios["kv-vq-4bit"] == ratios["artifact"]
    assert all(0.9 < ratio < 1.1 for ratio in ratios.values())
    done = command("generate", out, "--prompt", "river stone", "--max-new-tokens", 5, "--kv-cache", "kv-vq-4bit")
    assert done.exit_code == 0, done.output


@torch.inference_mode()
def test_a_loaded_model_generates_with_codes(artifact: tuple[Path, Path, Path]) -> None:
    _, _, out = artifact
    ids, settings = ids_of(1, 60), {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    made: list[KVCache] = []
    with pytest.MonkeyPatch.context() as patch:
        begin = KVCache.__init__
        patch.setattr(KVCache, "__init__", lambda self, *a, **k: (made.append(self), begin(self, *a, **k))[1])
        coded = load(out, kv_cache=True).generate(ids, **settings)
        assert len(made) == 1
        assert torch.equal(coded[:, :60], ids)
        load(out).generate(ids, **settings)
        load(out, kv_cache="kv-fp8").generate(ids, **{CACHE: DynamicCache()}, **settings)
        assert len(made) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("OUT", "--kv-cache", "kv-vq-2bit"),
            "holds codebooks for bits: 4, not bits: 2: take --kv-cache artifact, or give --kv-cache kv-vq-2bit",
        ),
        (("OUT", "--kv-cache", "fp8-tile"), "that recipe says nothing of a cache; kv-vq-4bit does"),
        (("OUT", "--kv-cache", "kv-vq-4bits"), "no recipe 'kv-vq-4bits'. Did you mean 'kv-vq-4bit'?"),
        (("OUT", "--kv-cache", "cache: {keys: after}"), "holds codebooks for keys: auto, not keys: after: take"),
        (("SOURCE", "--kv-cache", "kv-vq-4bit"), "holds no codebooks for a cache of 4 bits"),
        (("SOURCE", "--kv-cache", "artifact"), "says nothing of its cache; name a recipe that does, such as kv-fp8"),
    ],
)
def test_a_cache_that_cannot_be_is_refused(
    artifact: tuple[Path, Path, Path], words: tuple[str, ...], message: str, recipe_file: Callable[[str], str]
) -> None:
    source, _, out = artifact
    places = {"OUT": out, "SOURCE": source}
    done = command("generate", *(places.get(word, recipe_file(word)) for word in words), "--prompt", "river")
    assert done.exit_code == 2, done.output
    assert message in done.stderr


def test_codebooks_that_are_damaged_are_named(artifact: tuple[Path, Path, Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(artifact[2], broken)
    books = load_file(broken / KV_CACHE)
    save_file(books | {"1.keys": books["1.keys"][:, :, :100].contiguous()}, broken / KV_CACHE)
    with pytest.raises(VQCompressError, match="is damaged: its SHA-256"):
        load(broken, kv_cache=True)
    with pytest.raises(VQCompressError, match="the codebooks of the cache of layer 1 are missing or damaged"):
        load(broken, kv_cache=True, check=False)
    (broken / KV_CACHE).unlink()
    with pytest.raises(VQCompressError, match=r"kv_cache\.safetensors is missing"):
        load(broken, kv_cache=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cache: {bits: 3}", "cache.bits=3"),
        ("cache: {bits: 8}", "fp8"),
        ("cache: {windows: 3}", "cache.windows"),
    ],
)
def test_knobs_of_a_cache_that_mean_nothing_are_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        parse(text, "test")


def test_a_recipe_of_weights_may_say_how_the_cache_is_kept() -> None:
    recipe = parse("cache: {bits: 2, sinks: 1}\nrules: [{match: '*', method: fp8}]", "both")
    assert recipe.cache is not None
    assert (recipe.cache.bits, recipe.cache.sinks, len(recipe.rules)) == (2, 1, 1)
    assert parse(dump(recipe), "again").cache == recipe.cache
    assert parse("cache: {bits: 4}\nrules: [{match: '*', method: fp8}]", "both").fingerprint() != recipe.fingerprint()


def test_heads_that_do_not_divide_are_refused() -> None:
    model = model_of("llama", hidden=48)
    with pytest.raises(VQCompressError, match="layer 0: heads of 12 channels"):
        calibrate(model, ids_of(4, 32), KVCacheConfig(bits=1), find_rotary(model))
