"""The method of docs/add-a-method.md, taken out of the page, goes the whole way."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from cases import SHAPES, WEIGHTS
from safetensors.torch import load_file
from test_methods import assert_laws_of_storage

import vqcompress
from vqcompress import methods
from vqcompress.errors import VQCompressError
from vqcompress.evaluate.perplexity import perplexity
from vqcompress.evaluate.verify import verify
from vqcompress.export import export
from vqcompress.methods import Method
from vqcompress.storage.artifact import Artifact

PAGE = Path(__file__).parent.parent.parent / "docs" / "add-a-method.md"
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
CLASS = next(body for kind, body in BLOCKS if kind == "python" and "class RTN" in body)
PROGRAM = next(body for kind, body in BLOCKS if kind == "python" and "METHODS[" in body)
RECIPE = next(body for kind, body in BLOCKS if kind == "yaml")


@pytest.fixture(scope="module")
def rtn() -> Iterator[type[Method]]:
    """The class, known to the package."""
    module = ModuleType("rtn")
    # Where pydantic looks for the names in annotations.
    sys.modules["rtn"] = module
    exec(compile(CLASS, str(PAGE), "exec"), module.__dict__)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(methods.METHODS, "rtn", module.RTN)
        yield module.RTN
    del sys.modules["rtn"]


def test_the_example_is_short(rtn: type[Method]) -> None:
    assert len(CLASS.splitlines()) <= 66


@pytest.mark.parametrize("options", [{}, {"bits": 3, "group": 50}], ids=str)
def test_it_keeps_the_laws_of_storage(rtn: type[Method], options: dict[str, int]) -> None:
    for shape in SHAPES:
        for weight in WEIGHTS.values():
            assert_laws_of_storage(rtn(**options), weight(shape))


def test_it_goes_the_whole_way(
    rtn: type[Method], toy: Callable[..., Path], quantized: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    out = quantized(RECIPE)
    assert verify(str(out))["targets"] == 14
    figures = perplexity(str(out), str(text), str(toy()), seqlen=64, limit=8)
    assert figures["perplexity"] == pytest.approx(figures["baseline"]["perplexity"], rel=0.1)
    ids = torch.arange(32)[None] % 300
    with torch.inference_mode():
        logits = vqcompress.load(out)(ids).logits
    assert logits.isfinite().all()

    export(str(out), "dense", tmp_path / "dense")
    artifact, dense = Artifact(out), {}
    for file in (tmp_path / "dense").glob("*.safetensors"):
        dense |= load_file(file)
    for name, entry in artifact.entries.items():
        parts = artifact.read([f"{name}.weight_codes", f"{name}.weight_scale"])
        own = {key.removeprefix(f"{name}.weight_"): part for key, part in parts.items()}
        assert torch.equal(dense[f"{name}.weight"], entry.decode(own))
    assert {type(entry.method) for entry in artifact.entries.values()} == {rtn}


def test_who_does_not_know_it_is_told(
    rtn: type[Method], quantized: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = quantized(RECIPE)
    monkeypatch.delitem(methods.METHODS, "rtn")
    with pytest.raises(VQCompressError, match="no method 'rtn'"):
        vqcompress.load(out)


def test_the_program_of_the_page_runs(
    rtn: type[Method], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rtn.yaml").write_text(RECIPE)
    exec(compile(PROGRAM, str(PAGE), "exec"), {})
    # 4 bits, and 16 for every 64 columns.
    assert capsys.readouterr().out == "4.25\n"
    assert verify("demo-rtn")["targets"] == 21
