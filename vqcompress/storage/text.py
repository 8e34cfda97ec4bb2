"""Calibration text and the rows of tokens that are cut from it."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from vqcompress.errors import VQCompressError, one_line
from vqcompress.storage.hub import check_text

DEFAULT_SAMPLES = 128
FEWEST_SAMPLES = 8
# Suffix of a file with a column `text` → the loader of `datasets` that reads it.
COLUMNS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
BUILT_IN = Path(__file__).parent.parent / "demo" / "calibration.txt"


def read_text(source: str) -> str:
    """The text of a plain-text file, of the `text` column of a JSONL or Parquet file, or of a dataset id.

    Documents are joined by a blank line. A dataset id is `name`, `name:split` or `name/config:split`. All but plain
    text is read with the `datasets` library, the extra `data`.
    """
    path = Path(source)
    if path.is_file() and path.suffix not in COLUMNS:
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise VQCompressError(f"{path} is not UTF-8 text: {error}") from error
    check_text(source)
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise VQCompressError(f"reading {source} needs the datasets library: pip install datasets") from error
    name, _, split = source.partition(":")
    parts = name.split("/")
    try:
        if path.is_file():
            data = load_dataset(COLUMNS[path.suffix], data_files=source, split="train", streaming=True)
        else:
            data = load_dataset("/".join(parts[:2]), *parts[2:], split=split or "train", streaming=True)
            # Far more than any calibration reads, and little enough to tokenize in a minute.
            data = itertools.islice(data, 20_000)
        return "\n\n".join(str(row["text"]) for row in data if row["text"] is not None)
    except Exception as error:  # a dataset can fail in as many ways as there are loaders
        raise VQCompressError(f"{source} cannot be read: {one_line(error)}") from error


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
