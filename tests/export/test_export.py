"""Exports in the readers they are for: transformers, with compressed-tensors and with aqlm; and refusals."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from aqlm import QuantizedLinear
from aqlm.utils import _dequantize_weight, unpack_int_data
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.utils.quantization_config import CompressedTensorsConfig

from vqcompress.cli import options
from vqcompress.errors import UsageError, VQCompressError
from vqcompress.evaluate.perplexity import open_model
from vqcompress.export import FORMATS, export
from vqcompress.export.verify import compare
from vqcompress.model.stream import BlockStream
from vqcompress.runtime.load import load
from vqcompress.storage.artifact import Artifact
from vqcompress.storage.checkpoint import INDEX, Checkpoint

Make = Callable[..., Path]
IDS = torch.arange(3, 35)[None]

STATIC = "rules: [{match: '*', method: int8, activations: per_tensor}]"
FOLDED = "rules: [{match: '*', method: int8, smoothing: {alpha: 0.5, norm: fold}}]"
POWERS = "rules: [{match: '*', method: fp8, power_of_two_scales: true}]"
WIDE_CODES = "rules: [{match: '*', method: vq, d: 4, bits: 9, scope: target, feedback: false}]"
TWO_SIZES = (
    "rules:\n"
    "  - {match: '*.self_attn.*', method: vq, d: 2, bits: 4, iterations: 1, codebook_updates: 0}\n"
    "  - {match: '*', method: vq, d: 4, bits: 4, iterations: 1, codebook_updates: 0}\n"
)
ROTATED = "rules: [{match: '*', method: vq, d: 2, bits: 4, rotation: true, iterations: 1, codebook_updates: 0}]"
ROTATED_INT8 = "rules: [{match: '*', method: int8, rotation: true}]"
THIRDS = "rules: [{match: '*', method: vq, d: 3, bits: 4, iterations: 1}]"
TRELLIS = "rules: [{match: '*', method: vq, codebook: trellis, state_bits: 8, feedback: false}]"
# Projections that vLLM merges in the families below: all or none of them are in the list of dense modules.
MERGED = [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"], ["q_a_proj", "kv_a_proj_with_mqa"]]


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


def read(path: Path) -> Any:
    """The model that transformers loads in float32, with no tensor missing or left over."""
    model, info = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def quantization_config(out: Path) -> dict[str, Any]:
    return json.loads((out / "config.json").read_text())["quantization_config"]


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS).logits


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


@pytest.fixture
def decoded(tmp_path: Path) -> Callable[[Path], dict[str, torch.Tensor]]:
    """decoded(artifact) → the tensors of its dense export, by their names in transformers' model."""

    def tensors(folder: Path) -> dict[str, torch.Tensor]:
        export(str(folder), "dense", tmp_path / "plain")
        return read(tmp_path / "plain").state_dict()

    return tensors


@pytest.mark.parametrize(("recipe", "family"), [("mixed", "llama"), ("vq-small", "gemma"), slow("int8-runtime", "opt")])
def test_a_dense_export_has_the_decoded_weights(
    recipe: str, family: str, quantized: Make, toy: Make, decoded: Callable[..., Any]
) -> None:
    found, modules = decoded(quantized(recipe, family)), dict(load(quantized(recipe, family)).named_modules())
    for name in Artifact(quantized(recipe, family)).entries:
        torch.testing.assert_close(found[f"{name}.weight"], modules[name].decoded(), atol=1e-6, rtol=1e-6)
    assert found.keys() == load(toy(family)).state_dict().keys()


