"""Texts from files of several formats: documents, chats, and everything that is neither."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vqcompress.errors import Notice, VQCompressError
from vqcompress.storage.text import check_calibration, check_text, read_documents, split_share


def contents(source: Path | str) -> list[Any]:
    return [document.content for document in read_documents(str(source))]


def test_files_with_a_column_of_text_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    from pyarrow import table

    monkeypatch.setitem(sys.modules, "datasets", None)
    texts = ["One.\nTwo.", "Three."]
    (tmp_path / "plain.txt").write_text("\n\n".join(texts))
    assert contents(tmp_path / "plain.txt") == ["One.\nTwo.\n\nThree."]
    lines = "".join(json.dumps({"text": text, "n": 1}) + "\n" for text in texts)
    (tmp_path / "rows.jsonl").write_text(lines)
    (tmp_path / "rows.json").write_text(json.dumps([{"text": text} for text in texts], indent=1))
    parquet.write_table(table({"text": texts}), tmp_path / "rows.parquet")
    for name in ("rows.jsonl", "rows.json", "rows.parquet"):
        assert contents(tmp_path / name) == texts


def test_json_lines_end_at_line_feeds_only(tmp_path: Path) -> None:
    """A byte-order mark, blank lines, Windows' ends of lines, and separators of Unicode inside of a string."""
    text = "a\u2028b\u2029c\x85d\x1ce"
    line = json.dumps({"text": text}, ensure_ascii=False)
    (tmp_path / "x.jsonl").write_bytes(f"\ufeff{line}\r\n\r\n  \n{line}".encode())
    assert contents(tmp_path / "x.jsonl") == [text, text]


CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]


@pytest.mark.parametrize(
    ("row", "content"),
    [
        ({"messages": CHAT}, CHAT),
        ({"text": None, "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]}, CHAT[:1]),
        ({"prompt": "Hi", "completion": "Ho"}, "HiHo"),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, CHAT),
    ],
)
def test_rows_are_texts_or_chats(row: Any, content: Any, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(json.dumps(row))
    assert contents(tmp_path / "x.jsonl") == [content]


def test_conversations_have_roles_of_their_own(tmp_path: Path) -> None:
    talk = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]
    (tmp_path / "x.jsonl").write_text(json.dumps({"conversations": talk}))
    ((user, assistant),) = contents(tmp_path / "x.jsonl")
    assert [user["role"], user["content"], assistant["role"]] == ["user", "Hi", "assistant"]


@pytest.mark.parametrize(
    ("name", "data", "named"),
    [
        ("x.txt", b"\xff", "x.txt"),
        ("x.jsonl", b"{", "line 1"),
        ("x.jsonl", b'{"text": "a"}\n\n{"text": "b"', "line 3"),
        ("x.jsonl", b'{"text": "a"}\n{"text": "\xff"}', "line 2"),
        ("x.json", b'[\n{"text": "a"},\n]', "line 3"),
        ("x.jsonl", b'{"a": 1}\n', "line 1"),
        ("x.jsonl", b'"text"\n', "line 1"),
        ("x.jsonl", b'{"text": "a"}\n{"text": 12}', "line 2"),
        ("x.jsonl", b'{"text": ["a"]}', "line 1"),
        ("x.jsonl", b'{"text": "\\ud800"}', "line 1"),
        ("x.jsonl", b'{"messages": [{"role": "user", "content": null}]}', "line 1"),
        ("x.jsonl", b'{"messages": [{"content": "a"}]}', "line 1"),
        ("x.jsonl", b'{"conversations": "a"}', "line 1"),
        ("x.json.gz", b"\x1f\x8b", "x.json.gz"),
        ("x.parquet", b"{}", "x.parquet"),
        ("x.jsonl", b"", "x.jsonl"),
    ],
)
def test_a_file_that_holds_no_text_is_named(name: str, data: bytes, named: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(VQCompressError, match=name) as error:
        read_documents(str(tmp_path / name))
    assert named in str(error.value)
    assert "\n" not in str(error.value)


def test_a_row_without_a_value_is_left_out_with_a_warning(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n{"text": null}\n{"text": null}\n')
    with pytest.warns(Notice, match=r"x.jsonl: 2 .*line 2"):
        assert contents(tmp_path / "x.jsonl") == ["a"]


@pytest.mark.parametrize("source", ["/nowhere/text", "org/text.txt", "./text", "a/b/c/d", "nowhere.jsonl", " "])
def test_a_missing_file_is_named(source: str) -> None:
    with pytest.raises(VQCompressError, match=source):
        check_text(source)


@pytest.mark.parametrize(
    "source", ["wikimedia/wikipedia/20231101.en", "imdb:test", "imdb", "allenai/c4/en.noblocklist"]
)
def test_a_dataset_may_have_dots_and_no_owner(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(*names: str, split: str, streaming: bool) -> list[dict[str, str]]:
        asked.append(("/".join(names), split))
        return [{"text": "a"}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    check_text(source)
    assert contents(source) == ["a"]
    assert asked == [(source.partition(":")[0], source.partition(":")[2] or "train")]


def test_a_dataset_that_cannot_be_read_and_a_missing_library_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **settings: Any) -> None:
        raise TimeoutError

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=fail))
    for source in ("org/text", "nowhere"):
        with pytest.raises(VQCompressError, match=rf"{source} .*TimeoutError"):
            read_documents(source)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(VQCompressError, match=r"datasets"):
        read_documents("org/text")


def test_a_share_stands_behind_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x=0.5").touch()
    names = {"a.txt=0.7": ("a.txt", 0.7), "self=3": ("self", 3.0), "x=0.5": ("x=0.5", None), "a=b": ("a=b", None)}
    assert {name: split_share(name) for name in names} == names
    check_calibration("self=1")
    for wrong in ("a.txt=0", "a.txt=-1", "a.txt=nan", "a.txt=inf", "no.txt=0.5"):
        with pytest.raises(VQCompressError, match=r"no such"):
            check_calibration(wrong)
