"""Linear layers of other classes than nn.Linear: found by a run, and right in every form of an artifact."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys import toy_checkpoint
from transformers import AutoModelForCausalLM
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

from vqcompress.errors import VQCompressError
from vqcompress.evaluate.read_report import read_report
from vqcompress.evaluate.verify import verify
from vqcompress.export import export
from vqcompress.model.linear import decode_layers
from vqcompress.model.projections import form_of
from vqcompress.model.stream import BlockStream
from vqcompress.model.weight_reads import _suspects, _watch
from vqcompress.pipeline.quantize import QuantizeOptions, quantize
from vqcompress.runtime.load import load
from vqcompress.storage.artifact import Artifact
from vqcompress.storage.checkpoint import Checkpoint

IDS = torch.randint(3, 384, (2, 24), generator=torch.Generator().manual_seed(0))
CPU = torch.device("cpu")


class Clamped(nn.Linear):
    """Linear for small inputs alone."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.clamp(-50, 50))


class Scaled(nn.Module):
    """A matrix and a scale: no linear layer, though both are parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.ones(8, 4)), nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T * self.scale


@pytest.mark.parametrize(
    ("module", "form"),
    [
        (nn.Linear(8, 4), ((4, 8), True, False)),
        (FalconLinear(8, 4, bias=False), ((4, 8), False, False)),
        (Conv1D(4, 8), ((4, 8), True, True)),
        (Conv1D(8, 8).to(torch.bfloat16), ((8, 8), True, True)),
        (Clamped(8, 4), None),
        (Scaled(), None),
        (nn.Embedding(8, 4), None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_a_module_is_a_linear_layer_if_it_computes_like_one(module: nn.Module, form: Any) -> None:
    assert form_of(module) == form


def streamed(folder: Path) -> Tensor:
    """The logits as `eval perplexity` computes them."""
    stream = BlockStream(Artifact(folder), CPU, torch.float32)
    states = [stream.embed(IDS)]
    for i in range(len(stream.blocks)):
        stream.forward(stream.load_block(i), i, states)
    return stream.logits(states[0])


@torch.inference_mode()
def logits(model: Any) -> Tensor:
    return model.eval()(IDS, use_cache=False).logits


def check_all_forms(model: Path, recipe: str, text: Path, out: Path) -> Artifact:
    """Quantize; the artifact streamed, loaded both ways, and exported computes the same."""
    quantize(QuantizeOptions(str(model), out / "artifact", recipe, [str(text)], samples=8, seqlen=32))
    verify(str(out / "artifact"))
    loaded = load(out / "artifact")
    ours = logits(loaded)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(out / "artifact", dtype=torch.float32)), ours)
    assert torch.allclose(streamed(out / "artifact"), ours, atol=1e-4)
    dense = logits(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32))
    assert (ours - dense).norm() < 0.1 * dense.norm()
    export(str(out / "artifact"), "dense", out / "dense")
    decode_layers(loaded)
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(out / "dense")), logits(loaded), atol=1e-4)
    shapes = {name: info.shape for name, info in Checkpoint(out / "dense").tensors.items()}
    assert shapes == {name: info.shape for name, info in Checkpoint(model).tensors.items()}
    return Artifact(out / "artifact")


@pytest.mark.parametrize("family", ["gpt2", "falcon", "granitemoe"])
def test_other_classes_are_right_in_every_form(
    family: str, tmp_path: Path, text: Path, recipe_file: Callable[[str], str]
) -> None:
    model = toy_checkpoint(tmp_path / "model", family, hidden=64)
    # transformers has other names for the fused experts of granitemoe than checkpoints have.
    # A kept weight is rescaled by a fold, and stored as the original stores it.
    recipe = (
        "rules:\n  - {match: 're:.*[.](h|layers)[.]0[.].*(c_attn|c_fc|query_key_value|q_proj)', method: keep}\n"
        "  - {match: '*', method: int8, smoothing: {alpha: 0.5}}\n"
    )
    artifact = check_all_forms(model, recipe_file(recipe), text, tmp_path)
    count = {"gpt2": 6, "falcon": 7, "granitemoe": 2 * (4 + 4 * 3) - 1}[family]
    assert len(artifact.entries) == count
    if family == "gpt2":
        assert artifact.tensors["transformer.h.0.attn.c_attn.weight"].shape == (64, 192)
        assert artifact.entries["transformer.h.1.attn.c_attn"].target.shape == (192, 64)


def test_a_weight_that_the_model_reads_itself_stays_dense_by_name(tmp_path: Path, text: Path) -> None:
    # Jamba multiplies by `dt_proj.weight`, unless some other quantizer loaded it: then it calls the layer.
    model = toy_checkpoint(tmp_path / "model", "jamba", hidden=64)
    artifact = check_all_forms(model, "smoothquant-int8", text, tmp_path)
    assert {name.rpartition(".")[2] for name in artifact.entries if ".mamba." in name} == {
        "in_proj",
        "x_proj",
        "out_proj",
    }
    left = read_report(artifact.path)["left_dense"]
    assert "itself" in left["model.layers.*.mamba.dt_proj.weight"]
    assert read_report(artifact.path)["uncalibrated"] == []


def test_only_weights_that_a_run_uses_are_read_by_the_model() -> None:
    class Reader(nn.Module):
        """Reads one weight itself, asks another for its type, and has a third in code that never runs."""

        def __init__(self) -> None:
            super().__init__()
            self.used, self.asked, self.idle = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            x = self.asked(x.to(self.asked.weight.dtype)) @ self.used.weight.T
            return x @ self.idle.weight if self.training else self.idle(x)

    block = nn.Sequential(Reader()).eval()
    assert _suspects(block) == {"0.used", "0.asked", "0.idle"}
    seen: set[str] = set()
    for path, module in block.named_modules():
        _watch(module, path, seen)
    block(torch.zeros(2, 4))
    assert seen == {"0.used"}


def test_formats_of_others_refuse_transposed_weights_by_name(quantized: Callable[..., Path], tmp_path: Path) -> None:
    artifact = quantized("fp8-tile", "gpt2")
    with pytest.raises(VQCompressError, match=r"transformer\.h\.0\.attn\.c_attn .*dense"):
        export(str(artifact), "fp8", tmp_path / "out")
    assert not (tmp_path / "out").exists()
