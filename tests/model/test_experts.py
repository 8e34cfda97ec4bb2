"""Experts of a mixture: taken apart they compute what the fused module does, and each is a target like any other."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from kernels import interpreter, needs_gpu, relative_rms
from processes import Processes
from torch import Tensor, nn
from toys import rewritten, toy_checkpoint, toy_config
from transformers import AutoModelForCausalLM

from vqcompress.errors import UsageError
from vqcompress.evaluate.inspect import inspect
from vqcompress.evaluate.perplexity import perplexity
from vqcompress.evaluate.verify import verify
from vqcompress.export import export
from vqcompress.methods.fp8 import reference as fp8_ref
from vqcompress.methods.int8 import reference as int8_ref
from vqcompress.methods.statistics import Accumulator
from vqcompress.model.experts import Experts, unfuse
from vqcompress.model.folds import find_inputs
from vqcompress.model.linear import CompressedLinear
from vqcompress.model.stream import BlockStream
from vqcompress.model.targets import blocks_of, find_blocks
from vqcompress.model.weights import skeleton
from vqcompress.pipeline.bit_allocation import make_plans
from vqcompress.pipeline.block import study
from vqcompress.pipeline.calibration import first_states
from vqcompress.pipeline.context import BlockContext
from vqcompress.pipeline.gather import coverage, gather
from vqcompress.pipeline.plan import make_plan
from vqcompress.pipeline.quantize import QuantizeOptions, dry_run, quantize
from vqcompress.pipeline.smoothing import Smoother
from vqcompress.runtime.load import load
from vqcompress.storage import writer
from vqcompress.storage.artifact import REPORTS, SUMS, Artifact
from vqcompress.storage.checkpoint import Checkpoint
from vqcompress.storage.recipe import load as load_recipe
from vqcompress.storage.recipe import parse
from vqcompress.storage.recipe_files import packaged

Make = Callable[..., Path]
CPU = torch.device("cpu")
ROWS = torch.randint(3, 384, (4, 32), generator=torch.Generator().manual_seed(0))
# Family → its gate, up and down, as the checkpoint calls them.
LEAVES = {
    "mixtral": ("w1", "w3", "w2"),
    "qwen3_moe": ("gate_proj", "up_proj", "down_proj"),
    "deepseek_v3": ("gate_proj", "up_proj", "down_proj"),
    # Stored fused: these names are ours.
    "gpt_oss": ("gate_proj", "up_proj", "down_proj"),
    "llama4": ("gate_proj", "up_proj", "down_proj"),
}
every_family = pytest.mark.parametrize("family", LEAVES)
stored_fused = pytest.mark.parametrize("family", ["gpt_oss", "llama4"])
RECIPES = ["smoothquant-int8", "fp8-tile", "vq-small"]
STATIC = "rules:\n  - {match: '*', method: int8, activations: per_tensor}\n"
ALONE = "rules:\n  - {match: '*.experts.0.*', method: fp8}\n  - {match: '*', method: int8}\n"
# 48 outputs are no multiple of 32.
RAGGED = "rules:\n  - {match: '*', method: vq, codebook: trellis, state_bits: 8}\n"


@torch.inference_mode()
def logits(model: Any) -> Tensor:
    return model(ROWS).logits.float()


def files(folder: Path) -> dict[str, str]:
    """SHA-256 by name, of what the inputs determine."""
    kept = (path for path in folder.iterdir() if path.name not in (*REPORTS, SUMS))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in kept}


def mixture(family: str) -> str:
    """Path of the mixture in a block."""
    return "feed_forward" if family == "llama4" else "mlp"


@pytest.fixture(scope="module")
def lonely(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of 4 with one expert per token: 0 and 1 share all tokens, 2 and 3 get none; 1 is all zero."""
    source = toy_checkpoint(tmp_path_factory.mktemp("source"), "mixtral", hidden=64, num_experts_per_tok=1)

    def change(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if ".gate." in name:
                tensor[1], tensor[2:] = -tensor[0], 0
            if ".experts.1." in name:
                tensor.zero_()

    return rewritten(source, tmp_path_factory.mktemp("lonely") / "model", change)


@every_family
@torch.inference_mode()
def test_taken_apart_the_experts_compute_the_same(family: str, toy: Make) -> None:
    stream = BlockStream(Checkpoint(toy(family)), CPU, torch.float32)
    block = stream.load_block(1)
    (path, experts), *others = [(n, m) for n, m in block.named_modules() if isinstance(m, Experts)]
    assert not others
    fused = load(str(toy(family))).model.layers[1].get_submodule(path)
    # The other implementations read uninitialized memory for a token without an expert, and the tests fill it with NaN.
    if family != "llama4":
        fused.config._experts_implementation = "eager"
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(50, 64, generator=draw)
    # Four means no expert, as in transformers' own from 5.18 on, except that of gpt-oss.
    none = family != "gpt_oss" and tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 18)
    chosen = torch.stack([torch.randperm(4 + none, generator=draw)[:2] for _ in x])
    routing = () if family == "llama4" else (chosen, torch.rand(50, 2, generator=draw))
    x = x[:48] * (torch.arange(48) % 3 > 0)[:, None] if family == "llama4" else x
    torch.testing.assert_close(experts(x, *routing), fused(x, *routing), atol=1e-5, rtol=1e-5)
    assert torch.equal(experts(x[:0], *(r[:0] for r in routing)), x[:0])


