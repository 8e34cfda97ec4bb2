"""Texts: plain files, files with a document or a chat in every row, and datasets of the hub. No torch."""

from __future__ import annotations

import codecs
import itertools
import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from vqcompress.errors import Notice, VQCompressError, one_line

# In place of a calibration text: rows are sampled from the model.
SELF = "self"
BUILT_IN = Path(__file__).parent.parent / "demo" / "calibration.txt"
# Files with a document in every row.
TABLES = (".jsonl", ".ndjson", ".json", ".parquet")
# What ends so is a file. Other names with dots may be datasets: wikimedia/wikipedia/20231101.en.
FILES = (*TABLES, ".txt", ".text", ".md", ".csv", ".tsv", ".gz", ".zst", ".zip")
# NAME, OWNER/NAME or OWNER/NAME/CONFIG, then perhaps a colon and a split.
DATASET = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*){0,2}(:[\w.+-]+)?")
# A name and a share above zero.
SHARE = re.compile(r"(.+)=(?=[\d.]*[1-9])(\d*\.?\d+)")
# Far more than any calibration reads, and little enough to tokenize in a minute.
MOST_ROWS = 20_000
# Names of roles in `conversations` → those in `messages`.
ROLES = {"human": "user", "gpt": "assistant"}

Chat = list[dict[str, Any]]


class Document(NamedTuple):
    """A text or the messages of a chat, and where it is from: the file and the line, or the number of the row."""

    content: str | Chat
    where: str


def check_text(source: str) -> None:
    """VQCompressError unless a text is there, or may be the id of a dataset."""
    if not source or (not Path(source).exists() and (not DATASET.fullmatch(source) or source.lower().endswith(FILES))):
        raise VQCompressError(f"no such text file: {source}")


def split_share(given: str) -> tuple[str, float | None]:
    """`NAME=0.7` as the name of a text and its share of the rows; None without one, or if a file has the whole name."""
    found = None if Path(given).exists() else SHARE.fullmatch(given)
    return (found[1], float(found[2])) if found else (given, None)


def check_calibration(given: str) -> None:
    """`check_text` of what stands before a share; rows of the model itself need no text."""
    if (name := split_share(given)[0]) != SELF:
        check_text(name)


def is_plain(source: str) -> bool:
    """Whether a text is one document, to be read as it is."""
    return Path(source).is_file() and not source.lower().endswith(TABLES)


def read_documents(source: str) -> list[Document]:
    """The documents of a text: the whole of a plain file, else one per row of a JSON, Parquet or dataset.

    A row has a `text`, the `messages` (or `conversations`) of a chat, or a `prompt` and a `completion`. Rows without a
    value are left out, with a warning. A value that is no text is a VQCompressError that names its line or row.
    Datasets are OWNER/NAME/CONFIG:SPLIT; CONFIG and SPLIT may be left out.
    """
    if is_plain(source):
        try:
            return [Document(Path(source).read_text(encoding="utf-8-sig"), source)]
        except UnicodeDecodeError as error:
            raise VQCompressError(f"{source} is not UTF-8 text: {error}") from error
    check_text(source)
    found, empty = [], []
    for where, row in _rows(source):
        try:
            content = _content(row)
        except ValueError as error:
            raise VQCompressError(f"{where}: {one_line(error)}") from error
        if content:
            found.append(Document(content, where))
        elif content is None:
            empty.append(f"{where} has no value")
    warn_of_skipped(source, empty)
    if not found:
        raise VQCompressError(f"{source} holds no text")
    return found


def warn_of_skipped(source: str, reasons: list[str]) -> None:
    """Warn that rows of a text are left out, each for a reason."""
    if reasons:
        warnings.warn(f"{source}: {len(reasons)} rows are left out; the first: {reasons[0]}", Notice, stacklevel=2)


