"""The sweep over types of language models, on a few that differ as much as they can."""

from __future__ import annotations

from pathlib import Path

import pytest
import sweep

# Plain; transposed layers; a layer class of its own; ALiBi; learned positions and ReLU; a tower; latent attention and
# experts; fused experts with biases; a state space; a hybrid of that with attention; layers of several kinds.
# A block that text skips; queries, keys and values stored as one tensor; blocks that answer lists.
TYPES = ["llama", "gpt2", "falcon", "bloom", "opt", "gemma3", "deepseek_v3", "gpt_oss", "mamba2", "jamba"]
TYPES += ["gemma4_text", "mllama", "sarvam_moe", "openai-gpt"]


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
