"""Errors made good after the codes are fixed: by the closing layer of a block, by tuning, by distillation."""

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
from vqcompress.pipeline import block as compress
from vqcompress.pipeline.block import first_states
from vqcompress.pipeline.correction import closing_layer
from vqcompress.pipeline.quantize import QuantizeOptions, quantize
from vqcompress.storage import artifact, writer
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
    return quantize(QuantizeOptions(str(model), out, file, [str(text)], samples=24, seqlen=64, **more))


@pytest.mark.parametrize(
    ("family", "closing"),
    [
        ("llama", "mlp.down_proj"),
        ("qwen3", "mlp.down_proj"),
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
    assert closing_layer(stream, 0, module, inputs, states[0]) == closing
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
    run(
        model,
        tmp_path / "b",
        recipe(tmp_path, "", "tuning: {distill_epochs: 4, distill_rate: 0.05}"),
        text,
    )
    first, second = (Artifact(tmp_path / name) for name in "ab")
    assert first.tensors.keys() == second.tensors.keys()
    plain, tuned = first.read(first.tensors), second.read(second.tensors)
    moved = {name for name in plain if not torch.equal(plain[name], tuned[name])}
    assert all(plain[name].dtype == tuned[name].dtype for name in plain)
    assert not [name for name in moved if name.endswith(("codes", "step", "embed_tokens.weight", "lm_head.weight"))]
    for ending in ("scale", "codebook", "input_layernorm.weight", "model.norm.weight"):
        assert [name for name in moved if name.endswith(ending)], ending
    assert not (tmp_path / "b" / artifact.SHARD.format(0, 0)).exists()


@pytest.mark.parametrize("family", ["llama", "mixtral", "opt"])
@pytest.mark.parametrize("method", ["", ", codebook: trellis, state_bits: 8, bits: 2"])
def test_tuned_artifacts_load_and_run(family: str, method: str, toy: Make, text: Path, tmp_path: Path) -> None:
    rule = f"{{match: '*', method: vq{method}}}" if method else RULE % ""
    file = tmp_path / "recipe.yaml"
    file.write_text(f"{TUNED}\nrules:\n  - {rule}\n", encoding="utf-8")
    run(toy(family), tmp_path / "out", str(file), text)
    assert perplexity(str(tmp_path / "out"), str(text), seqlen=64, limit=4)["perplexity"] < 1e5


class Killed(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize("at", ["second block", "distillation", "staged", "first shard taken in"])
@pytest.mark.slow
def test_a_killed_tuned_run_ends_in_the_same_bytes(
    at: str, toy: Make, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, file = toy("llama"), recipe(tmp_path, "", TUNED)
    run(model, tmp_path / "whole", file, text)

    def die(*_: Any, **__: Any) -> Any:
        raise Killed

    with monkeypatch.context() as patch:
        if at == "second block":
            study, calls = compress.study, []
            patch.setattr(compress, "study", lambda *a: study(*a) if not calls and not calls.append(1) else die())
        elif at == "distillation":
            patch.setattr("vqcompress.pipeline.quantize.distill", die)
        elif at == "staged":
            patch.setattr(writer.Writer, "apply_staged", die)
        else:
            # The shard is in its place, the journal does not know yet.
            write, done = writer.Writer._write_journal, []

            def mortal(into: writer.Writer) -> None:
                if artifact.STAGED in into.done:
                    done.append(1)
                if len(done) == 2:
                    raise Killed
                write(into)

            patch.setattr(writer.Writer, "_write_journal", mortal)
        with pytest.raises(Killed):
            run(model, tmp_path / "cut", file, text)
    run(model, tmp_path / "cut", file, text)
    sums = [contents(tmp_path / name) for name in ("whole", "cut")]
    assert sums[0] == sums[1]


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
    ("head", "reason"),
    [
        ("tuning: 3", "tuning=3"),
        ("tuning: {epochs: 3}", "tuning.epochs"),
        ("tuning: {distill_rate: -1}", "tuning.distill_rate"),
        ("tuning: {distill_epochs: 0}", "tuning.distill_epochs"),
    ],
)
def test_tuning_that_means_nothing_is_refused(head: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        parse(f"{head}\nrules:\n  - {RULE % ''}\n", "test")


def test_tuning_needs_something_to_tune() -> None:
    with pytest.raises(UsageError, match="nothing to tune"):
        parse("tuning: {distill_epochs: 2}\nrules:\n  - {match: '*', method: fp8}\n", "test")


def test_a_recipe_says_its_tuning() -> None:
    plain = parse(f"rules:\n  - {RULE % ''}\n", "test")
    tuned = parse(f"{TUNED}\nrules:\n  - {RULE % ''}\n", "test")
    assert plain.fingerprint() != tuned.fingerprint()
    assert parse(dump(tuned), "again").fingerprint() == tuned.fingerprint()
    assert json.dumps(tuned.tuning.model_dump()) if tuned.tuning else False
