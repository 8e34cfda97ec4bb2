"""Quantize from end to end: what lies on disk, what the report says of it, and that neither depends on luck."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vqcompress.errors import UsageError, VQCompressError
from vqcompress.evaluate.inspect import inspect
from vqcompress.evaluate.verify import verify
from vqcompress.pipeline.quantize import QuantizeOptions, quantize
from vqcompress.storage.artifact import HINT, SUMS, Artifact
from vqcompress.storage.checkpoint import INDEX, Checkpoint

Make = Callable[..., Path]
# What holds times, and the checksums of that.
TIMED = {"report.json", "report.html", "README.md", SUMS}
CASES = [
    *(("llama", recipe) for recipe in ("smoothquant-int8", "fp8-tile", "vq-2bit", "vq-3bit", "vq-4bit", "mixed")),
    *((family, recipe) for family in ("opt", "gemma", "gpt_neox", "qwen3") for recipe in ("int8-plain", "vq-small")),
    ("mixtral", "smoothquant-int8"),
    ("mixtral", "vq-small"),
    ("qwen3_moe", "mixed"),
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
    """A target's name as its checkpoint has it, which only for mixtral is another."""
    return name.replace(".mlp.experts.", ".block_sparse_moe.experts.") if ".w" in name else name


def parts_on_disk(artifact: Artifact) -> set[str]:
    """The names of everything stored in place of compressed weights, found without asking the writer."""
    weights = tuple(f"{spelled(name)}.weight_" for name in artifact.entries)
    return {n for n in artifact.tensors if n.startswith(weights) or ".shared_parts." in n}


@every_case
def test_the_artifact_is_sound_and_in_hugging_face_layout(family: str, recipe: str, quantized: Make, toy: Make) -> None:
    folder, source = quantized(recipe, family), Checkpoint(toy(family))
    verify(str(folder))
    names = {path.name for path in folder.iterdir()}
    blocks = len({name.split(".layers.")[1].split(".")[0] for name in source.tensors if ".layers." in name})
    shards = {f"model-{i:05d}-of-{blocks + 1:05d}.safetensors" for i in range(1, blocks + 2)}
    expected = {"config.json", INDEX, SUMS, *TIMED, "generation_config.json"} | shards
    assert names == expected | {"tokenizer.json", "tokenizer_config.json"}
    index = json.loads((folder / INDEX).read_text())
    assert set(index["weight_map"].values()) == shards
    config = json.loads((folder / "config.json").read_text())
    quantization = config.pop("quantization_config")
    assert config == source.config
    assert quantization["quant_method"] == "vqcompress"


@every_case
def test_what_is_not_compressed_keeps_its_name_and_its_bytes(
    family: str, recipe: str, quantized: Make, toy: Make
) -> None:
    artifact, source = Artifact(quantized(recipe, family)), Checkpoint(toy(family))
    compressed = {f"{spelled(name)}.weight" for name in artifact.entries}
    kept = source.tensors.keys() - compressed
    marker = f"{next(iter(artifact.entries))}.weight"
    assert artifact.tensors.keys() - parts_on_disk(artifact) == kept | {marker, HINT}
    before, after = tensors(source), tensors(artifact)
    # Smoothing folds into norms; a router reads what they give.
    folded = ("norm", "mlp.gate.weight", "block_sparse_moe.gate.weight")
    untouched = {n for n in kept if not any(part in n for part in folded)}
    untouched = untouched if recipe in ("smoothquant-int8", "mixed") else kept
    assert all(raw(before[name]) == raw(after[name]) for name in untouched)
    assert all(before[name].dtype == after[name].dtype for name in kept)


@every_case
def test_checksums_are_as_sha256sum_reads_them(family: str, recipe: str, quantized: Make) -> None:
    folder = quantized(recipe, family)
    lines = (folder / SUMS).read_text().splitlines()
    listed = dict(reversed(line.split("  ", 1)) for line in lines)
    assert listed.keys() == {path.name for path in folder.iterdir()} - {SUMS}
    assert all(hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest for name, digest in listed.items())


