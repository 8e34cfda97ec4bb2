"""Hidden states in a file behave like a list of them, and change no byte of an artifact."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from kills import contents
from torch.utils._pytree import tree_flatten

from vqcompress.errors import VQCompressError
from vqcompress.pipeline.quantize import QuantizeOptions, quantize
from vqcompress.storage.hidden_states import State, StatesOnDisk, keep


def same(a: State, b: State) -> bool:
    (first, structure), (second, other) = tree_flatten(a), tree_flatten(b)
    return structure == other and all(x is y or torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_on_disk_are_a_list(dtype: torch.dtype, tmp_path: Path) -> None:
    states = [State(torch.randn(rows, 3, 8).to(dtype), torch.arange(3).expand(rows, 3)) for rows in (2, 1)]
    kept = keep(states, tmp_path)
    assert all(same(a, b) for a, b in zip(kept, states, strict=True))
    earlier = kept[1]
    # What a block answers beside the hidden states can make a state larger than its place in the file.
    pair = torch.zeros(1, 0), torch.ones(1, 9, dtype=torch.bool)
    larger = State(states[1].hidden + 1, states[1].ids, (None, pair[0]), {"shared": {"full": pair}}, True)
    kept[1] = larger
    assert same(earlier, states[1])
    assert same(kept[1], larger)
    kept[1] = states[1]
    assert same(kept[1], states[1])
    assert same(kept[0], states[0])
    # A file without a name: nothing is left behind, however the process ends.
    assert not list(tmp_path.iterdir())
    kept.clear()
    assert not kept
    assert keep(states, None) == states


def test_growing_states_on_disk_take_the_room_of_earlier_ones(tmp_path: Path) -> None:
    """As where every block fills a mapping further, for later ones."""
    states = StatesOnDisk([State(torch.zeros(1, 4, 8), torch.zeros(1, 4)) for _ in range(6)], tmp_path)
    for block in range(1, 9):
        for k in range(6):
            shared = {"keys": {n: torch.full((1, 4, 8), float(k)) for n in range(block)}}
            states[k] = State(states[k].hidden + k, states[k].ids, (), shared)
    live = sum(x.nbytes for state in states for x in tree_flatten(state)[0] if isinstance(x, torch.Tensor))
    assert states._file.seek(0, 2) < 1.5 * live
    for k in range(6):
        assert all(bool((x == k).all()) for x in states[k].shared["keys"].values())
        assert bool((states[k].hidden == 8 * k).all())


def test_a_full_disk_is_an_error_that_names_the_folder(tmp_path: Path) -> None:
    states = StatesOnDisk([], tmp_path)
    with open("/dev/full", "rb+", buffering=0) as full:
        states._file = full
        with pytest.raises(VQCompressError, match=re.escape(str(tmp_path))):
            states.append(State(torch.zeros(1, 2, 4), torch.zeros(1, 2)))


def test_states_on_disk_make_the_same_artifact(
    toy: Callable[..., Path], recipe_file: Callable[[str], str], text: Path, tmp_path: Path
) -> None:
    """With a second stream, of the dense model, that the last layer of a block is corrected by."""
    recipe = recipe_file("rules: [{match: '*', method: vq, codebook: trellis, state_bits: 8}]")
    for states in ("memory", "disk"):
        options = QuantizeOptions(str(toy()), tmp_path / states, recipe, [str(text)], samples=4, seqlen=32)
        quantize(replace(options, states=states))
    assert contents(tmp_path / "disk") == contents(tmp_path / "memory")
