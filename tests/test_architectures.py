"""The sweep over types of language models, on a few that differ as much as they can."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import sweep
import torch

from vqcompress.errors import VQCompressError
from vqcompress.model.rotation import RotatedCheckpoint
from vqcompress.model.stream import BlockStream
from vqcompress.pipeline.context import generator_for
from vqcompress.pipeline.plan import make_plan
from vqcompress.pipeline.preflight import check_plan
from vqcompress.storage.checkpoint import Checkpoint
from vqcompress.storage.recipe import parse

# Plain; transposed layers; a layer class of its own; ALiBi; learned positions and ReLU; a tower; latent attention and
# experts; fused experts with biases; a state space; a hybrid of that with attention; layers of several kinds.
# A block that text skips; queries, keys and values stored as one tensor; blocks that answer lists; blocks that share
# weights; a weight that transformers makes of two.
TYPES = ["llama", "gpt2", "falcon", "bloom", "opt", "gemma3", "deepseek_v3", "gpt_oss", "mamba2", "jamba"]
TYPES += ["gemma4_text", "mllama", "sarvam_moe", "openai-gpt", "zamba2", "minimax_m3_vl"]


@pytest.mark.slow
@pytest.mark.parametrize("name", TYPES)
def test_types_that_differ_work(name: str, tmp_path: Path) -> None:
    result = sweep.try_type(name, tmp_path, ["fp8-tile", "smoothquant-int8"])
    assert (result["state"], result["reason"]) == (sweep.WORKS, "")


def test_every_type_has_a_class() -> None:
    """Types come from transformers, so a new one is tried without an edit here."""
    assert {"llama", "gemma3"} <= sweep.toy_zoo.CLASSES.keys()
    assert all(sweep.toy_zoo.class_name(name).isidentifier() for name in sweep.toy_zoo.CLASSES)


@pytest.mark.parametrize("name", ["bert", "mllama", "gemma4_text"])
def test_doctor_makes_a_toy_of(name: str, tmp_path: Path) -> None:
    """A tied head with a bias; a text part that is no model by itself; widths that differ from layer to layer."""
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


@pytest.mark.parametrize("name", HELD)
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
