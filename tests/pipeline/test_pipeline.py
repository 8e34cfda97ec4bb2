"""Quantize from end to end: the files on disk, the report, and that both depend on the inputs alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kills import TIMED, contents
from safetensors.torch import load_file, save_file
from torch import Tensor

from vqcompress.errors import UsageError, VQCompressError
from vqcompress.evaluate.inspect import inspect
from vqcompress.evaluate.verify import verify
from vqcompress.pipeline.quantize import QuantizeOptions, quantize
from vqcompress.storage.artifact import HINT, SUMS, Artifact
from vqcompress.storage.checkpoint import INDEX, Checkpoint

Make = Callable[..., Path]
CASES = [
    *(("llama", recipe) for recipe in ("smoothquant-int8", "fp8-tile", "vq-2bit", "mixed")),
    ("opt", "vq-small"),
    ("gemma", "vq-small"),
    ("gpt_neox", "int8-plain"),
    ("mixtral", "smoothquant-int8"),
    ("mixtral", "vq-small"),
    ("deepseek_v3", "int8-plain"),
]
every_case = pytest.mark.parametrize(("family", "recipe"), CASES)


def tensors(source: Checkpoint) -> dict[str, Tensor]:
    return source.read(source.tensors)


def report_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def spelled(name: str) -> str:
    """A target's name as its checkpoint has it; only mixtral's differ."""
    return name.replace(".mlp.experts.", ".block_sparse_moe.experts.") if ".w" in name else name


def parts_on_disk(artifact: Artifact) -> set[str]:
    """The names of everything stored in place of compressed weights, found without asking the writer."""
    weights = tuple(f"{spelled(name)}.weight_" for name in artifact.entries)
    return {n for n in artifact.tensors if n.startswith(weights) or ".shared_parts." in n}


@every_case
def test_the_artifact_is_sound_and_in_hugging_face_layout(family: str, recipe: str, quantized: Make, toy: Make) -> None:
    folder, source = quantized(recipe, family), Checkpoint(toy(family))
    verify(str(folder))
    blocks = len({name.split(".layers.")[1].split(".")[0] for name in source.tensors if ".layers." in name})
    shards = {f"model-{i:05d}-of-{blocks + 1:05d}.safetensors" for i in range(1, blocks + 2)}
    companions = {"generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in folder.iterdir()} == {"config.json", INDEX, *TIMED} | companions | shards
    # As `sha256sum -c` reads them; `verify` has compared the digests.
    listed = {line.split("  ", 1)[1] for line in (folder / SUMS).read_text().splitlines()}
    assert listed == {path.name for path in folder.iterdir()} - {SUMS}
    assert set(json.loads((folder / INDEX).read_text())["weight_map"].values()) == shards
    config = json.loads((folder / "config.json").read_text())
    assert config.pop("quantization_config")["quant_method"] == "vqcompress"
    assert config == source.config


@every_case
def test_a_dense_tensor_keeps_its_name_and_its_bytes(family: str, recipe: str, quantized: Make, toy: Make) -> None:
    artifact, source = Artifact(quantized(recipe, family)), Checkpoint(toy(family))
    compressed = {f"{spelled(name)}.weight" for name in artifact.entries}
    kept = source.tensors.keys() - compressed
    marker = f"{next(iter(artifact.entries))}.weight"
    assert artifact.tensors.keys() - parts_on_disk(artifact) == kept | {marker, HINT}
    before, after = tensors(source), tensors(artifact)
    # Smoothing folds into norms, whose output a router reads.
    folded = ("norm", "mlp.gate.weight", "block_sparse_moe.gate.weight")
    smoothed = recipe in ("smoothquant-int8", "mixed")
    untouched = {n for n in kept if not (smoothed and any(part in n for part in folded))}
    assert all(raw(before[name]) == raw(after[name]) for name in untouched)
    assert all(before[name].dtype == after[name].dtype for name in kept)


@every_case
def test_the_report_has_its_stable_keys_and_the_bits_on_disk(
    family: str, recipe: str, quantized: Make, toy: Make
) -> None:
    folder = quantized(recipe, family)
    artifact, report = Artifact(folder), report_of(folder)
    assert report.keys() >= {
        "recipe", "model", "seed", "bits_per_weight", "weights_quantized", "source_bytes", "artifact_bytes",
        "seconds", "peak_rss_bytes", "peak_device_bytes", "targets",
    }  # fmt: skip
    assert [t["name"] for t in report["targets"]] == list(artifact.entries)
    for target in report["targets"]:
        assert target.keys() >= {
            "name", "method", "shape", "bits_per_weight", "relative_error", "proxy_error", "tokens", "seconds",
        }  # fmt: skip
        assert 0 < target["relative_error"] < 0.5
    assert report["source_bytes"] == Checkpoint(toy(family)).bytes
    on_disk = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert on_disk == pytest.approx(report["artifact_bytes"], rel=0.01)
    bits = sum(8 * artifact.tensors[name].bytes for name in parts_on_disk(artifact))
    assert report["weights_quantized"] == sum(entry.target.weights for entry in artifact.entries.values())
    assert report["bits_per_weight"] == pytest.approx(bits / report["weights_quantized"], rel=1e-12)
    per_target = sum(t["bits_per_weight"] * t["shape"][0] * t["shape"][1] for t in report["targets"])
    assert per_target == pytest.approx(bits, rel=1e-12)


def test_uses_of_codebook_entries_are_counted(quantized: Make) -> None:
    options = "method: vq, d: 2, bits: 3, iterations: 1, codebook_updates: 0"
    own, shared = f"{{match: '*.v_proj', {options}, scope: target}}", f"{{match: '*.[qk]_proj', {options}}}"
    folder = quantized(f"rules:\n  - {own}\n  - {shared}\n  - {{match: '*.down_proj', method: int8}}\n")
    books, weights = report_of(folder)["codebooks"], Artifact(folder).entries
    blocks = ("model.layers.0", "model.layers.1")
    assert books.keys() == {f"{b}.{end}" for b in blocks for end in ("self_attn.v_proj", "shared_parts.1")}
    for block in blocks:
        (counts,) = books[f"{block}.shared_parts.1"]["counts"]
        read = sum(weights[f"{block}.self_attn.{name}_proj"].target.weights for name in "qk")
        assert (len(counts), sum(counts)) == (8, read / 2)
        assert "counts" not in books[f"{block}.self_attn.v_proj"]
    assert all(0 < a <= b <= c <= 1 for a, b, c in (book["hottest"] for book in books.values()))
    assert inspect(str(folder))["codebooks"] == books


def test_the_seed_decides_the_bytes(
    quantized: Make, toy: Make, recipe_file: Callable[[str], str], text: Path, tmp_path: Path
) -> None:
    first, job = quantized("mixed"), (recipe_file("mixed"), [str(text)])
    for seed in (0, 1):
        quantize(QuantizeOptions(str(toy()), tmp_path / str(seed), *job, samples=8, seqlen=64, seed=seed))
    assert contents(tmp_path / "0") == contents(first)
    name = "model.layers.0.shared_parts.1.codebook"
    assert not torch.equal(tensors(Artifact(tmp_path / "1"))[name], tensors(Artifact(first))[name])


def test_the_first_rule_that_matches_decides(quantized: Make) -> None:
    methods = {name: entry.method.name for name, entry in Artifact(quantized("mixed")).entries.items()}
    block = {n.removeprefix("model.layers.1."): m for n, m in methods.items() if n.startswith("model.layers.1.")}
    assert block == {
        "self_attn.q_proj": "vq",
        "self_attn.k_proj": "vq",
        "self_attn.v_proj": "vq",
        "mlp.gate_proj": "int8",
        "mlp.up_proj": "int8",
        "mlp.down_proj": "fp8",
    }


@pytest.mark.parametrize(
    ("rules", "named"),
    [
        ("{match: '*.z_proj', method: int8}", "z_proj.*model.layers"),
        ("{match: '*', method: int8}\n  - {match: '*.experts.*', method: fp8}", "experts"),
        ("{match: '*', method: keep}", "recipe"),
    ],
)
def test_a_recipe_that_misses_the_model_is_refused(
    rules: str, named: str, toy: Make, recipe_file: Callable[[str], str], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=named):
        quantize(QuantizeOptions(str(toy()), tmp_path / "out", recipe_file(f"rules:\n  - {rules}\n")))
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_with_nan_is_refused_by_name(toy: Make, recipe_file: Callable[[str], str], tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    for path in toy().iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    damaged = load_file(tmp_path / "model.safetensors")
    damaged[name][3, 4] = float("nan")
    save_file(damaged, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VQCompressError, match=name):
        quantize(QuantizeOptions(str(tmp_path), tmp_path / "out", recipe_file("int8-plain")))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model": "/nowhere/at/all"}, "/nowhere/at/all"),
        ({"samples": 10**6}, "--samples"),
        ({"seqlen": 1000}, "--seqlen"),
        ({"texts": ["/nowhere.txt"]}, "/nowhere.txt"),
        ({"recipe": "vq-2bits"}, "'vq-2bit'"),
        ({"device": "tpu"}, "--device"),
    ],
)
def test_a_wrong_option_is_named(change: dict[str, Any], named: str, toy: Make, text: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"model": str(toy()), "recipe": "vq-2bit", "texts": [str(text)], "seqlen": 64}
    with pytest.raises(VQCompressError, match=named):
        quantize(QuantizeOptions(**{**options, "out": tmp_path / "out", **change}))


def test_an_artifact_cannot_be_quantized_again(quantized: Make, tmp_path: Path) -> None:
    folder = str(quantized())
    with pytest.raises(VQCompressError, match=folder):
        quantize(QuantizeOptions(folder, tmp_path / "out", "fp8-tile"))
