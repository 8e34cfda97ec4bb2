"""A folded rotation changes every weight and no logit; models that it does not fit are refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from toys import rewritten, toy_config

from vqcompress.errors import UsageError, VQCompressError
from vqcompress.evaluate.verify import verify
from vqcompress.export import export
from vqcompress.methods.hadamard import block_size
from vqcompress.model.rotation import RotatedCheckpoint
from vqcompress.model.stream import BlockStream
from vqcompress.pipeline.context import generator_for
from vqcompress.pipeline.quantize import QuantizeOptions, dry_run, quantize
from vqcompress.runtime.load import load
from vqcompress.storage import recipe as recipes
from vqcompress.storage import writer
from vqcompress.storage.artifact import REPORTS, SUMS, Artifact
from vqcompress.storage.checkpoint import SINGLE, Checkpoint

Make = Callable[..., Path]
CPU = torch.device("cpu")
IDS = torch.randint(384, (2, 40), generator=torch.Generator().manual_seed(7))
FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"tie_word_embeddings": True}),
    ("llama", {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True}),
    ("llama", {"hidden": 96}),
    ("qwen3", {}),
    ("gemma", {}),
    # Some of its experts get no probe token.
    ("mixtral", {"num_local_experts": 32, "intermediate_size": 32, "num_experts_per_tok": 1}),
]


@pytest.fixture(scope="module")
def lively(toy: Make, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """lively(family, **extra) → a toy whose norms and biases are not the ones and zeros of a new model."""
    made: dict[str, Path] = {}

    def add_noise(tensors: dict[str, Tensor]) -> None:
        draw = torch.Generator().manual_seed(1)
        for tensor in tensors.values():
            if tensor.dim() == 1:
                tensor += 0.3 * torch.randn(tensor.shape, generator=draw).to(tensor.dtype)

    def make(family: str = "llama", **extra: Any) -> Path:
        key = f"{family}-{sorted(extra.items())}"
        if key not in made:
            made[key] = rewritten(toy(family, **extra), tmp_path_factory.mktemp("lively") / "toy", add_noise)
        return made[key]

    return make


@pytest.fixture
def fold(recipe_file: Callable[[str], str], text: Path, tmp_path: Path) -> Callable[..., Path]:
    """fold(model, rule) → the artifact of a recipe with `rotation: fold`."""

    def run(model: Path, rule: str, name: str = "out") -> Path:
        recipe = recipe_file(f"rotation: fold\nrules:\n  - {rule}\n")
        quantize(QuantizeOptions(str(model), tmp_path / name, recipe, [str(text)], samples=8, seqlen=64))
        return tmp_path / name

    return run


def rotated(model: Path, seed: int = 0) -> RotatedCheckpoint:
    return RotatedCheckpoint(BlockStream(Checkpoint(model), CPU, torch.float32), partial(generator_for, seed))


@torch.inference_mode()
def logits(model: Path) -> Tensor:
    """Of the plain checkpoint, by transformers."""
    return transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(IDS).logits


def error(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def matrix(n: int) -> Tensor:
    """blockdiag(Hadamard_b)/√b."""
    b = block_size(n)
    rows = [[(-1) ** (i & j).bit_count() for j in range(b)] for i in range(b)]
    return torch.block_diag(*[torch.tensor(rows, dtype=torch.float64)] * (n // b)) / b**0.5


@pytest.mark.parametrize(("family", "extra"), FAMILIES)
def test_the_rotated_model_is_the_same_function_of_other_weights(
    family: str, extra: dict[str, Any], lively: Make
) -> None:
    model = lively(family, **extra)
    before, source = Checkpoint(model), rotated(model)
    stream = BlockStream(source, CPU, torch.float32)
    states = [stream.embed(IDS)]
    for i in range(len(stream.blocks)):
        stream.forward(stream.load_block(i), i, states)
    assert error(stream.logits(states[0]), logits(model)) < 1e-5
    assert source.config["tie_word_embeddings"] is False
    assert "lm_head.weight" in source.tensors
    tensors, raw = source.read(source.tensors), before.read(before.tensors)
    for name, tensor in raw.items():
        keeps = name.endswith(("q_norm.weight", "k_norm.weight", "q_proj.bias", "k_proj.bias", "up_proj.bias"))
        if keeps or name.endswith("gate_proj.bias"):
            assert torch.equal(tensors[name], tensor)
        elif "norm.weight" in name or "layernorm" in name:
            assert tensors[name].unique().tolist() == [0.0 if family == "gemma" else 1.0]
        else:
            assert not torch.equal(tensors[name], tensor), name
    # v_proj by definition: Hadamard · signs on each head's rows, γ and Qᵀ on its columns.
    name = "model.layers.1.self_attn.v_proj.weight"
    gain = raw["model.layers.1.input_layernorm.weight"].double() + (family == "gemma")
    rows, hidden = raw[name].shape
    signs = (torch.randint(0, 2, (rows,), generator=generator_for(0, name.removesuffix(".weight"))) * 2 - 1).double()
    q = matrix(hidden) * (torch.randint(0, 2, (hidden,), generator=generator_for(0, "rotation")) * 2 - 1).double()
    heads = torch.block_diag(*[matrix(hidden // 4)] * (rows // (hidden // 4))) * signs
    expected = heads @ (raw[name].double() * gain) @ q.T
    torch.testing.assert_close(tensors[name].double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("family", "extra"), [FAMILIES[1], *FAMILIES[-2:]])
@torch.inference_mode()
def test_an_artifact_and_its_dense_export_are_the_rotated_model(
    family: str, extra: dict[str, Any], lively: Make, fold: Callable[..., Path], tmp_path: Path
) -> None:
    model = lively(family, **extra)
    # One weight is compressed, almost without loss; all others are kept.
    folder = fold(model, "{match: '*.0.*.k_proj', method: vq, d: 1, bits: 10, entry_bits: 16, feedback: false}")
    verify(str(folder))
    ours = load(folder)(IDS).logits
    assert error(ours, logits(model)) < 0.01
    # The check starts a process, which takes seconds; one is enough.
    export(str(folder), "dense", tmp_path / "dense", verify=family == "gemma")
    assert error(logits(tmp_path / "dense"), ours) < 1e-5
    assert "lm_head.weight" in Checkpoint(tmp_path / "dense").tensors
    assert Checkpoint(tmp_path / "dense").config["tie_word_embeddings"] is False


@torch.inference_mode()
@pytest.mark.parametrize(
    "rule",
    [
        "{match: '*', method: int8, smoothing: {alpha: 0.5, norm: fold, attention: fold, mlp: fold}}",
        "{match: '*', method: int8, smoothing: {alpha: auto, norm: runtime, attention: runtime, mlp: runtime}}",
        "{match: '*', method: vq, d: 2, bits: 8, iterations: 3, codebook_updates: 1}",
    ],
)
def test_methods_and_smoothing_work_on_it(rule: str, lively: Make, fold: Callable[..., Path]) -> None:
    model = lively("qwen3", tie_word_embeddings=True)
    folder = fold(model, rule)
    verify(str(folder))
    assert error(load(folder)(IDS).logits, logits(model)) < (0.5 if "vq" in rule else 0.2)
    report = json.loads((folder / "report.json").read_text())
    assert (report["rotation"], report["source_bytes"]) == ("fold", Checkpoint(model).bytes)


def test_dense_tensors_keep_their_type_and_weights_are_encoded_from_float32(
    lively: Make, fold: Callable[..., Path]
) -> None:
    model = lively("llama", dtype="bfloat16")
    source, done = rotated(model), Artifact(fold(model, "{match: '*.up_proj', method: int8}"))
    assert all(done.tensors[n].dtype == torch.bfloat16 for n in source.tensors if "up_proj" not in n)
    name, kept = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"
    weight = source.read([name])[name]
    assert weight.dtype == torch.float32
    assert torch.equal(done.read([f"{name}_scale"])[f"{name}_scale"], weight.abs().amax(1) / 127)
    # A weight that is kept is rounded once, from float32.
    assert torch.equal(done.read([kept])[kept], source.read([kept])[kept].bfloat16())


def test_outliers_are_spread_and_nan_is_named(lively: Make, tmp_path: Path) -> None:
    """A weight whose error is all in one large column is quantized as well as any other."""
    name = "model.layers.0.mlp.gate_proj.weight"

    def peak(w: Tensor) -> float:
        return (w.abs().amax(1) / w.square().mean(1).sqrt()).mean().item()

    loud = rewritten(lively(), tmp_path / "loud", lambda tensors: tensors[name][:, 3].mul_(50))
    assert peak(rotated(loud).read([name])[name]) < 0.5 * peak(load_file(loud / SINGLE)[name])
    broken = rewritten(lively(), tmp_path / "broken", lambda tensors: tensors[name][0, 0].fill_(float("nan")))
    with pytest.raises(VQCompressError, match=name):
        rotated(broken)


@pytest.mark.parametrize(
    ("family", "named"), [("opt", "OPT"), ("gpt_neox", "GPTNeoX"), ("gemma2", r"model\.layers\.0")]
)
def test_a_model_that_cannot_be_rotated_is_refused_by_name(family: str, named: str, tmp_path: Path) -> None:
    fields = toy_config(family.replace("gemma2", "gemma"), hidden=64).to_dict()
    if family == "gemma2":
        fields = {k: v for k, v in fields.items() if k not in ("model_type", "architectures")}
        config = transformers.Gemma2Config(**fields)
    else:
        config = toy_config(family, hidden=64)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path)
    with pytest.raises(VQCompressError, match=named):
        rotated(tmp_path)


def test_another_seed_is_another_rotation(lively: Make) -> None:
    name = "model.embed_tokens.weight"
    first, same, other = (rotated(lively(), seed).read([name])[name] for seed in (0, 0, 1))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name not in (*REPORTS, SUMS)}


def test_a_killed_run_ends_in_the_same_bytes(
    lively: Make, fold: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = lively("llama", tie_word_embeddings=True)
    rule = "{match: '*', method: vq, d: 2, bits: 4, iterations: 2, codebook_updates: 0, scope: target}"
    whole, write, calls = contents(fold(model, rule, "whole")), writer.Shards.write_shard, []

    def kill(*args: Any) -> dict[str, Any]:
        calls.append(args)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return write(*args)

    with monkeypatch.context() as patch:
        patch.setattr(writer.Shards, "write_shard", kill)
        with pytest.raises(KeyboardInterrupt):
            fold(model, rule, "killed")
    assert contents(fold(model, rule, "killed")) == whole


@pytest.mark.parametrize("value", ["true", "folded", "[fold]"])
def test_the_key_is_fold_or_left_out(value: str) -> None:
    with pytest.raises(UsageError, match="rotation"):
        recipes.parse(f"rotation: {value}\nrules:\n  - {{match: '*', method: int8}}\n", "test")


def test_a_plan_counts_the_head(toy: Make, fold: Callable[..., Path], recipe_file: Callable[[str], str]) -> None:
    model, rule = toy("llama", tie_word_embeddings=True), "{match: '*', method: fp8}"
    planned = dry_run(QuantizeOptions(str(model), None, recipe_file(f"rotation: fold\nrules:\n  - {rule}\n")))
    report = json.loads((fold(model, rule) / "report.json").read_text())
    assert planned["rotation"] == "fold"
    assert planned["source_bytes"] == report["source_bytes"]
    # The headers of the files.
    assert planned["artifact_bytes"] == pytest.approx(report["artifact_bytes"], rel=0.05)
