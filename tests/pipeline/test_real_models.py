"""On trained models: what the recipes promise, measured against the original on real text."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from vqcompress.evaluate.perplexity import perplexity
from vqcompress.evaluate.verify import verify
from vqcompress.pipeline.quantize import QuantizeOptions, quantize

# The protocol of docs and README: 200 windows for evaluation, 128 rows for calibration.
WINDOWS, SEQLEN, SAMPLES = 200, 512, 128
# Of them, by which a plain loop is compared with our own.
FEW = 24


@pytest.fixture(scope="module")
def dense(shared: Path) -> dict[int, float]:
    """The perplexity of wren-6m on a few windows and on all, by the plainest loop."""
    folder = shared / "models" / "wren-6m"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    text = (shared / "text" / "wikitext2-test.txt").read_text(encoding="utf-8")
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0]
    total, found = 0.0, {}
    with torch.inference_mode():
        for number, row in enumerate(ids[: WINDOWS * SEQLEN].view(WINDOWS, SEQLEN).split(8), 1):
            logits = model(row, use_cache=False).logits[:, :-1].float()
            total += cross_entropy(logits.flatten(0, 1), row[:, 1:].flatten(), reduction="sum").item()
            found[8 * number] = math.exp(total / (8 * number * (SEQLEN - 1)))
    return found


@pytest.mark.parametrize("model", ["wren-6m"])
@pytest.mark.slow
def test_the_perplexity_of_the_original_is_that_of_a_plain_loop(
    model: str, shared: Path, dense: dict[int, float]
) -> None:
    text = str(shared / "text" / "wikitext2-test.txt")
    found = perplexity(str(shared / "models" / model), text, seqlen=SEQLEN, limit=FEW)
    assert found["perplexity"] == pytest.approx(dense[FEW], rel=1e-5)


# The other recipes' figures come from scripts/quickstart.py; all of them would take half of the suite's time.
@pytest.mark.parametrize(
    ("model", "recipe", "bits", "ratio"),
    [
        ("wren-6m", "smoothquant-int8", 8.2, 1.0008),
        ("wren-6m", "vq-2bit", 2.1, 1.042),
        ("wren-6m-outliers", "smoothquant-int8", 8.2, 1.0010),
        ("wren-6m-outliers", "fp8-tile", 8.01, 1.0018),
    ],
)
@pytest.mark.slow
def test_a_recipe_costs_no_more_than_it_promises(
    model: str, recipe: str, bits: float, ratio: float, shared: Path, dense: dict[int, float], tmp_path: Path
) -> None:
    texts = [str(shared / "text" / "calibration.txt")]
    report = quantize(QuantizeOptions(str(shared / "models" / model), tmp_path / "out", recipe, texts, SAMPLES, SEQLEN))
    verify(str(tmp_path / "out"))
    text = str(shared / "text" / "wikitext2-test.txt")
    found = perplexity(str(tmp_path / "out"), text, seqlen=SEQLEN, limit=WINDOWS)
    assert report["bits_per_weight"] <= bits
    assert found["perplexity"] / dense[WINDOWS] <= ratio
