"""Steps that attend to codes: as if all that is stored were decoded first, however the cache keeps it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernels import needs_gpu
from test_cache import FAMILIES, ids_of, model_of, new_cache, plain
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, Gemma3TextConfig, Qwen3NextConfig

from vqcompress.errors import VQCompressError
from vqcompress.kv_cache import codes as kv
from vqcompress.kv_cache import layer as cache_layer
from vqcompress.kv_cache.attention import CACHE, AttentionHook, find_rotary
from vqcompress.kv_cache.cache import KVCache
from vqcompress.kv_cache.layer import KVLayer
from vqcompress.kv_cache.quantizers import FP8, KVQuantizer, Learned, Universal


def learned(model: Any, d: int = 4) -> list[tuple[KVQuantizer, KVQuantizer]]:
    """Random codebooks for every head, scaled as keys and values are."""
    seen = DynamicCache()
    model(ids_of(2, 64, seed=5).to(model.device), **{CACHE: seen}, use_cache=True)

    def book(x: Tensor, seed: int) -> Learned:
        heads, channels = x.shape[1], x.shape[3]
        draw = torch.Generator().manual_seed(seed)
        return Learned(torch.randn(heads, channels // d, 256, d, generator=draw).to(x.device) * x.std())

    return [(book(layer.keys, 2 * n), book(layer.values, 2 * n + 1)) for n, layer in enumerate(seen.layers)]


def coders_of(model: Any, kind: str) -> tuple[list[tuple[KVQuantizer, KVQuantizer]], list[Any]]:
    """KVQuantizers and the embeddings that keys are stored without."""
    if kind == "learned":
        return learned(model), find_rotary(model)
    coder = {"universal": Universal(4, model.device), "fp8": FP8()}[kind]
    pair = coder, coder
    layers = model.config.num_hidden_layers
    return [pair] * layers, [None] * layers


def run(model: Any, cache: KVCache | DynamicCache, ids: Tensor, mask: Tensor, prompt: int) -> Tensor:
    """Logits of a prompt and then of steps."""
    places, found = (mask.cumsum(1) - 1).clamp(min=0), []
    for start, end in [(0, prompt), *((n, n + 1) for n in range(prompt, ids.shape[1]))]:
        given = {"attention_mask": mask[:, :end], "position_ids": places[:, start:end]}
        found.append(model(ids[:, start:end], **given, **{CACHE: cache}, use_cache=True).logits)
    return torch.cat(found, 1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["learned", "universal", "fp8"])
@torch.inference_mode()
def test_steps_attend_to_codes_as_to_what_they_decode_to(
    family: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With and without padding and tokens in full precision; past sliding windows."""
    model = model_of(family)
    assert AttentionHook(model).install() == (family != "deepseek_v3")
    coders, rotary = coders_of(model, kind)
    ids = ids_of(2, 30)
    calls = []
    attend = KVLayer.attend
    for padding in (0, 5):
        mask = torch.ones_like(ids)
        mask[1, :padding] = 0
        for kept in ((0, 0), (6, 3)):
            with monkeypatch.context() as patch:
                patch.setattr(KVLayer, "attend", lambda *arguments: None)
                expected = run(model, new_cache(model, coders, rotary, *kept), ids, mask, 12)
            with monkeypatch.context() as patch:
                patch.setattr(KVLayer, "attend", lambda *a: calls.append(attend(*a)) or calls[-1])
                cache = new_cache(model, coders, rotary, *kept, length=40)
                found = run(model, cache, ids, mask, 12)
            shown = mask.bool()[:, :, None]
            torch.testing.assert_close(found * shown, expected * shown, atol=2e-4, rtol=1e-3)
            assert cache.get_seq_length() == 30
    # DeepSeek's cache holds latents, which its layers expand before they attend.
    assert {call is None for call in calls} == ({kind == "fp8"} if AttentionHook(model).install() else set())


