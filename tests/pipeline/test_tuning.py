"""Output correction by the closing layer of a block, and distillation after the codes are fixed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kills import contents

from vqcompress.errors import UsageError
from vqcompress.evaluate.perplexity import perplexity
from vqcompress.evaluate.verify import verify
from vqcompress.model.folds import find_inputs
from vqcompress.model.stream import BlockStream
from vqcompress.pipeline.calibration import first_states
from vqcompress.pipeline.context import BlockContext
from vqcompress.pipeline.correction import closing_layer
from vqcompress.pipeline.plan import make_plan
from vqcompress.pipeline.quantize import QuantizeOptions, quantize
from vqcompress.storage.artifact import Artifact
from vqcompress.storage.checkpoint import Checkpoint, resolve
from vqcompress.storage.recipe import dump, parse

Make = Callable[..., Path]
CPU = torch.device("cpu")
IDS = torch.randint(384, (4, 48), generator=torch.Generator().manual_seed(7))
RULE = "{match: '*', method: vq, d: 2, bits: 7, iterations: 2, codebook_updates: 0%s}"


def recipe(folder: Path, knobs: str = "", tuning: str = "") -> str:
    path = folder / f"recipe-{abs(hash((knobs, tuning)))}.yaml"
    path.write_text(f"{tuning}\nrules:\n  - {RULE % knobs}\n", encoding="utf-8")
    return str(path)


def run(model: Path, out: Path, file: str, text: Path, **more: Any) -> dict[str, Any]:
    return quantize(QuantizeOptions(str(model), out, file, [str(text)], samples=8, seqlen=64, **more))


@pytest.mark.parametrize(
    ("family", "closing"),
    [
        ("llama", "mlp.down_proj"),
        ("gemma", "mlp.down_proj"),
        ("opt", "fc2"),
        ("gpt_neox", "mlp.dense_4h_to_h"),
        ("mixtral", None),
    ],
)
def test_the_closing_layer_is_found_and_proven(toy: Make, family: str, closing: str | None) -> None:
    stream = BlockStream(Checkpoint(toy(family)), CPU, torch.float32)
    states = first_states(stream, IDS)
    module = stream.load_block(0)
    before = stream.run(module, 0, states[0])
    inputs = find_inputs(module, stream.blocks[0], lambda m: stream.run(m, 0, states[0]), prove=False)
    context = BlockContext(stream, make_plan(stream, parse(f"rules: [{RULE % ''}]", "test")), 0, states, 0)
    assert closing_layer(context, module, inputs) == closing
    assert torch.equal(stream.run(module, 0, states[0]), before)


@pytest.mark.slow
def test_compensation_and_distillation_bring_the_predictions_nearer(tmp_path: Path) -> None:
    """On a trained model: errors of a random one have no meaning that a least squares could find."""
    demo = resolve("demo")
    text, loss = str(demo / "evaluation.txt"), {}
    original = perplexity("demo", text, seqlen=128, limit=24)["nll_per_token"]
    for name, knobs, head in (
        ("plain", ", compensate: false", ""),
        ("compensated", "", ""),
        ("distilled", "", "tuning: {distill_epochs: 1}"),
    ):
        file = tmp_path / f"{name}.yaml"
        file.write_text(f"{head}\nrules:\n  - {{match: '*', method: vq, codebook: trellis, state_bits: 8{knobs}}}\n")
        report = quantize(QuantizeOptions("demo", tmp_path / name, str(file), samples=96, seqlen=128))
        closing = [row["name"] for row in report["targets"] if row["compensates"]]
        assert closing == ([] if name == "plain" else [f"model.layers.{i}.mlp.down_proj" for i in range(3)])
        assert verify(str(tmp_path / name))["targets"] == 21
        loss[name] = perplexity(str(tmp_path / name), text, seqlen=128, limit=24)["nll_per_token"] - original
    assert loss["compensated"] < 0.9 * loss["plain"]
    assert loss["distilled"] < loss["compensated"]


TUNED = "tuning: {distill_epochs: 1}"


def test_codes_stay_and_scales_codebooks_and_norms_move(toy: Make, text: Path, tmp_path: Path) -> None:
    model = toy("llama", dtype="bfloat16")
    run(model, tmp_path / "a", recipe(tmp_path), text)
    run(model, tmp_path / "b", recipe(tmp_path, "", "tuning: {distill_epochs: 4, distill_rate: 0.05}"), text)
    first, second = (Artifact(tmp_path / name) for name in "ab")
    assert first.tensors.keys() == second.tensors.keys()
    plain, tuned = first.read(first.tensors), second.read(second.tensors)
    moved = {name for name in plain if not torch.equal(plain[name], tuned[name])}
    assert all(plain[name].dtype == tuned[name].dtype for name in plain)
    assert not [name for name in moved if name.endswith(("codes", "step", "embed_tokens.weight", "lm_head.weight"))]
    for ending in ("scale", "codebook", "input_layernorm.weight", "model.norm.weight"):
        assert [name for name in moved if name.endswith(ending)], ending


@pytest.mark.parametrize(
    ("family", "rule"),
    [("mixtral", RULE % ""), ("opt", "{match: '*', method: vq, codebook: trellis, state_bits: 8, bits: 2}")],
)
def test_tuned_artifacts_load_and_run(
    family: str, rule: str, toy: Make, text: Path, recipe_file: Callable[[str], str], tmp_path: Path
) -> None:
    run(toy(family), tmp_path / "out", recipe_file(f"{TUNED}\nrules:\n  - {rule}\n"), text)
    assert perplexity(str(tmp_path / "out"), str(text), seqlen=64, limit=4)["perplexity"] < 1e5


@pytest.mark.slow
def test_same_bytes_whatever_the_threads(toy: Make, text: Path, tmp_path: Path) -> None:
    file, threads, sums = recipe(tmp_path, "", TUNED), torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            run(toy("llama"), tmp_path / str(count), file, text)
            sums.append(contents(tmp_path / str(count)))
    finally:
        torch.set_num_threads(threads)
    assert sums[0] == sums[1]


@pytest.mark.parametrize(
    ("head", "rule", "named"),
    [
        ("tuning: 3", RULE % "", "tuning"),
        ("tuning: {epochs: 3}", RULE % "", "epochs"),
        ("tuning: {distill_rate: -1}", RULE % "", "distill_rate"),
        ("tuning: {distill_epochs: 0}", RULE % "", "distill_epochs"),
        # Nothing of FP8 can be tuned.
        (TUNED, "{match: '*', method: fp8}", "test"),
    ],
)
def test_tuning_that_means_nothing_is_refused(head: str, rule: str, named: str) -> None:
    with pytest.raises(UsageError, match=named):
        parse(f"{head}\nrules:\n  - {rule}\n", "test")


def test_a_recipe_says_its_tuning() -> None:
    plain = parse(f"rules:\n  - {RULE % ''}\n", "test")
    tuned = parse(f"{TUNED}\nrules:\n  - {RULE % ''}\n", "test")
    assert plain.fingerprint() != tuned.fingerprint()
    assert parse(dump(tuned), "again").fingerprint() == tuned.fingerprint()
    assert json.dumps(tuned.tuning.model_dump()) if tuned.tuning else False
