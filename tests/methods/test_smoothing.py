"""Smoothing rewrites W x exactly, folds only where that is proven, and makes outliers bearable."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from toys import toy_checkpoint

from vqcompress.methods import make
from vqcompress.methods.smoothing import Smoothing, fit_smoothing, output_error, smoothing_factors, tied_max
from vqcompress.methods.statistics import Accumulator, Statistics
from vqcompress.model.folds import Input, find_inputs
from vqcompress.model.stream import BlockStream
from vqcompress.model.targets import linear_targets
from vqcompress.pipeline import quantize as quantizing
from vqcompress.pipeline.calibration import first_states
from vqcompress.pipeline.context import BlockContext
from vqcompress.pipeline.gather import gather
from vqcompress.pipeline.plan import make_plan
from vqcompress.pipeline.smoothing import Smoother
from vqcompress.runtime.load import load
from vqcompress.storage.artifact import Artifact
from vqcompress.storage.checkpoint import SINGLE, Checkpoint
from vqcompress.storage.recipe import parse
from vqcompress.storage.targets import Block

CPU = torch.device("cpu")
MORE = ["gemma", "opt", "gpt_neox"]
ROWS = torch.randint(3, 384, (4, 32), generator=torch.Generator().manual_seed(0))


def lively(path: Path, family: str, dtype: str = "float32", **extra: Any) -> Path:
    """A toy whose norms and biases are not the ones and zeros they start as."""
    toy_checkpoint(path, family, hidden=64, **extra)
    tensors = load_file(path / SINGLE)
    draw = torch.Generator().manual_seed(1)
    for name, tensor in sorted(tensors.items()):
        if tensor.dim() == 1:
            tensor = tensor + 0.2 * torch.randn(tensor.shape, generator=draw)
        tensors[name] = tensor.to(getattr(torch, dtype))
    save_file(tensors, path / SINGLE, metadata={"format": "pt"})
    return path


def recipe(smoothing: str, method: str = "int8") -> str:
    return f"rules:\n  - {{match: '*', method: {method}, smoothing: {smoothing}}}\n"


EVERYWHERE = "{alpha: 0.5, norm: fold, attention: fold, mlp: fold}"


def smoothed_block(path: Path, text: str) -> tuple[BlockStream, nn.Module, nn.Module, Any, list[Input], Tensor]:
    """The first block before and after `smooth`, the rewrites, the inputs, and hidden states to try them on."""
    stream = BlockStream(Checkpoint(path), CPU, torch.float32)
    plan = make_plan(stream, parse(text, "test"))
    states = first_states(stream, ROWS)
    dense, module = stream.load_block(0), stream.load_block(0)
    inputs = find_inputs(module, plan.blocks[0], lambda m: stream.run(m, 0, states[0]))
    context = BlockContext(stream, plan, 0, states, 0)
    rewrites = Smoother(context, module, gather(context, module, inputs)).smooth(inputs)
    return stream, dense, module, rewrites, inputs, states[0]


def divide_at_run_time(module: nn.Module, rewrites: Any) -> None:
    """What a CompressedLinear with a smoothing vector does to its input."""
    for path in rewrites.runtime:
        module.get_submodule(path).register_forward_pre_hook(
            lambda _, args, s=rewrites.columns[path]: (args[0] / s, *args[1:])
        )


def test_the_formula_against_numbers_computed_by_hand() -> None:
    x = torch.tensor([16.0, 1.0, 0.25, 4.0])
    w = torch.tensor([0.25, 1.0, 4.0, 4.0])
    torch.testing.assert_close(smoothing_factors(x, w, 0.5), torch.tensor([8.0, 1.0, 0.25, 1.0]))
    torch.testing.assert_close(smoothing_factors(x, w, 1.0), x)
    torch.testing.assert_close(smoothing_factors(x, w, 0.0), 1 / w)
    torch.testing.assert_close(smoothing_factors(x, w, 0.75), torch.tensor([8 * 2**0.5, 1.0, 0.25, 2.0]))


def test_silent_and_unread_channels_keep_their_scale() -> None:
    s = smoothing_factors(torch.tensor([0.0, 8.0]), torch.tensor([2.0, 0.0]), 0.5)
    assert s.tolist() == [1.0, 1.0]


def test_channels_of_one_row_of_the_producer_share_a_factor() -> None:
    assert tied_max(torch.tensor([1.0, 5.0, 3.0, 2.0]), torch.tensor([0, 1, 0, 1]), 2).tolist() == [3.0, 5.0]


@pytest.mark.parametrize("family", ["llama", *(pytest.param(f, marks=pytest.mark.slow) for f in MORE), "mixtral"])
def test_smoothing_leaves_the_function_of_a_block_unchanged(family: str, tmp_path: Path) -> None:
    stream, dense, module, rewrites, _, hidden = smoothed_block(lively(tmp_path, family), recipe(EVERYWHERE))
    assert rewrites.columns, "nothing was smoothed"
    assert any((s - 1).abs().max() > 0.1 for s in rewrites.columns.values())
    divide_at_run_time(module, rewrites)
    expected = stream.run(dense, 0, hidden)
    torch.testing.assert_close(stream.run(module, 0, hidden), expected, atol=2e-5 * expected.abs().max().item(), rtol=0)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_what_is_folded_survives_being_stored_in_bfloat16(family: str, tmp_path: Path) -> None:
    """Norms and dense consumers are written back in the type of the checkpoint; their rounding must cost nothing."""
    stream, dense, module, rewrites, _, hidden = smoothed_block(
        lively(tmp_path, family, "bfloat16"), recipe(EVERYWHERE)
    )
    for path in rewrites.dense:
        for name, parameter in module.get_submodule(path).named_parameters(recurse=False):
            if parameter.dim() == 1 or path not in rewrites.columns:
                parameter.data = parameter.data.bfloat16().float()
                assert torch.isfinite(parameter).all(), (path, name)
    divide_at_run_time(module, rewrites)
    expected = stream.run(dense, 0, hidden)
    torch.testing.assert_close(stream.run(module, 0, hidden), expected, atol=2e-5 * expected.abs().max().item(), rtol=0)


FOLDS: dict[str, dict[str, str | None]] = {
    "llama": {
        "self_attn.q_proj": "input_layernorm",
        "self_attn.o_proj": "self_attn.v_proj",
        "mlp.gate_proj": "post_attention_layernorm",
        "mlp.down_proj": "mlp.up_proj",
    },
    "gemma": {
        "self_attn.q_proj": "input_layernorm",
        "self_attn.o_proj": "self_attn.v_proj",
        "mlp.gate_proj": "post_attention_layernorm",
        "mlp.down_proj": "mlp.up_proj",
    },
    # ReLU passes positive factors through.
    "opt": {
        "self_attn.q_proj": "self_attn_layer_norm",
        "self_attn.out_proj": "self_attn.v_proj",
        "fc1": "final_layer_norm",
        "fc2": "fc1",
    },
    # GELU does not; and q, k and v are one matrix, whose rows no factor of the attention's output can scale.
    "gpt_neox": {
        "attention.query_key_value": "input_layernorm",
        "attention.dense": None,
        "mlp.dense_h_to_4h": "post_attention_layernorm",
        "mlp.dense_4h_to_h": None,
    },
}


@pytest.mark.parametrize("family", FOLDS)
def test_folds_go_where_they_are_exact_and_nowhere_else(family: str, tmp_path: Path) -> None:
    _, _, _, rewrites, inputs, _ = smoothed_block(lively(tmp_path, family), recipe(EVERYWHERE))
    found = {i.consumers[0]: i.producer.module if i.producer else None for i in inputs}
    assert found == FOLDS[family]
    assert rewrites.runtime == {path for path, producer in found.items() if producer is None}


def test_grouped_query_attention_ties_the_factors_of_its_heads(tmp_path: Path) -> None:
    _, _, _, rewrites, _, _ = smoothed_block(lively(tmp_path, "llama"), recipe(EVERYWHERE))
    # Four query heads of 16 channels, two value heads: heads 0 and 1 read the first, 2 and 3 the second.
    s_HC = rewrites.columns["self_attn.o_proj"].view(4, 16)
    assert torch.equal(s_HC[0], s_HC[1])
    assert torch.equal(s_HC[2], s_HC[3])
    assert not torch.equal(s_HC[0], s_HC[2])


class Gossip(nn.Module):
    """A block that uses what its norm gives in one more place than its linear layers."""

    def __init__(self, share: float):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.up, self.down, self.share = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16), share

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.down(torch.tanh(self.up(h))) + self.share * h


@pytest.mark.parametrize("share", [0.0, 0.1])
def test_a_norm_that_somebody_else_reads_is_not_folded_into(share: float) -> None:
    module = Gossip(share).requires_grad_(False)
    x = torch.randn(1, 20, 16, generator=torch.Generator().manual_seed(1))
    block = Block("block", linear_targets(module, "block"))
    up, down = find_inputs(module, block, lambda m: m(x))
    assert (up.producer is not None) == (share == 0)
    assert down.producer is None, "tanh does not pass factors through"


def test_looking_for_folds_leaves_the_block_as_it_was(tmp_path: Path) -> None:
    stream = BlockStream(Checkpoint(lively(tmp_path, "llama")), CPU, torch.float32)
    hidden = first_states(stream, ROWS)[0]
    module = stream.load_block(0)
    before = {name: p.clone() for name, p in module.named_parameters()}
    find_inputs(module, stream.blocks[0], lambda m: stream.run(m, 0, hidden))
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())


def outlier_input() -> tuple[list[Tensor], Statistics]:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(200, 64, generator=draw)
    x[:, 5] *= 50
    accumulator = Accumulator(frozenset({"absmax", "sample"}), 64, 200)
    accumulator.add(x)
    return [torch.randn(32, 64, generator=draw), torch.randn(16, 64, generator=draw)], accumulator.statistics()


def test_alpha_auto_takes_the_point_of_the_grid_with_the_lowest_error() -> None:
    weights, statistics = outlier_input()
    methods = [make("int8", {})] * 2
    smoothing = Smoothing(grid=(0.1, 0.5, 0.6, 1.0))
    s, alpha = fit_smoothing(smoothing, weights, methods, statistics, torch.arange(64), False, 0)
    errors = {}
    assert statistics.absmax_I is not None
    for a in smoothing.grid:
        factors = smoothing_factors(statistics.absmax_I, torch.cat(weights).abs().amax(0), a)
        errors[a] = output_error(weights, methods, statistics, factors, torch.Generator().manual_seed(0))
        assert a != alpha or torch.equal(s, factors)
    errors[None] = output_error(weights, methods, statistics, torch.ones(64), torch.Generator().manual_seed(0))
    assert alpha == min(errors, key=lambda a: errors[a])
    assert errors[alpha] < 0.25 * errors[None]


def test_alpha_auto_leaves_alone_what_smoothing_would_only_harm() -> None:
    draw = torch.Generator().manual_seed(0)
    accumulator = Accumulator(frozenset({"absmax", "sample"}), 64, 200)
    accumulator.add(torch.sign(torch.randn(200, 64, generator=draw)))
    weight = torch.randn(32, 64, generator=draw)
    weight[:, ::2] *= 0.01
    s, alpha = fit_smoothing(
        Smoothing(grid=(0.0,)), [weight], [make("int8", {})], accumulator.statistics(), torch.arange(64), False, 0
    )
    errors = [
        output_error([weight], [make("int8", {})], accumulator.statistics(), f, torch.Generator().manual_seed(0))
        for f in (torch.ones(64), smoothing_factors(torch.ones(64), weight.abs().amax(0), 0.0))
    ]
    assert (alpha is None) == (errors[0] <= errors[1])
    assert (alpha is None) == bool((s == 1).all())


@pytest.mark.parametrize(
    ("smoothing", "runtime", "folded"),
    [
        ("{alpha: 0.5, norm: runtime}", {"norm"}, set()),
        ("{alpha: 0.5, norm: none, mlp: runtime}", {"mlp"}, set()),
        ("{alpha: 0.5, norm: fold, attention: runtime, mlp: none}", {"attention"}, {"norm"}),
    ],
)
def test_each_place_is_smoothed_as_the_recipe_says(
    smoothing: str, runtime: set[str], folded: set[str], tmp_path: Path
) -> None:
    _, _, _, rewrites, inputs, _ = smoothed_block(lively(tmp_path, "llama"), recipe(smoothing))
    place = {path: entrance.role for entrance in inputs for path in entrance.consumers}
    assert {place[path] for path in rewrites.runtime} == runtime
    assert {place[path] for path in rewrites.columns.keys() - rewrites.runtime} == folded


@torch.inference_mode()
@pytest.mark.parametrize("family", ["llama", "mixtral", *(pytest.param(f, marks=pytest.mark.slow) for f in MORE)])
def test_runtime_smoothing_round_trips_through_an_artifact(family: str, quantized: Callable[..., Path]) -> None:
    folder = quantized("int8-runtime", family)
    model = load(folder)
    vectors = [name for name, _ in model.named_buffers() if name.endswith("weight_smoothing")]
    assert len(vectors) == sum(hasattr(m, "entry") for m in model.modules())
    stream = BlockStream(Artifact(folder), CPU, torch.float32)
    states = [stream.embed(ROWS)]
    for i in range(len(stream.blocks)):
        stream.forward(stream.load_block(i), i, states)
    torch.testing.assert_close(stream.logits(states[0]), model(ROWS).logits, atol=1e-4, rtol=1e-4)


def inject_outliers(path: Path, target: Path, layers: int) -> Path:
    """The same function with 4 channels after each norm 32 times larger and 4 of up_proj 16 times, to the bit."""
    tensors = load_file(path / SINGLE)
    draw = torch.Generator().manual_seed(0)

    def factors(size: int, scale: float) -> Tensor:
        s = torch.ones(size)
        s[torch.randperm(size, generator=draw)[:4]] = scale
        return s

    for i in range(layers):
        prefix = f"model.layers.{i}."
        for norm, consumers in (
            ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ):
            s = factors(len(tensors[f"{prefix}{norm}.weight"]), 32)
            tensors[f"{prefix}{norm}.weight"] *= s
            for consumer in consumers:
                tensors[f"{prefix}{consumer}.weight"] /= s
        s = factors(len(tensors[f"{prefix}mlp.up_proj.weight"]), 16)
        tensors[f"{prefix}mlp.up_proj.weight"] *= s[:, None]
        tensors[f"{prefix}mlp.down_proj.weight"] /= s
    target.mkdir()
    for file in path.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    save_file(tensors, target / SINGLE, metadata={"format": "pt"})
    return target


@torch.inference_mode()
def test_smoothquant_bears_outliers_that_int8_does_not(
    toy: Callable[..., Path], recipe_file: Callable[[str], str], text: Path, tmp_path: Path
) -> None:
    loud = inject_outliers(toy(), tmp_path / "loud", 2)
    exact = transformers.AutoModelForCausalLM.from_pretrained(toy(), dtype=torch.float32)(ROWS).logits
    same = transformers.AutoModelForCausalLM.from_pretrained(loud, dtype=torch.float32)(ROWS).logits
    torch.testing.assert_close(same, exact, atol=1e-5, rtol=1e-5)
    errors = {}
    for name in ("int8-plain", "smoothquant-int8"):
        quantizing.quantize(
            quantizing.QuantizeOptions(str(loud), tmp_path / name, recipe_file(name), [str(text)], samples=8, seqlen=64)
        )
        errors[name] = (load(tmp_path / name)(ROWS).logits - exact).square().mean().item()
    assert errors["smoothquant-int8"] < 0.1 * errors["int8-plain"], errors