@every_family
def test_a_config_alone_counts_the_same_targets(family: str, toy: Make, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((toy(family) / "config.json").read_bytes())
    planned, found = (
        dry_run(QuantizeOptions(str(tmp_path), None, "fp8-tile")),
        dry_run(QuantizeOptions(str(toy(family)), None, "fp8-tile")),
    )
    assert planned["targets"] == found["targets"]
    names = {target["name"] for target in planned["targets"]}
    path = f"model.layers.1.{mixture(family)}.experts"
    assert {f"{path}.{e}.{leaf}" for e in range(4) for leaf in LEAVES[family]} <= names
    assert not any("expert" in why for why in planned["left_dense"].values())


def test_an_altered_activation_is_noticed_and_stays_fused() -> None:
    model = skeleton(toy_config("mixtral"), torch.float32)
    for layer in model.model.layers:
        experts = layer.mlp.experts
        layer.mlp.experts.__class__ = type("Odd", (type(experts),), {"forward": lambda self, x, i, w: x})
    assert unfuse(model) == "Odd does more than gate, up and down"
    assert not any(isinstance(m, Experts) for m in model.modules())


def test_a_class_with_a_gate_of_its_own_keeps_it() -> None:
    """As DeepSeek-V4 and MiniMax-M3, which clamp."""
    config = transformers.MiniMaxM2Config(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_local_experts=4, vocab_size=384
    )
    model = skeleton(config, torch.float32)
    experts = type(model.model.layers[0].mlp.experts)
    clamped = lambda self, x: self.act_fn(x.chunk(2, -1)[0].clamp(max=0.5)) * x.chunk(2, -1)[1]  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experts, "_apply_gate", clamped)
        # The plain forward of this class does not call it: the two differ, and that is seen.
        assert "more than gate" in unfuse(model)
    assert unfuse(skeleton(config, torch.float32)) == ""


def test_experts_that_are_stored_fused_stay_dense_and_are_named(toy: Make, tmp_path: Path, text: Path) -> None:
    def fuse(tensors: dict[str, Tensor]) -> None:
        state = AutoModelForCausalLM.from_pretrained(toy("mixtral"), dtype=torch.float32).state_dict()
        tensors.clear()
        tensors.update({name: tensor.clone() for name, tensor in state.items()})

    source = rewritten(toy("mixtral"), tmp_path / "fused", fuse)
    report = quantize(QuantizeOptions(str(source), tmp_path / "out", "fp8-tile"))
    assert report["left_dense"].keys() >= {f"model.layers.*.mlp.experts.{n}_proj" for n in ("gate_up", "down")}
    assert any("does not store them one by one" in why for why in report["left_dense"].values())
    verify(str(tmp_path / "out"))
    assert not any("experts" in name for name in Artifact(tmp_path / "out").entries)
    assert torch.isfinite(logits(load(tmp_path / "out"))).all()


@stored_fused
def test_experts_that_nothing_compresses_are_copied_as_they_are_stored(family: str, quantized: Make, toy: Make) -> None:
    rules = "{match: '*.experts.*', method: keep}\n  - {match: '*', method: vq, d: 2, bits: 4, iterations: 2}"
    folder = quantized(f"rules:\n  - {rules}\n", family)
    verify(str(folder))
    stored, source = Artifact(folder), Checkpoint(toy(family))
    fused = {name for name in source.tensors if ".experts." in name}
    assert fused == {name for name in stored.tensors if ".experts." in name}
    before, after = source.read(fused), stored.read(fused)
    assert all(torch.equal(before[name], after[name]) for name in fused)
    other, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(logits(other.eval()), logits(load(folder)))


@stored_fused
def test_what_is_taken_apart_is_put_together_again_to_the_bit(
    family: str, quantized: Make, toy: Make, tmp_path: Path
) -> None:
    folder = quantized("rules:\n  - {match: '*.experts.1.*', method: int8}\n", family)
    export(str(folder), "dense", tmp_path / "dense", verify=True)
    before, after = Checkpoint(toy(family)), Checkpoint(tmp_path / "dense")
    assert {n: i.shape for n, i in before.tensors.items()} == {n: i.shape for n, i in after.tensors.items()}
    assert before.tensors.keys() == after.tensors.keys()
    old, new = before.read(before.tensors), after.read(after.tensors)
    for name in old:
        if ".experts." in name and not name.endswith("bias"):
            assert not torch.equal(new[name][1], old[name][1])
            old[name][1] = new[name][1]
        assert torch.equal(old[name], new[name]), name


