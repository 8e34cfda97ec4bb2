"""Draft layers (multi-token prediction): carried over, listed, and named by exports."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import call
from toys import rewritten

from vqcompress.errors import VQCompressError
from vqcompress.evaluate.inspect import inspect
from vqcompress.evaluate.verify import verify
from vqcompress.export import export
from vqcompress.pipeline.options import QuantizeOptions
from vqcompress.pipeline.quantize import quantize
from vqcompress.storage.checkpoint import Checkpoint

# Family → where its draft layer lies.
PLACES = {"deepseek_v3": "model.layers.2", "qwen3": "mtp", "llama": "model.mtp_layers"}


@pytest.fixture
def drafted(toy: Callable[..., Path], tmp_path: Path) -> Callable[[str], Path]:
    """drafted(family) → a toy with a draft layer: a copy of its last block, and a projection beside it."""

    def add(tensors: dict[str, torch.Tensor], place: str) -> None:
        copies = {n.replace("model.layers.1", place): t for n, t in tensors.items() if n.startswith("model.layers.1.")}
        tensors |= {name: tensor.clone() for name, tensor in copies.items()}
        tensors[f"{place}.eh_proj.weight"] = torch.ones(128, 256)

    def make(family: str) -> Path:
        dense = toy(family, hidden=128)
        return rewritten(dense, tmp_path / "model", lambda tensors: add(tensors, PLACES[family]))

    return make


@pytest.mark.parametrize("family", PLACES)
def test_draft_layers_are_carried_over_and_named(family: str, drafted: Callable[[str], Path], tmp_path: Path) -> None:
    folder, place = drafted(family), PLACES[family]
    report = quantize(QuantizeOptions(model=str(folder), recipe="fp8-tile", out=tmp_path / "out"))
    original = Checkpoint(folder)
    drafts = [name for name in original.tensors if name.startswith(f"{place}.")]
    size = sum(original.tensors[name].bytes for name in drafts)
    assert report["draft_layers"] == inspect(str(tmp_path / "out"))["draft_layers"] == {place: size}
    assert "draft layer" in report["left_dense"][place]
    assert verify(str(tmp_path / "out"))["targets"] == len(report["targets"])
    modules = {name.rpartition(".")[0] for name in drafts if len(original.tensors[name].shape) > 1}
    for format, key in (("fp8", "modules_to_not_convert"), ("compressed-tensors", "ignore"), ("dense", "")):
        out = tmp_path / format
        if format == "compressed-tensors" and family != "llama":
            continue
        export(str(tmp_path / "out"), format, out, verify=family + format == "llamafp8")
        exported = Checkpoint(out)
        for name, tensor in original.read(drafts).items():
            assert torch.equal(exported.read([name])[name], tensor)
        assert not key or modules <= set(json.loads((out / "config.json").read_text())["quantization_config"][key])


def test_a_model_with_draft_layers_is_not_rotated(
    drafted: Callable[[str], Path], tmp_path: Path, recipe_file: Any
) -> None:
    recipe = recipe_file("rotation: fold\nrules: [{match: '*', method: fp8}]")
    with pytest.raises(VQCompressError, match=PLACES["llama"]):
        quantize(QuantizeOptions(model=str(drafted("llama")), recipe=recipe, out=tmp_path / "out"))


def test_layers_beyond_those_of_the_config_are_no_draft_layers(toy: Callable[..., Path], tmp_path: Path) -> None:
    """As of a model whose last layers were cut off in its config alone."""
    folder, out = Path(shutil.copytree(toy(), tmp_path / "model")), tmp_path / "out"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    result = call("quantize", folder, "-o", out, "--recipe", "fp8-tile", "--device", "cpu")
    assert (result.exit_code, "model.layers.1: layer beyond the num_hidden_layers" in result.stdout) == (0, True)
    assert "model.layers.1" in call("inspect", out).stdout
    assert "draft" not in json.loads((out / "report.json").read_text())["left_dense"]["model.layers.1"]
    assert call("verify", out).exit_code == 0