@every_case
def test_bits_per_weight_are_the_bits_on_disk(family: str, recipe: str, quantized: Make) -> None:
    folder = quantized(recipe, family)
    artifact, report = Artifact(folder), report_of(folder)
    bits = sum(8 * artifact.tensors[name].bytes for name in parts_on_disk(artifact))
    weights = sum(entry.target.weights for entry in artifact.entries.values())
    assert report["weights_quantized"] == weights
    assert report["bits_per_weight"] == pytest.approx(bits / weights, rel=1e-12)
    per_target = sum(t["bits_per_weight"] * t["shape"][0] * t["shape"][1] for t in report["targets"])
    assert per_target == pytest.approx(bits, rel=1e-12)


COUNTED = """rules:
  - {match: '*.q_proj', method: vq, d: 2, bits: 4, iterations: 2, codebook_updates: 0}
  - {match: '*.k_proj', method: vq, d: 2, bits: 4, iterations: 2, codebook_updates: 0}
  - {match: '*.v_proj', method: vq, d: 2, bits: 3, iterations: 2, codebook_updates: 0, scope: target}
  - {match: '*.o_proj', method: vq, codebook: trellis, state_bits: 8}
  - {match: '*.down_proj', method: int8}
  - {match: '*', method: vq, codebook: trellis, state_bits: 8}
"""


def test_uses_of_entries_are_counted_where_a_codebook_lies(quantized: Make) -> None:
    folder = quantized(COUNTED)
    artifact, report = Artifact(folder), report_of(folder)
    books = report["codebooks"]
    blocks = list(report["blocks"])[1:]
    for block in blocks:
        shared, own = f"{block}.shared_parts.0", f"{block}.self_attn.v_proj"
        assert {place for place in books if place.startswith(f"{block}.")} == {shared, own}
        for place, members, d in ((shared, ("q_proj", "k_proj"), 2),):
            weights = sum(e.target.weights for name, e in artifact.entries.items() if name.endswith(members))
            (counts,) = books[place]["counts"]
            assert len(counts) == books[place]["entries"]
            assert sum(counts) == weights / len(blocks) / d
            assert books[place]["hottest"][2] == pytest.approx(sum(counts[: len(counts) // 2]) / sum(counts), abs=1e-4)
        assert books[own].keys() == {"entries", "hottest"}
        assert books[own]["entries"] == 8
    assert all(0 < a <= b <= c <= 1 for a, b, c in (book["hottest"] for book in books.values()))
    assert inspect(str(folder))["codebooks"] == books


@every_case
def test_the_report_has_its_stable_keys(family: str, recipe: str, quantized: Make, toy: Make) -> None:
    folder = quantized(recipe, family)
    report = report_of(folder)
    assert report.keys() >= {
        "recipe", "model", "seed", "bits_per_weight", "weights_quantized", "source_bytes", "artifact_bytes",
        "seconds", "peak_rss_bytes", "peak_device_bytes", "targets",
    }  # fmt: skip
    assert [t["name"] for t in report["targets"]] == list(Artifact(folder).entries)
    for target in report["targets"]:
        assert target.keys() >= {
            "name", "method", "shape", "bits_per_weight", "relative_error", "proxy_error", "tokens",
            "seconds",
        }  # fmt: skip
        assert 0 < target["relative_error"] < 0.5
    assert report["source_bytes"] == Checkpoint(toy(family)).bytes
    on_disk = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert on_disk == pytest.approx(report["artifact_bytes"], rel=0.01)


def contents(folder: Path, skip: set[str] = TIMED) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in skip}


@pytest.mark.parametrize("recipe", ["smoothquant-int8", "fp8-tile", "vq-small", "mixed"])
def test_the_same_seed_gives_the_same_bytes(
    recipe: str, quantized: Make, toy: Make, recipe_file: Callable[[str], str], text: Path, tmp_path: Path
) -> None:
    quantize(QuantizeOptions(str(toy()), tmp_path / "out", recipe_file(recipe), [str(text)], samples=8, seqlen=64))
    assert contents(tmp_path / "out") == contents(quantized(recipe))


def test_another_seed_gives_other_codebooks(quantized: Make) -> None:
    first, second = (tensors(Artifact(quantized("vq-small", seed=seed))) for seed in (0, 1))
    name = "model.layers.0.shared_parts.0.codebook"
    assert not torch.equal(first[name], second[name])


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
    ("rules", "said"),
    [
        (
            "{match: '*.z_proj', method: int8}",
            r"z_proj.*model\.layers\.[*]",
        ),
        ("{match: '*', method: int8}\n  - {match: '*.experts.*', method: fp8}", "experts"),
        ("{match: '*', method: keep}", "compresses nothing"),
    ],
)
def test_a_recipe_that_misses_the_model_is_refused(
    rules: str, said: str, toy: Make, recipe_file: Callable[[str], str], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=said):
        quantize(QuantizeOptions(str(toy()), tmp_path / "out", recipe_file(f"rules:\n  - {rules}\n")))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("tied", [False, True])
def test_tied_and_untied_embeddings(tied: bool, quantized: Make, toy: Make) -> None:
    folder = quantized("int8-plain", "llama", tie_word_embeddings=tied)
    verify(str(folder))
    assert ("lm_head.weight" in Artifact(folder).tensors) != tied


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_checkpoint_with_nan_is_refused_by_name(
    value: float, toy: Make, recipe_file: Callable[[str], str], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    name = "model.layers.1.mlp.up_proj.weight"
    for path in toy().iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    damaged = load_file(tmp_path / "model.safetensors")
    damaged[name][3, 4] = value
    save_file(damaged, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VQCompressError, match=name):
        quantize(QuantizeOptions(str(tmp_path), tmp_path / "out", recipe_file("int8-plain")))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": "/nowhere/at/all"}, "no such directory"),
        ({"samples": 10**6}, "too short"),
        ({"samples": 0}, "at least"),
        ({"seqlen": 1}, "at least"),
        ({"texts": ["/nowhere.txt"]}, "no such text file"),
        ({"recipe": "vq-2bits"}, "Did you mean 'vq-2bit'"),
        ({"device": "tpu"}, "--device"),
    ],
)
def test_wrong_arguments_are_named_errors(
    change: dict[str, Any], said: str, toy: Make, text: Path, tmp_path: Path
) -> None:
    arguments: dict[str, Any] = {"model": str(toy()), "recipe": "vq-2bit", "texts": [str(text)], "seqlen": 64}
    with pytest.raises(VQCompressError, match=said):
        quantize(QuantizeOptions(**{**arguments, "out": tmp_path / "out", **change}))