def test_a_prefix_of_the_checkpoint_is_kept(toy: Make, recipe_file: Any, tmp_path: Path) -> None:
    """As Llama-4's, whose language model is a part of a larger one."""

    def spell(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[f"language_model.{name}"] = tensors.pop(name)

    source = rewritten(toy("llama4"), tmp_path / "spelled", spell)
    quantize(QuantizeOptions(str(source), tmp_path / "out", recipe_file("rules: [{match: '*', method: fp8}]")))
    assert (
        "language_model.model.layers.1.feed_forward.experts.0.up_proj.weight_codes"
        in Artifact(tmp_path / "out").tensors
    )
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    export(str(tmp_path / "out"), "dense", tmp_path / "dense")
    assert Checkpoint(tmp_path / "dense").tensors.keys() == Checkpoint(source).tensors.keys()


@stored_fused
def test_gate_and_up_are_the_rows_that_meet_in_a_channel(family: str, toy: Make) -> None:
    stored = Checkpoint(toy(family))
    stream = BlockStream(stored, CPU, torch.float32)
    path = f"model.layers.1.{mixture(family)}.experts"
    fused = stored.read([f"{path}.gate_up_proj"])[f"{path}.gate_up_proj"]
    names = [f"{path}.2.{leaf}_proj.weight" for leaf in ("gate", "up")]
    gate, up = (stream.source.read(names)[name] for name in names)
    rows = fused[2].T
    if family == "gpt_oss":
        assert torch.equal(gate, rows[::2])
        assert torch.equal(up, rows[1::2])
    else:
        assert torch.equal(torch.cat([gate, up]), rows)
    assert stream.source.bytes == stored.bytes
    assert stream.source.fingerprint() == stored.fingerprint()


@pytest.mark.parametrize(
    ("family", "recipe"),
    list(zip(LEAVES, ["vq-small", "smoothquant-int8", "fp8-tile", "vq-small", "int8-plain"], strict=True)),
)
def test_all_ways_to_use_an_artifact(family: str, recipe: str, quantized: Make, toy: Make, tmp_path: Path) -> None:
    folder = quantized(recipe, family)
    verify(str(folder))
    rows = {row["name"]: row for row in inspect(str(folder))["targets"]}
    assert sum(".experts." in name for name in rows) == 4 * 3 * (1 if family == "deepseek_v3" else 2)
    model = load(folder)
    compressed = {name for name, m in model.named_modules() if isinstance(m, CompressedLinear)}
    assert compressed == rows.keys()
    exact, found = logits(load(str(toy(family)))), logits(model)
    likeness = torch.corrcoef(torch.stack([exact.flatten(), found.flatten()]))[0, 1].item()
    # A token that goes to another expert counts much in a toy.
    assert likeness > (0.3 if "vq" in recipe else 0.9)
    other, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(logits(other.eval()), found)
    other.save_pretrained(tmp_path / "saved")
    saved, before = (Checkpoint(path).tensors for path in (tmp_path / "saved", folder))
    markers = {n for n in before if before[n].dtype == torch.uint8 and "codes" not in n}
    assert saved.keys() == before.keys() - markers
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)), found)
    out = model.generate(ROWS[:1, :8], max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert out.shape == (1, 12)
    # Of experts that are stored fused another test compares what a process of its own reads.
    result = export(str(folder), "dense", tmp_path / "dense", verify=(family, recipe) == ("mixtral", "vq-small"))
    assert result["files"] == 3
    assert Checkpoint(tmp_path / "dense").tensors.keys() == Checkpoint(toy(family)).tensors.keys()
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    if recipe == "vq-small":
        torch.testing.assert_close(logits(dense), found, atol=1e-4, rtol=1e-4)


def test_a_streamed_evaluation_is_that_of_the_loaded_model(quantized: Make, text: Path) -> None:
    folder = quantized("vq-small", "mixtral")
    found = perplexity(str(folder), str(text), seqlen=64, limit=2)
    model = load(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text.read_text(), add_special_tokens=False, return_tensors="pt").input_ids[0][:128].view(2, 64)
    with torch.inference_mode():
        nll = nn.functional.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert found["perplexity"] == pytest.approx(math.exp(nll), rel=1e-4)


@pytest.mark.parametrize("match", ["*.self_attn.*", "*.experts.1.*"])
def test_some_experts_may_stay_dense(match: str, quantized: Make, toy: Make) -> None:
    folder = quantized(f"rules:\n  - {{match: '{match}', method: int8}}\n", "mixtral")
    verify(str(folder))
    assert any(isinstance(m, Experts) for m in load(folder).modules()) == ("experts" in match)
    other, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    torch.testing.assert_close(logits(other.eval()), logits(load(folder)))
    stored, source = Artifact(folder), Checkpoint(toy("mixtral"))
    kept = stored.tensors.keys() & source.tensors.keys()
    before, after = source.read(kept), stored.read(kept)
    first = next(iter(stored.entries)).replace("mlp", "block_sparse_moe")
    assert all(torch.equal(before[n], after[n]) for n in kept if n != f"{first}.weight")


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_a_process_that_did_not_import_vqcompress_fails_loudly(
    family: str, quantized: Make, processes: Processes
) -> None:
    """The marker stands where transformers merges experts, or where it has them fused."""
    folder = quantized("rules:\n  - {match: '*.experts.*', method: int8}\n", family)
    _, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    verify(str(folder))
    code = "import sys, transformers; transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]); print('LOADED')"
    done = processes.python(code, folder)
    assert done.returncode != 0
    assert "LOADED" not in done.stdout


def test_a_shared_codebook_of_experts_alone_lies_under_the_block(quantized: Make) -> None:
    rules = "{match: '*.experts.*', method: vq, d: 2, bits: 4, iterations: 2, codebook_updates: 0}"
    folder = quantized(f"rules:\n  - {rules}\n", "mixtral")
    assert "model.layers.1.shared_parts.0.codebook" in Artifact(folder).tensors
    assert torch.isfinite(logits(load(folder))).all()


@pytest.mark.parametrize("recipe", ["smoothquant-int8", "vq-small"])
def test_idle_and_empty_experts_do_no_harm(
    recipe: str, lonely: Path, recipe_file: Any, text: Path, tmp_path: Path
) -> None:
    report = quantize(
        QuantizeOptions(str(lonely), tmp_path / "out", recipe_file(recipe), [str(text)], samples=8, seqlen=64)
    )
    verify(str(tmp_path / "out"))
    for row in report["targets"]:
        assert math.isfinite(row["relative_error"])
        assert row["proxy_error"] is None or math.isfinite(row["proxy_error"])
        expert = row["name"].split(".")[-2]
        if ".experts." in row["name"] and row["name"].endswith("w2") and "fp8" not in recipe:
            assert (row["tokens"] == 0) == (expert in "23")
            assert row["borrowed"] or expert in "01"
    tensors = Artifact(tmp_path / "out").read(Artifact(tmp_path / "out").tensors)
    assert all(torch.isfinite(t.float()).all() for t in tensors.values())
    assert torch.isfinite(logits(load(tmp_path / "out"))).all()


def test_gate_and_up_share_statistics_and_down_has_its_own(lonely: Path) -> None:
    stream = BlockStream(Checkpoint(lonely), CPU, torch.float32)
    plan = make_plan(stream, parse("rules:\n  - {match: '*', method: vq, d: 2, bits: 4}\n", "test"))
    states = first_states(stream, ROWS.repeat(4, 1))
    module = stream.load_block(0)
    inputs = find_inputs(module, plan.blocks[0], lambda m: stream.run(m, 0, states[0]))
    found = gather(BlockContext(stream, plan, 0, states, 0), module, inputs)
    heads = [found[f"mlp.experts.{e}.{leaf}"] for e in range(4) for leaf in ("w1", "w3")]
    assert all(statistics is heads[0] for statistics in heads)
    assert heads[0].tokens == 512
    own, borrowed = found["mlp.experts.0.w2"], found["mlp.experts.3.w2"]
    assert own.own_tokens is None
    assert own.tokens + found["mlp.experts.1.w2"].tokens == 512
    assert (borrowed.own_tokens, borrowed.tokens) == (0, 512)
    # Expert 1 is all zero, so all that the sum holds is what expert 0 saw.
    assert own.hessian_II is not None
    assert borrowed.hessian_II is not None
    torch.testing.assert_close(borrowed.hessian_II * 512, own.hessian_II * own.tokens)


def studied(source: Path, knobs: str, rows: Tensor = ROWS) -> tuple[Any, Experts, dict[str, Any], list[Tensor]]:
    """Statistics of the last block of a toy under an `experts` key, its mixture, and how that was called."""
    stream = BlockStream(Checkpoint(source), CPU, torch.float32)
    rules = "rules:\n  - {match: '*', method: vq, d: 2, bits: 4}\n"
    plan = make_plan(stream, parse(f"experts: {knobs}\n{rules}", "test"))
    states = first_states(stream, rows)
    stream.forward(stream.load_block(0), 0, states)
    module = stream.load_block(1)
    inputs = find_inputs(module, plan.blocks[1], lambda m: stream.run(m, 1, states[0]))
    (experts,) = (m for m in module.modules() if isinstance(m, Experts))
    calls: list[Tensor] = []
    handle = experts.register_forward_pre_hook(lambda _, args: calls.extend(args))
    before = stream.run(module, 1, states[0])
    handle.remove()
    found = gather(BlockContext(stream, plan, 1, states, 0), module, inputs)
    # What goes on to the next block is that of the real routing, and nobody is left listening.
    assert torch.equal(stream.run(module, 1, states[0]), before)
    assert not any(m._forward_pre_hooks for m in module.modules())
    return coverage(inputs, found), experts, found, calls


def moment(x_TI: Tensor, weight_T: Tensor) -> Tensor:
    x_TI, weight_T = x_TI.double(), weight_T.double()
    return (x_TI.T @ (x_TI * weight_T[:, None]) / weight_T.sum()).float()


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss"])
def test_statistics_can_be_weighted_by_the_square_of_the_routing_weight(family: str, toy: Make) -> None:
    _, experts, found, (x_TI, index_TK, weight_TK) = studied(toy(family), "{calibrate: weighted, min_tokens: 1}")
    shared, square_TK = found["mlp.experts.0.gate_proj"], weight_TK.square()
    assert all(found[f"mlp.experts.{e}.{leaf}"] is shared for e in range(4) for leaf in ("gate_proj", "up_proj"))
    torch.testing.assert_close(shared.hessian_II, moment(x_TI, square_TK.sum(1)), atol=1e-5, rtol=1e-4)
    assert shared.tokens == len(x_TI)
    if family == "deepseek_v3":
        # The shared expert sees every token as it is.
        plain = found["mlp.shared_experts.gate_proj"]
        torch.testing.assert_close(plain.hessian_II, moment(x_TI, torch.ones(len(x_TI))), atol=1e-5, rtol=1e-4)
    for e in range(4):
        tokens, place = torch.where(index_TK == e)
        last = found[f"mlp.experts.{e}.down_proj"]
        assert (last.tokens, last.routed, last.own_tokens) == (len(tokens), len(tokens), None)
        with torch.no_grad():
            inner_TF = experts.inner(e, x_TI[tokens])
        torch.testing.assert_close(last.hessian_II, moment(inner_TF, square_TK[tokens, place]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("knobs", ["{calibrate: routed}", "{calibrate: weighted}"])
def test_inputs_that_were_multiplied_are_counted_as_they_are(knobs: str, toy: Make) -> None:
    """Llama-4's router multiplies what enters an expert, so its weight is in the statistics already."""
    tokens, _, found, (x_TI,) = studied(toy("llama4"), knobs)
    rows_TI = x_TI[x_TI.any(1)]
    shared, plain = (found[f"feed_forward.{path}.up_proj"] for path in ("experts.3", "shared_expert"))
    assert (len(rows_TI), shared.tokens, plain.tokens) == (128, 128, 128)
    torch.testing.assert_close(shared.hessian_II, moment(rows_TI, torch.ones(128)), atol=1e-5, rtol=1e-4)
    assert (shared.hessian_II.diag() < plain.hessian_II.diag()).all()
    routed = x_TI.any(1).view(4, -1).sum(1).tolist()
    assert tokens["feed_forward.experts"]["routed"] == routed
    assert sum(routed) == 128


@pytest.mark.parametrize("family", ["qwen3_moe", "llama4"])
def test_all_tokens_can_be_counted_for_every_expert(family: str, toy: Make) -> None:
    tokens, experts, found, (x_TI, *routing) = studied(toy(family), "{calibrate: all}")
    x_TI, index_TK, _ = experts.routing(x_TI, *routing)
    x_TI = x_TI[(index_TK < 4).any(1)]
    for e in range(4):
        with torch.no_grad():
            inner_TF = experts.inner(e, x_TI)
        last = found[f"{mixture(family)}.experts.{e}.down_proj"]
        torch.testing.assert_close(last.hessian_II, moment(inner_TF, torch.ones(128)), atol=1e-5, rtol=1e-4)
    routed = torch.bincount(index_TK.flatten(), minlength=5)[:4].tolist()
    assert tokens == {f"{mixture(family)}.experts": {"routed": routed, "counted": [128] * 4, "borrowed": []}}


def test_the_floor_of_tokens_is_a_knob(toy: Make) -> None:
    for floor, borrowed in ((1, []), (1000, [0, 1, 2, 3])):
        tokens, *_ = studied(toy("mixtral"), f"{{min_tokens: {floor}}}")
        assert tokens["mlp.experts"]["borrowed"] == borrowed
        assert tokens["mlp.experts"]["counted"] == tokens["mlp.experts"]["routed"]
        assert sum(tokens["mlp.experts"]["routed"]) == 2 * ROWS.numel()


@pytest.mark.parametrize(("setting", "named"), [("calibrate: al", "calibrate"), ("floor: 3", "floor")])
def test_a_wrong_setting_of_experts_is_named(setting: str, named: str) -> None:
    with pytest.raises(UsageError, match=named):
        parse(f"experts: {{{setting}}}\nrules: [{{match: '*', method: int8}}]", "test")


@pytest.mark.parametrize(("family", "method"), [("llama", "int8"), ("mixtral", "fp8")])
def test_settings_of_experts_without_effect_are_refused(family: str, method: str, toy: Make) -> None:
    stream = BlockStream(Checkpoint(toy(family)), CPU, torch.float32)
    with pytest.raises(UsageError, match="'experts'"):
        make_plan(stream, parse(f"experts: {{calibrate: all}}\nrules: [{{match: '*', method: {method}}}]", "test"))


def test_the_report_and_inspect_tell_the_tokens_of_every_expert(
    lonely: Path, recipe_file: Any, text: Path, tmp_path: Path
) -> None:
    rules = "rules:\n  - {match: '*.experts.*', method: vq, d: 2, bits: 4, iterations: 2, codebook_updates: 0}\n"
    for knobs, counted in (("routed", None), ("all", [512] * 4)):
        out, recipe = tmp_path / knobs, recipe_file(f"experts: {{calibrate: {knobs}}}\n{rules}")
        report = quantize(QuantizeOptions(str(lonely), out, recipe, [str(text)], samples=8, seqlen=64))
        facts = inspect(str(out))
        for i in range(2):
            tokens = facts["experts"][f"model.layers.{i}.mlp.experts"]
            assert tokens == report["experts"][f"model.layers.{i}.mlp.experts"]
            assert sum(tokens["routed"]) == 512
            assert tokens["routed"][2:] == [0, 0]
            assert tokens["counted"] == (counted or tokens["routed"])
            assert set(tokens["borrowed"]) == {e for e in range(4) if tokens["counted"][e] < 128}


def test_what_is_borrowed_is_what_one_accumulator_of_all_would_have_seen() -> None:
    needs = frozenset({"absmax", "sumsq", "hessian", "sample"})
    x = torch.randn(3000, 8, generator=torch.Generator().manual_seed(0))
    whole, sum_of_parts = Accumulator(needs, 8, 3000), Accumulator(needs, 8, 3000)
    whole.add(x)
    for part in x.split([0, 1000, 1, 1999]):
        accumulator = Accumulator(needs, 8, 3000)
        accumulator.add(part)
        sum_of_parts.merge(accumulator)
    expected, found = whole.statistics(), sum_of_parts.statistics()
    assert found.tokens == 3000
    for name in ("absmax_I", "sumsq_I", "hessian_II"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))
    assert found.sample_SI is not None
    assert 900 < len(found.sample_SI) < 2048


@every_family
def test_smoothing_folds_into_the_norm_with_the_router_as_one_more_consumer(family: str, toy: Make) -> None:
    stream = BlockStream(Checkpoint(toy(family)), CPU, torch.float32)
    states = [stream.embed(ROWS)]
    stream.forward(stream.load_block(0), 0, states)
    block = stream.load_block(1)
    inputs = find_inputs(block, stream.blocks[1], lambda m: stream.run(m, 1, states[0]))
    gate, up, down = LEAVES[family]
    path, router = mixture(family), "router" if family in ("gpt_oss", "llama4") else "gate"
    heads = {f"{path}.experts.{e}.{leaf}" for e in range(4) for leaf in (gate, up)}
    (shared,) = (i for i in inputs if f"{path}.experts.0.{gate}" in i.consumers)
    assert {f"{path}.{router}", *heads} <= set(shared.consumers)
    assert shared.producer is not None
    assert shared.producer.module == "post_attention_layernorm"
    folds = {i.consumers: i.producer.module for i in inputs if i.mixture and i.producer}
    # That of gpt-oss adds one to what the up projection makes, and clamps it.
    known = {(f"{path}.experts.{e}.{down}",): f"{path}.experts.{e}.{up}" for e in range(4)}
    assert folds == ({} if family == "gpt_oss" else known)


def test_a_killed_run_goes_on_to_the_same_bytes(
    toy: Make, recipe_file: Any, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(out: str) -> None:
        model, recipe = str(toy("gpt_oss")), recipe_file("vq-small")
        quantize(QuantizeOptions(model, tmp_path / out, recipe, [str(text)], samples=4, seqlen=32))

    save, saved = writer.save_file, []

    def save_two(*args: Any, **kwargs: Any) -> None:
        if len(saved) == 2:
            raise KeyboardInterrupt
        saved.append(1)
        save(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(writer, "save_file", save_two)
        with pytest.raises(KeyboardInterrupt):
            run("killed")
    assert len(json.loads((tmp_path / "killed" / "journal.json").read_text())["blocks"]) == 2
    run("killed")
    run("straight")
    assert files(tmp_path / "killed") == files(tmp_path / "straight")


@pytest.mark.parametrize(
    ("family", "recipe"),
    [("mixtral", "vq-2bit"), ("qwen3_moe", "smoothquant-int8"), ("gpt_oss", "vq-small"), ("llama4", "fp8-tile")],
)
def test_stacked_experts_compute_what_they_do_one_by_one(family: str, recipe: str, quantized: Make) -> None:
    folder = quantized(recipe, family)
    one_by_one, stacked = load(folder, cpu_weights="dense"), load(folder, cpu_weights="packed")
    bytes_of_one = sum(b.numel() * b.itemsize for b in one_by_one.buffers())
    # A code of an activation may be another one where sums differ in the last bit.
    assert relative_rms(logits(stacked), logits(one_by_one)) < (2e-2 if recipe == "fp8-tile" else 1e-4)
    modules = [m for m in stacked.modules() if isinstance(m, Experts)]
    assert modules
    assert all(m._stacks.keys() == {*m.first, m.last} for m in modules)
    assert not any(m._stacks for m in one_by_one.modules() if isinstance(m, Experts))
    # The parts are viewed where they are stacked, not held twice, and are still those of the artifact.
    storages = {b.untyped_storage().data_ptr(): b.untyped_storage().nbytes() for b in stacked.buffers()}
    assert sum(storages.values()) <= bytes_of_one * 1.01
    layer = next(m for m in stacked.modules() if isinstance(m, CompressedLinear) and ".0." in m.entry.target.name)
    for name, part in one_by_one.get_submodule(layer.entry.target.name).parts().items():
        assert torch.equal(part, layer.parts()[name])


def test_an_index_beyond_the_experts_adds_nothing(quantized: Make) -> None:
    model = load(quantized("int8-plain", "mixtral"), cpu_weights="packed")
    experts = next(m for m in model.modules() if isinstance(m, Experts))
    x_TI = torch.randn(5, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    index_TK, weight_TK = torch.tensor([[0, 1], [1, 4], [4, 4], [3, 0], [2, 1]]), torch.rand(5, 2)
    index_TK[index_TK == 4] = len(experts.leaves())
    found_TI = experts(x_TI, index_TK, weight_TK)
    assert not found_TI[2].any()
    kept_TK = torch.tensor([[True, False]]).expand(5, 2)
    alone_TI = experts(x_TI[1:2], index_TK[1:2].clamp(max=3), torch.where(kept_TK, weight_TK, 0)[1:2])
    torch.testing.assert_close(found_TI[1:2], alone_TI)


def test_other_weights_in_the_place_of_stacked_ones_are_noticed(quantized: Make) -> None:
    one, other = (load(quantized("vq-small", "mixtral", seed=seed), cpu_weights="packed") for seed in (0, 1))
    wanted = logits(other)
    assert not torch.equal(logits(one), wanted)
    state = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    one.load_state_dict(state, assign=True)
    assert torch.equal(logits(one), wanted)


# Ways to store the weights of a mixture that a GPU multiplies in one launch for all experts, and the relative error of
# a token's logits to the same on a CPU: activations in 8 bits may be rounded to another code.
STORED = {
    "int8": ("method: int8", 2e-2),
    "fp8": ("method: fp8", 2e-2),
    "learned": ("method: vq, d: 2, bits: 4, iterations: 2, codebook_updates: 0", 1e-3),
    "trellis": ("method: vq, codebook: trellis, state_bits: 8", 1e-3),
}
PROMPT = 6
every_way_to_store = pytest.mark.parametrize("name", STORED)


@torch.inference_mode()
def run_mixture(folder: Path, device: str) -> tuple[Tensor, Tensor]:
    """A mixture's logits (L, V) of a prompt and the tokens that it decodes then."""
    network = load(folder, device=device, cpu_weights="packed")
    prompt_BL = ROWS[:1, :PROMPT].to(device)
    logits_LV = network(prompt_BL).logits[0].float()
    modules = [m for m in network.modules() if isinstance(m, Experts)]
    assert modules
    assert all(m._stacks.keys() == {*m.first, m.last} for m in modules)
    settings = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    out_BL = network.generate(prompt_BL, attention_mask=torch.ones_like(prompt_BL), **settings)
    return logits_LV.cpu(), out_BL[:, PROMPT:].cpu()


def run_mixture_by_kernels(folder: Path) -> tuple[Tensor, Tensor]:
    """The same in a process with the interpreter, where what a GPU runs is behind the operators on a CPU too."""
    from vqcompress.methods.fp8 import kernel as fp8
    from vqcompress.methods.int8 import kernel as int8
    from vqcompress.methods.vq import reference as product

    calls = set()

    def by(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*arguments: Any) -> Tensor:
            ends_E = arguments[-1]
            of_experts = isinstance(ends_E, Tensor) and ends_E.dtype == torch.int32
            calls.add(f"{kernel.__name__}{' of experts' if of_experts else ''}")
            return kernel(*arguments)

        return run

    for operator, kernel in (
        (int8_ref.int8_linear, by(int8.linear)),
        (fp8_ref.fp8_linear, by(fp8.linear)),
        (product.vq_linear, by(product.on_gpu)),
    ):
        operator.register_kernel("cpu")(kernel)
    found = run_mixture(folder, "cpu")
    assert calls in ({"linear", "linear of experts"}, {"on_gpu", "on_gpu of experts"})
    return found


def check_mixture(name: str, folder: Path, found: tuple[Tensor, Tensor]) -> None:
    """Against decoded weights on a CPU, one expert after the other."""
    with torch.inference_mode():
        wanted_LV = load(folder, cpu_weights="dense")(ROWS[:1, :PROMPT]).logits[0].float()
    errors = [relative_rms(f, w) for f, w in zip(found[0], wanted_LV, strict=True)]
    # One of the tokens may have two experts that are as good as equal, and go to the other.
    assert sorted(errors)[-2] < STORED[name][1]
    assert found[1].shape == (1, 3)
    assert found[1][0, 0] == found[0][-1].argmax()


@pytest.fixture(scope="module")
def interpret() -> Any:
    with interpreter() as call:
        yield call


@pytest.mark.slow
@every_way_to_store
def test_a_mixture_by_its_kernels(name: str, quantized: Make, interpret: Callable[..., Any]) -> None:
    # One layer is enough of what takes the interpreter so long.
    folder = quantized(f"rules:\n  - {{match: '*', {STORED[name][0]}}}\n", "mixtral", layers=1)
    check_mixture(name, folder, interpret(run_mixture_by_kernels, folder))


@pytest.mark.gpu
@needs_gpu
@every_way_to_store
def test_a_mixture_on_a_gpu(name: str, quantized: Make) -> None:
    """Experts in one launch, and decoding as a graph, which answers what single steps do."""
    folder = quantized(f"rules:\n  - {{match: '*', {STORED[name][0]}}}\n", "mixtral")
    check_mixture(name, folder, run_mixture(folder, "cuda"))


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
@torch.no_grad()
def test_routing_does_not_change_by_a_bit_when_smoothing_is_folded(family: str, toy: Make, tmp_path: Path) -> None:
    """In float32 and with what is stored in 16 bits."""

    def sharpen(tensors: dict[str, Tensor]) -> None:
        """Norms whose channels are not alike."""
        for name in tensors:
            if name.endswith("post_attention_layernorm.weight"):
                tensors[name] = (3 * torch.randn(64, generator=torch.Generator().manual_seed(0))).exp2().bfloat16()

    source = rewritten(toy(family, dtype="bfloat16"), tmp_path / "sharp", sharpen)
    stream = BlockStream(Checkpoint(source), CPU, torch.float32)
    rules = f"rules:\n  - {{match: '*.{mixture(family)}.*', method: int8, smoothing: {{alpha: 0.5, mlp: fold}}}}\n"
    plan = make_plan(stream, parse(rules, "test"))
    states = first_states(stream, ROWS)
    stream.forward(stream.load_block(0), 0, states)
    context = BlockContext(stream, plan, 1, states, 0)
    _, module, inputs, statistics = study(context)
    experts = next(m for m in module.modules() if isinstance(m, Experts))
    calls: list[tuple[Tensor, ...]] = []
    experts.register_forward_pre_hook(lambda _, args: calls.append(experts.routing(*args)))
    stream.run(module, 1, states[0])
    rewrites = Smoother(context, module, statistics).smooth(inputs)
    router = f"{mixture(family)}.{'router' if family in ('gpt_oss', 'llama4') else 'gate'}"
    assert {"post_attention_layernorm", router} <= rewrites.dense
    s_I = rewrites.columns[router]
    assert s_I.unique().numel() > 2
    assert torch.equal(s_I.log2(), s_I.log2().round())
    # As it comes back from the disk.
    for path in ("post_attention_layernorm", router):
        weight = module.get_submodule(path).get_parameter("weight")
        assert torch.equal(weight, weight.bfloat16().float())
    stream.run(module, 1, states[0])
    (x_TI, index_TK, weight_TK), (smoothed_TI, *routing) = calls
    assert torch.equal(index_TK, routing[0])
    assert torch.equal(weight_TK, routing[1])
    assert torch.equal(smoothed_TI * s_I, x_TI)


@pytest.mark.parametrize("family", [*LEAVES, "qwen2_moe", "afmoe"])
def test_routers_and_gates_stay_dense_in_every_packaged_recipe(family: str, toy: Make) -> None:
    stream = BlockStream(Checkpoint(toy(family)), CPU, torch.float32)
    names = {"qwen2_moe": ("gate", "shared_expert_gate"), "gpt_oss": ("router",), "llama4": ("router",)}
    names["afmoe"] = ("router.gate",)
    left = {f"model.layers.*.{mixture(family)}.{name}.weight" for name in names.get(family, ("gate",))}
    for recipe in (load_recipe(name) for name in packaged() if not name.startswith("kv-")):
        for plan in make_plans(stream, recipe, 4.0 if recipe.candidates else None):
            told = {name: why for name, why in plan.left_dense.items() if name in left}
            assert told.keys() == left
            assert all("routes or gates" in why for why in told.values())
            assert not {target.name.rpartition(".")[2] for target in plan.targets} & {"gate", "router", "wg"}
            assert any(".experts.0." in target.name for target in plan.targets)
            # All else in the blocks is compressed.
            assert plan.left_dense.keys() <= left | {"model.embed_tokens.weight", "lm_head.weight"}


# What decides about experts in the last block of a model → config class, its fields beside those of `toy_config`.
DECIDES: dict[str, tuple[str, dict[str, Any]]] = {
    "mlp.router.gate": ("Afmoe", {"num_experts": 4, "num_dense_layers": 0}),
    "mlp.gate.wg": ("HunYuanMoEV1", {"num_experts": 4, "num_local_experts": 4, "moe_topk": 2}),
    # Two more rows, for experts that do nothing, and matrices without a use for them.
    "mlp.router.classifier": (
        "LongcatFlash",
        {"num_layers": 1, "expert_ffn_hidden_size": 32, "n_routed_experts": 4, "zero_expert_num": 2},
    ),
    "router.proj": ("Gemma4Text", {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "pad_token_id": 0}),
    "ffn.router.layer": (
        "Dbrx",
        {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4}, "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 32}},
    ),
    # An expert more, which does nothing.
    "mlp.gate.down_proj mlp.gate.router_mlp.fc1 mlp.gate.router_mlp.fc2 mlp.gate.router_mlp.out_proj": (
        "Zaya",
        {"num_experts": 4, "num_experts_per_tok": 1, "router_hidden_size": 16},
    ),
    "self_attention.experts.router.layer mlp.router.layer": ("JetMoe", {"num_local_experts": 4, "kv_channels": 16}),
    # Shared experts with as many inner channels as there are experts, as those of Qwen3-Next.
    "mlp.shared_expert_gate": ("Qwen2Moe", {"num_experts": 4, "shared_expert_intermediate_size": 4}),
}


@pytest.mark.parametrize("refused", [False, True])
@pytest.mark.parametrize("paths", DECIDES)
def test_what_decides_about_experts_is_no_target_wherever_it_lies(paths: str, refused: bool) -> None:
    kind, fields = DECIDES[paths]
    common = {"vocab_size": 384, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16}
    common |= {"num_key_value_heads": 2, "intermediate_size": 128, "moe_intermediate_size": 32, "pad_token_id": None}
    config = getattr(transformers, f"{kind}Config")(**{**common, **fields})
    model = skeleton(config, torch.float32)
    if not refused:
        unfuse(model)
    block, layer = blocks_of(model)[-1], find_blocks(model)[1][-1]
    dense = {n for n, m in layer.named_modules() if type(m) is nn.Linear} - {block.local(t) for t in block.targets}
    # All else is a target, shared experts among them.
    assert dense == set(paths.split())
