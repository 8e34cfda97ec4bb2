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
from test_cache import ids_of, model_of, rough
from transformers import AutoModelForCausalLM, GenerationConfig

from vqcompress.evaluate.verify import verify
from vqcompress.kv_cache.attention import CACHE
from vqcompress.kv_cache.cache import KVCache, KVCacheSpec, use_kv_cache
from vqcompress.kv_cache.rotary import find_rotary
from vqcompress.pipeline.quantize import QuantizeOptions, quantize
from vqcompress.runtime.load import load


def spec(model: Any) -> KVCacheSpec:
    return KVCacheSpec(rough(model), find_rotary(model), 8, 2)


@pytest.fixture
def model() -> Any:
    made = model_of("qwen3", hidden=64)
    use_kv_cache(made, spec(made))
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
        return model.generate(ids, max_new_tokens=16, do_sample=False)[0].tolist()  # type: ignore[no-any-return]

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
    cache = KVCache(model, spec(model))
    for part in (more[:, :12], *more[:, 12:length].split(1, 1)):
        model(part, **{CACHE: cache}, use_cache=True)
    steps = found.sequences[:, more.shape[1] : -1].split(1, 1)
    for part, expected in zip((more[:, length:], *steps), found.logits, strict=True):
        logits = model(part, **{CACHE: cache}, use_cache=True).logits[:, -1]
        torch.testing.assert_close(expected, logits)


def test_a_cache_that_nobody_holds_is_freed(model: Any) -> None:
    cache = KVCache(model, spec(model))
    model.generate(ids_of(1, 5), max_new_tokens=3, **{CACHE: cache})
    gone = [weakref.ref(cache), *map(weakref.ref, cache.layers)]
    del cache
    gc.collect()
    assert not any(each() for each in gone)


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


def test_the_choice_of_a_checkpoint_gives_way_and_that_of_a_caller_does_not() -> None:
    model = model_of("llama")
    model.generation_config.cache_implementation = "static"
    use_kv_cache(model, spec(model))
    chosen = GenerationConfig(cache_implementation="static", max_new_tokens=3)
    for given, coded in (({"max_new_tokens": 3}, True), ({"generation_config": chosen}, False)):
        cache = model.generate(ids_of(1, 8), return_dict_in_generate=True, **given).past_key_values
        assert isinstance(cache, KVCache) == coded


def test_a_saved_copy_loads_without_codebooks(
    toy: Callable[..., Path], text: Path, recipe_file: Callable[[str], str], tmp_path: Path
) -> None:
    out, saved, cache = tmp_path / "out", tmp_path / "saved", recipe_file("cache: {bits: 4, rounds: 2}")
    quantize(QuantizeOptions(str(toy()), out, "fp8-tile", [str(text)], samples=8, seqlen=64, kv_cache=cache))
    AutoModelForCausalLM.from_pretrained(out).save_pretrained(saved)
    ids = ids_of(1, 8)
    assert torch.equal(load(saved)(ids).logits, load(out)(ids).logits)
    verify(str(saved))


def test_steps_need_no_other_mode_of_autograd() -> None:
    model, ids = model_of("llama").requires_grad_(True), ids_of(1, 9)
    cache = KVCache(model, spec(model))
    for part in (ids[:, :8], ids[:, 8:]):
        assert model(part, **{CACHE: cache}, use_cache=True).logits.isfinite().all()
