"""Perplexity is the figure of a plain loop, whatever is streamed, strided or compared."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer

from vqcompress.errors import UsageError, VQCompressError
from vqcompress.evaluate.perplexity import first_scored, perplexity, windows
from vqcompress.evaluate.speed import speed
from vqcompress.runtime.load import load

Make = Callable[..., Path]


@torch.inference_mode()
def plain(model: Any, folder: Path, text: Path, seqlen: int, limit: int) -> float:
    """The perplexity by the plainest loop."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text.read_text(), add_special_tokens=False, return_tensors="pt").input_ids[0]
    total = 0.0
    for i in range(limit):
        row = ids[None, i * seqlen : (i + 1) * seqlen]
        total += cross_entropy(model(row).logits[0, :-1].double(), row[0, 1:], reduction="sum").item()
    return math.exp(total / (limit * (seqlen - 1)))


@pytest.mark.parametrize("family", ["llama", "opt", "mixtral"])
def test_perplexity_equals_a_plain_loop(family: str, toy: Make, text: Path) -> None:
    found = perplexity(str(toy(family)), str(text), seqlen=48, limit=9)
    expected = plain(load(str(toy(family))), toy(family), text, 48, 9)
    assert found["perplexity"] == pytest.approx(expected, rel=1e-6 if family != "mixtral" else 1e-5)
    assert (found["tokens"], found["windows"], found["seqlen"], found["stride"]) == (9 * 47, 9, 48, 48)


@pytest.mark.parametrize("recipe", ["smoothquant-int8", "fp8-tile", "vq-small", "int8-runtime"])
def test_streaming_an_artifact_equals_loading_it(recipe: str, quantized: Make, text: Path) -> None:
    folder = quantized(recipe)
    found = perplexity(str(folder), str(text), seqlen=48, limit=6)["perplexity"]
    # The sums of a batch are rounded otherwise than a row's, and 8-bit activations make steps of that.
    assert found == pytest.approx(plain(load(folder), folder, text, 48, 6), rel=1e-3)


def test_the_result_has_its_stable_keys(toy: Make, text: Path) -> None:
    found = perplexity(str(toy()), str(text), seqlen=32, limit=2, baseline=str(toy("llama", seed=1)))
    assert found.keys() >= {
        "perplexity", "nll_per_token", "bits_per_byte", "tokens", "windows", "seqlen", "stride", "bos", "seconds",
        "tokens_per_second", "peak_rss_bytes", "baseline", "kl_divergence", "top1_agreement",
    }  # fmt: skip
    assert found["kl_divergence"].keys() == {"mean", "p99", "max"}
    assert found["perplexity"] == pytest.approx(math.exp(found["nll_per_token"]))
    assert 0 < found["kl_divergence"]["mean"] <= found["kl_divergence"]["max"]
    assert found["top1_agreement"] < 1


def test_a_model_agrees_with_itself(toy: Make, text: Path) -> None:
    found = perplexity(str(toy()), str(text), seqlen=32, limit=4, baseline=str(toy()))
    assert found["baseline"]["perplexity"] == found["perplexity"]
    assert found["kl_divergence"]["max"] == pytest.approx(0, abs=1e-6)
    assert found["top1_agreement"] == 1


@pytest.mark.parametrize(("seqlen", "stride"), [(8, 8), (8, 4), (8, 7), (8, 1), (2, 1)])
def test_every_token_is_scored_once(seqlen: int, stride: int) -> None:
    cut = windows(torch.arange(41), seqlen, stride, None)
    labels = [row[1 + first_scored(number, seqlen, stride) :] for number, row in enumerate(cut)]
    seen = torch.cat(labels).tolist()
    assert len(seen) == len(set(seen))
    # Without overlap the first token of a window has nothing before it that could predict it.
    expected = set(range(1, int(cut.max()) + 1)) - (set(range(0, 41, seqlen)) if stride == seqlen else set())
    assert set(seen) == expected


def test_a_stride_scores_tokens_with_more_before_them(toy: Make, text: Path) -> None:
    tokens = perplexity(str(toy()), str(text), seqlen=32, stride=8, limit=5)["tokens"]
    assert tokens == 31 + 4 * 8


def test_bits_per_byte_divide_by_the_bytes_of_what_was_predicted(toy: Make, text: Path) -> None:
    found = perplexity(str(toy()), str(text), seqlen=32, limit=4)
    ids = AutoTokenizer.from_pretrained(toy())(text.read_text(), add_special_tokens=False)["input_ids"][: 4 * 32]
    pieces = [i for n, i in enumerate(ids) if n % 32]
    count = len(AutoTokenizer.from_pretrained(toy()).decode(pieces).encode())
    assert found["bits_per_byte"] == pytest.approx(found["nll_per_token"] * found["tokens"] / math.log(2) / count)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"seqlen": 10**6}, VQCompressError, "--seqlen 1000000"),
        ({"seqlen": 32, "stride": 33}, UsageError, "--stride 33"),
        ({"text": "/nowhere.txt"}, VQCompressError, "/nowhere.txt"),
        ({"model": "/nowhere"}, VQCompressError, "/nowhere"),
    ],
)
def test_wrong_arguments_are_named_errors(
    change: dict[str, Any], error: type[Exception], said: str, toy: Make, text: Path
) -> None:
    arguments = {"model": str(toy()), "text": str(text), "seqlen": 32, **change}
    with pytest.raises(error, match=said):
        perplexity(**arguments)


@pytest.mark.parametrize("vocab", [300, 400])
def test_a_baseline_with_another_vocabulary_is_refused(vocab: int, toy: Make, text: Path) -> None:
    other = str(toy("llama", vocab=vocab))
    with pytest.raises(VQCompressError, match=re.escape(other)):
        perplexity(str(toy()), str(text), baseline=other, seqlen=32, limit=1)


def test_a_text_that_is_not_utf8_is_a_named_error(toy: Make, tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 100)
    with pytest.raises(VQCompressError, match=r"latin\.txt"):
        perplexity(str(toy()), str(tmp_path / "latin.txt"), seqlen=32)


@pytest.mark.parametrize("compressed", [False, True])
def test_speed_reports_its_stable_keys(compressed: bool, toy: Make, quantized: Make) -> None:
    found = speed(str(quantized("int8-plain") if compressed else toy()), prompt_tokens=8, new_tokens=3, batch=2)
    assert found.keys() >= {
        "prefill_tokens_per_second", "decode_tokens_per_second", "time_to_first_token", "peak_rss_bytes", "batch",
    }  # fmt: skip
    assert found["decode_tokens_per_second"] > 0
