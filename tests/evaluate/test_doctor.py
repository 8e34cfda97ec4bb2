"""The doctor proves an architecture on a toy of it, from its config alone."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from processes import Processes

from vqcompress.errors import VQCompressError
from vqcompress.evaluate.doctor import examine
from vqcompress.pipeline.quantize import QuantizeOptions, dry_run
from vqcompress.runtime.load import load

Make = Callable[..., Path]
DEEPSEEK_671B: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "dtype": "bfloat16",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "first_k_dense_replace": 3,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "vocab_size": 129280,
    "max_position_embeddings": 163840,
}
# In a process of its own, whose peak memory is the doctor's.
EXAMINE = """
import json, sys
from pathlib import Path
from vqcompress.evaluate.doctor import examine
found = examine(sys.argv[1])
peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
print(json.dumps({"found": found, "peak": peak}))
"""


@pytest.mark.parametrize(
    "family",
    [
        *("llama", "opt", "deepseek_v3"),
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("gemma", "qwen3", "qwen3_moe", "gpt_neox", "mixtral")
        ),
    ],
)
def test_the_doctor_finds_common_architectures_sound(family: str, toy: Make, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((toy(family) / "config.json").read_bytes())
    found = examine(str(tmp_path))
    assert found["ok"], found["checks"]
    # All but the routers of mixtures.
    assert found["coverage"] == 1 if "experts" not in str(found["folds"]) else found["coverage"] > 0.99
    assert found["blocks"] == 2
    assert not any("experts" in why for why in found["left_dense"].values())
    if family == "llama":
        folds = {fold["input"]: fold["producer"] for fold in found["folds"]}
        assert folds["self_attn.q_proj, self_attn.k_proj, self_attn.v_proj"] == "input_layernorm"
        assert folds["mlp.down_proj"] == "mlp.up_proj"


def test_the_doctor_names_the_experts_that_stay_dense(tmp_path: Path) -> None:
    """DBRX stores its experts as rows of one matrix."""
    attention = {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0}
    experts = {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2}
    sizes = {"d_model": 64, "n_heads": 4, "n_layers": 2, "vocab_size": 384, "max_seq_len": 256}
    transformers.DbrxConfig(**sizes, attn_config=attention, ffn_config=experts).save_pretrained(tmp_path)
    found = examine(str(tmp_path))
    assert found["ok"], found["checks"]
    assert found["coverage"] < 0.5
    assert any("experts" in f"{name} {why}" for name, why in found["left_dense"].items())


def test_the_doctor_takes_matrices_that_are_stored_transposed(tmp_path: Path) -> None:
    """GPT-2 has them in modules of its own."""
    transformers.GPT2Config(n_layer=2, n_embd=64, n_head=4, vocab_size=384).save_pretrained(tmp_path)
    found = examine(str(tmp_path))
    assert found["ok"], found["checks"]
    assert found["coverage"] == 1


def test_a_config_that_nobody_knows_is_a_named_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "nonsense"}')
    with pytest.raises(VQCompressError, match="nonsense"):
        examine(str(tmp_path))


@pytest.mark.parametrize(
    ("kind", "architecture"),
    [
        ("Bert", "BertForMaskedLM"),
        ("Llama", "LlamaForSequenceClassification"),
        ("T5", "T5ForConditionalGeneration"),
    ],
)
def test_other_models_than_causal_ones_are_refused_by_name(kind: str, architecture: str, tmp_path: Path) -> None:
    """transformers would build a causal model from some of these configs, with random weights."""
    config = getattr(transformers, f"{kind}Config")()
    config.architectures = [architecture]
    config.save_pretrained(tmp_path)
    for job in (examine, lambda model: dry_run(QuantizeOptions(model, None, "fp8-tile")), load):
        with pytest.raises(VQCompressError, match=architecture) as error:
            job(str(tmp_path))
        assert "tie_word_embeddings" not in str(error.value)


def test_a_decoder_without_a_head_is_whole_where_its_head_is_the_embedding(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    for tied in (True, False):
        config = transformers.LlamaConfig(**sizes, vocab_size=384, tie_word_embeddings=tied)
        config.architectures = ["LlamaModel"]
        config.save_pretrained(tmp_path)
        if tied:
            assert examine(str(tmp_path))["ok"]
        else:
            with pytest.raises(VQCompressError, match=r"LlamaModel.*tie_word_embeddings"):
                examine(str(tmp_path))


@pytest.mark.parametrize("file", ["model_index.json", "adapter_config.json"])
def test_pipelines_and_adapters_are_refused(file: str, tmp_path: Path) -> None:
    (tmp_path / file).write_text("{}")
    with pytest.raises(VQCompressError, match=re.escape(str(tmp_path))):
        examine(str(tmp_path))


def test_the_text_part_of_a_multimodal_model_that_transformers_loads(tmp_path: Path) -> None:
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**small, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 384, "sliding_window": 32}
    config = transformers.Gemma3Config(text_config=text, vision_config={**small, "image_size": 32, "patch_size": 16})
    config.architectures = ["Gemma3ForConditionalGeneration"]
    config.save_pretrained(tmp_path)
    found = examine(str(tmp_path))
    assert (found["ok"], found["targets"]) == (True, 14)


def test_the_doctor_takes_a_config_that_computes_its_types_of_layers(tmp_path: Path) -> None:
    transformers.MambaConfig(hidden_size=64, num_hidden_layers=2, vocab_size=384).save_pretrained(tmp_path)
    assert examine(str(tmp_path))["ok"]


@pytest.mark.slow
def test_the_doctor_examines_671_billion_weights_in_little_memory(tmp_path: Path, processes: Processes) -> None:
    (tmp_path / "config.json").write_text(json.dumps(DEEPSEEK_671B))
    done = processes.python(EXAMINE, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["found"]["ok"], result["found"]["checks"]
    assert result["found"]["targets"] == 61 * 5 + 3 * 3 + 58 * 3 * 257
    assert result["found"]["coverage"] > 0.999
    assert result["peak"] < 3e9
