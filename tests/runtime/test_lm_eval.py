"""`lm_eval` evaluates an artifact by the command in docs/serving.md, and its figure is that of a plain loop."""

from __future__ import annotations

import importlib
import json
import math
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from toys import toy_text
from transformers import AutoTokenizer

from vqcompress.runtime.load import load

TEXTS = [toy_text(30, seed) for seed in range(5)]


@torch.inference_mode()
def bits_per_byte(folder: Path) -> float:
    """Of all texts, each after the token for a beginning."""
    model, tokenizer, nats = load(folder), AutoTokenizer.from_pretrained(folder), 0.0
    for text in TEXTS:
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False).input_ids]])
        logits = model(ids).logits[0, :-1].double()
        nats += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
    return nats / math.log(2) / sum(len(text.encode()) for text in TEXTS)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["vq-small"])
def test_the_documented_ways_give_the_figure_of_a_plain_loop(
    recipe: str, quantized: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = importlib.import_module("datasets.config")
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    task, command, program = (
        found[1]
        for start in (r"yaml\n(?=task:)", r"\n(?=python -c)", r"python\n(?=import lm_eval)")
        if (found := re.search(rf"```{start}(.*?)```", page, re.S))
    )
    (tmp_path / "my_text.yaml").write_text(task)
    (tmp_path / "my_text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    (tmp_path / "demo-2bit").symlink_to(quantized(recipe))
    python, _, code, *arguments = shlex.split(command.replace("\\\n", " "))
    assert python == "python"
    assert code.startswith("import vqcompress;")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(sys, "argv", ["-c", *arguments])
    ran: dict[str, Any] = {}
    with torch.random.fork_rng():
        exec(code, {})
        exec(program, ran)
    (written,) = tmp_path.glob("results/**/results_*.json")
    expected = pytest.approx(bits_per_byte(quantized(recipe)), rel=1e-5)
    for results in (json.loads(written.read_text()), ran["results"]):
        assert results["results"]["my_text"]["bits_per_byte,none"] == expected
