"""Checkpoints as people have them: files beside the weights, pickled weights, and halves of a download."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import call, line
from safetensors.torch import load_file, save_file
from toys import rewritten
from transformers import AutoModelForCausalLM

from vqcompress.errors import VQCompressError
from vqcompress.evaluate.perplexity import perplexity
from vqcompress.runtime.load import load
from vqcompress.storage.artifact import Artifact, read_sums
from vqcompress.storage.checkpoint import INDEX, Checkpoint

Make = Callable[..., Path]
FP8 = ["--recipe", "fp8-tile", "--device", "cpu"]
SINGLE, BIN = "model.safetensors", "pytorch_model.bin"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
PAGE = "<!DOCTYPE html><html>404</html>"


@pytest.fixture
def copy(toy: Make, tmp_path: Path) -> Path:
    """A copy of a toy checkpoint, to be changed."""
    return Path(shutil.copytree(toy(), tmp_path / "copy"))


def shards(folder: Path, kind: str = "safetensors", index: bool = True) -> list[str]:
    """Split the weights of a checkpoint into three shards; their names."""
    tensors = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    stem = "model" if kind == "safetensors" else "pytorch_model"
    names = [f"{stem}-{i:05d}-of-00003.{kind}" for i in (1, 2, 3)]
    for i, name in enumerate(names):
        part = {key: tensor for k, (key, tensor) in enumerate(sorted(tensors.items())) if k % 3 == i}
        torch.save(part, folder / name) if kind == "bin" else save_file(part, folder / name, {"format": "pt"})
    weight_map = {key: names[k % 3] for k, key in enumerate(sorted(tensors))}
    if index:
        (folder / f"{stem}.{kind}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return names


def test_every_file_that_is_no_weight_is_taken_along(copy: Path, tmp_path: Path) -> None:
    taken = {
        "tiktoken.model", "tekken.json", "qwen.tiktoken", "modules.json", "1_Pooling/config.json", "params.json",
        "additional_chat_templates/tool_use.jinja", "code/odd.py", "code/deep/er.py", "picture.png", "LICENSE",
        "preprocessor_config.json", "a name with spaces.txt", "1_Pooling/README.md",
    }  # fmt: skip
    left = {
        "README.md", "flax_model.msgpack", "onnx/model.onnx", "gguf/toy.Q4.GGUF", "original/consolidated.00.pth",
        "quantize_config.json", "adapter_model.bin", "model.fp16.safetensors", "tf_model.h5", "line\nbreak.txt",
    }  # fmt: skip
    hidden = {".git/config", ".cache/huggingface/x.metadata", "code/__pycache__/odd.pyc", "a.incomplete"}
    for name in taken | left | hidden:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_text(f"of {name}")
    other = shutil.copytree(copy, tmp_path / "other", ignore=lambda *_: taken | left) and tmp_path / "other"
    shutil.copytree(other, copy / "checkpoint-5")
    out, dense = tmp_path / "out", tmp_path / "dense"
    done = call("quantize", copy, "-o", out, *FP8)
    assert done.exit_code == 0, done.stderr
    assert set(json.loads((out / "report.json").read_text())["left_out"]) == left | {"checkpoint-5"}
    assert "flax_model.msgpack" in done.stdout
    assert call("export", out, "--format", "dense", "-o", dense).exit_code == 0
    for folder in (out, dense):
        files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
        assert taken <= files
        assert not (left | hidden) - {"README.md"} & files
        assert all((folder / name).read_bytes() == (copy / name).read_bytes() for name in taken)
    assert taken <= read_sums(out).keys()
    assert call("verify", out).exit_code == 0
    # --overwrite takes away what it had written, and nothing else.
    for folder, again in ((out, ["quantize", copy, *FP8]), (dense, ["export", out, "--format", "dense"])):
        shutil.rmtree(copy / "code", ignore_errors=True)
        (folder / "code" / "mine.txt").write_text("mine")
        assert call(*again, "-o", folder, "--overwrite").exit_code == 0
        assert [p.name for p in (folder / "code").rglob("*") if p.is_file()] == ["mine.txt"]
        assert (folder / "1_Pooling" / "config.json").is_file()
    (out / "1_Pooling" / "config.json").write_text("changed")
    assert "1_Pooling/config.json" in line(call("verify", out))


@pytest.mark.parametrize("sharded", [False, True])
def test_pickled_weights_are_read_as_safetensors_are(sharded: bool, copy: Path, toy: Make, text: Path) -> None:
    tensors = load_file(copy / SINGLE)
    before = Checkpoint(toy())
    # A view of another tensor, and one whose rows are not in order.
    tensors["model.norm.weight"] = torch.stack([tensors["model.norm.weight"]] * 2)[1]
    tensors["lm_head.weight"] = tensors["lm_head.weight"].T.contiguous().T
    if sharded:
        shards(copy, "bin")
    else:
        torch.save(tensors, copy / BIN)
        (copy / SINGLE).unlink()
    after = Checkpoint(copy)
    assert after.fingerprint() == before.fingerprint()
    assert {n: after.digest([n]) for n in after.tensors} == {n: before.digest([n]) for n in before.tensors}
    read = after.read(after.tensors)
    assert all(torch.equal(read[n], t) for n, t in before.read(before.tensors).items())
    ours, theirs = load(copy, "cpu"), AutoModelForCausalLM.from_pretrained(copy)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    figures = [perplexity(str(folder), str(text), seqlen=64, limit=2)["perplexity"] for folder in (copy, toy())]
    assert figures[0] == figures[1]
    # Safetensors are preferred.
    (copy / SINGLE).write_bytes((toy() / SINGLE).read_bytes())
    assert {info.file for info in Checkpoint(copy).tensors.values()} == {SINGLE}


Q, NORM = "model.layers.1.self_attn.q_proj.weight", "model.norm.weight"
ONE = torch.ones(1, 1)
ENDS = ("model.embed_tokens.weight", "lm_head.weight")


def packed(tensors: dict[str, Any], name: str, part: str) -> None:
    """A weight in place of which another tool has stored something else."""
    tensors[f"{name.removesuffix('weight')}{part}"] = tensors.pop(name).to(torch.int8)


def renamed(tensors: dict[str, Any], prefix: str) -> None:
    for name in list(tensors):
        tensors[prefix + name] = tensors.pop(name)


# What makes of a dense checkpoint another one, and the tensor to name.
OTHERS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "fp8": (lambda t: t.update({Q: t[Q].to(torch.float8_e4m3fn)}), Q),
    "fp8 with scales": (lambda t: t.update({Q: t[Q].to(torch.float8_e4m3fn), f"{Q}_scale": ONE}), Q),
    "scales alone": (lambda t: t.update({f"{Q}_scale_inv": ONE}), f"{Q}_scale_inv"),
    "int8": (lambda t: t.update({Q: t[Q].to(torch.int8)}), Q),
    "head": (lambda t: t.update({"lm_head.weight_scale": ONE}), "lm_head.weight_scale"),
    "gptq": (lambda t: packed(t, Q, "qweight"), "GPTQ"),
    "packed": (lambda t: packed(t, Q, "weight_packed"), Q),
    "bitsandbytes": (lambda t: t.update({f"{Q}.absmax": ONE}), f"{Q}.absmax: compressed by bitsandbytes"),
    "bitsandbytes in 4 bits": (lambda t: t.update({Q: torch.ones(2048, 1).byte(), f"{Q}.absmax": ONE}), "bitsandbytes"),
    "mlx": (lambda t: t.update({Q: t[Q][:, :8].int(), Q.replace("weight", "biases"): ONE}), "MLX"),
    "eagle": (lambda t: t.pop("model.embed_tokens.weight") is t.update({"fc.weight": ONE}), "fc.weight: a draft head"),
    "medusa": (lambda t: t.clear() or t.update({"0.0.linear.weight": ONE}), "0.0.linear.weight: a draft head"),
    "reward": (lambda t: t.update({"score.weight": t.pop("lm_head.weight")}), "score.weight: a classifier"),
    "no head": (lambda t: t.pop("lm_head.weight"), '"tie_word_embeddings": true'),
    "more tokens": (lambda t: t.update({name: torch.ones(400, 64) for name in ENDS}), '"vocab_size": 400'),
    "another width": (lambda t: t.update({Q: t[Q][:8].clone()}), f"{Q} has the shape (8, 64)"),
    "lora": (lambda t: t.update({Q.replace("weight", "lora_A.default.weight"): ONE}), "q_proj.lora_A"),
    "bias": (lambda t: t.update({Q.replace("weight", "bias"): torch.ones(64)}), "q_proj.bias"),
    "norm": (lambda t: t.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(16)}), "q_norm"),
    "peft": (lambda t: renamed(t, "base_model.model."), "base_model.model.model."),
    "compiled": (lambda t: renamed(t, "_orig_mod."), "_orig_mod.model."),
    "parallel": (lambda t: renamed(t, "module."), "module.model."),
    "an embedding left out": (lambda t: t.pop("model.embed_tokens.weight"), "model.embed_tokens.weight"),
    "a norm left out": (lambda t: t.pop("model.norm.weight"), "model.norm.weight"),
    "a weight left out": (lambda t: t.pop(Q), Q),
}


@pytest.mark.parametrize("other", OTHERS)
def test_what_is_not_the_dense_model_is_named(other: str, toy: Make, text: Path, tmp_path: Path) -> None:
    change, named = OTHERS[other]
    folder, out = rewritten(toy(), tmp_path / "copy", change), tmp_path / "out"
    jobs: list[list[Any]] = [["quantize", folder, "-o", out, *FP8]]
    jobs += [["generate", folder, "--prompt", "x", "--max-new-tokens", "1"]]
    if other in ("fp8 with scales", "peft"):
        jobs += [["plan", folder, *FP8], ["eval", "perplexity", folder, "--text", text]]
    for words in jobs:
        result = call(*words)
        assert (result.exit_code, named in line(result)) == (1, True), line(result)
    assert not out.exists()


@pytest.mark.parametrize(
    ("family", "name", "shape"),
    [
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq", (8,)),
        ("llama", "v_head.summary.weight", (1, 64)),
        ("llama", "mtp.layers.0.mlp.up_proj.weight", (64, 64)),
        ("llama", "model.layers.2.mlp.up_proj.weight", (64, 64)),
        ("gpt_neox", "gpt_neox.layers.0.attention.masked_bias", ()),
        ("gpt_neox", "gpt_neox.layers.0.attention.bias", (1, 1, 8, 8)),
    ],
)
def test_tensors_that_change_nothing_are_carried_over(
    family: str, name: str, shape: tuple[int, ...], toy: Make, tmp_path: Path
) -> None:
    folder = rewritten(toy(family), tmp_path / "copy", lambda t: t.update({name: torch.ones(shape)}))
    assert call("quantize", folder, "-o", tmp_path / "out", *FP8).exit_code == 0
    assert name in Artifact(tmp_path / "out").tensors
    assert load(folder) is not None
    assert call("verify", tmp_path / "out").exit_code == 0


class Other:
    """What no file of tensors holds."""


@pytest.mark.parametrize("what", ["legacy", "object", "nested", "list", "cut", "garbage"])
def test_a_pickle_that_cannot_be_read_is_named(what: str, copy: Path) -> None:
    tensors: Any = load_file(copy / SINGLE)
    held = {"object": {**tensors, "odd": Other()}, "nested": {"state_dict": tensors}, "list": [1]}.get(what, tensors)
    torch.save(held, copy / BIN, _use_new_zipfile_serialization=what != "legacy")
    if what in ("cut", "garbage"):
        data = (copy / BIN).read_bytes()
        (copy / BIN).write_bytes(data[: len(data) // 2] if what == "cut" else b"\x80\x04.")
    (copy / SINGLE).unlink()
    for result in (call("plan", copy, *FP8), call("quantize", copy, "-o", copy / "out", *FP8)):
        assert (result.exit_code, BIN in line(result), "internal error:" in line(result)) == (1, True, False)
    assert not (copy / "out").exists()


def only(folder: Path, name: str) -> None:
    """Leave nothing but the weights, under another name."""
    (folder / SINGLE).rename(folder / name)
    for path in folder.iterdir():
        path.unlink() if path.name != name else None


def moved(folder: Path, below: str) -> None:
    """Move all into a directory of it."""
    paths = list(folder.iterdir())
    (folder / below).mkdir()
    for path in paths:
        path.rename(folder / below / path.name)


HALVES: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "pointer": (lambda f: (f / SINGLE).write_text(POINTER), SINGLE, "git lfs pull"),
    "pointer for a tokenizer": (lambda f: (f / "tokenizer.json").write_text(POINTER), "tokenizer.json", "git lfs pull"),
    "pointer for a config": (lambda f: (f / "config.json").write_text(POINTER), "config.json", "git lfs pull"),
    "empty": (lambda f: (f / SINGLE).write_bytes(b""), SINGLE, "hf download"),
    "cut short": (lambda f: os.truncate(f / SINGLE, 9000), SINGLE, "fetch"),
    "a page as config": (lambda f: (f / "config.json").write_text(PAGE), "config.json", "hf download"),
    "a page as tokenizer": (lambda f: (f / "tokenizer.json").write_text(PAGE), "tokenizer.json", "hf download"),
    "a page as weights": (lambda f: (f / SINGLE).write_text(PAGE), SINGLE, "hf download"),
    "dead link": (lambda f: (f / SINGLE).unlink() or (f / SINGLE).symlink_to("gone"), SINGLE, "hf download"),
    "dead shards": (
        lambda f: [(f / n).unlink() or (f / n).symlink_to(f"gone-{n}") for n in shards(f)],
        "model-00001-of-00003.safetensors",
        "hf download",
    ),
    "a shard is missing": (lambda f: (f / shards(f)[1]).unlink(), "model-00002-of-00003.safetensors", "hf download"),
    "no index, a shard is missing": (
        lambda f: (f / shards(f, index=False)[2]).unlink(),
        "model-00003-of-00003.safetensors",
        "hf download",
    ),
    "an index alone": (
        lambda f: [(f / name).unlink() for name in shards(f)], "model-00001-of-00003.safetensors", "hf download",
    ),
    "no tensors": (lambda f: save_file({}, f / SINGLE), SINGLE, "no tensors"),
    "several models": (
        lambda f: [moved(f, "b"), (f / "a").mkdir(), (f / "a/adapter_config.json").write_text("{}")],
        "b/config.json", "directory",
    ),
    "still under way": (lambda f: (f / SINGLE).rename(f / f"{SINGLE}.incomplete"), f"{SINGLE}.incomplete", ""),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json", "hf download"),
    "an adapter": (lambda f: (f / "config.json").rename(f / "adapter_config.json"), "", "merge"),
    "weights of an adapter": (lambda f: (f / SINGLE).rename(f / "adapter_model.safetensors"), "adapter_model", "merge"),
    "gguf": (lambda f: (f / SINGLE).rename(f / "toy.gguf"), "toy.gguf", "gguf_file"),
    "gguf alone": (lambda f: only(f, "toy.Q4.gguf"), "toy.Q4.gguf", "gguf_file"),
    "a variant": (lambda f: (f / SINGLE).rename(f / "model.fp16.safetensors"), "model.fp16.safetensors", "rename"),
    "a pickled variant": (lambda f: (f / SINGLE).rename(f / "pytorch_model.fp16.bin"), "model.fp16.bin", BIN),
    "mlx": (lambda f: (f / SINGLE).rename(f / "weights.00.safetensors"), "weights.00.safetensors", "rename"),
    "meta": (lambda f: only(f, "consolidated.00.pth"), "consolidated.00.pth", "convert"),
    "flax": (lambda f: (f / SINGLE).rename(f / "flax_model.msgpack"), "flax_model.msgpack", "from_flax"),
    "tensorflow": (lambda f: (f / SINGLE).rename(f / "tf_model.h5"), "tf_model.h5", "from_tf"),
    "onnx": (lambda f: (f / "onnx").mkdir() or (f / SINGLE).rename(f / "onnx/model.onnx"), "onnx/model.onnx", "fetch"),
    "deepspeed": (lambda f: (f / SINGLE).rename(f / "zero_to_fp32.py"), "zero_to_fp32.py", "run"),
    "fsdp": (lambda f: (f / "fsdp_0").mkdir() or (f / SINGLE).rename(f / "fsdp_0/__0.distcp"), "__0.distcp", "merge"),
    "a pipeline": (lambda f: only(f, "model_index.json"), "model_index.json", "language model"),
    "checkpoints of a training": (lambda f: moved(f, "checkpoint-5"), "checkpoint-5/config.json", "directory"),
    "no weights": (lambda f: (f / SINGLE).unlink(), SINGLE, "hf download"),
    "a fifo": (lambda f: (f / SINGLE).unlink() or os.mkfifo(f / SINGLE), SINGLE, "plain"),
    "a fifo as config": (lambda f: (f / "config.json").unlink() or os.mkfifo(f / "config.json"), "config.json", ""),
}  # fmt: skip


@pytest.mark.parametrize("half", HALVES)
def test_half_a_download_is_said_as_what_it_is(half: str, copy: Path) -> None:
    change, named, said = HALVES[half]
    change(copy)
    result = call("quantize", copy, "-o", copy / "out", *FP8)
    assert (result.exit_code, str(copy) in line(result), named in line(result)) == (1, True, True), line(result)
    # Whatever lies there, fetching is said as well.
    assert said in line(result)
    assert "missing" not in line(result) or "hf download" in line(result)
    assert not (copy / "out").exists()


# A family, what is wrong with its tensors, what to name, and what has nothing to do with it.
ADVICE: dict[str, tuple[str, Callable[[dict[str, Any]], Any], str, str]] = {
    "a tied embedding left out": ("gemma", lambda t: t.pop(ENDS[0]), ENDS[0], "tie_word"),
    "a width and a score": ("llama", lambda t: t.update({Q: t[Q][:8].clone(), "score.weight": ONE}), Q, "score"),
    "a width beside a scale": ("llama", lambda t: t.update({Q: t[Q][:8].clone(), f"{NORM}.absmax": ONE}), Q, "absmax"),
    "no norm and a score": ("llama", lambda t: t.update({"score.weight": t.pop(NORM)}), NORM, "score"),
    "no head beside a draft": ("llama", lambda t: t.update({"0.1.weight": t.pop(ENDS[1])}), "tie_word", "draft"),
    "another head": ("llama", lambda t: t.update({"score.weight": t.pop(ENDS[1])}), "score.weight", "tie_word"),
    "a compressed head": ("llama", lambda t: packed(t, ENDS[1], "qweight"), "lm_head.qweight", "tie_word"),
    "more tokens in the head": ("llama", lambda t: t.update({ENDS[1]: torch.ones(400, 64)}), ENDS[1], "vocab_size"),
    "more tokens at first": ("llama", lambda t: t.update({ENDS[0]: torch.ones(400, 64)}), ENDS[0], "vocab_size"),
}  # fmt: skip


@pytest.mark.parametrize("case", ADVICE)
def test_advice_is_given_only_where_it_helps(case: str, toy: Make, tmp_path: Path) -> None:
    family, change, named, unsaid = ADVICE[case]
    result = call("plan", rewritten(toy(family), tmp_path / "copy", change), *FP8)
    assert (result.exit_code, named in line(result), unsaid in line(result)) == (1, True, False), line(result)


@pytest.mark.parametrize(
    ("missing", "stray"),
    [
        *((SINGLE, name) for name in ("training_args.bin", "optimizer.pt", "rng_state_0.pth", "optimizer_0/a.distcp")),
        *((name, "loras/adapter_config.json") for name in (SINGLE, "config.json")),
        *((SINGLE, name) for name in ("1_Pooling/config.json", "vision/x.pth")),
        *(("config.json", name) for name in ("model.fp16.safetensors", "pytorch_model.fp16.bin", ".old/config.json")),
    ],
)
def test_a_file_that_tells_nothing_is_not_named(missing: str, stray: str, copy: Path) -> None:
    (copy / missing).unlink()
    (copy / stray).parent.mkdir(exist_ok=True)
    (copy / stray).write_text("{}")
    said = line(call("quantize", copy, "-o", copy / "out", *FP8))
    assert (f"{copy / missing} is missing" in said, "hf download" in said, stray in said) == (True, True, False), said


def test_shards_that_have_lost_their_index_are_read(copy: Path, toy: Make, tmp_path: Path) -> None:
    shards(copy, index=False)
    assert Checkpoint(copy).fingerprint() == Checkpoint(toy()).fingerprint()
    assert all(torch.equal(a, b) for a, b in zip(load(copy).parameters(), load(toy()).parameters(), strict=True))


def test_a_shard_outside_of_the_directory_is_refused(copy: Path, tmp_path: Path) -> None:
    name = shards(copy)[1]
    data = (copy / name).read_bytes()
    (copy / name).unlink()
    outside, blobs = tmp_path / name, tmp_path / "blobs"
    outside.write_bytes(data)
    (copy / name).symlink_to(outside)
    with pytest.raises(VQCompressError, match=name):
        Checkpoint(copy)
    (copy / name).unlink()
    os.mkfifo(copy / name)
    with pytest.raises(VQCompressError, match=name):
        Checkpoint(copy)
    # The hub's cache: blobs beside snapshots.
    (copy / name).unlink()
    blobs.mkdir()
    shutil.move(outside, blobs / "abc")
    snapshot = tmp_path / "snapshots" / "main"
    shutil.copytree(copy, snapshot)
    (snapshot / name).symlink_to("../../blobs/abc")
    assert len(Checkpoint(snapshot).tensors) == len(Checkpoint(snapshot).read(Checkpoint(snapshot).tensors))


@pytest.mark.parametrize("value", [None, {}, [], "fp8", 0, False])
def test_no_quantization_config_is_dense_and_nonsense_is_refused(value: Any, copy: Path, tmp_path: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"quantization_config": value}))
    result = call("quantize", copy, "-o", tmp_path / "out", *FP8)
    if value in (None, {}):
        assert result.exit_code == 0, result.stderr
        assert Artifact(tmp_path / "out").entries
        assert load(copy) is not None
    else:
        assert (result.exit_code, "quantization_config" in line(result)) == (1, True)
        assert INDEX not in line(result)
