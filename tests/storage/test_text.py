"""Calibration text from files of several formats."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vqcompress.errors import VQCompressError
from vqcompress.storage.text import read_text


def test_files_with_a_column_of_text_are_read(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    parquet = pytest.importorskip("pyarrow.parquet")
    from pyarrow import table

    texts = ["One.\nTwo.", "Three."]
    (tmp_path / "plain.txt").write_text("\n\n".join(texts))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text, "n": 1}) + "\n" for text in texts))
    parquet.write_table(table({"text": texts}), tmp_path / "rows.parquet")
    for name in ("plain.txt", "rows.jsonl", "rows.parquet"):
        assert read_text(str(tmp_path / name)) == "One.\nTwo.\n\nThree."


@pytest.mark.parametrize(("name", "data"), [("x.txt", b"\xff"), ("x.jsonl", b"{"), ("x.jsonl", b'{"a": 1}\n')])
def test_a_file_that_holds_no_text_is_named(name: str, data: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(VQCompressError, match=name):
        read_text(str(tmp_path / name))


@pytest.mark.parametrize("source", ["nowhere", "/nowhere/text", "org/text.txt"])
def test_a_missing_file_is_named(source: str) -> None:
    with pytest.raises(VQCompressError, match=source):
        read_text(source)


def test_a_dataset_that_cannot_be_read_and_a_missing_library_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **settings: Any) -> None:
        raise TimeoutError

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=fail))
    with pytest.raises(VQCompressError, match=r"org/text .*TimeoutError"):
        read_text("org/text")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(VQCompressError, match=r"datasets"):
        read_text("org/text")
