"""`lm_eval` evaluates an artifact by the command in docs/serving.md, and its figure is that of a plain loop."""

from __future__ import annotations

import json
import math
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

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


@pytest.mark.parametrize("recipe", ["vq-small"])
def test_the_documented_command_gives_the_figure_of_a_plain_loop(
    recipe: str, quantized: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = pytest.importorskip("datasets.config")
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    task, command = re.search(r"```yaml\n(task:.*?)```", page, re.S), re.search(r"```\n(python -c .*?)```", page, re.S)
    assert task
    assert command
    (tmp_path / "my_text.yaml").write_text(task[1])
    (tmp_path / "my_text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    (tmp_path / "demo-2bit").symlink_to(quantized(recipe))
    python, _, code, *arguments = shlex.split(command[1].replace("\\\n", " "))
    assert python == "python"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(sys, "argv", ["-c", *arguments])
    with torch.random.fork_rng():
        exec(code, {})
    (results,) = tmp_path.glob("results/**/results_*.json")
    found = json.loads(results.read_text())["results"]["my_text"]["bits_per_byte,none"]
    assert found == pytest.approx(bits_per_byte(quantized(recipe)), rel=1e-5)
