"""Artifacts of every format version that was ever released still load and compute what they did."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import vqcompress
from vqcompress.evaluate.verify import verify
from vqcompress.storage.artifact import FORMAT_VERSION

GOLDEN = Path(__file__).parent.parent / "golden"


def test_the_present_version_has_its_golden_artifact() -> None:
    assert (GOLDEN / f"v{FORMAT_VERSION}").is_dir()


@pytest.mark.parametrize("version", sorted(path.name for path in GOLDEN.iterdir() if path.is_dir()))
def test_a_golden_artifact_computes_what_it_did(version: str) -> None:
    verify(str(GOLDEN / version))
    expected = load_file(GOLDEN / f"{version}.safetensors")
    with torch.inference_mode():
        logits = vqcompress.load(GOLDEN / version)(expected["ids"]).logits
    # Eight-bit activations may round another way on another processor: one step there, hardly anything here.
    error = (logits - expected["logits"]).square().mean().sqrt() / expected["logits"].square().mean().sqrt()
    assert error < 1e-3