@pytest.mark.parametrize(
    ("recipe", "family", "hidden"),
    [
        ("fp8-tile", "mixtral", 256),
        (POWERS, "llama", 256),
        slow("fp8-tile", "gemma", 128),
        slow("fp8-tile", "qwen3_moe", 256),
        slow("fp8-tile", "deepseek_v3", 256),
    ],
)
def test_fp8_is_read_to_the_bit(
    recipe: str, family: str, hidden: int, quantized: Make, decoded: Callable[..., Any], tmp_path: Path
) -> None:
    folder, out = quantized(recipe, family, hidden=hidden), tmp_path / "out"
    left_dense = export(str(folder), "fp8", out)["left_dense"]
    found, wanted = read(out).state_dict(), decoded(folder)
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []
    config, stored = quantization_config(out), Checkpoint(out).tensors
    assert config.get("scale_fmt") == ("ue8m0" if recipe == POWERS else None)
    skipped = config["modules_to_not_convert"]
    for name in (n.removesuffix(".weight") for n, info in stored.items() if len(info.shape) > 1):
        if not name.endswith("_scale_inv") and "embed_tokens" not in name:
            is_code = stored[f"{name}.weight"].dtype == torch.float8_e4m3fn
            assert is_code == (f"{name}.weight_scale_inv" in stored)
            assert is_code != (name in skipped), name
    assert "lm_head" in skipped
    assert left_dense.keys() == Artifact(folder).entries.keys() & set(skipped)
    for parent in {name.rpartition(".")[0] for name in Artifact(folder).entries}:
        for leaves in MERGED:
            assert len({f"{parent}.{leaf}" in skipped for leaf in leaves}) == 1, parent
    # What was compressed comes back from the export alone.
    assert open_model(str(out)).format == "fp8"


def test_fp8_writes_partial_tiles_dense_with_everything_merged_with_them(
    quantized: Make, decoded: Callable[..., Any], tmp_path: Path
) -> None:
    folder, out = quantized("fp8-tile", hidden=128, dtype="bfloat16"), tmp_path / "out"
    left = export(str(folder), "fp8", out)["left_dense"]
    assert {name.rpartition(".")[2] for name in left} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert "model.layers.1.self_attn.k_proj" in left["model.layers.1.self_attn.q_proj"]
    assert Checkpoint(out).tensors["model.layers.0.self_attn.q_proj.weight"].dtype == torch.bfloat16
    found, wanted = read(out).state_dict(), decoded(folder)
    for name in (f"{name}.weight" for name in Artifact(folder).entries):
        # Compressed weights are not rounded to the model's type.
        assert torch.equal(found[name].bfloat16(), wanted[name].bfloat16())


def test_fp8_leaves_a_kept_expert_and_the_others_of_its_layer_dense(quantized: Make, tmp_path: Path) -> None:
    recipe = "rules: [{match: '*.experts.2.w1', method: keep}, {match: '*', method: fp8}]"
    left = export(str(quantized(recipe, "mixtral", hidden=256)), "fp8", tmp_path / "out")["left_dense"]
    assert len(left) == 2 * (4 * 3 - 1)
    assert "model.layers.0.mlp.experts.2.w1" in left["model.layers.0.mlp.experts.3.w2"]
    skipped = quantization_config(tmp_path / "out")["modules_to_not_convert"]
    assert {"model.layers.0.mlp.experts", "model.layers.0.block_sparse_moe.experts.3.w2"} < set(skipped)
    assert "model.layers.0.self_attn.q_proj" not in skipped
    read(tmp_path / "out")


@pytest.mark.parametrize(("recipe", "hidden"), [(FOLDED, 64), (STATIC, 64), slow("fp8-tile", 256)])
def test_compressed_tensors_are_read_to_the_bit_and_run(
    recipe: str, hidden: int, quantized: Make, decoded: Callable[..., Any], tmp_path: Path
) -> None:
    folder, out = quantized(recipe, hidden=hidden), tmp_path / "out"
    export(str(folder), "compressed-tensors", out)
    dequantized = CompressedTensorsConfig(dequantize=True)
    weights = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, quantization_config=dequantized)
    found, wanted = weights.state_dict(), decoded(folder)
    assert [n for n in Artifact(folder).entries if not torch.equal(found[f"{n}.weight"], wanted[f"{n}.weight"])] == []
    model, exact, ours = read(out), logits(read(tmp_path / "plain")), logits(load(folder))
    if recipe == FOLDED:
        # Its steps for activations are 0.4 % smaller than ours, so errors differ but are as large.
        assert 0.7 < error(logits(model), exact) / error(ours, exact) < 1.4
    else:
        assert error(logits(model), ours) < 1e-5 < error(logits(model), exact)


