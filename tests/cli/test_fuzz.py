"""Some cases of `scripts/fuzz.py`, which damages artifacts and recipes; VQCOMPRESS_FUZZ_CASES sets their number."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import fuzz
import pytest

Make = Callable[..., Path]
# About 0.1 s each.
CASES = 60


def test_damage_is_refused_by_name_or_changes_nothing(quantized: Make) -> None:
    cases, seed = (int(os.environ.get(f"VQCOMPRESS_FUZZ_{name}", d)) for name, d in (("CASES", CASES), ("SEED", 0)))
    # A slow machine may try fewer.
    seconds = 40 * cases / CASES
    result = fuzz.fuzz([quantized("int8-runtime"), quantized("vq-small")], seconds, seed, most=cases)
    assert result.failures == []
    assert sum(result.cases.values()) >= min(cases, 10)


def test_the_fuzz_notices_a_check_that_is_gone(quantized: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "verify", lambda path: None)
    monkeypatch.setattr(fuzz, "KINDS", [("stale bytes", fuzz.stale_bytes)])
    assert len(fuzz.fuzz([quantized("int8-plain")], 60, most=3).failures) == 3
