"""Hidden states in a file behave like a list of them, and change no byte of an artifact."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from kills import contents

from vqcompress.errors import VQCompressError
from vqcompress.pipeline.quantize import QuantizeOptions, quantize
from vqcompress.storage.hidden_states import StatesOnDisk, keep


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_on_disk_are_a_list(dtype: torch.dtype, tmp_path: Path) -> None:
    states = [torch.randn(2, 3, 8).to(dtype), torch.randn(1, 3, 8).to(dtype)]
    kept = keep(states, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(kept, states, strict=True))
    earlier = kept[1]
    kept[1] = states[1] + 1
    assert torch.equal(earlier, states[1])
    assert torch.equal(kept[1], states[1] + 1)
    assert torch.equal(kept[0], states[0])
    with pytest.raises(ValueError, match="item 0"):
        kept[0] = states[1]
    # A file without a name: nothing is left behind, however the process ends.
    assert not list(tmp_path.iterdir())
    kept.clear()
    assert not kept
    assert keep(states, None) == states


def test_a_full_disk_is_an_error_that_names_the_folder(tmp_path: Path) -> None:
    states = StatesOnDisk([], tmp_path)
    with open("/dev/full", "rb+", buffering=0) as full:
        states._file = full
        with pytest.raises(VQCompressError, match=re.escape(str(tmp_path))):
            states.append(torch.zeros(1, 2, 4))


def test_states_on_disk_make_the_same_artifact(
    toy: Callable[..., Path], recipe_file: Callable[[str], str], text: Path, tmp_path: Path
) -> None:
    """With a second stream, of the dense model, that the last layer of a block is corrected by."""
    recipe = recipe_file("rules: [{match: '*', method: vq, codebook: trellis, state_bits: 8}]")
    for states in ("memory", "disk"):
        options = QuantizeOptions(str(toy()), tmp_path / states, recipe, [str(text)], samples=4, seqlen=32)
        quantize(replace(options, states=states))
    assert contents(tmp_path / "disk") == contents(tmp_path / "memory")
