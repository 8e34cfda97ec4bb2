"""The sweep over types of language models, on a few that differ as much as they can."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import sweep
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from vqcompress.errors import VQCompressError
from vqcompress.export import export
from vqcompress.model.rotation import RotatedCheckpoint
from vqcompress.model.stream import BlockStream
from vqcompress.pipeline.context import generator_for
from vqcompress.pipeline.options import QuantizeOptions
from vqcompress.pipeline.plan import make_plan
from vqcompress.pipeline.preflight import check_plan
from vqcompress.pipeline.quantize import dry_run, quantize
from vqcompress.storage.checkpoint import Checkpoint
from vqcompress.storage.recipe import parse

# Plain; transposed layers; a layer class of its own; ALiBi; learned positions and ReLU; a tower; latent attention and
# experts; fused experts with biases; a state space; a hybrid of that with attention; layers of several kinds.
# A block that text skips; queries, keys and values stored as one tensor; blocks that answer lists; blocks that share
# weights; a weight that transformers makes of two; a layer that reads two inputs.
TYPES = ["llama", "gpt2", "falcon", "bloom", "opt", "gemma3", "deepseek_v3", "gpt_oss", "mamba2", "jamba"]
TYPES += ["gemma4_text", "mllama", "sarvam_moe", "openai-gpt", "zamba2", "minimax_m3_vl", "zaya"]


@pytest.mark.slow
@pytest.mark.parametrize("name", TYPES)
def test_types_that_differ_work(name: str, tmp_path: Path) -> None:
    result = sweep.try_type(name, tmp_path, ["fp8-tile", "smoothquant-int8"])
    assert (result["state"], result["reason"]) == (sweep.WORKS, "")


# Nested defaults that differ from those of their class; angles in sections; a window that the config leaves open; a
# vocabulary of bytes; sizes under another name.
@pytest.mark.slow
@pytest.mark.parametrize("name", ["paligemma", "qwen2_vl", "step3p7", "reformer", "inkling_mm_model"])
def test_the_zoo_makes_toys_that_transformers_runs(name: str, tmp_path: Path) -> None:
    sweep.make_toy(name, tmp_path)


@pytest.mark.parametrize("name", ["blip", "diffusion_gemma"])
def test_a_type_that_takes_no_text_alone_is_said_to_be_so(name: str, tmp_path: Path) -> None:
    with pytest.raises(sweep.BrokenByTransformers, match="text alone"):
        sweep.make_toy(name, tmp_path)


def test_rounding_is_told_from_other_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(32, 48, generator=generator)
    factors = torch.rand(48, generator=generator) + 0.5, torch.rand(32, 1, generator=generator) + 0.5
    after = (before * factors[0] * factors[1]).to(torch.bfloat16).float()
    assert sweep.rounding(before, after, scaled=True) < 0.01 < 0.1 < sweep.rounding(before, after, scaled=False)
    assert sweep.rounding(before, after.flip(0), scaled=True) > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("recipe", sweep.RECIPES)
@pytest.mark.parametrize("name", ["mlp.up_proj", "input_layernorm"])
def test_a_wrong_weight_that_all_readers_agree_about_is_found(
    recipe: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A matrix with its rows in another order; a norm, which smoothing changes, so that logits alone tell."""

    def spoil(options: Any) -> Any:
        report = quantize(options)
        tensors = load_file(tmp_path / "toy" / "model.safetensors")
        tensors = {key: t.flip(0).contiguous() if f".0.{name}." in key else t for key, t in tensors.items()}
        save_file(tensors, tmp_path / "toy" / "model.safetensors", {"format": "pt"})
        return report

    monkeypatch.setattr(sweep, "quantize", spoil)
    result = sweep.try_type("llama", tmp_path, [recipe])
    assert result["state"] == sweep.FAILED
    assert ("moves the logits" if recipe == "smoothquant-int8" and "norm" in name else name) in result["reason"]


def test_a_result_of_other_code_is_made_again(tmp_path: Path) -> None:
    code, file = sweep.fingerprint(), tmp_path / "a.json"
    file.write_text(json.dumps({"code": code, "recipes": ["fp8-tile"], "reason": ""}))
    assert sweep.is_done(file, ["fp8-tile"], code, keep=False)
    assert not sweep.is_done(file, ["vq-2bit"], code, keep=True)
    assert not sweep.is_done(file, ["fp8-tile"], "another", keep=False)
    assert sweep.is_done(file, ["fp8-tile"], "another", keep=True)
    assert not sweep.is_done(tmp_path / "b.json", ["fp8-tile"], code, keep=True)
    file.write_text(json.dumps({"code": code, "recipes": ["fp8-tile"], "reason": f"toy: {sweep.LOST}"}))
    assert not sweep.is_done(file, ["fp8-tile"], code, keep=True)


