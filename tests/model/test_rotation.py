"""A folded rotation changes every weight and no logit; what it cannot pass is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from toys import toy_config

from vqcompress.errors import UsageError, VQCompressError
from vqcompress.evaluate.verify import verify
from vqcompress.export import export
from vqcompress.methods.hadamard import block_size
from vqcompress.model.rotation import RotatedCheckpoint, _watch
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
    ("mixtral", {}),
]
every_family = pytest.mark.parametrize(("family", "extra"), FAMILIES)


@pytest.fixture(scope="module")
def lively(toy: Make, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """lively(family, **extra) → a toy whose norms and biases are not the ones and zeros of a new model."""
    made: dict[str, Path] = {}

    def make(family: str = "llama", **extra: Any) -> Path:
        key = f"{family}-{sorted(extra.items())}"
        if key not in made:
            source, folder = toy(family, **extra), tmp_path_factory.mktemp("lively")
            for path in source.iterdir():
                (folder / path.name).write_bytes(path.read_bytes())
            tensors, draw = load_file(source / SINGLE), torch.Generator().manual_seed(1)
            for name, tensor in tensors.items():
                if tensor.dim() == 1:
                    noise = 0.3 * torch.randn(tensor.shape, generator=draw)
                    tensors[name] = (tensor.float() + noise).to(tensor.dtype)
            save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
            made[key] = folder
        return made[key]

    return make


@pytest.fixture
def fold(recipe_file: Callable[[str], str], text: Path, tmp_path: Path) -> Callable[..., Path]:
    """fold(model, rules) → the artifact of a recipe with `rotation: fold`."""

    def run(model: Path, rules: str, name: str = "out", **changes: Any) -> Path:
        recipe = recipe_file(f"rotation: fold\nrules:\n  - {rules}\n")
        quantize(
            QuantizeOptions(str(model), tmp_path / name, recipe, [str(text)], **{"samples": 8, "seqlen": 64, **changes})
        )
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


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name not in (*REPORTS, SUMS)}


@every_family
def test_the_rotated_model_is_the_same_function(family: str, extra: dict[str, Any], lively: Make) -> None:
    model = lively(family, **extra)
    stream = BlockStream(rotated(model), CPU, torch.float32)
    states = [stream.embed(IDS)]
    for i in range(len(stream.blocks)):
        stream.forward(stream.load_block(i), i, states)
    assert error(stream.logits(IDS, states[0]), logits(model)) < 1e-5


@every_family
def test_what_was_rotated(family: str, extra: dict[str, Any], lively: Make) -> None:
    """Every matrix but its energy (up to the norms' weights) changed, heads included; norms that are read have none."""
    model = lively(family, **extra)
    before, source = Checkpoint(model), rotated(model)
    tensors = source.read(source.tensors)
    assert source.config["tie_word_embeddings"] is False
    assert "lm_head.weight" in source.tensors
    kept = {n for n in before.tensors if n.endswith(("q_norm.weight", "k_norm.weight"))}
    kept |= {n for n in before.tensors if n.endswith("bias") and "o_proj" not in n and "down_proj" not in n}
    kept = {n for n in kept if "v_proj" not in n}
    for name, tensor in before.read(before.tensors).items():
        if "norm.weight" in name or "layernorm" in name:
            neutral = torch.full_like(tensor, 0.0 if family == "gemma" else 1.0)
            assert torch.equal(tensors[name], tensor if name in kept else neutral)
        else:
            assert torch.equal(tensors[name], tensor) == (name in kept), name
    # v_proj by definition: Hadamard · signs on each head's rows, γ and Qᵀ on its columns.
    raw = before.read(before.tensors)
    name = "model.layers.1.self_attn.v_proj.weight"
    gain = raw["model.layers.1.input_layernorm.weight"].double() + (family == "gemma")
    rows, hidden = raw[name].shape
    signs = (torch.randint(0, 2, (rows,), generator=generator_for(0, name.removesuffix(".weight"))) * 2 - 1).double()
    q = matrix(hidden) * (torch.randint(0, 2, (hidden,), generator=generator_for(0, "rotation")) * 2 - 1).double()
    heads = torch.block_diag(*[matrix(hidden // 4)] * (rows // (hidden // 4))) * signs
    expected = heads @ (raw[name].double() * gain) @ q.T
    torch.testing.assert_close(tensors[name].double(), expected, atol=1e-5, rtol=1e-5)


def matrix(n: int) -> Tensor:
    """blockdiag(Hadamard_b)/√b."""
    b = block_size(n)
    rows = [[(-1) ** (i & j).bit_count() for j in range(b)] for i in range(b)]
    return torch.block_diag(*[torch.tensor(rows, dtype=torch.float64)] * (n // b)) / b**0.5


@every_family
@torch.inference_mode()
def test_an_artifact_and_its_dense_export_are_the_rotated_model(
    family: str, extra: dict[str, Any], lively: Make, fold: Callable[..., Path], tmp_path: Path
) -> None:
    model = lively(family, **extra)
    # One weight is compressed, and hardly; all others are kept.
    folder = fold(model, "{match: '*.0.*.k_proj', method: vq, d: 1, bits: 10, entry_bits: 16, feedback: false}")
    verify(str(folder))
    ours = load(folder)(IDS).logits
    assert error(ours, logits(model)) < 0.01
    # A fresh process takes seconds; one is enough.
    done = export(str(folder), "dense", tmp_path / "dense", verify=family == "gemma")
    assert done.get("verified", {}).get("mean_kl_divergence", 0.0) < 1e-5
    assert error(logits(tmp_path / "dense"), ours) < 1e-5
    names = json.loads((tmp_path / "dense" / "model.safetensors.index.json").read_text())["weight_map"]
    assert "lm_head.weight" in names
    assert json.loads((tmp_path / "dense" / "config.json").read_text())["tie_word_embeddings"] is False


@torch.inference_mode()
@pytest.mark.parametrize(
    "rules",
    [
        "{match: '*', method: int8}",
        "{match: '*', method: int8, smoothing: {alpha: 0.5, norm: fold, attention: fold, mlp: fold}}",
        "{match: '*', method: int8, smoothing: {alpha: auto, norm: runtime, attention: runtime, mlp: runtime}}",
        "{match: '*', method: fp8}",
        "{match: '*', method: vq, d: 2, bits: 8, iterations: 3, codebook_updates: 1}",
        "{match: '*.mlp.*', method: int8, smoothing: {alpha: 0.5}}",
    ],
)
def test_every_method_and_smoothing_work_on_it(rules: str, lively: Make, fold: Callable[..., Path]) -> None:
    model = lively("qwen3", tie_word_embeddings=True)
    folder = fold(model, rules)
    verify(str(folder))
    assert error(load(folder)(IDS).logits, logits(model)) < (0.5 if "vq" in rules else 0.2)
    report = json.loads((folder / "report.json").read_text())
    assert report["rotation"] == "fold"
    assert report["source_bytes"] == Checkpoint(model).bytes


def test_dense_tensors_keep_their_type_and_weights_are_encoded_from_float32(
    lively: Make, fold: Callable[..., Path]
) -> None:
    model = lively("llama", dtype="bfloat16")
    folder = fold(model, "{match: '*.up_proj', method: int8}")
    source, done = rotated(model), Artifact(folder)
    assert all(done.tensors[n].dtype == torch.bfloat16 for n in source.tensors if "up_proj" not in n)
    name = "model.layers.0.mlp.up_proj.weight"
    weight = source.read([name])[name]
    assert weight.dtype == torch.float32
    scale = weight.abs().amax(1) / 127
    assert torch.equal(done.read([f"{name}_scale"])[f"{name}_scale"], scale)
    # A weight that is kept is rounded once, from float32.
    kept = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(done.read([kept])[kept], source.read([kept])[kept].bfloat16())


def test_outliers_are_spread(lively: Make, tmp_path: Path) -> None:
    """A weight whose error is all in one loud column is quantized as well as any other."""
    model = lively()
    for path in model.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(tmp_path / SINGLE)
    name = "model.layers.0.mlp.gate_proj.weight"
    tensors[name][:, 3] *= 50
    save_file(tensors, tmp_path / SINGLE, metadata={"format": "pt"})
    weight = rotated(tmp_path).read([name])[name]

    def peak(w: Tensor) -> float:
        return (w.abs().amax(1) / w.square().mean(1).sqrt()).mean().item()

    assert peak(weight) < 0.5 * peak(tensors[name])


class Mixture(nn.Module):
    """A router and three experts, of which the last gets no token."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.router = nn.RMSNorm(8), nn.Linear(8, 3)
        self.up = nn.ModuleList(nn.Linear(8, 16) for _ in range(3))
        self.down = nn.ModuleList(nn.Linear(16, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        chosen, out = self.router(y).argmax(-1) % 2, torch.zeros_like(x)
        for k in (0, 1):
            out[chosen == k] = self.down[k](self.up[k](y[chosen == k]).relu())
        return x + out


def test_an_expert_that_reads_some_rows_of_a_norm_is_its_reader() -> None:
    torch.manual_seed(0)
    block, x = Mixture(), torch.randn(1, 32, 8)
    roles, out = _watch(block, lambda: block(x))
    assert roles == {"router": "norm", "up.0": "norm", "up.1": "norm", "down.0": None, "down.1": None}
    assert torch.equal(out, block(x))


def toy_of(config: transformers.PretrainedConfig, folder: Path) -> Path:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("family", "said"),
    [
        ("opt", "final_layer_norm is a LayerNorm, which subtracts the mean"),
        ("gpt_neox", "final_layer_norm is a LayerNorm"),
        ("gemma2", r"model\.layers\.0.*no linear layer reads the norm post_attention_layernorm"),
    ],
)
def test_what_a_rotation_cannot_pass_is_refused_by_name(
    family: str, said: str, tmp_path: Path, toy: Make, recipe_file: Callable[[str], str], text: Path
) -> None:
    if family == "gemma2":
        fields = toy_config("gemma", hidden=64).to_dict()
        fields = {k: v for k, v in fields.items() if k not in ("model_type", "architectures")}
        model = toy_of(transformers.Gemma2Config(**fields), tmp_path / "toy")
    else:
        model = toy(family)
    recipe = recipe_file("rotation: fold\nrules:\n  - {match: '*', method: fp8}\n")
    with pytest.raises(VQCompressError, match=f"{said}.*'rotation: true'") as caught:
        quantize(QuantizeOptions(str(model), tmp_path / "out", recipe))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_weight_that_is_nan_is_named_before_anything_is_rotated(lively: Make, tmp_path: Path) -> None:
    model = lively()
    for path in model.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(tmp_path / SINGLE)
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, tmp_path / SINGLE, metadata={"format": "pt"})
    with pytest.raises(VQCompressError, match=r"model\.layers\.0\.mlp\.up_proj\.weight holds NaN"):
        rotated(tmp_path)


RULES = "{match: '*', method: vq, d: 2, bits: 4, iterations: 2, codebook_updates: 0, scope: target}"


def test_another_seed_is_another_rotation(lively: Make) -> None:
    name = "model.embed_tokens.weight"
    first, same, other = (rotated(lively(), seed).read([name])[name] for seed in (0, 0, 1))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


class Killed(BaseException):
    """Stands for a kill where the process of the tests must live on."""


@pytest.mark.parametrize("blocks", [0, 1])
def test_a_killed_run_ends_in_the_same_bytes(
    blocks: int, lively: Make, fold: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = lively("llama", tie_word_embeddings=True)
    whole = contents(fold(model, RULES, "whole"))
    write, calls = writer.Shards.write_shard, 0

    def mortal(*args: Any) -> dict[str, Any]:
        nonlocal calls
        calls += 1
        if calls > blocks + 1:
            raise Killed
        return write(*args)

    with monkeypatch.context() as patch:
        patch.setattr(writer.Shards, "write_shard", mortal)
        with pytest.raises(Killed):
            fold(model, RULES, "killed")
    assert contents(fold(model, RULES, "killed")) == whole


def test_threads_do_not_change_a_byte(lively: Make, fold: Callable[..., Path]) -> None:
    model = lively("llama", hidden=512, tie_word_embeddings=True)
    before, made = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            made.append(contents(fold(model, "{match: '*', method: fp8}", str(threads))))
    finally:
        torch.set_num_threads(before)
    assert made[0] == made[1]


@pytest.mark.parametrize("value", ["true", "folded", "[fold]", "1"])
def test_the_key_is_fold_or_left_out(value: str) -> None:
    with pytest.raises(UsageError, match="'rotation' is 'fold' or left out"):
        recipes.parse(f"rotation: {value}\nrules:\n  - {{match: '*', method: int8}}\n", "test")


def test_the_key_is_part_of_the_meaning() -> None:
    text = "rules:\n  - {match: '*', method: int8}\n"
    plain, folded = (recipes.parse(head + text, "test") for head in ("", "rotation: fold\n"))
    assert plain.rotation is None
    assert folded.rotation == "fold"
    assert plain.fingerprint() != folded.fingerprint()


@pytest.mark.parametrize("tied", [False, True])
def test_a_plan_says_it_and_counts_the_head(
    tied: bool, toy: Make, fold: Callable[..., Path], recipe_file: Callable[[str], str]
) -> None:
    model = toy("llama", tie_word_embeddings=tied)
    rules = "{match: '*', method: fp8}"
    planned = dry_run(QuantizeOptions(str(model), None, recipe_file(f"rotation: fold\nrules:\n  - {rules}\n")))
    report = json.loads((fold(model, rules) / "report.json").read_text())
    assert planned["rotation"] == "fold"
    assert planned["source_bytes"] == report["source_bytes"]
    # The headers of the files.
    assert planned["artifact_bytes"] == pytest.approx(report["artifact_bytes"], rel=0.05)
