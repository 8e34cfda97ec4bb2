"""Every corruption of an artifact is an error that names what is wrong, in whatever part of it it lies."""

from __future__ import annotations

import ast
import json
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import vqcompress
from vqcompress.errors import VQCompressError
from vqcompress.evaluate.perplexity import perplexity
from vqcompress.evaluate.verify import verify
from vqcompress.model import weights
from vqcompress.model.weights import load_config, skeleton
from vqcompress.runtime.load import load
from vqcompress.storage.artifact import REPORTS, SUMS, Artifact, cache_settings, sha256
from vqcompress.storage.checkpoint import INDEX, Checkpoint, check_sizes
from vqcompress.storage.writer import refresh_sums

Make = Callable[..., Path]
CODES = "model.layers.0.self_attn.q_proj.weight_codes"
SCALE = "model.layers.0.self_attn.q_proj.weight_scale"


@pytest.fixture
def copy(quantized: Make, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of the toy artifact of a recipe, to be damaged."""

    def make(recipe: str = "int8-plain") -> Path:
        return Path(shutil.copytree(quantized(recipe), tmp_path / "copy"))

    return make


def seal(folder: Path) -> None:
    """Make the checksums right again, so that something else has to notice."""
    names = sorted(p.name for p in folder.iterdir() if p.name != SUMS)
    (folder / SUMS).write_text("".join(f"{sha256(folder / name)}  {name}\n" for name in names))


def shard_of(folder: Path, tensor: str) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][tensor]


def edit_tensors(folder: Path, tensor: str, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change the tensors of the shard that holds one, and make index and checksums fit."""
    file = shard_of(folder, tensor)
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    index = json.loads((folder / INDEX).read_text())
    others = {name: f for name, f in index["weight_map"].items() if f != file.name}
    index["weight_map"] = {**others, **dict.fromkeys(tensors, file.name)}
    (folder / INDEX).write_text(json.dumps(index))
    seal(folder)


def edit_json(path: Path, change: Callable[[Any], Any]) -> None:
    data = json.loads(path.read_text())
    replaced = change(data)
    path.write_text(json.dumps(data if replaced is None else replaced))
    seal(path.parent)


def refusals(folder: Path, text: Path) -> dict[str, str]:
    """What verify, load and eval say; any error but a VQCompressError fails the test."""
    said = {}
    jobs: dict[str, Callable[[], Any]] = {
        "verify": lambda: verify(str(folder)),
        "load": lambda: load(folder),
        "eval": lambda: perplexity(str(folder), str(text), seqlen=16, limit=1),
    }
    for name, job in jobs.items():
        try:
            job()
        except VQCompressError as error:
            said[name] = str(error)
    return said


def test_an_intact_artifact_passes(copy: Callable[..., Path], text: Path) -> None:
    folder = copy()
    seal(folder)
    assert refusals(folder, text) == {}


def test_every_flipped_bit_is_found(copy: Callable[..., Path]) -> None:
    folder, draw = copy(), random.Random(0)
    files = sorted(folder.iterdir())
    for path in files:
        data = path.read_bytes()
        places = {0, len(data) - 1, *(draw.randrange(len(data)) for _ in range(12))}
        for place in sorted(places):
            damaged = bytearray(data)
            damaged[place] ^= 1 << draw.randrange(8)
            path.write_bytes(damaged)
            try:
                verify(str(folder))
            except VQCompressError:
                continue
            pytest.fail(f"{path.name}: nobody noticed that byte {place} was flipped")
        path.write_bytes(data)
    verify(str(folder))


@pytest.mark.slow
def test_every_byte_counts(copy: Callable[..., Path]) -> None:
    """A bit of every byte of the text files and headers; of long ones every few bytes unless there is time for all."""
    folder, draw, tried = copy("vq-small"), random.Random(0), 0
    (folder / "report.html").write_text("<p>A page.</p>")
    (folder / "recipe.yaml").write_text("rules: [{match: '*', method: int8}]")
    refresh_sums(folder, ["report.html", "recipe.yaml"])
    verify(str(folder))
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        header = 8 + int.from_bytes(data[:8], "little") if path.suffix == ".safetensors" else len(data)
        step = 1 if header < 1200 or os.environ.get("VQCOMPRESS_EVERY_BYTE") else 97
        places = {*range(draw.randrange(step), header, step), len(data) - 1}
        places |= {draw.randrange(len(data)) for _ in range(20)}
        with path.open("rb+", buffering=0) as stream:
            for place in sorted(places):
                bit = 1 << draw.randrange(8)
                stream.seek(place)
                stream.write(bytes([data[place] ^ bit]))
                # How `verify` begins.
                with pytest.raises(VQCompressError):
                    Artifact(folder).check_files(reports=True)
                stream.seek(place)
                stream.write(data[place : place + 1])
                tried += 1
    assert tried > 2000
    verify(str(folder))


@pytest.mark.parametrize("name", ["report.json", "README.md", "tokenizer.json", "config.json"])
def test_a_line_that_is_gone_from_the_checksums_is_noticed(name: str, copy: Callable[..., Path]) -> None:
    folder = copy()
    lines = (folder / SUMS).read_text().splitlines(keepends=True)
    (folder / SUMS).write_text("".join(line for line in lines if not line.endswith(f"  {name}\n")))
    with pytest.raises(VQCompressError, match=re.escape(name)):
        verify(str(folder))


@pytest.mark.parametrize(
    "name", ["extra.safetensors", "model.safetensors", "added_tokens.json", "merges.txt", "chat_template.jinja"]
)
def test_a_file_that_was_added_is_named(name: str, copy: Callable[..., Path]) -> None:
    folder = copy()
    (folder / name).write_bytes(shard_of(folder, CODES).read_bytes() if "safetensors" in name else b"{}")
    with pytest.raises(VQCompressError, match=re.escape(name) if name != "model.safetensors" else "."):
        verify(str(folder))


def test_whoever_rewrites_a_report_refreshes_its_checksum(copy: Callable[..., Path], text: Path) -> None:
    folder = copy()
    (folder / "report.json").write_text("{}")
    (folder / "README.md").unlink()
    # What only people read does not keep anybody from loading.
    assert refusals(folder, text).keys() == {"verify"}
    refresh_sums(folder, REPORTS)
    assert refusals(folder, text) == {}
    assert "README.md" not in (folder / SUMS).read_text()


def test_a_cache_of_the_hub_is_links(quantized: Make, tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    snapshot = tmp_path / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    for path in quantized("int8-plain").iterdir():
        shutil.copy(path, tmp_path / "blobs" / sha256(path))
        (snapshot / path.name).symlink_to(Path("../../blobs") / sha256(path))
    verify(str(snapshot))
    load(snapshot)


@pytest.mark.parametrize("where", ["load", "eval"])
def test_load_and_eval_check_the_files_first(where: str, copy: Callable[..., Path], text: Path) -> None:
    folder = copy()
    file = shard_of(folder, CODES)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert file.name in refusals(folder, text)[where]


@pytest.mark.parametrize("sealed", [False, True])
@pytest.mark.parametrize("left", [0, 4, 8, 100, -1])
def test_a_truncated_shard_is_named(left: int, sealed: bool, copy: Callable[..., Path], text: Path) -> None:
    folder = copy()
    file = shard_of(folder, CODES)
    file.write_bytes(file.read_bytes()[:left])
    if sealed:
        seal(folder)
    said = refusals(folder, text)
    assert said.keys() == {"verify", "load", "eval"}
    assert all(file.name in message for message in said.values())


def test_a_header_of_absurd_length_is_named(copy: Callable[..., Path], text: Path) -> None:
    folder = copy()
    file = shard_of(folder, CODES)
    file.write_bytes((2**62).to_bytes(8, "little") + file.read_bytes()[8:])
    seal(folder)
    said = refusals(folder, text)
    assert said.keys() == {"verify", "load", "eval"}
    assert all(file.name in message for message in said.values())


@pytest.mark.parametrize("name", ["shard", INDEX, SUMS, "config.json", "tokenizer.json"])
def test_a_missing_file_is_named(name: str, copy: Callable[..., Path], text: Path) -> None:
    folder = copy()
    path = shard_of(folder, CODES) if name == "shard" else folder / name
    path.unlink()
    said = refusals(folder, text)
    assert said.keys() == {"verify", "load", "eval"}
    # Without its index a directory has no weights that anybody could miss.
    assert all(path.name in message or name == INDEX for message in said.values()), said


@pytest.mark.parametrize(
    "tensor",
    [CODES, SCALE, "model.norm.weight", "model.embed_tokens.weight", "model.layers.1.input_layernorm.weight"],
)
def test_a_missing_tensor_is_named(tensor: str, copy: Callable[..., Path], text: Path) -> None:
    folder = copy()
    edit_tensors(folder, tensor, lambda tensors: tensors.pop(tensor))
    said = refusals(folder, text)
    assert said.keys() == {"verify", "load", "eval"}
    assert all(tensor in message for message in said.values())


@pytest.mark.parametrize("part", ["codebook", "step"])
def test_a_missing_shared_part_is_named(part: str, copy: Callable[..., Path], text: Path) -> None:
    folder = copy("vq-small")
    name = f"model.layers.0.shared_parts.0.{part}"
    edit_tensors(folder, name, lambda tensors: tensors.pop(name))
    said = refusals(folder, text)
    assert said.keys() == {"verify", "load", "eval"}
    assert all(f"shared_parts.0.{part}" in message for message in said.values())


def cut(tensor: Tensor) -> Tensor:
    return tensor[:-1].contiguous()


def unsigned(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8)


@pytest.mark.parametrize(
    ("tensor", "change"),
    [
        (CODES, cut),
        (CODES, unsigned),
        (CODES, Tensor.flatten),
        (SCALE, cut),
        (SCALE, Tensor.double),
        ("model.norm.weight", cut),
        ("model.layers.1.input_layernorm.weight", cut),
        ("model.embed_tokens.weight", cut),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_wrong_shape_or_type_is_named(
    tensor: str, change: Callable[[Tensor], Tensor], copy: Callable[..., Path], text: Path
) -> None:
    folder = copy()
    edit_tensors(folder, tensor, lambda tensors: tensors.update({tensor: change(tensors[tensor])}))
    said = refusals(folder, text)
    assert tensor in said["verify"]
    # A type that converts without a loss may be loaded.
    assert change in (unsigned, Tensor.double) or said.keys() == {"verify", "load", "eval"}


@pytest.mark.parametrize(
    ("recipe", "tensor", "value"),
    [
        ("int8-plain", CODES, -128),
        ("int8-plain", SCALE, float("nan")),
        ("int8-plain", SCALE, float("inf")),
        ("int8-plain", SCALE, 0.0),
        ("int8-plain", SCALE, -1.0),
        ("int8-plain", "model.norm.weight", float("nan")),
        ("int8-plain", "model.layers.1.input_layernorm.weight", float("inf")),
        ("fp8-tile", CODES, float("nan")),
        ("fp8-tile", SCALE, float("nan")),
        ("fp8-tile", SCALE, 0.0),
        ("vq-small", SCALE, float("nan")),
        ("vq-small", "model.layers.1.shared_parts.0.step", float("nan")),
        ("int8-runtime", "model.layers.0.mlp.down_proj.weight_smoothing", 0.0),
        ("int8-runtime", "model.layers.0.mlp.down_proj.weight_smoothing", float("nan")),
        ("int8-runtime", "model.layers.0.mlp.down_proj.weight_smoothing", -2.0),
    ],
)
def test_a_value_out_of_range_is_named(
    recipe: str, tensor: str, value: float, copy: Callable[..., Path], text: Path
) -> None:
    folder = copy(recipe)

    def spoil(tensors: dict[str, Tensor]) -> None:
        whole = tensors[tensor]
        whole.reshape(-1)[-1:] = torch.tensor([value]).to(whole.dtype)

    edit_tensors(folder, tensor, spoil)
    said = refusals(folder, text)["verify"]
    weight, _, part = tensor.rpartition("weight_")
    assert tensor in said or (weight.removesuffix(".") in said and part in said)


@pytest.mark.parametrize(
    ("change", "said_of"),
    [
        (lambda i: i["weight_map"].update({CODES: "../model-00002-of-00003.safetensors"}), "outside"),
        (lambda i: i["weight_map"].update({CODES: "/etc/passwd"}), "outside"),
        (lambda i: i["weight_map"].update({CODES: "sub/model.safetensors"}), "outside"),
        (lambda i: i["weight_map"].update({CODES: "nowhere.safetensors"}), "nowhere.safetensors"),
        (lambda i: i["weight_map"].update({CODES: ""}), INDEX),
        (lambda i: i["weight_map"].update({CODES: "."}), INDEX),
        (lambda i: i["weight_map"].update({CODES: 3}), INDEX),
        (lambda i: i.pop("weight_map"), INDEX),
        (lambda i: i.update(weight_map=[]), INDEX),
        (lambda i: [], INDEX),
    ],
    ids=["up", "absolute", "below", "missing", "empty", "dot", "number", "none", "list", "no-object"],
)
def test_an_index_that_points_astray_is_named(
    change: Callable[[Any], Any], said_of: str, copy: Callable[..., Path], text: Path
) -> None:
    folder = copy()
    edit_json(folder / INDEX, lambda index: [] if change(index) == [] else None)
    said = refusals(folder, text)
    assert said.keys() == {"verify", "load", "eval"}
    assert all(said_of in message for message in said.values()), said


@pytest.mark.parametrize("name", ["config.json", INDEX])
@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe{}", b"[" * 100_000, b"null", b"3"], ids=repr)
def test_a_file_that_is_not_json_is_named(name: str, data: bytes, copy: Callable[..., Path], text: Path) -> None:
    folder = copy()
    (folder / name).write_bytes(data)
    seal(folder)
    said = refusals(folder, text)
    assert said.keys() == {"verify", "load", "eval"}
    assert all(name in message for message in said.values()), said


@pytest.mark.parametrize("line", ["", "nonsense\n", f"{'0' * 64}  ../config.json\n", f"{'0' * 64}  config.json\n"])
def test_damaged_checksums_are_named(line: str, copy: Callable[..., Path], text: Path) -> None:
    folder = copy()
    (folder / SUMS).write_text(line)
    said = refusals(folder, text)
    assert said.keys() == {"verify", "load", "eval"}
    assert all(SUMS in message for message in said.values())


def target(config: dict[str, Any]) -> dict[str, Any]:
    return next(iter(config["targets"].values()))


def rename(config: dict[str, Any], name: str) -> None:
    config["targets"] = {name if i == 0 else old: t for i, (old, t) in enumerate(config["targets"].items())}


DAMAGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no quant_method": lambda q: q.pop("quant_method"),
    "another quant_method": lambda q: q.update(quant_method="gptq"),
    "no format version": lambda q: q.pop("format_version"),
    "newer format version": lambda q: q.update(format_version=2),
    "format version as text": lambda q: q.update(format_version="1"),
    "no methods": lambda q: q.pop("methods"),
    "empty methods": lambda q: q.update(methods=[]),
    "methods is an object": lambda q: q.update(methods={}),
    "a method is null": lambda q: q.update(methods=[None]),
    "a method is text": lambda q: q.update(methods=["int8"]),
    "unknown method": lambda q: q["methods"][0].update(method="int9"),
    "method is a list": lambda q: q["methods"][0].update(method=[]),
    "newer method version": lambda q: q["methods"][0].update(version=99),
    "no method version": lambda q: q["methods"][0].pop("version"),
    "unknown knob": lambda q: q["methods"][0].update(speed="high"),
    "knob out of range": lambda q: q["methods"][0].update(activations="per_moon"),
    "no targets": lambda q: q.pop("targets"),
    "targets is null": lambda q: q.update(targets=None),
    "targets is a list": lambda q: q.update(targets=[]),
    "empty targets": lambda q: q.update(targets={}),
    "a target is null": lambda q: q["targets"].update({"model.layers.0.self_attn.q_proj": None}),
    "target of another name": lambda q: rename(q, "model.layers.0.self_attn.z_proj"),
    "target in a layer too many": lambda q: rename(q, "model.layers.7.self_attn.q_proj"),
    "target is a norm": lambda q: rename(q, "model.norm"),
    "target without a name": lambda q: rename(q, ""),
    "one target left out": lambda q: q["targets"].pop("model.layers.0.self_attn.q_proj"),
    "no shape": lambda q: target(q).pop("shape"),
    "shape of one number": lambda q: target(q).update(shape=[64]),
    "shape of text": lambda q: target(q).update(shape=["64", "64"]),
    "shape with zero": lambda q: target(q).update(shape=[0, 64]),
    "negative shape": lambda q: target(q).update(shape=[-64, 64]),
    "another shape": lambda q: target(q).update(shape=[32, 64]),
    "shape of bools": lambda q: target(q).update(shape=[True, True]),
    "huge shape": lambda q: target(q).update(shape=[2**31 - 1, 2**31 - 1]),
    "absurd shape": lambda q: target(q).update(shape=[10**30, 10**30]),
    "method beyond the list": lambda q: target(q).update(method=5),
    "method counted from behind": lambda q: target(q).update(method=-1),
    "method is text": lambda q: target(q).update(method="0"),
    "bias that is not there": lambda q: target(q).update(bias=True),
    "bias is text": lambda q: target(q).update(bias="false"),
    "smoothed that is not": lambda q: target(q).update(smoothed=True),
    "shared that is not": lambda q: target(q).update(shared="model.layers.0.shared_parts.0"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_quantization_config_is_a_named_error(damage: str, copy: Callable[..., Path], text: Path) -> None:
    folder = copy()
    edit_json(folder / "config.json", lambda config: DAMAGES[damage](config["quantization_config"]) and None)
    said = refusals(folder, text)
    assert said.keys() == {"verify", "load", "eval"}


def knob(config: dict[str, Any], target: str, **knobs: Any) -> None:
    """Give a target a method of its own, as its present one but for some knobs."""
    entry = config["targets"][target]
    config["methods"].append({**config["methods"][entry["method"]], **knobs})
    entry["method"] = len(config["methods"]) - 1


PARTS: dict[str, tuple[str, Callable[[dict[str, Any]], Any], str]] = {
    "smoothing that config.json does not name": (
        "int8-runtime", lambda q: [t.update(smoothed=False) for t in q["targets"].values()], "what for"
    ),
    "a codebook of another method": (
        "vq-small", lambda q: knob(q, "model.layers.0.self_attn.q_proj", bits=3), "another method shares"
    ),
    "codes of another type": ("int8-plain", lambda q: q["methods"][0].update(method="fp8"), "activations|stores"),
    "numbers of another size": (
        "vq-small", lambda q: [m.update(entry_bits=16) for m in q["methods"]], "codebook.*stores"
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", PARTS)
@pytest.mark.parametrize("adapter", [False, True])
def test_parts_that_a_kernel_would_misread_are_named(damage: str, adapter: bool, copy: Callable[..., Path]) -> None:
    recipe, change, said = PARTS[damage]
    folder = copy(recipe)
    edit_json(folder / "config.json", lambda config: change(config["quantization_config"]) and None)
    with pytest.raises(VQCompressError, match=said):
        AutoModelForCausalLM.from_pretrained(folder) if adapter else load(folder)


@pytest.mark.parametrize(
    "shared", ["", ".", "../x", "model.nowhere.shared_parts.0", "model.layers.1.shared_parts.7", 3]
)
def test_a_damaged_path_of_shared_parts_is_a_named_error(shared: Any, copy: Callable[..., Path], text: Path) -> None:
    folder = copy("vq-small")

    def change(config: dict[str, Any]) -> None:
        target(config["quantization_config"])["shared"] = shared

    edit_json(folder / "config.json", change)
    assert refusals(folder, text).keys() == {"verify", "load", "eval"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"targets": {}}, "is damaged: it names no target"),
        ({"targets": {"a": {}}}, "is damaged: it has no 'method'"),
        ({"kv_cache": {"bits": 0}}, "is damaged: cache: bits=0 is not valid: Input should be 1, 2, 4 or 8"),
        ({"kv_cache": {"bits": 8}}, "is damaged: cache bits=8: fp8 has 8 bits"),
    ],
)
def test_damage_is_told_in_words(change: dict[str, Any], said: str, copy: Callable[..., Path]) -> None:
    folder = copy()
    edit_json(folder / "config.json", lambda config: config["quantization_config"].update(change))
    with pytest.raises(VQCompressError) as raised:
        Artifact(folder)
    assert said in str(raised.value)
    assert not re.search(r"Error|pydantic", str(raised.value))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "nonsense"),
        ("model_type", None),
        ("hidden_size", -1),
        ("hidden_size", "wide"),
        ("hidden_size", 96),
        ("hidden_size", 10**12),
        ("vocab_size", 10**15),
        ("num_hidden_layers", 10**7),
        ("head_dim", 10**9),
        ("max_position_embeddings", 10**12),
        ("layer_types", ["full_attention"] * 3),
        ("num_hidden_layers", 1),
        ("num_hidden_layers", 3),
        ("num_hidden_layers", -1),
        ("num_attention_heads", 0),
        ("hidden_act", "nonsense"),
        ("quantization_config", []),
    ],
)
def test_a_damaged_model_config_is_a_named_error(key: str, value: Any, copy: Callable[..., Path], text: Path) -> None:
    folder = copy()
    edit_json(folder / "config.json", lambda config: config.update({key: value}))
    assert refusals(folder, text).keys() == {"verify", "load", "eval"}


@pytest.mark.parametrize(
    "value",
    [3, [], {"codebook": "learned"}, {"bits": 0}, {"window": 10**12}, {"keys": {}}, {"before": 3}, {"more": 1}],
    ids=str,
)
def test_a_damaged_cache_config_is_a_named_error(value: Any, copy: Callable[..., Path], text: Path) -> None:
    folder = copy()
    edit_json(folder / "config.json", lambda config: config["quantization_config"].update(kv_cache=value))
    assert refusals(folder, text).keys() == {"verify", "load", "eval"}


def test_codebooks_mean_nothing_without_the_layers_they_were_learned_before() -> None:
    config = {"quantization_config": {"kv_cache": {"codebook": "learned", "bits": 4}}}
    with pytest.raises(VQCompressError, match="the kv_cache of here is damaged: before is None"):
        cache_settings(config, "here")


def test_sizes_of_known_models_pass() -> None:
    # Doge has an embedding for each expert; DeepSeek-V3 as its authors' code has it, three modules for each.
    check_sizes({"num_experts": 16384, "num_hidden_layers": 8}, "here", tensors=100, numbers=10**6)
    # Modules are made for these before they are found to be too many.
    with pytest.raises(VQCompressError, match="num_experts is 1000000"):
        check_sizes({"num_experts": 10**6}, "here", tensors=100, numbers=10**9)
    assert weights.MAX_PARAMETERS > 2 * 58 * 256 * 3


def test_a_model_of_endless_parameters_is_refused(toy: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "MAX_PARAMETERS", 300)
    config = load_config(toy())
    config.num_hidden_layers = 10**6
    config.layer_types = None
    with pytest.raises(VQCompressError, match="parameters"):
        skeleton(config, torch.float32)


def test_code_of_a_checkpoint_is_not_run(copy: Callable[..., Path], text: Path) -> None:
    folder = copy()
    (folder / "evil.py").write_text("raise SystemExit('it ran')")
    names = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    edit_json(folder / "config.json", lambda config: config.update(auto_map=names, model_type="unknown"))
    assert refusals(folder, text).keys() == {"verify", "load", "eval"}


def test_pickles_are_refused(toy: Make, tmp_path: Path) -> None:
    shutil.copy(toy() / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(VQCompressError, match="pickle") as refused:
        Checkpoint(tmp_path)
    assert "\n" not in str(refused.value)


def test_nothing_reads_pickles_or_runs_text() -> None:
    forbidden = {
        "pickle",
        "dill",
        "joblib",
        "marshal",
        "shelve",
        "torch.load",
        "torch.save",
        "eval",
        "exec",
        "yaml.load",
    }
    found = set()
    for file in Path(vqcompress.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                found |= {(file.name, ast.unparse(node.func))} if ast.unparse(node.func) in forbidden else set()
                found |= {(file.name, k.arg) for k in node.keywords if k.arg == "allow_pickle"}
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [a.name for a in node.names] + [getattr(node, "module", None) or ""]
                found |= {(file.name, name) for name in names if name.split(".")[0] in forbidden}
    # A loader of its own, which is PyYAML's safe one without aliases.
    assert found == {("recipe.py", "yaml.load")}


def test_an_artifact_names_only_what_it_is(toy: Make, tmp_path: Path) -> None:
    with pytest.raises(VQCompressError, match="plain checkpoint"):
        Artifact(toy())
    with pytest.raises(VQCompressError, match=r"config\.json"):
        Artifact(tmp_path)


def test_architectures_are_names(toy: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copytree(toy(), tmp_path / "copy")
    config = json.loads((tmp_path / "copy" / "config.json").read_text())
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config | {"architectures": [3]}))
    with pytest.raises(VQCompressError, match=r"architectures \[3\] are no names"):
        load_config(tmp_path / "copy")
