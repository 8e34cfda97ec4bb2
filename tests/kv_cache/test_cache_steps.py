"""Steps that attend to codes: as if all that is stored were decoded first, however the cache keeps it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from kernels import needs_gpu
from test_cache import FAMILIES, exact, gaussian, ids_of, model_of, new_cache, rough, run
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, Gemma2Config, Gemma3TextConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vqcompress.errors import VQCompressError
from vqcompress.kv_cache import codes as kv
from vqcompress.kv_cache.attention import CACHE, install
from vqcompress.kv_cache.cache import KVCache, KVCacheSpec
from vqcompress.kv_cache.quantizers import FP8, KVQuantizer, Learned

TINY = {"hidden_size": 32, "intermediate_size": 64, "head_dim": 16, "num_attention_heads": 2, "vocab_size": 384}


@dataclass(frozen=True)
class Counted(Learned):
    """Counts how often codes are decoded."""

    decoded: ClassVar[list[None]] = []

    def decode(self, parts: dict[str, Tensor]) -> Tensor:
        self.decoded.append(None)
        return super().decode(parts)


@dataclass
class Opaque(KVQuantizer):
    """Codes that attention cannot read."""

    coder: KVQuantizer

    def encode(self, x_BHTD: Tensor) -> dict[str, Tensor]:
        return self.coder.encode(x_BHTD)

    def decode(self, parts: dict[str, Tensor]) -> Tensor:
        return self.coder.decode(parts)


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_steps_attend_to_codes_as_to_what_they_decode_to(family: str) -> None:
    """With and without tokens in full precision; rows that are padded are decoded first."""
    model, ids = model_of(family), ids_of(2, 24)
    coders = [(Counted(k.book), Counted(v.book)) for k, v in rough(model)]  # type: ignore[attr-defined]
    # DeepSeek's layers attend to what they make of the latents that the cache holds.
    assert install(model) == (family != "deepseek_v3")
    for padding, full in ((0, (6, 3)), (0, (0, 0)), (5, (6, 3))):
        mask = torch.ones_like(ids)
        mask[1, :padding] = 0
        opaque = [(Opaque(k), Opaque(v)) for k, v in coders]
        expected = run(model, new_cache(model, opaque, *full), ids, mask, 12)  # type: ignore[arg-type]
        Counted.decoded.clear()
        found = run(model, new_cache(model, coders, *full), ids, mask, 12)  # type: ignore[arg-type]
        shown = mask.bool()[:, :, None]
        torch.testing.assert_close(found * shown, expected * shown, atol=2e-4, rtol=1e-3)
        assert bool(Counted.decoded) == (padding > 0 or family in ("gpt_oss", "deepseek_v3"))


@torch.inference_mode()
def test_a_sliding_window_forgets_tokens_that_no_other_reads() -> None:
    torch.manual_seed(0)
    kinds = {"layer_types": ["sliding_attention", "full_attention"], "num_hidden_layers": 2, "num_key_value_heads": 1}
    config = Gemma3TextConfig(**TINY, **kinds, sliding_window=8, max_position_embeddings=256)
    model, ids = AutoModelForCausalLM.from_config(config).float().eval(), ids_of(1, 40)
    for prompt in (1, 7, 30):
        cache = new_cache(model, exact(model), 4, 2)
        expected = run(model, DynamicCache(config=model.config), ids, prompt=prompt)
        torch.testing.assert_close(run(model, cache, ids, prompt=prompt), expected, atol=1e-4, rtol=1e-3)
        assert [layer.parts[0]["x"].shape[2] for layer in cache.layers] == [8, 40]
        with pytest.raises(VQCompressError, match="window"):
            cache.crop(-3)
        with pytest.raises(ValueError, match="3"):
            cache.crop(3)
        cache.crop(0)
        assert cache.get_seq_length() == 40


def logits_by_kernels(cuda: bool = False) -> Tensor:
    """Of a prompt and a few steps. Without CUDA: in the interpreter, where the launcher replaces the operator."""
    from vqcompress.kv_cache import kernel

    model, ids = model_of("llama", hidden=64), ids_of(2, 12)
    if cuda:
        model, ids = model.bfloat16().cuda(), ids.cuda()
    with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
        if not cuda:
            patch.setattr(kv, "attend", kernel.attend)
        return run(model, new_cache(model, rough(model), 4, 2), ids, prompt=10).float().cpu()


def logits_by_reference() -> Tensor:
    model = model_of("llama", hidden=64)
    return run(model, new_cache(model, rough(model), 4, 2), ids_of(2, 12), prompt=10)


def test_the_kernel_gets_arguments_that_it_takes(interpreted: Any) -> None:
    torch.testing.assert_close(interpreted(logits_by_kernels), logits_by_reference(), atol=2e-4, rtol=1e-3)


@pytest.mark.gpu
@needs_gpu
def test_steps_on_a_gpu_are_those_on_a_cpu() -> None:
    torch.testing.assert_close(logits_by_kernels(cuda=True), logits_by_reference(), atol=5e-2, rtol=5e-2)


@torch.inference_mode()
def test_another_attention_stays_and_reads_decoded_tokens() -> None:
    asked: list[None] = []

    def mine(*arguments: Any, **others: Any) -> Any:
        asked.append(None)
        return ALL_ATTENTION_FUNCTIONS["sdpa"](*arguments, **others)

    ALL_ATTENTION_FUNCTIONS.register("mine", mine)
    model, ids = model_of("llama"), ids_of(1, 12)
    expected = run(model, DynamicCache(config=model.config), ids, prompt=8)
    model.set_attn_implementation("mine")
    assert not install(model)
    cache = new_cache(model, exact(model), 0, 0)
    asked.clear()
    torch.testing.assert_close(run(model, cache, ids, prompt=8), expected)
    assert len(asked) == 5 * model.config.num_hidden_layers
    assert model.config._attn_implementation == "mine"


@torch.inference_mode()
def test_an_attention_that_changes_between_steps_does_no_harm() -> None:
    model, ids = model_of("llama"), ids_of(1, 12)
    quantizers = rough(model)
    expected = run(model, new_cache(model, quantizers, 4, 2), ids, prompt=8)
    cache = new_cache(model, quantizers, 4, 2)
    found = [run(model, cache, ids[:, :8], prompt=8)]
    for n, name in zip(range(8, 12), ("sdpa", "eager", "vqcompress_coded", "vqcompress_coded_eager"), strict=True):
        model.set_attn_implementation(name)
        found.append(model(ids[:, n : n + 1], **{CACHE: cache}, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(found, 1), expected)


def test_limits_of_scores_are_kept() -> None:
    """Gemma 2 limits them, so codes are decoded first; one pass limits them, too."""
    torch.manual_seed(0)
    config = Gemma2Config(**TINY, num_hidden_layers=2, num_key_value_heads=1, attn_logit_softcapping=0.5)
    model, ids = AutoModelForCausalLM.from_config(config).eval(), ids_of(1, 20)
    expected = run(model, DynamicCache(config=model.config), ids)
    assert install(model)
    torch.testing.assert_close(run(model, new_cache(model, exact(model), 0, 0), ids), expected, atol=1e-4, rtol=1e-3)
    strict = run(model, new_cache(model, exact(model), 0, 0, strict=True), ids, prompt=20)
    torch.testing.assert_close(strict, expected, atol=1e-4, rtol=1e-3)


@torch.inference_mode()
def test_rows_begin_at_the_same_token_however_a_cache_is_given() -> None:
    """By place, and to the inner model; and a row may begin in a later piece of the prompt."""
    model, ids = model_of("llama"), ids_of(2, 20)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    caches = [new_cache(model, rough(model), 4, 2) for _ in range(3)]
    model(ids, mask, places, caches[0])
    model.base_model(ids, mask, places, caches[1])
    for start, end in ((0, 6), (6, 20)):
        given = {"attention_mask": mask[:, :end], "position_ids": places[:, start:end]}
        model(ids[:, start:end], **given, **{CACHE: caches[2]}, use_cache=True)
    for cache in caches:
        torch.testing.assert_close(cache.layers[0].first[0], caches[0].layers[0].first[0])
        assert (cache.layers[0].read()[1][1, :, 9:11] == cache.layers[0].first[1][1]).all()


@pytest.mark.parametrize("window", [0, 3, 1 << 20])
@torch.inference_mode()
def test_the_first_and_the_newest_tokens_are_read_in_full_precision(window: int) -> None:
    """From the first token on, of rows that begin elsewhere, and with a window that is never filled."""
    model = model_of("llama")
    cache = KVCache(model, KVCacheSpec([(FP8(), FP8())] * 2, [None] * 2, window, 4))
    keys, values = gaussian(2, 2, 1, 9, 8)
    cache.shared.find_rows(torch.tensor([[1] * 9, [0] * 3 + [1] * 6]), 0)
    layer: Any = cache.layers[0]
    for n in range(9):
        layer.update(keys[:, :, n : n + 1], values[:, :, n : n + 1])
        same = (layer.read()[0] == keys[:, :, : n + 1]).all(-1)[:, 0]
        for row, first in enumerate((0, 3)):
            full = [first <= t < first + 4 or t > n - window for t in range(n + 1)]
            assert same[row].tolist() == full, (row, n)
