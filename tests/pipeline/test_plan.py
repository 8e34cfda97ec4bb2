"""What `plan` foretells: sizes and work of the largest open models from their configs alone; memory."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import VQCOMPRESS, Processes

from vqcompress.errors import UsageError
from vqcompress.model.stream import BlockStream
from vqcompress.pipeline import estimate as costs
from vqcompress.pipeline.bit_allocation import make_plans, outlook
from vqcompress.pipeline.estimate import Site
from vqcompress.pipeline.quantize import dry_run
from vqcompress.storage.artifact import open_checkpoint
from vqcompress.storage.recipe import load

COMMON = {"torch_dtype": "bfloat16", "tie_word_embeddings": False}
# Config, parameters as published (DeepSeek-V3 without the layer that predicts a second token), weights per token.
MODELS: dict[str, tuple[dict[str, Any], float, float]] = {
    "DeepSeek-V3": (
        {
            "model_type": "deepseek_v3", "num_hidden_layers": 61, "hidden_size": 7168, "intermediate_size": 18432,
            "moe_intermediate_size": 2048, "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8,
            "first_k_dense_replace": 3, "n_group": 8, "topk_group": 4, "q_lora_rank": 1536, "kv_lora_rank": 512,
            "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "num_attention_heads": 128,
            "num_key_value_heads": 128, "vocab_size": 129280, "max_position_embeddings": 163840,
        },
        671.0e9,
        37e9,
    ),
    "Llama-3.1-405B": (
        {
            "model_type": "llama", "num_hidden_layers": 126, "hidden_size": 16384, "intermediate_size": 53248,
            "num_attention_heads": 128, "num_key_value_heads": 8, "vocab_size": 128256,
            "max_position_embeddings": 131072,
        },
        405.9e9,
        405e9,
    ),
    "Qwen3-235B-A22B": (
        {
            "model_type": "qwen3_moe", "num_hidden_layers": 94, "hidden_size": 4096, "intermediate_size": 12288,
            "moe_intermediate_size": 1536, "num_experts": 128, "num_experts_per_tok": 8, "num_attention_heads": 64,
            "head_dim": 128, "num_key_value_heads": 4, "vocab_size": 151936, "max_position_embeddings": 40960,
        },
        235.1e9,
        22e9,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_the_largest_models_are_planned_from_their_configs(name: str, tmp_path: Path) -> None:
    config, published, active = MODELS[name]
    (tmp_path / "config.json").write_text(json.dumps(COMMON | config))
    stream = BlockStream(open_checkpoint(str(tmp_path), weights=False), torch.device("cpu"), torch.float32)
    plans = make_plans(stream, load("vq-2bit"), None)

    def plan(gpus: int) -> dict[str, Any]:
        return outlook(plans, stream, 128, 2048, Site(gpus, tflops=400, encode_tflops=20, disk_gbps=2))

    alone, *teams = facts = [plan(gpus) for gpus in (1, 8, 64)]
    assert alone["parameters"] == pytest.approx(published, rel=0.005)
    assert alone["source_bytes"] == 2 * alone["parameters"]
    quantized = alone["weights_quantized"]
    assert quantized > 0.98 * published
    assert alone["artifact_bytes"] == pytest.approx(2 * (published - quantized) + quantized * 2.004 / 8, rel=0.02)
    assert alone["disk_written_bytes"] == alone["artifact_bytes"]
    assert alone["disk_read_bytes"] == alone["source_bytes"] + alone["artifact_bytes"]
    # Measured, moved on and passed in the dense model; where a layer can compensate once more; and attention.
    passes = alone["flops"]["forward"] / (2 * active * 128 * 2048)
    assert 3 < passes < 5
    hidden = config["hidden_size"]
    for found, gpus in zip(facts, (1, 8, 64), strict=True):
        # Of the two streams in 16 bits.
        assert found["states_bytes"] == 2 * 2 * hidden * 128 * 2048 // gpus
        assert found["peak_device_bytes"] > found["states_bytes"]
        assert found["peak_rss_bytes"] > max(2 * published / config["num_hidden_layers"], 2**28)
        assert found["flops"] == alone["flops"]
        assert found["seconds"] == pytest.approx(sum(found["seconds_by"].values()) + 1)
    for slower, faster in zip(facts, teams, strict=False):
        # Reading the checkpoint and the last weights of blocks take as long whatever the number.
        assert slower["seconds"] / 8 < faster["seconds"] < slower["seconds"]
    with pytest.raises(UsageError, match="--gpus 65: 64 batches of calibration rows are too few"):
        plan(65)


def test_more_processes_share_the_blocks_of_a_data_free_recipe() -> None:
    rates = {"tflops": 1.0, "encode_tflops": 0.1, "disk_gbps": 1.0}
    each = [dry_run("demo", "fp8-tile", site=Site(gpus, **rates)) for gpus in (1, 2, 3)]
    took = [plan["seconds_by"]["encode"] for plan in each]
    # The demo has three blocks, so two processes make two rounds.
    assert took == pytest.approx([took[0], took[0] * 2 / 3, took[0] / 3])
    assert {plan["calibration_tokens"] for plan in each} == {0}


def test_given_rates_are_the_plans_own() -> None:
    slow, fast = (dry_run("demo", "vq-2bit", samples=16, site=Site(None, t, t / 10, 1)) for t in (0.01, 0.1))
    assert fast["rates"] == pytest.approx({"tflops": 0.1, "encode_tflops": 0.01, "disk_gbps": 1.0})
    assert slow["seconds_by"]["forward"] == pytest.approx(10 * fast["seconds_by"]["forward"])
    assert slow["seconds_by"]["encode"] == pytest.approx(10 * fast["seconds_by"]["encode"])
    assert slow["processes"] == 1
    assert slow["peak_device_bytes"] == 0


@pytest.mark.parametrize("forbidden", range(4))
def test_the_disk_that_is_measured_is_the_checkpoints_if_that_can_be(
    forbidden: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the current directory's, else that of temporary files."""
    asked, probe = list[Any](), tmp_path / "probe"

    def creates(dir: Any) -> Any:
        asked.append(dir)
        if len(asked) <= forbidden:
            raise PermissionError
        return probe.open("wb")

    monkeypatch.setattr(costs.tempfile, "TemporaryFile", creates)
    if forbidden == 3:
        with pytest.raises(UsageError, match="--disk-gbps"):
            costs._disk_rate(tmp_path)
    else:
        assert costs._disk_rate(tmp_path) > 0
        # A disk that compresses does not gain by it.
        assert len(zlib.compress(probe.read_bytes()[: 1 << 20], 1)) > 1 << 20
    assert asked == [tmp_path, ".", None][: forbidden + 1]


@pytest.mark.parametrize("recipe", ["fp8-tile", "vq-2bit"])
def test_the_memory_that_is_planned_is_what_is_used(recipe: str, tmp_path: Path, processes: Processes) -> None:
    job = ["demo", "--recipe", recipe, "--samples", 4, "--device", "cpu", "--json"]
    rates = ["--tflops", 1, "--encode-tflops", 1, "--disk-gbps", 1]
    for words in (
        ["plan", *job, tmp_path / "plan.json", *rates],
        ["quantize", *job, tmp_path / "report.json", "-o", tmp_path / "out"],
    ):
        done = processes.python(VQCOMPRESS, *words)
        assert done.returncode == 0, done.stderr
    planned, used = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("plan", "report"))
    assert planned["peak_rss_bytes"] == pytest.approx(used["peak_rss_bytes"], rel=0.25)
