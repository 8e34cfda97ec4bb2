"""What `scripts/fuzz.py` does to artifacts and recipes, for a few seconds; VQCOMPRESS_FUZZ_SECONDS asks for more."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import fuzz
import pytest

Make = Callable[..., Path]


def test_damage_is_refused_by_name_or_changes_nothing(quantized: Make) -> None:
    seconds, seed = (float(os.environ.get(f"VQCOMPRESS_FUZZ_{name}", d)) for name, d in (("SECONDS", 15), ("SEED", 0)))
    result = fuzz.fuzz([quantized("int8-runtime"), quantized("vq-small")], seconds, int(seed))
    assert result.failures == []
    assert result.cases


def test_the_fuzz_notices_a_check_that_is_gone(quantized: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "verify", lambda path: None)
    monkeypatch.setattr(fuzz, "KINDS", [("stale bytes", fuzz.stale_bytes)])
    assert len(fuzz.fuzz([quantized("int8-plain")], 60, most=3).failures) == 3
