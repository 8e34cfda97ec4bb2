"""Every corruption of an artifact is an error that names what is wrong, in whatever part of it it lies."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vqcompress.artifact import SUMS, Artifact, sha256
from vqcompress.checkpoint import INDEX
from vqcompress.errors import VQCompressError
from vqcompress.evaluate import perplexity
from vqcompress.runtime.load import load
from vqcompress.verify import verify

Make = Callable[..., Path]
CODES = "model.layers.0.self_attn.q_proj.weight_codes"
SCALE = "model.layers.0.self_attn.q_proj.weight_scale"
# What a run says of itself is for people and has no checksum.
UNSEALED = {"report.json", "report.html", "README.md"}


@pytest.fixture
def copy(quantized: Make, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of the toy artifact of a recipe, to be damaged."""

    def make(recipe: str = "int8-plain") -> Path:
        return Path(shutil.copytree(quantized(recipe), tmp_path / "copy"))

    return make


def seal(folder: Path) -> None:
    """Make the checksums right again, so that something else has to notice."""
    names = sorted(p.name for p in folder.iterdir() if p.name not in {SUMS, *UNSEALED})
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
    files = [path for path in sorted(folder.iterdir()) if path.name not in UNSEALED]
    assert len(files) >= 6
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
    ("key", "value"),
    [
        ("model_type", "nonsense"),
        ("model_type", None),
        ("hidden_size", -1),
        ("hidden_size", "wide"),
        ("hidden_size", 96),
        ("hidden_size", 10**12),
        ("vocab_size", 10**15),
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


def test_an_artifact_names_only_what_it_is(toy: Make, tmp_path: Path) -> None:
    with pytest.raises(VQCompressError, match="plain checkpoint"):
        Artifact(toy())
    with pytest.raises(VQCompressError, match=r"config\.json"):
        Artifact(tmp_path)
