"""A checkpoint's tokenizer: from texts and chats to token ids, and to rows of them.

Shape legend: n tokens of a text, N rows, L tokens of a row.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from vqcompress.errors import UsageError, VQCompressError, one_line
from vqcompress.storage.text import is_plain, read_documents, warn_of_skipped
from vqcompress.storage.trust import reason, trusted


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a directory; VQCompressError if there is none."""
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trusted())
    except Exception as error:  # tokenizers raise whatever their parser raises
        raise VQCompressError(f"{path} has no tokenizer that loads; add tokenizer*.json: {reason(error)}") from error


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """The ids (n,) int64 of a whole text, tokenized once and without special tokens."""
    # The tokenizer would warn that the text is longer than the model's context; it is cut into windows later.
    ids = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def start_tokens(tokenizer: PreTrainedTokenizerBase, bos: str) -> list[int]:
    """The ids that begin every row: what the tokenizer puts before a text, mostly one BOS; empty for none.

    bos: `auto` also takes the BOS token where the chat template names it, since the model was then trained with it.
    `always` takes it wherever there is one, and is a UsageError otherwise; `never` takes none.
    """
    if bos == "never":
        return []
    text, whole = tokenize(tokenizer, "a").tolist(), list(tokenizer("a")["input_ids"])
    before = next((k for k in range(len(whole)) if whole[k : k + len(text)] == text), 0)
    if before:
        return whole[:before]
    own: Any = tokenizer.bos_token_id
    if bos == "always" and own is None:
        raise UsageError("--bos always: the tokenizer has no BOS token")
    return [own] if own is not None and (bos == "always" or "bos_token" in str(tokenizer.chat_template)) else []


def check_ids(ids: Tensor, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """VQCompressError naming a token that the tokenizer knows and the embeddings of the model do not."""
    matrix: Any = model.get_input_embeddings().weight
    known, largest = matrix.shape[0], int(ids.max()) if ids.numel() else 0
    if largest >= known:
        token = f"gives the token {tokenizer.convert_ids_to_tokens(largest)!r} the number {largest}"
        advice = "take the tokenizer of these weights, or save the model with resized embeddings"
        raise VQCompressError(
            f"{tokenizer.name_or_path}: the tokenizer {token}, the model has {known} tokens; {advice}"
        )


def read_text(tokenizer: PreTrainedTokenizerBase, source: str) -> str:
    """A text as one string: its documents, chats by the tokenizer's template, with a blank line between them."""
    return "\n\n".join(_rendered(tokenizer, source))


def pack(tokenizer: PreTrainedTokenizerBase, sources: list[str]) -> Tensor:
    """The ids (n,) int64 of texts one after the other.

    Plain files alone are one text, with a blank line between files. Otherwise an EOS token follows every document (a
    blank line if the tokenizer has none), and a chat is what the template makes of it.
    """
    if all(is_plain(source) for source in sources):
        return tokenize(tokenizer, "\n\n".join(read_text(tokenizer, source) for source in sources))
    end = str(tokenizer.eos_token or "\n\n")
    return tokenize(tokenizer, "".join(text for source in sources for text in _rendered(tokenizer, source, end)))


def _rendered(tokenizer: PreTrainedTokenizerBase, source: str, end: str = "") -> list[str]:
    """The documents of a text as strings. Chats that the template refuses are left out. end: of documents that are
    no chats."""
    found, refused = [], []
    # What begins every row anyway, see `start_tokens`, would stand there twice if the template wrote it, too.
    begin = "".join(map(str, tokenizer.convert_ids_to_tokens(start_tokens(tokenizer, "auto"))))
    for content, where in read_documents(source):
        if isinstance(content, str):
            found.append(content + end)
            continue
        if not tokenizer.chat_template:
            raise VQCompressError(f"{where}: a chat, and {tokenizer.name_or_path} has no chat template for it")
        try:
            found.append(str(tokenizer.apply_chat_template(content, tokenize=False)).removeprefix(begin))
        except Exception as error:  # a template raises what its author likes
            refused.append(f"{where}: the chat template says: {one_line(error)}")
    warn_of_skipped(source, refused)
    return found


def too_short(name: str, tokens: int, length: int, wanted: int, what: str) -> VQCompressError:
    """The error for a text with too few tokens. length: of a row. what: the options that ask for less."""
    rows = f"{tokens // length} rows of {length}, and {wanted} are needed"
    longest = f" (at most {tokens // wanted})" if tokens >= 2 * wanted else ""
    return VQCompressError(f"{name} is too short: its {tokens} tokens give {rows}; give more text or {what}{longest}")


def cut_rows(tokens: Tensor, count: int, length: int, seed: int, name: str) -> Tensor:
    """Calibration rows (N, L) int64: windows without overlap, drawn by the seed, in text order.

    tokens: (n,) the whole text. name: of the text, for the error if it is too short.
    """
    windows = len(tokens) // length
    if windows < count:
        raise too_short(name, len(tokens), length, count, "a smaller --samples or --seqlen")
    order = torch.randperm(windows, generator=torch.Generator().manual_seed(seed))[:count].sort().values
    return tokens[: windows * length].view(windows, length)[order].long()


def fingerprint(rows: Tensor) -> str:
    """SHA-256 of calibration rows."""
    return hashlib.sha256(rows.contiguous().numpy().tobytes()).hexdigest()
