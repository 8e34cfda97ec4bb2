"""A cache of codes behaves as a cache, and every token attends to what is stored."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from toys import toy_config
from transformers import AutoModelForCausalLM, DynamicCache, Qwen3NextConfig

from vqcompress.errors import VQCompressError
from vqcompress.kv_cache import codes as kv
from vqcompress.kv_cache.attention import CACHE
from vqcompress.kv_cache.cache import KVCache, KVCacheSpec
from vqcompress.kv_cache.calibrate import calibrate
from vqcompress.kv_cache.quantizers import FP8, KVQuantizer, Learned
from vqcompress.kv_cache.rotary import apply_rope, find_rotary
from vqcompress.storage.recipe import KVCacheConfig

FAMILIES = ["llama", "qwen3", "gemma", "opt", "gpt_neox", "mixtral", "gpt_oss", "deepseek_v3"]
Quantizers = list[tuple[KVQuantizer, KVQuantizer]]


class Exact(KVQuantizer):
    """Stores what it gets, so that all but the codes can be compared with a plain cache."""

    def encode(self, x_BHTD: Tensor) -> dict[str, Tensor]:
        return {"x": x_BHTD.float()}

    def decode(self, parts: dict[str, Tensor]) -> Tensor:
        return parts["x"].clone()


def model_of(family: str, **extra: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(toy_config(family, **extra)).float().eval()


def exact(model: Any) -> Quantizers:
    return [(Exact(), Exact()) for _ in range(model.config.num_hidden_layers)]


@torch.inference_mode()
def rough(model: Any, d: int = 4) -> Quantizers:
    """Random codebooks for every head, scaled as keys and values are."""
    seen = DynamicCache()
    model(ids_of(2, 64, seed=5).to(model.device), **{CACHE: seen}, use_cache=True)

    def book(x: Tensor, seed: int) -> Learned:
        heads, channels = x.shape[1], x.shape[3]
        draw = torch.Generator().manual_seed(seed)
        return Learned(torch.randn(heads, channels // d, 256, d, generator=draw).to(x.device) * x.std())

    return [(book(layer.keys, 2 * n), book(layer.values, 2 * n + 1)) for n, layer in enumerate(seen.layers)]


def ids_of(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 384, shape, generator=torch.Generator().manual_seed(seed))


def new_cache(model: Any, quantizers: Quantizers, window: int, sinks: int, strict: bool = False) -> KVCache:
    return KVCache(model, KVCacheSpec(quantizers, find_rotary(model), window, sinks), strict)


@torch.inference_mode()
def run(model: Any, cache: Any, ids: Tensor, mask: Tensor | None = None, prompt: int = 1) -> Tensor:
    """Logits of a prompt and then of steps."""
    mask = torch.ones_like(ids) if mask is None else mask
    places, found = (mask.cumsum(1) - 1).clamp(min=0), []
    for start, end in [(0, prompt), *((n, n + 1) for n in range(prompt, ids.shape[1]))]:
        given = {"attention_mask": mask[:, :end], "position_ids": places[:, start:end]}
        found.append(model(ids[:, start:end], **given, **{CACHE: cache}, use_cache=True).logits)
    return torch.cat(found, 1)


def gaussian(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_an_embedding_that_is_removed_is_gone() -> None:
    x, angle = gaussian(2, 3, 5, 8), gaussian(1, 5, 4).repeat(1, 1, 2)
    angles = 1.5 * angle.cos(), 1.5 * angle.sin()
    turned = apply_rope(x, angles)
    assert (turned - x).norm() > x.norm() / 2
    torch.testing.assert_close(apply_rope(turned, angles, inverse=True), x)


@pytest.mark.parametrize("d", [2, 4, 8])
def test_codes_are_those_of_the_nearest_entry(d: int) -> None:
    book, x = gaussian(3, 16 // d, 256, d).half(), gaussian(2, 3, 7, 16)
    codes, groups = kv.encode(x, book), x.unflatten(-1, (-1, d)).double()
    distance = (groups[..., None, :] - book.double()[None, :, None]).square().sum(-1)
    assert codes.dtype == torch.uint8
    assert torch.equal(codes.long(), distance.argmin(-1))
    for h in range(3):
        entries = [book[h, g, codes[:, h, :, g].long()].float() for g in range(16 // d)]
        assert torch.equal(kv.decode(codes, book)[:, h], torch.cat(entries, -1))


def test_e4m3_loses_a_sixteenth_at_most() -> None:
    x = gaussian(1, 2, 50, 64) * 1e3
    back = FP8().decode(FP8().encode(x))
    assert ((back - x).abs() <= x.abs() / 16 + x.abs().amax(-1, keepdim=True) / 448 / 512).all()


def test_codebooks_are_learned_from_the_tokens_that_weigh() -> None:
    """Two clouds of vectors; the one of no weight gets next to no entries."""
    x = torch.cat([gaussian(4000, 1, 4), gaussian(4000, 1, 4) + 50])
    heavy = torch.cat([torch.ones(4000, 1, 4), torch.zeros(4000, 1, 4)])
    near = [
        int((kv.learn(x, weight, 4, 8, torch.Generator().manual_seed(0))[0, 0].float().norm(dim=1) < 20).sum())
        for weight in (heavy, None)
    ]
    assert near[0] > 230
    assert 80 < near[1] < 180


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_are_coded_before_their_embedding_where_that_is_proven(family: str) -> None:
    """Not where there is none, it covers a part of a head, it has half the numbers, or keys are assembled later."""
    proven = family not in ("opt", "gpt_neox", "gpt_oss", "deepseek_v3")
    assert [module is not None for module in find_rotary(model_of(family))] == [proven] * 2


def test_layers_that_keep_a_recurrent_state_are_refused_by_name() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 384, "num_hidden_layers": 4, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "linear_num_value_heads": 2, "linear_num_key_heads": 1}
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
    config = Qwen3NextConfig(**sizes, **heads, **experts, shared_expert_intermediate_size=16)
    with pytest.raises(VQCompressError, match=r"Qwen3NextForCausalLM: layers \[0, 1, 2\]"):
        find_rotary(AutoModelForCausalLM.from_config(config).float().eval())


@pytest.mark.parametrize(("family", "full"), [*((family, (8, 2)) for family in FAMILIES), ("llama", (0, 0))])
def test_generate_goes_as_with_a_plain_cache(family: str, full: tuple[int, int]) -> None:
    """Rows that are padded on the left, and more tokens than sliding windows hold."""
    model = model_of(family)
    ids, mask = ids_of(3, 20), torch.ones(3, 20, dtype=torch.long)
    mask[1, :7] = mask[2, :1] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    settings["eos_token_id"] = None
    expected = model.generate(ids, **{CACHE: DynamicCache(config=model.config)}, **settings)
    cache = new_cache(model, exact(model), *full)
    assert torch.equal(model.generate(ids, **{CACHE: cache}, **settings), expected)
    assert cache.get_seq_length() == 35


def test_beams_are_reordered() -> None:
    model = model_of("llama")
    settings = {"max_new_tokens": 16, "do_sample": False, "num_beams": 3, "pad_token_id": 0, "eos_token_id": None}
    ids, mask = ids_of(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[1, :5] = 0
    expected = model.generate(ids, attention_mask=mask, **settings)
    cache = new_cache(model, exact(model), 4, 2)
    assert torch.equal(model.generate(ids, attention_mask=mask, **{CACHE: cache}, **settings), expected)


@pytest.mark.parametrize(
    ("family", "full"),
    [
        ("llama", (0, 0)),
        ("llama", (1, 0)),
        ("llama", (100, 0)),
        ("gemma", (6, 3)),
        ("opt", (6, 3)),
        ("gpt_oss", (6, 3)),
    ],
)
@torch.inference_mode()
def test_one_pass_measures_decoding_token_by_token(family: str, full: tuple[int, int]) -> None:
    model = model_of(family)
    ids, quantizers = ids_of(2, 30), rough(model)
    steps = run(model, new_cache(model, quantizers, *full), ids)
    cache = new_cache(model, quantizers, *full, strict=True)
    once = model(ids, **{CACHE: cache}, use_cache=True).logits
    torch.testing.assert_close(once, steps, atol=2e-4, rtol=1e-3)
    assert ((once - model(ids, use_cache=False).logits).abs().max() > 1e-3) == (full != (100, 0))


@torch.inference_mode()
def test_a_prompt_attends_in_full_precision() -> None:
    model, ids = model_of("llama"), ids_of(2, 40)
    found = model(ids, **{CACHE: new_cache(model, rough(model), 0, 0)}, use_cache=True).logits
    torch.testing.assert_close(found, model(ids, use_cache=False).logits)


def test_a_padded_row_reads_the_same_as_alone() -> None:
    """Its first tokens stay in full precision, not the padding."""
    model, short = model_of("llama"), ids_of(1, 30)
    ids, mask = torch.cat([torch.zeros(1, 9, dtype=torch.long), short], 1), (torch.arange(39) >= 9).long()[None]
    alone = run(model, new_cache(model, rough(model), 5, 3), short, prompt=3)
    padded = run(model, new_cache(model, rough(model), 5, 3), ids, mask, prompt=12)
    torch.testing.assert_close(padded[:, -27:], alone[:, -27:], atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize(("make", "full"), [(rough, (0, 3)), (exact, (8, 0))])
@torch.inference_mode()
def test_cropped_tokens_were_never_there(make: Any, full: tuple[int, int]) -> None:
    model, ids = model_of("llama"), ids_of(1, 30)
    once, cropped = (new_cache(model, make(model), *full) for _ in range(2))
    model(ids[:, :20], **{CACHE: once}, use_cache=True)
    model(torch.cat([ids[:, :20], ids_of(1, 7, seed=1)], 1), **{CACHE: cropped}, use_cache=True)
    cropped.crop(-7)
    assert cropped.get_seq_length() == 20
    found = [
        torch.cat([model(ids[:, n : n + 1], **{CACHE: c}, use_cache=True).logits for n in range(20, 30)], 1)
        for c in (once, cropped)
    ]
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-4)


@torch.inference_mode()
def test_memory_is_that_of_codes() -> None:
    """4 bits: about a quarter of 16."""
    model, ids = model_of("llama", hidden=256).to(torch.bfloat16), ids_of(2, 250)
    cache = KVCache(model, KVCacheSpec(rough(model, 2), [None, None], 0, 0))
    model(ids, **{CACHE: cache}, use_cache=True)
    # Keys and values of 2 layers with 2 heads of 64 channels.
    assert cache.nbytes() <= 0.26 * 2 * 2 * ids.numel() * 2 * 64 * 2
    cache.reset()
    assert cache.nbytes() == cache.get_seq_length() == 0


@pytest.mark.parametrize("weights", ["gradient", "uniform"])
def test_codebooks_of_a_model_lose_less_than_random_ones(weights: Any) -> None:
    model, rows = model_of("qwen3", hidden=64), ids_of(8, 128)
    options = KVCacheConfig(bits=2, weights=weights, rounds=3)
    (books, before), (again, _) = calibrate(model, rows, options), calibrate(model, rows, options)
    assert before == [True, True]
    assert [(name, *book.shape) for name, book in books.items()] == [
        (f"{n}.{kind}", 2, 4, 256, 4) for n in range(2) for kind in ("keys", "values")
    ]
    assert all(torch.equal(book, again[name]) for name, book in books.items())
    learned: Quantizers = [(Learned(books[f"{n}.keys"]), Learned(books[f"{n}.values"])) for n in range(2)]
    expected, errors = model(rows[:4], use_cache=False).logits, []
    for quantizers in (learned, rough(model)):
        logits = run(model, new_cache(model, quantizers, 0, 0, strict=True), rows[:4], prompt=128)
        errors.append((logits - expected).square().mean())
    assert errors[0] < errors[1]


def test_heads_without_whole_groups_are_refused() -> None:
    with pytest.raises(VQCompressError, match="layer 0: heads of 12 channels"):
        calibrate(model_of("llama", hidden=48), ids_of(4, 32), KVCacheConfig(bits=1))