def test_compressed_tensors_of_a_mixture_are_for_vllm(quantized: Make, tmp_path: Path) -> None:
    folder, out = quantized("int8-plain", "qwen3_moe"), tmp_path / "out"
    with pytest.raises(UsageError, match="--verify"):
        export(str(folder), "compressed-tensors", out, verify=True)
    assert not out.exists()
    export(str(folder), "compressed-tensors", out)
    stored = Checkpoint(out).tensors
    assert stored["model.layers.1.mlp.experts.3.up_proj.weight"].dtype == torch.int8
    assert stored["model.layers.1.mlp.experts.3.up_proj.weight_scale"].shape == (32, 1)
    ignored = ["lm_head", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]
    assert quantization_config(out)["ignore"] == ignored


@pytest.mark.parametrize("recipe", ["vq-small", slow("vq-2bit-aqlm"), slow(WIDE_CODES)])
def test_aqlm_is_read_to_the_bit(
    recipe: str, quantized: Make, decoded: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = quantized(recipe), tmp_path / "out"
    export(str(folder), "aqlm", out)
    model, wanted = read(out), decoded(folder)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    assert layers.keys() == Artifact(folder).entries.keys()

    def dense(layer: QuantizedLinear) -> torch.Tensor:
        codes = unpack_int_data(layer.codes, layer.nbits_per_codebook)
        return _dequantize_weight(codes, layer.codebooks, layer.scales)

    assert [n for n, layer in layers.items() if not torch.equal(dense(layer), wanted[f"{n}.weight"])] == []
    # Its kernel for CPUs has a race.
    forward = lambda layer, x: torch.nn.functional.linear(x, dense(layer), layer.bias)  # noqa: E731
    monkeypatch.setattr(QuantizedLinear, "forward", forward)
    assert error(logits(model), logits(load(folder))) < 1e-5
    assert quantization_config(out)["linear_weights_not_to_quantize"] == ["lm_head", "lm_head.weight"]


@pytest.mark.parametrize(
    ("format", "recipe", "family", "named"),
    [
        ("fp8", "vq-small", "llama", "layers.0.self_attn.q_proj"),
        ("fp8", "fp8-tile", "llama", "layers.0.self_attn.q_proj"),
        slow("fp8", "mixed", "llama", "fp8"),
        slow("fp8", "fp8-tile", "gpt_oss", "experts.0.gate_proj"),
        slow("compressed-tensors", "vq-small", "llama", "layers.0.self_attn.q_proj"),
        ("compressed-tensors", "int8-runtime", "opt", "compressed-tensors"),
        slow("compressed-tensors", POWERS, "llama", "layers.0.self_attn.q_proj"),
        slow("compressed-tensors", STATIC, "qwen3_moe", "experts.0.gate_proj"),
        ("aqlm", "int8-plain", "llama", "layers.0.self_attn.q_proj"),
        slow("aqlm", TRELLIS, "llama", "layers.0.self_attn.q_proj"),
        ("compressed-tensors", ROTATED_INT8, "llama", "layers.0.self_attn.q_proj"),
        ("aqlm", ROTATED, "llama", "layers.0.self_attn.q_proj"),
        slow("aqlm", TWO_SIZES, "llama", "mlp.gate_proj"),
        slow("aqlm", THIRDS, "llama", "layers.0.self_attn.q_proj"),
        slow("aqlm", "vq-small", "mixtral", "experts.0.w1"),
    ],
)
def test_a_weight_that_a_format_cannot_hold_is_named_before_anything_is_written(
    format: str, recipe: str, family: str, named: str, quantized: Make, tmp_path: Path
) -> None:
    with pytest.raises(VQCompressError, match=named):
        export(str(quantized(recipe, family)), format, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("format", "recipe"), [("compressed-tensors", FOLDED), ("aqlm", "vq-small"), ("dense", "vq-small")]
)
def test_an_export_is_verified_by_its_own_reader(
    format: str, recipe: str, quantized: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "transformers.py").write_text("raise SystemExit('a module of the current directory was imported')")
    result = export(str(quantized(recipe)), format, tmp_path / "out", verify=True)
    assert str(tmp_path / "out") in result["next"]
    assert format == "dense" or format in result["verified"]["reader"]
    bounds = {"compressed-tensors": 1e-2, "aqlm": 1e-8, "dense": 1e-4}
    assert result["verified"]["mean_kl_divergence"] < bounds[format]


def test_what_an_export_leaves_dense_rounds_no_activations(quantized: Make, tmp_path: Path) -> None:
    made = export(
        str(quantized("fp8-tile", hidden=256, intermediate_size=192)), "compressed-tensors", tmp_path / "out", True
    )
    assert any(name.endswith("up_proj") for name in made["left_dense"])
    assert made["verified"]["mean_kl_divergence"] < 1e-6


def test_a_reader_that_rounds_otherwise_may_differ_as_two_roundings_do(quantized: Make, tmp_path: Path) -> None:
    source, reader = Artifact(quantized("int8-plain")), FORMATS["compressed-tensors"].READER
    export(str(source.path), "compressed-tensors", tmp_path / "out")
    stream = BlockStream(source, torch.device("cpu"), torch.float32)
    found = compare(stream, source, tmp_path / "out", replace(reader, bound=0.0), source.entries.keys())
    assert 0 < found["mean_kl_divergence"] <= found["bound"] < reader.bound


@pytest.mark.slow
def test_verification_finds_a_wrong_weight(quantized: Make, tmp_path: Path) -> None:
    source, out = Artifact(quantized("fp8-tile", hidden=256)), tmp_path / "out"
    export(str(source.path), "fp8", out)
    for file in out.glob("*.safetensors"):
        tensors = {name: 1.5 * t if name.endswith("_scale_inv") else t for name, t in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    stream = BlockStream(source, torch.device("cpu"), torch.float32)
    with pytest.raises(VQCompressError, match=re.escape(str(out))):
        compare(stream, source, out, FORMATS["fp8"].READER, source.entries.keys())


def test_an_interrupted_export_is_no_checkpoint_and_is_replaced(quantized: Make, tmp_path: Path) -> None:
    def pressed(*args: Any) -> Any:
        raise KeyboardInterrupt

    out, words = tmp_path / "out", (str(quantized("vq-small")), "dense")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vqcompress.storage.writer.Shards.write_shard", pressed)
        with pytest.raises(KeyboardInterrupt):
            export(*words, out)
    assert not (out / "config.json").exists()
    # As a kill during the very first write leaves it.
    (out / "model.safetensors.index.json").rename(out / "model.safetensors.index.json.partial")
    assert str(out) in export(*words, out)["next"]
    (out / "config.json").unlink()
    (out / "notes.txt").write_text("mine")
    assert str(out) in export(*words, out)["next"]
    with pytest.raises(VQCompressError, match="--overwrite"):
        export(*words, out)
    first = {path.name: path.read_bytes() for path in out.iterdir()}
    (out / "model-00009-of-00009.safetensors").write_text("of an earlier export")
    export(*words, out, overwrite=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == first
    assert first["notes.txt"] == b"mine"


@pytest.mark.parametrize("sharded", [False, True])
def test_an_export_never_overwrites_a_checkpoint(sharded: bool, quantized: Make, toy: Make, tmp_path: Path) -> None:
    out = tmp_path / "precious"
    if sharded:
        load(toy()).save_pretrained(out, max_shard_size="100KB")
        assert (out / INDEX).is_file()
    else:
        shutil.copytree(toy(), out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    for overwrite in (False, True):
        with pytest.raises(VQCompressError, match=str(out)):
            export(str(quantized()), "dense", out, overwrite=overwrite)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_the_command_and_the_page_list_every_format() -> None:
    assert list(FORMATS) == list(options.FORMATS)
    page = (Path(__file__).parent.parent.parent / "docs" / "export.md").read_text(encoding="utf-8")
    assert all(f"\n| `{format}`" in page for format in FORMATS)
