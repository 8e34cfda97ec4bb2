"""What the readers of an artifact would refuse is refused before anything is written, and `verify` runs a model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import call, line
from safetensors.torch import load_file, save_file
from toys import rewritten

from vqcompress.storage.artifact import INDEX, SUMS, checksum_lines, sha256

Tensors = dict[str, torch.Tensor]
NORM = "model.layers.0.input_layernorm.weight"
WEIGHT = "model.layers.1.mlp.up_proj.weight"


def renamed(tensors: Tensors) -> None:
    """As an adapter leaves them."""
    for name in list(tensors):
        tensors[f"base_model.model.{name}"] = tensors.pop(name)


# Change to the tensors of a checkpoint → what the message names.
SPOILED: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "no final norm": (lambda t: t.pop("model.norm.weight"), "model.norm.weight"),
    "no embeddings": (lambda t: t.pop("model.embed_tokens.weight"), "model.embed_tokens.weight"),
    "other names": (renamed, "model."),
    "a scale beside a weight": (lambda t: t.update({f"{WEIGHT}_scale_inv": torch.ones(1, 1)}), f"{WEIGHT}_scale_inv"),
    "codes for a weight": (lambda t: t.update({WEIGHT: t[WEIGHT].to(torch.int8)}), WEIGHT),
    "codes outside of blocks": (lambda t: t.update({"lm_head.weight": t["lm_head.weight"].to(torch.int8)}), "lm_head"),
    "too large to compute": (lambda t: t.update({NORM: t[NORM] * 3e38}), "model.layers.0"),
}


@pytest.mark.parametrize("spoiled", SPOILED)
def test_what_readers_would_refuse_is_refused_before_anything_is_written(
    spoiled: str, toy: Any, tmp_path: Path
) -> None:
    change, named = SPOILED[spoiled]
    model = rewritten(toy(), tmp_path / "model", change)
    result = call("quantize", model, "-o", tmp_path / "out", "--recipe", "fp8-tile")
    assert result.exit_code == 1
    assert named in line(result)
    assert not (tmp_path / "out").exists()
    # What needs only headers, `plan` says too.
    planned = call("plan", model, "--recipe", "fp8-tile")
    assert planned.exit_code == (0 if spoiled == "too large to compute" else 1)


def test_verify_runs_the_first_and_last_block(quantized: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(quantized("int8-plain"), tmp_path / "copy"))
    assert call("verify", folder, "--json", tmp_path / "facts.json").exit_code == 0
    assert json.loads((tmp_path / "facts.json").read_text())["ran"] == ["model.layers.0", "model.layers.1"]
    file = folder / json.loads((folder / INDEX).read_text())["weight_map"][NORM]
    tensors = load_file(file)
    save_file({**tensors, NORM: tensors[NORM] * 3e38}, file, metadata={"format": "pt"})
    (folder / SUMS).write_text(checksum_lines({p.name: sha256(p) for p in folder.iterdir() if p.name != SUMS}))
    result = call("verify", folder)
    assert result.exit_code == 1
    assert "model.layers.0" in line(result)
    assert call("verify", folder, "--quick").exit_code == 0


def test_a_calibrated_run_without_a_tokenizer_is_refused_by_plan_too(toy: Any, tmp_path: Path) -> None:
    model = Path(shutil.copytree(toy(), tmp_path / "model", ignore=shutil.ignore_patterns("token*")))
    for words in (["plan", model], ["quantize", model, "-o", tmp_path / "out"]):
        result = call(*words, "--recipe", "smoothquant-int8")
        assert (result.exit_code, "tokenizer" in line(result)) == (1, True)
    assert call("plan", model, "--recipe", "fp8-tile").exit_code == 0


def test_a_run_goes_on_when_a_weight_with_nan_is_mended(toy: Any, tmp_path: Path) -> None:
    spoil = lambda t: t.update({WEIGHT: t[WEIGHT].clone().fill_(torch.nan)})  # noqa: E731
    model, out = rewritten(toy(layers=3), tmp_path / "model", spoil), tmp_path / "out"
    job = ["quantize", model, "-o", out, "--recipe", "fp8-tile", "--device", "cpu"]
    result = call(*job)
    assert (result.exit_code, WEIGHT in result.stderr, "same command" in result.stderr) == (1, True, True)
    shutil.copy(toy(layers=3) / "model.safetensors", model)
    result = call(*job)
    assert (result.exit_code, "blocks done by an earlier run: 1" in result.stderr) == (0, True), result.stderr
