"""Every corruption of an artifact is an error that names what is wrong, in whatever part of it it lies."""

from __future__ import annotations

import ast
import json
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
from vqcompress.runtime.load import load
from vqcompress.storage.artifact import REPORTS, SUMS, Artifact, checksum_lines, sha256
from vqcompress.storage.checkpoint import INDEX
from vqcompress.storage.writer import refresh_sums

Make = Callable[..., Path]
CODES = "model.layers.0.self_attn.q_proj.weight_codes"
SCALE = "model.layers.0.self_attn.q_proj.weight_scale"
SMOOTHING = "model.layers.0.mlp.down_proj.weight_smoothing"
STEP = "model.layers.0.shared_parts.0.step"
NORM = "model.layers.1.input_layernorm.weight"
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture
def copy(quantized: Make, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the toy artifact of a recipe, to be damaged."""
    return lambda recipe="int8-plain": Path(shutil.copytree(quantized(recipe), tmp_path / "copy"))


def seal(folder: Path) -> None:
    """Make the checksums right again, so that something else has to notice the damage."""
    (folder / SUMS).write_text(checksum_lines({p.name: sha256(p) for p in folder.iterdir() if p.name != SUMS}))


def shard_of(folder: Path, tensor: str) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][tensor]


def edit_tensor(folder: Path, name: str, change: Callable[[Tensor], Tensor | None]) -> None:
    """Replace a tensor by what `change` makes of it, or remove it; index and checksums fit."""
    file = shard_of(folder, name)
    tensors = load_file(file)
    changed = change(tensors.pop(name))
    save_file(tensors if changed is None else {**tensors, name: changed}, file, metadata={"format": "pt"})
    index = json.loads((folder / INDEX).read_text())
    if changed is None:
        del index["weight_map"][name]
    (folder / INDEX).write_text(json.dumps(index))
    seal(folder)


def edit_json(path: Path, change: Callable[[Any], Any]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    seal(path.parent)


def refusals(folder: Path, text: Path) -> dict[str, str]:
    """The messages of verify, load and eval; any error but a VQCompressError fails the test."""
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


def refused(folder: Path, text: Path, named: str) -> None:
    """Assert that verify, load and eval refuse an artifact and name something."""
    said = refusals(folder, text)
    assert said.keys() == {"verify", "load", "eval"}
    assert all(named in message for message in said.values()), said


def test_a_flipped_bit_in_any_file_is_found_and_named(copy: Make, text: Path) -> None:
    folder, draw = copy(), random.Random(0)
    assert refusals(folder, text) == {}
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        damaged = bytearray(data)
        damaged[draw.randrange(len(data))] ^= 1 << draw.randrange(7)
        path.write_bytes(damaged)
        with pytest.raises(VQCompressError, match="." if path.name == SUMS else re.escape(path.name)):
            verify(str(folder))
        path.write_bytes(data)
    verify(str(folder))


@pytest.mark.slow
def test_every_byte_counts(copy: Make) -> None:
    """A bit of every byte of the text files and headers; of long ones every 97th byte."""
    folder, draw, tried = copy("vq-small"), random.Random(0), 0
    (folder / "recipe.yaml").write_text("rules: [{match: '*', method: int8}]")
    refresh_sums(folder, ["recipe.yaml"])
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        header = 8 + int.from_bytes(data[:8], "little") if path.suffix == ".safetensors" else len(data)
        step = 1 if header < 1200 else 97
        places = {*range(draw.randrange(step), header, step), *(draw.randrange(len(data)) for _ in range(20))}
        with path.open("rb+", buffering=0) as stream:
            for place in sorted(places):
                stream.seek(place)
                stream.write(bytes([data[place] ^ 1 << draw.randrange(8)]))
                # How `verify` begins.
                with pytest.raises(VQCompressError):
                    Artifact(folder).check_files(reports=True)
                stream.seek(place)
                stream.write(data[place : place + 1])
                tried += 1
    assert tried > 2000
    verify(str(folder))


def test_load_and_eval_check_the_files_but_not_the_reports(copy: Make, text: Path) -> None:
    folder = copy()
    (folder / "report.json").write_text("{}")
    (folder / "README.md").unlink()
    assert refusals(folder, text).keys() == {"verify"}
    refresh_sums(folder, REPORTS)
    assert refusals(folder, text) == {}
    file = shard_of(folder, CODES)
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    refused(folder, text, file.name)


@pytest.mark.parametrize("lines", ["", "nonsense\n", f"{'0' * 64}  ../config.json\n", f"{'0' * 64}  config.json\n"])
def test_damaged_checksums_are_named(lines: str, copy: Make, text: Path) -> None:
    folder = copy()
    (folder / SUMS).write_text(lines)
    refused(folder, text, SUMS)


def test_a_cache_of_the_hub_is_links(quantized: Make, tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    snapshot = tmp_path / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    for path in quantized("int8-plain").iterdir():
        shutil.copy(path, tmp_path / "blobs" / sha256(path))
        (snapshot / path.name).symlink_to(Path("../../blobs") / sha256(path))
    verify(str(snapshot))
    load(snapshot)


@pytest.mark.parametrize("left", [0, 100, -1])
def test_a_truncated_shard_is_named(left: int, copy: Make, text: Path) -> None:
    folder = copy()
    file = shard_of(folder, CODES)
    file.write_bytes(file.read_bytes()[:left])
    seal(folder)
    refused(folder, text, file.name)


@pytest.mark.parametrize("name", ["shard", INDEX, SUMS, "config.json", "tokenizer.json"])
def test_a_missing_file_is_named(name: str, copy: Make, text: Path) -> None:
    folder = copy()
    path = shard_of(folder, CODES) if name == "shard" else folder / name
    path.unlink()
    # Without its index a directory has no weights that anybody could miss.
    refused(folder, text, "" if name == INDEX else path.name)


@pytest.mark.parametrize("name", ["config.json", INDEX])
@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe{}", b"null"], ids=repr)
def test_a_file_that_is_not_json_is_named(name: str, data: bytes, copy: Make, text: Path) -> None:
    folder = copy()
    (folder / name).write_bytes(data)
    seal(folder)
    refused(folder, text, name)


@pytest.mark.parametrize("file", ["../model-00002-of-00003.safetensors", "/etc/passwd", "nowhere.safetensors", "", 3])
def test_an_index_that_points_astray_is_named(file: Any, copy: Make, text: Path) -> None:
    folder = copy()
    edit_json(folder / INDEX, lambda index: index["weight_map"].update({CODES: file}))
    refused(folder, text, file if file == "nowhere.safetensors" else str(folder))


@pytest.mark.parametrize(
    ("recipe", "name"),
    [("int8-plain", CODES), ("int8-plain", EMBEDDING), ("int8-plain", NORM), ("vq-small", STEP)],
)
def test_a_missing_tensor_is_named(recipe: str, name: str, copy: Make, text: Path) -> None:
    folder = copy(recipe)
    edit_tensor(folder, name, lambda tensor: None)
    refused(folder, text, name)


@pytest.mark.parametrize("name", [CODES, SCALE, NORM, EMBEDDING])
def test_a_wrong_shape_or_type_is_named(name: str, copy: Make, text: Path) -> None:
    folder = copy()
    edit_tensor(folder, name, lambda tensor: tensor[:-1].contiguous())
    refused(folder, text, name)
    if name in (CODES, SCALE):
        edit_tensor(folder, name, lambda tensor: torch.zeros(len(tensor) + 1, *tensor.shape[1:], dtype=torch.float64))
        refused(folder, text, name)


@pytest.mark.parametrize(
    ("recipe", "name", "values"),
    [
        ("int8-plain", CODES, [-128]),
        ("int8-plain", SCALE, [torch.nan, torch.inf, 0, -1]),
        ("int8-plain", NORM, [torch.inf]),
        ("int8-runtime", SMOOTHING, [torch.nan, 0, -2]),
        ("fp8-tile", CODES, [torch.nan]),
        ("fp8-tile", SCALE, [torch.nan, 0]),
        ("vq-small", SCALE, [torch.nan]),
        ("vq-small", STEP, [torch.nan]),
    ],
)
def test_a_value_out_of_range_is_named(recipe: str, name: str, values: list[float], copy: Make) -> None:
    folder = copy(recipe)
    for value in values:

        def spoil(tensor: Tensor, value: float = value) -> Tensor:
            tensor.reshape(-1)[-1:] = torch.tensor([value]).to(tensor.dtype)
            return tensor

        edit_tensor(folder, name, spoil)
        with pytest.raises(VQCompressError, match=r".*".join(map(re.escape, name.replace(".weight_", " ").split()))):
            verify(str(folder))


def one(config: dict[str, Any]) -> dict[str, Any]:
    """The description of the first target."""
    found: dict[str, Any] = next(iter(config["targets"].values()))
    return found


DAMAGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "another quant_method": lambda q: q.update(quant_method="gptq"),
    "newer format version": lambda q: q.update(format_version=2),
    "no methods": lambda q: q.pop("methods"),
    "a method is null": lambda q: q.update(methods=[None]),
    "unknown method": lambda q: q["methods"][0].update(method="int9"),
    "newer method version": lambda q: q["methods"][0].update(version=99),
    "unknown option": lambda q: q["methods"][0].update(speed="high"),
    "targets is a list": lambda q: q.update(targets=[]),
    "target of another name": lambda q: q["targets"].update({"model.layers.7.self_attn.q_proj": one(q)}),
    "one target left out": lambda q: q["targets"].pop("model.layers.0.self_attn.q_proj"),
    "no shape": lambda q: one(q).pop("shape"),
    "negative shape": lambda q: one(q).update(shape=[-64, 64]),
    "another shape": lambda q: one(q).update(shape=[32, 64]),
    "method beyond the list": lambda q: one(q).update(method=5),
    "bias that is not there": lambda q: one(q).update(bias=True),
    "smoothed that is not": lambda q: one(q).update(smoothed=True),
    "cache of 0 bits": lambda q: q.update(kv_cache={"bits": 0}),
    "cache without its layers": lambda q: q.update(kv_cache={"codebook": "learned"}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_quantization_config_is_refused(damage: str, copy: Make, text: Path) -> None:
    folder = copy()
    edit_json(folder / "config.json", lambda config: DAMAGES[damage](config["quantization_config"]))
    refused(folder, text, "")


def with_options(config: dict[str, Any], target: str, **options: Any) -> None:
    """Give a target a method of its own, as its present one but for some options."""
    entry = config["targets"][target]
    config["methods"].append({**config["methods"][entry["method"]], **options})
    entry["method"] = len(config["methods"]) - 1


PARTS: dict[str, tuple[str, Callable[[dict[str, Any]], Any], str]] = {
    "smoothing that config.json does not name": (
        "int8-runtime", lambda q: [t.update(smoothed=False) for t in q["targets"].values()], "weight_smoothing"
    ),
    "a codebook of another method": (
        "vq-small", lambda q: with_options(q, "model.layers.0.self_attn.q_proj", bits=3), "shared_parts"
    ),
    "codes of another type": ("int8-plain", lambda q: q["methods"][0].update(method="fp8"), "activations"),
    "entries of another size": ("vq-small", lambda q: [m.update(entry_bits=16) for m in q["methods"]], "codebook"),
}  # fmt: skip


@pytest.mark.parametrize("damage", PARTS)
def test_parts_that_a_kernel_would_misread_are_named(damage: str, copy: Make) -> None:
    recipe, change, named = PARTS[damage]
    folder = copy(recipe)
    edit_json(folder / "config.json", lambda config: change(config["quantization_config"]))
    for reader in (load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(VQCompressError, match=named):
            reader(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "nonsense"),
        ("hidden_size", -1),
        ("hidden_size", 96),
        ("num_hidden_layers", 3),
        ("hidden_act", "x"),
    ],
)
def test_a_damaged_model_config_is_refused(key: str, value: Any, copy: Make, text: Path) -> None:
    folder = copy()
    edit_json(folder / "config.json", lambda config: config.update({key: value}))
    refused(folder, text, "")


def test_code_of_a_checkpoint_is_not_run(copy: Make, text: Path) -> None:
    folder = copy()
    (folder / "evil.py").write_text("raise SystemExit('it ran')")
    names = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    edit_json(folder / "config.json", lambda config: config.update(auto_map=names, model_type="unknown"))
    refused(folder, text, "--trust-remote-code")


def test_nothing_unpickles_objects_or_runs_text() -> None:
    modules = {"pickle", "dill", "joblib", "marshal", "shelve"}
    calls = {"torch.save", "eval", "exec", "yaml.load"}
    for file in Path(vqcompress.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in calls, file
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert "allow_pickle" not in given, file
                assert ast.unparse(node.func) != "torch.load" or given["weights_only"] == "True", file
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                assert not modules & {name.split(".")[0] for name in names}, file


def test_an_artifact_names_only_what_it_is(toy: Make, tmp_path: Path) -> None:
    with pytest.raises(VQCompressError, match="quantization_config"):
        Artifact(toy())
    with pytest.raises(VQCompressError, match=r"config\.json"):
        Artifact(tmp_path)
