"""`plan`: sizes of the largest open models from their configs alone, and a bound on memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from processes import VQCOMPRESS, Processes

from vqcompress.pipeline.quantize import QuantizeOptions, dry_run

Make = Callable[..., Path]
COMMON = {"torch_dtype": "bfloat16", "tie_word_embeddings": False}
# Config, and parameters as published (DeepSeek-V3 without the layer that predicts a second token).
MODELS: dict[str, tuple[dict[str, Any], float]] = {
    "DeepSeek-V3": (
        {
            "model_type": "deepseek_v3", "num_hidden_layers": 61, "hidden_size": 7168, "intermediate_size": 18432,
            "moe_intermediate_size": 2048, "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8,
            "first_k_dense_replace": 3, "n_group": 8, "topk_group": 4, "q_lora_rank": 1536, "kv_lora_rank": 512,
            "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "num_attention_heads": 128,
            "num_key_value_heads": 128, "vocab_size": 129280, "max_position_embeddings": 163840,
        },
        671.0e9,
    ),
    "Qwen3-235B-A22B": (
        {
            "model_type": "qwen3_moe", "num_hidden_layers": 94, "hidden_size": 4096, "intermediate_size": 12288,
            "moe_intermediate_size": 1536, "num_experts": 128, "num_experts_per_tok": 8, "num_attention_heads": 64,
            "head_dim": 128, "num_key_value_heads": 4, "vocab_size": 151936, "max_position_embeddings": 40960,
        },
        235.1e9,
    ),
    "Llama-3.1-405B": (
        {
            "model_type": "llama", "num_hidden_layers": 126, "hidden_size": 16384, "intermediate_size": 53248,
            "num_attention_heads": 128, "num_key_value_heads": 8, "vocab_size": 128256,
            "max_position_embeddings": 131072,
        },
        405.9e9,
    ),
}  # fmt: skip


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("DeepSeek-V3", "Qwen3-235B-A22B")]


@pytest.mark.parametrize("name", ["Llama-3.1-405B", *SLOW])
def test_the_largest_models_are_planned_from_their_configs(name: str, tmp_path: Path) -> None:
    config, published = MODELS[name]
    (tmp_path / "config.json").write_text(json.dumps(COMMON | config))
    plan = dry_run(QuantizeOptions(str(tmp_path), None, "vq-2bit", samples=128, seqlen=2048, device="cpu"))
    assert plan["parameters"] == pytest.approx(published, rel=0.005)
    assert plan["source_bytes"] == 2 * plan["parameters"]
    quantized = plan["weights_quantized"]
    assert quantized > 0.98 * published
    assert plan["artifact_bytes"] == pytest.approx(2 * (published - quantized) + quantized * 2.004 / 8, rel=0.02)
    # Two streams of hidden states in float32, and a block in 16 bits and in float32.
    assert plan["states_bytes"] == 2 * 4 * config["hidden_size"] * 128 * 2048
    block = published / config["num_hidden_layers"]
    assert plan["states_bytes"] + 6 * block < plan["peak_rss_bytes"] < plan["states_bytes"] + 50 * block
    assert plan["peak_device_bytes"] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json"]


def test_rows_of_the_model_itself_take_the_whole_model_in_memory(tmp_path: Path) -> None:
    config = {**MODELS["Llama-3.1-405B"][0], "num_hidden_layers": 4, "vocab_size": 512}
    (tmp_path / "config.json").write_text(json.dumps(COMMON | config))
    plan = dry_run(QuantizeOptions(str(tmp_path), None, "smoothquant-int8", ["self"], device="cpu"))
    # In float32, with the keys and values of 32 rows.
    assert plan["peak_rss_bytes"] > 4 * (plan["parameters"] + 32 * 2048 * 4 * 2 * 8 * 128)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["fp8-tile", "vq-2bit"])
def test_no_more_memory_is_used_than_planned(recipe: str, tmp_path: Path, processes: Processes) -> None:
    job = ["demo", "--recipe", recipe, "--samples", 4, "--device", "cpu", "--json"]
    for words in (
        ["plan", *job, tmp_path / "plan.json"],
        ["quantize", *job, tmp_path / "report.json", "-o", tmp_path / "out"],
    ):
        done = processes.python(VQCOMPRESS, *words)
        assert done.returncode == 0, done.stderr
    planned, used = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("plan", "report"))
    # The libraries themselves grow while they run.
    assert used["peak_rss_bytes"] < planned["peak_rss_bytes"] + 2**28


def test_a_plan_agrees_with_what_is_done(quantized: Make, toy: Make, text: Path) -> None:
    planned = dry_run(QuantizeOptions(str(toy()), None, "vq-2bit", [str(text)], samples=8, seqlen=64))
    done = json.loads((quantized("vq-2bit") / "report.json").read_text())
    for key in ("bits_per_weight", "weights_quantized", "source_bytes", "left_dense"):
        assert planned[key] == pytest.approx(done[key]) if key != "left_dense" else planned[key] == done[key]
    # Beside the parts there is the marker.
    assert planned["artifact_bytes"] == pytest.approx(done["artifact_bytes"], rel=0.05)
    assert [t["name"] for t in planned["targets"]] == [t["name"] for t in done["targets"]]


def test_a_plan_writes_nothing(toy: Make, text: Path) -> None:
    before = sorted((path.name, path.stat().st_mtime_ns) for path in toy().iterdir())
    dry_run(QuantizeOptions(str(toy()), None, "fp8-tile"))
    assert sorted((path.name, path.stat().st_mtime_ns) for path in toy().iterdir()) == before