@torch.inference_mode()
def test_a_sliding_window_forgets_what_no_token_reads() -> None:
    """Prompts and steps through several rounds of forgetting; a crop into what is forgotten is refused."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "head_dim": 16, "num_attention_heads": 2, "vocab_size": 384}
    kinds = {"layer_types": ["sliding_attention", "full_attention"], "num_hidden_layers": 2, "num_key_value_heads": 1}
    torch.manual_seed(0)
    config = Gemma3TextConfig(**sizes, **kinds, sliding_window=8, max_position_embeddings=256)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    windows = [getattr(layer, "sliding_window", None) for layer in DynamicCache(config=model.config).layers]
    assert None in windows
    assert 8 in windows
    ids = ids_of(1, 160)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_layer, "ROOM", 16)
        for prompt in (1, 100, 120):
            cache = new_cache(model, plain(model), find_rotary(model), 4, 2)
            found = run(model, cache, ids, torch.ones_like(ids), prompt)
            expected = run(model, DynamicCache(config=model.config), ids, torch.ones_like(ids), prompt)
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)
            for layer, window in zip(cache.layers, windows, strict=True):
                room = layer.parts[0]["x"].shape[2]
                assert room >= 160 if window is None else room <= 8 + 2 * 16
            with pytest.raises(RuntimeError, match="sliding window"):
                cache.crop(-100)


def logits_by_kernels(kind: str, padding: int, cuda: bool = False) -> Tensor:
    """Of a prompt and a few steps. Without CUDA: called in the interpreter, where launchers stand for operators."""
    from vqcompress.kv_cache import kernel as kernels
    from vqcompress.kv_cache import kernel_encode

    model = model_of("llama", hidden=64)
    coders, rotary = coders_of(model, kind)
    ids = ids_of(2, 12)
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    if cuda:
        model, ids, mask = model.cuda(), ids.cuda(), mask.cuda()
        coders, rotary = coders_of(model, kind)

    with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
        if not cuda:
            patch.setattr(kv, "attend_by_kernel", kernels.attend)
            patch.setattr(kv, "encode_unrotated", kernel_encode.encode)
        return run(model, new_cache(model, coders, rotary, 4, 2, length=16), ids, mask, 10).cpu()


@pytest.mark.parametrize(("kind", "padding"), [pytest.param("learned", 0, marks=pytest.mark.slow), ("universal", 3)])
def test_the_kernels_are_given_what_they_take(kind: str, padding: int, interpreted: Any) -> None:
    model, ids = model_of("llama", hidden=64), ids_of(2, 12)
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    with torch.inference_mode():
        expected = run(model, new_cache(model, *coders_of(model, kind), 4, 2), ids, mask, 10)
    found = interpreted(logits_by_kernels, kind, padding)
    shown = mask.bool()[:, :, None]
    torch.testing.assert_close(found * shown, expected * shown, atol=2e-4, rtol=1e-3)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("kind", ["learned", "universal"])
def test_steps_on_a_gpu_are_those_on_a_cpu(kind: str) -> None:
    model, ids = model_of("llama", hidden=64), ids_of(2, 12)
    with torch.inference_mode():
        expected = run(model, new_cache(model, *coders_of(model, kind), 4, 2), ids, torch.ones_like(ids), 10)
    torch.testing.assert_close(logits_by_kernels(kind, 0, cuda=True), expected, atol=5e-3, rtol=5e-2)


@torch.inference_mode()
def test_another_attention_in_between_is_noticed() -> None:
    model, ids = model_of("llama"), ids_of(1, 12)
    coders, rotary = coders_of(model, "learned")
    expected = run(model, new_cache(model, coders, rotary, 4, 2), ids, torch.ones_like(ids), 8)
    for name in ("sdpa", "eager"):
        model.set_attn_implementation(name)
        cache = new_cache(model, coders, rotary, 4, 2)
        torch.testing.assert_close(run(model, cache, ids, torch.ones_like(ids), 8), expected)
    cache = new_cache(model, coders, rotary, 4, 2)
    model(ids, **{CACHE: cache}, use_cache=True)
    model.set_attn_implementation("sdpa")
    with pytest.raises(VQCompressError):
        model(ids[:, :1], **{CACHE: cache}, use_cache=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "lm_head", None)
        with pytest.raises(TypeError):
            AttentionHook(model).install()
    assert model.config._attn_implementation == "sdpa"


@torch.inference_mode()
def test_a_cache_is_known_however_it_is_given() -> None:
    """By place, and to what is inside of the model; and a row may begin in a later piece of the prompt."""
    model, ids = model_of("llama"), ids_of(2, 20)
    coders, rotary = coders_of(model, "learned")
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    caches = [new_cache(model, coders, rotary, 4, 2) for _ in range(3)]
    model(ids, mask, places, caches[0])
    model.base_model(ids, mask, places, caches[1])
    for start, end in ((0, 6), (6, 20)):
        given = {"attention_mask": mask[:, :end], "position_ids": places[:, start:end]}
        model(ids[:, start:end], **given, **{CACHE: caches[2]}, use_cache=True)
    for cache in caches:
        assert cache.shared.first_token_B.tolist() == [0, 9]
    first = [layer.full[0][:, :, :2] for layer in caches[0].layers]
    for cache in caches[1:]:
        for layer, expected in zip(cache.layers[:1], first[:1], strict=True):
            torch.testing.assert_close(layer.full[0][:, :, :2], expected)


def test_a_state_that_is_no_keys_and_values_is_refused_by_name() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 384, "num_hidden_layers": 4, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "linear_num_value_heads": 2, "linear_num_key_heads": 1}
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
    config = Qwen3NextConfig(**sizes, **heads, **experts, shared_expert_intermediate_size=16)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with pytest.raises(VQCompressError, match=r"Qwen3NextForCausalLM: layers \[0, 1, 2\] keep a state that"):
        find_rotary(model)