def _rows(source: str) -> Iterator[tuple[str, Any]]:
    """Where each row is from, and the row."""
    path = Path(source)
    if path.is_file() and path.suffix.lower() != ".parquet":
        yield from _json_rows(path)
        return
    try:
        yield from ((f"{source}, row {number}", row) for number, row in enumerate(_table_rows(source, path), 1))
    except ImportError as error:
        raise VQCompressError(f"reading {source} needs the {error.name} library: pip install {error.name}") from error
    except Exception as error:  # a dataset can fail in as many ways as there are loaders
        lost = "" if path.exists() else " (there is no such file, and as a dataset it fails)"
        raise VQCompressError(f"{source} cannot be read{lost}: {one_line(error)}") from error


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """The rows of a file of JSON lines, or of a file that is one JSON array."""
    data = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    is_array = data.lstrip().startswith(b"[")
    # Bytes are split, because str.splitlines would also split strings at U+2028 and its like.
    for number, line in enumerate([data] if is_array else data.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            parsed = json.loads(line)
        except (ValueError, RecursionError) as error:
            at = number - 1 + getattr(error, "lineno", 1)
            raise VQCompressError(f"{path}, line {at}: no valid JSON: {one_line(error)}") from error
        rows = enumerate(parsed, 1) if is_array else [(number, parsed)]
        yield from ((f"{path}, {'row' if is_array else 'line'} {n}", row) for n, row in rows)


def _table_rows(source: str, path: Path) -> Iterator[Any]:
    """The rows of a Parquet file or of a dataset."""
    if path.is_file():
        from pyarrow import parquet

        return (row for batch in parquet.ParquetFile(path).iter_batches() for row in batch.to_pylist())
    from datasets import load_dataset

    name, _, split = source.partition(":")
    parts = [name] if path.is_dir() else name.split("/")
    data = load_dataset("/".join(parts[:2]), *parts[2:], split=split or "train", streaming=True)
    return itertools.islice(data, MOST_ROWS)


def _content(row: Any) -> str | Chat | None:
    """The text or chat of a row; None if its value is missing. ValueError for any other row."""
    if not isinstance(row, dict):
        raise ValueError("no JSON object")
    # A table has a null where a row has nothing in a column.
    given = {key: value for key, value in row.items() if value is not None}
    if "text" in given:
        return _text(given["text"], "text")
    for key in ("messages", "conversations"):
        if key in given:
            return _chat(given[key], key)
    if {"prompt", "completion"} <= given.keys():
        prompt, completion = given["prompt"], given["completion"]
        if isinstance(prompt, list) and isinstance(completion, list):
            return _chat(prompt + completion, "prompt and completion")
        return _text(prompt, "prompt") + _text(completion, "completion")
    if row.keys() & {"text", "messages", "conversations", "completion"}:
        return None
    found = ", ".join(map(str, row)) or "nothing"
    raise ValueError(f"has no text, no messages or conversations, and no prompt with completion, but {found}")


def _text(value: Any, key: str) -> str:
    """The value, if it is a text; ValueError if not, or if it holds half a surrogate pair."""
    if not isinstance(value, str):
        raise ValueError(f"{key} is {json.dumps(value, default=str)[:40]}, which is no text")
    value.encode()
    return value


def _chat(value: Any, key: str) -> Chat:
    """The messages of a chat, each with `role` and `content`."""
    chat = []
    for number, message in enumerate(value if isinstance(value, list) else [value]):
        name = f"{key}[{number}]"
        if not isinstance(message, dict):
            raise ValueError(f"{name} is no message with role and content")
        role, content = (message.get(a, message.get(b)) for a, b in (("role", "from"), ("content", "value")))
        if isinstance(content, list):
            parts = [part.get("text") if isinstance(part, dict) else part for part in content]
            content = "".join(_text(part, f"{name}.content") for part in parts)
        content = "" if content is None and message.get("tool_calls") else _text(content, f"{name}.content")
        chat.append({**message, "role": ROLES.get(str(role), _text(role, f"{name}.role")), "content": content})
    return chat
