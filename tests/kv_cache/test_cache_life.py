"""Coded caches as people use them: in threads, from turn to turn, of copies of a model, beside a model's own habits."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cache import gaussian, ids_of, model_of, new_cache, plain
from test_cache_steps import learned
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vqcompress.evaluate.verify import verify
from vqcompress.kv_cache import codes as kv
from vqcompress.kv_cache.attention import CACHE, AttentionHook, find_rotary
from vqcompress.kv_cache.cache import KVCache, KVCacheSpec, use_kv_cache
from vqcompress.kv_cache.layer import KVLayer
from vqcompress.kv_cache.quantizers import FP8, Universal
from vqcompress.pipeline.quantize import QuantizeOptions, quantize
from vqcompress.runtime.load import load


def how(model: Any, window: int = 8, sinks: int = 2) -> KVCacheSpec:
    """With keys before their embedding, so that a cache looks into the model's forward."""
    with torch.inference_mode():
        return KVCacheSpec(learned(model), find_rotary(model), window, sinks)


@pytest.fixture
def model() -> Any:
    made = model_of("qwen3", hidden=64)
    use_kv_cache(made, how(made))
    return made


@pytest.fixture
def hasty() -> Iterator[None]:
    """Threads take turns after every few instructions."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_threads_generate_at_the_same_time(model: Any, hasty: None) -> None:
    prompts = [ids_of(1, 12, seed=n) for n in range(4)]

    def ask(ids: torch.Tensor) -> list[int]:
        return model.generate(ids, max_new_tokens=20, do_sample=False)[0].tolist()  # type: ignore[no-any-return]

    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(ask, prompts))
    assert together == list(map(ask, prompts))


@torch.inference_mode()
def test_a_conversation_goes_on_with_the_cache_of_its_last_turn(model: Any) -> None:
    given: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True}
    first = model.generate(ids_of(1, 12), **given, output_logits=True)
    more = torch.cat([first.sequences, ids_of(1, 9, seed=1)], 1)
    length = first.past_key_values.get_seq_length()
    assert length == first.sequences.shape[1] - 1
    found = model.generate(more, **given, **{CACHE: first.past_key_values}, output_logits=True)
    # The same tokens through a cache that nobody else has seen.
    cache = KVCache(model, how(model))
    for part in (more[:, :12], *more[:, 12:length].split(1, 1)):
        model(part, **{CACHE: cache}, use_cache=True)
    steps = found.sequences[:, more.shape[1] : -1].split(1, 1)
    for part, expected in zip((more[:, length:], *steps), found.logits, strict=True):
        logits = model(part, **{CACHE: cache}, use_cache=True).logits[:, -1]
        torch.testing.assert_close(expected, logits)


def test_a_cache_that_nobody_holds_leaves_nothing_behind(model: Any) -> None:
    hooks = [module._forward_hooks for module in model.modules()] + [model.base_model._forward_pre_hooks]
    model.generate(ids_of(1, 5), max_new_tokens=3)
    cache = KVCache(model, how(model))
    gone = weakref.ref(cache)
    assert sum(map(len, hooks)) == 2
    del cache
    gc.collect()
    assert gone() is None
    assert not any(hooks)


def test_a_copy_generates_by_its_own_weights(model: Any) -> None:
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    ids = ids_of(1, 8)
    expected = model.generate(ids, max_new_tokens=6, do_sample=False)
    for other in copies:
        assert torch.equal(other.generate(ids, max_new_tokens=6, do_sample=False), expected)
        with torch.no_grad():
            other.lm_head.weight.zero_()
            other.lm_head.weight[9] = other.model.norm.weight
        other.generation_config.eos_token_id = None
        assert not torch.equal(other.generate(ids, max_new_tokens=6, do_sample=False), expected)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), expected)


def test_what_a_checkpoint_likes_gives_way_and_what_a_caller_says_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    model, made = model_of("llama"), []
    model.generation_config.cache_implementation = "static"
    use_kv_cache(model, how(model))
    begin = KVCache.__init__
    monkeypatch.setattr(KVCache, "__init__", lambda self, *a, **k: made.append(1) or begin(self, *a, **k))
    model.generate(ids_of(1, 8), max_new_tokens=3)
    assert made == [1]
    model.generate(ids_of(1, 8), generation_config=GenerationConfig(cache_implementation="static", max_new_tokens=3))
    assert made == [1]


@torch.inference_mode()
def test_another_attention_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def mine(*arguments: Any, **others: Any) -> Any:
        asked.append(1)
        return ALL_ATTENTION_FUNCTIONS["sdpa"](*arguments, **others)

    ALL_ATTENTION_FUNCTIONS.register("mine", mine)
    model, ids = model_of("llama"), ids_of(1, 12)
    expected = model(ids, use_cache=False).logits[:, -1]
    model.set_attn_implementation("mine")
    assert not AttentionHook(model).install()
    cache = new_cache(model, plain(model), find_rotary(model), 0, 0)
    asked.clear()
    for part in (ids[:, :8], *ids[:, 8:].split(1, 1)):
        logits = model(part, **{CACHE: cache}, use_cache=True).logits
    torch.testing.assert_close(logits[:, -1], expected)
    assert len(asked) == 5 * model.config.num_hidden_layers
    assert model.config._attn_implementation == "mine"


@pytest.mark.parametrize("family", ["gemma2", "llama", "deepseek_v3"])
def test_what_limits_its_scores_is_measured_in_one_pass(family: str) -> None:
    if family == "gemma2":
        from transformers import Gemma2Config

        sizes = {"hidden_size": 32, "intermediate_size": 64, "head_dim": 16, "num_attention_heads": 2}
        model: Any = AutoModelForCausalLM.from_config(
            Gemma2Config(**sizes, num_hidden_layers=2, num_key_value_heads=1, vocab_size=384)
        ).eval()
    else:
        model = model_of(family)
    # DeepSeek's layers attend to what they make of the latents that a cache gives them.
    assert (AttentionHook(model).covers_all_layers, AttentionHook(model).install()) == (
        family != "deepseek_v3",
        family == "llama",
    )


@pytest.mark.parametrize("window", [0, 3, 1 << 20])
@torch.inference_mode()
def test_the_first_and_the_newest_tokens_are_read_as_they_are(window: int) -> None:
    """From the first token on, of rows that begin elsewhere, and without room for a window that is never filled."""
    model = model_of("llama")
    layers = model.config.num_hidden_layers
    cache = new_cache(model, [(FP8(), FP8())] * layers, [None] * layers, window, 4)
    layer, (keys, values) = cache.layers[0], gaussian(2, 2, 1, 9, 8).unbind(0)
    cache.shared.first_token_B, cache.shared.sinks_end = torch.tensor([0, 3]), 3 + 4
    keys, values = keys.expand(2, -1, -1, -1), values.expand(2, -1, -1, -1)
    for n in range(9):
        layer.update(keys[:, :, n : n + 1], values[:, :, n : n + 1])
        found = layer.read()[0]
        same = (found == keys[:, :, : n + 1]).all(-1)[:, 0]
        for row, first in enumerate((0, 3)):
            exact = [first <= t < first + 4 or t > n - window for t in range(n + 1)]
            assert same[row].tolist() == exact, (row, n)
    assert layer.full[0].shape[2] <= 4 + min(window, 300)


@pytest.mark.parametrize("where", ["load", "from_pretrained"])
def test_what_is_saved_again_has_no_codebooks_and_does_not_say_so(
    where: str, toy: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    out, saved = tmp_path / "out", tmp_path / "saved"
    cache = tmp_path / "small.yaml"
    cache.write_text("cache: {bits: 4, rounds: 2}\n")
    quantize(QuantizeOptions(str(toy()), out, "fp8-tile", [str(text)], samples=8, seqlen=64, kv_cache=str(cache)))
    (load(out) if where == "load" else AutoModelForCausalLM.from_pretrained(out)).save_pretrained(saved)
    assert verify(str(saved))["targets"] == verify(str(out))["targets"]
    ids = ids_of(1, 8)
    assert torch.equal(load(saved)(ids).logits, load(out)(ids).logits)


def test_steps_need_no_other_mode_of_autograd() -> None:
    model, ids = model_of("llama").requires_grad_(True), ids_of(1, 9)
    cache = KVCache(model, how(model))
    for part in (ids[:, :8], ids[:, 8:]):
        assert model(part, **{CACHE: cache}, use_cache=True).logits.isfinite().all()


@torch.inference_mode()
def test_codes_that_a_kernel_cannot_read_two_at_a_time_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = model_of("llama"), []
    layer = KVLayer(new_cache(model, [], [], 0, 0).shared, (Universal(8), Universal(8)), None, None)
    layer.update(gaussian(1, 2, 1, 24), gaussian(1, 2, 1, 24))
    query = gaussian(1, 4, 1, 24)
    assert layer.attend(query, None, 1.0) is not None
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    monkeypatch.setattr(kv, "weigh", lambda *a: calls.append(a))
    assert layer.attend(query, None, 1.0) is None
    assert not calls
