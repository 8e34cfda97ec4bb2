"""On trained models: what the recipes promise, measured against the original on real text."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from vqcompress.evaluate import perplexity
from vqcompress.quantize import quantize
from vqcompress.verify import verify

WINDOWS, SEQLEN = 40, 512


@pytest.fixture(scope="module")
def dense(shared: Path) -> float:
    """The perplexity of wren-6m by the plainest loop."""
    folder = shared / "models" / "wren-6m"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    text = (shared / "text" / "wikitext2-test.txt").read_text(encoding="utf-8")
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0]
    total = 0.0
    with torch.inference_mode():
        for row in ids[: WINDOWS * SEQLEN].view(WINDOWS, SEQLEN).split(8):
            logits = model(row, use_cache=False).logits[:, :-1].float()
            total += cross_entropy(logits.flatten(0, 1), row[:, 1:].flatten(), reduction="sum").item()
    return math.exp(total / (WINDOWS * (SEQLEN - 1)))


def test_the_perplexity_of_the_original_is_that_of_a_plain_loop(shared: Path, dense: float) -> None:
    text = str(shared / "text" / "wikitext2-test.txt")
    found = perplexity(str(shared / "models" / "wren-6m"), text, seqlen=SEQLEN, limit=WINDOWS)
    assert found["perplexity"] == pytest.approx(dense, rel=1e-5)


@pytest.mark.parametrize(
    ("model", "recipe", "most"),
    [
        ("wren-6m", "smoothquant-int8", 1.0015),
        ("wren-6m", "fp8-tile", 1.0025),
        ("wren-6m-outliers", "smoothquant-int8", 1.002),
    ],
)
def test_eight_bits_cost_next_to_nothing(
    model: str, recipe: str, most: float, shared: Path, dense: float, tmp_path: Path
) -> None:
    quantize(
        str(shared / "models" / model),
        tmp_path / "out",
        recipe,
        [str(shared / "text" / "calibration.txt")],
        samples=32,
        seqlen=512,
    )
    verify(str(tmp_path / "out"))
    text = str(shared / "text" / "wikitext2-test.txt")
    found = perplexity(str(tmp_path / "out"), text, seqlen=SEQLEN, limit=WINDOWS)
    assert found["perplexity"] / dense <= most
