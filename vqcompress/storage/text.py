"""Calibration text and the rows of tokens that are cut from it."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from vqcompress.errors import VQCompressError, first_line
from vqcompress.storage.hub import check_text

DEFAULT_SAMPLES = 128
FEWEST_SAMPLES = 8
BUILT_IN = Path(__file__).parent.parent / "demo" / "calibration.txt"


def read_text(source: str) -> str:
    """The text of a plain-text file, of the `text` column of a JSONL or Parquet file, or of a dataset id.

    Documents are joined by a blank line. A dataset id is `name`, `name:split` or `name/config:split`, read with the
    `datasets` library.
    """
    path = Path(source)
    if path.is_dir():
        raise VQCompressError(f"{source} is a directory; give a text, JSONL or Parquet file")
    if not path.is_file():
        return _dataset_text(source)
    if path.suffix == ".parquet":
        return "\n\n".join(_parquet_column(path))
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise VQCompressError(f"{path} is not UTF-8 text: {error}") from error
    if path.suffix == ".json":
        raise VQCompressError(
            f"{path}: give JSONL (one object with a 'text' a line, named .jsonl), Parquet or plain text"
        )
    if path.suffix == ".jsonl":
        return "\n\n".join(_jsonl(content, path))
    return content


def _jsonl(content: str, path: Path) -> Iterable[str]:
    for number, line in enumerate(content.splitlines(), 1):
        if line.strip():
            try:
                yield str(json.loads(line)["text"])
            except (ValueError, KeyError, TypeError) as error:
                raise VQCompressError(f"{path}, line {number}: not a JSON object with a 'text'") from error


def _parquet_column(path: Path) -> list[str]:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError as error:
        raise VQCompressError(f"reading {path} needs pyarrow: pip install 'vqcompress[data]'") from error
    try:
        return [str(t) for t in parquet.read_table(path, columns=["text"])["text"].to_pylist() if t is not None]
    except (ArrowInvalid, KeyError, OSError) as error:
        raise VQCompressError(f"{path} is not a Parquet file with a 'text' column") from error


def _dataset_text(source: str) -> str:
    check_text(source)
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise VQCompressError(
            f"no such text file: {source}; as a dataset id it needs the datasets library:"
            " pip install 'vqcompress[data]'"
        ) from error
    name, _, split = source.partition(":")
    parts = name.split("/")
    try:
        data = load_dataset("/".join(parts[:2]), *parts[2:], split=split or "train", streaming=True)
        # Far more than any calibration reads, and little enough to tokenize in a minute.
        return "\n\n".join(str(row["text"]) for row in itertools.islice(data, 20_000))
    except Exception as error:  # a dataset can fail in as many ways as there are loaders; all mean the same here
        raise VQCompressError(f"the dataset {source} cannot be read: {first_line(error)}") from error


def cut_rows(tokens: Tensor, samples: int | None, seqlen: int, seed: int) -> Tensor:
    """Calibration rows (N, L) int64: windows of `seqlen` tokens, without overlap, drawn by the seed, in text order.

    tokens: (n,) the whole text. samples: how many; None takes up to 128 of what there is, and at least 8.
    """
    windows = len(tokens) // seqlen
    wanted = samples if samples is not None else max(FEWEST_SAMPLES, min(DEFAULT_SAMPLES, windows))
    if windows < wanted:
        raise VQCompressError(
            f"the calibration text is too short: {len(tokens)} tokens give {windows} rows of {seqlen}, {wanted} are"
            " needed; give more text, or a smaller --samples or --seqlen"
        )
    order = torch.randperm(windows, generator=torch.Generator().manual_seed(seed))[:wanted].sort().values
    return tokens[: windows * seqlen].view(windows, seqlen)[order].long()


def calibration_rows(
    sources: list[str], tokenize: Callable[[str], Tensor], samples: int | None, seqlen: int, seed: int
) -> Tensor:
    """Rows (N, L) from the given texts, or from the built-in one; `tokenize` adds no special tokens."""
    text = "\n\n".join(read_text(s) for s in sources) if sources else BUILT_IN.read_text(encoding="utf-8")
    return cut_rows(tokenize(text), samples, seqlen, seed)


def fingerprint(rows: Tensor) -> str:
    """SHA-256 of calibration rows."""
    return hashlib.sha256(rows.contiguous().numpy().tobytes()).hexdigest()