def test_every_type_has_a_class() -> None:
    """Types come from transformers, so a new one is tried without an edit here."""
    assert {"llama", "gemma3"} <= sweep.toy_zoo.CLASSES.keys()
    assert all(sweep.toy_zoo.class_name(name).isidentifier() for name in sweep.toy_zoo.CLASSES)


# A tied head with a bias; a text part that is no model by itself; widths that differ from layer to layer; a field that
# points at layers of a tower; lists that say something of each layer of a tower.
@pytest.mark.parametrize(
    "name", ["bert", "mllama", "gemma4_text", "molmo2", pytest.param("muse_spark", marks=pytest.mark.slow)]
)
def test_doctor_makes_a_toy_of(name: str, tmp_path: Path) -> None:
    sweep.toy_zoo.save(sweep.toy_zoo.toy_model(name), tmp_path)
    refusal, facts = sweep.diagnosis(tmp_path)
    assert not refusal
    assert facts["coverage"] > 0


HELD = {
    "zamba": "model.layers.*.shared_transf.self_attn.q_proj.weight",
    "minimax_m3_vl": "model.language_model.layers.*.mlp.shared_experts.gate_up_proj.weight",
    "inkling2_text": "model.layers.*.self_attn.k_proj.sconv.weight_proj.weight",
    # transformers initializes its experts from the module around them.
    "qwen3_omni_moe_thinker": "lm_head.weight",
}


@pytest.mark.parametrize("name", ["zamba", *(pytest.param(name, marks=pytest.mark.slow) for name in [*HELD][1:])])
def test_weights_without_a_tensor_of_their_own_stay_dense(name: str, tmp_path: Path) -> None:
    """Shared by blocks; made of two tensors; stored under a name without `weight`."""
    sweep.toy_zoo.save(sweep.toy_zoo.toy_model(name), tmp_path)
    stream = BlockStream(Checkpoint(tmp_path), torch.device("cpu"), torch.float32)
    plan = make_plan(stream, parse("rules: [{match: '*', method: fp8}]", "test"))
    check_plan(stream, plan)
    assert HELD[name] in plan.left_dense
    assert plan.targets
    if name == "zamba":
        with pytest.raises(VQCompressError, match=r"shared_transf"):
            RotatedCheckpoint(stream, partial(generator_for, 0))
    module = HELD[name].partition("*.")[2].removesuffix(".weight")
    assert not any(module and target.name.endswith(f".{module}") for target in plan.targets)


def test_any_of_the_weights_that_share_their_values_may_be_the_stored_one(tmp_path: Path) -> None:
    model = sweep.toy_zoo.toy_model("zamba")
    tied = model.all_tied_weights_keys
    sweep.toy_zoo.save(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    other = {own: alias for alias, own in tied.items() if "shared_transf" in alias}
    assert other
    save_file({other.get(name, name): t for name, t in tensors.items()}, tmp_path / "model.safetensors")
    stream = BlockStream(Checkpoint(tmp_path), torch.device("cpu"), torch.float32)
    for i, block in enumerate(stream.blocks):
        loaded = stream.load_block(i)
        for path, expected in model.get_submodule(block.name).named_parameters():
            assert torch.equal(loaded.get_parameter(path), expected.float()), (block.name, path)


def test_a_plan_counts_the_heads_of_each_layer(tmp_path: Path) -> None:
    """Gemma 4 has heads of two sizes, and its config refuses to tell one for all."""
    sweep.toy_zoo.save(sweep.toy_zoo.toy_model("gemma4_text"), tmp_path)
    options = QuantizeOptions(str(tmp_path), None, "smoothquant-int8", ["self"], 4, 32, device="cpu")
    assert dry_run(options)["peak_rss_bytes"] > 0


@pytest.mark.slow
def test_masks_that_old_checkpoints_store_are_no_weights(tmp_path: Path) -> None:
    """GPT-2 as it was published: no prefix, and in each block a mask of -Inf that transformers ignores."""
    toy, out = tmp_path / "toy", tmp_path / "out"
    sweep.toy_zoo.save(sweep.toy_zoo.toy_model("gpt2"), toy)
    tensors = {name.removeprefix("transformer."): t for name, t in load_file(toy / "model.safetensors").items()}
    save_file(tensors | {"h.0.attn.masked_bias": torch.tensor(-torch.inf)}, toy / "model.safetensors")
    quantize(QuantizeOptions(str(toy), out, "fp8-tile", device="cpu"))
    _, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert info["unexpected_keys"] <= {"h.0.attn.masked_bias"}
    assert export(str(out), "dense", tmp_path / "dense", verify=True)