def test_an_artifact_cannot_be_quantized_again(quantized: Make, tmp_path: Path) -> None:
    with pytest.raises(VQCompressError, match="artifact already"):
        quantize(QuantizeOptions(str(quantized()), tmp_path / "out", "fp8-tile"))


MEASURE = """
import sys
from pathlib import Path
from vqcompress.pipeline.quantize import QuantizeOptions, quantize
model, out, recipe, text = sys.argv[1:]
quantize(QuantizeOptions(model, Path(out), recipe, [text], samples=8, seqlen=64))
# Not ru_maxrss, in which Linux counts the process that started this one.
status = Path("/proc/self/status").read_text()
print(int(status.split("VmHWM:")[1].split()[0]) * 1024)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_layers(
    toy: Make, recipe_file: Callable[[str], str], text: Path, tmp_path: Path
) -> None:
    recipe = recipe_file("rules:\n  - {match: '*', method: int8, smoothing: {alpha: 0.5}}\n")
    peaks, sizes = [], []
    for layers in (4, 24):
        model = toy("llama", layers=layers, hidden=256)
        arguments = [str(model), str(tmp_path / str(layers)), recipe, str(text)]
        # Else glibc keeps what was freed, in pieces, and its peak measures that.
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
        command = [sys.executable, "-c", MEASURE, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-2000:]
        peaks.append(int(done.stdout.split()[-1]))
        sizes.append(Checkpoint(model).bytes)
    assert peaks[1] - peaks[0] < 0.25 * (sizes[1] - sizes[0]), (peaks, sizes)
