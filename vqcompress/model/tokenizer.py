"""A checkpoint's tokenizer: from texts and chats to token ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from vqcompress.errors import UsageError, VQCompressError, one_line
from vqcompress.storage.text import Document, is_plain, read_documents, warn_of_skipped
from vqcompress.storage.trust import reason, trusted


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a directory; VQCompressError if there is none."""
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trusted())
    except Exception as error:  # tokenizers raise whatever their parser raises
        raise VQCompressError(f"{path} has no tokenizer that transformers can load: {reason(error)}") from error


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
    known = model.get_input_embeddings().weight.shape[0]
    if ids.numel() and (largest := int(ids.max())) >= known:
        token = f"the token {tokenizer.convert_ids_to_tokens(largest)!r} the number {largest}"
        raise VQCompressError(
            f"the tokenizer of {tokenizer.name_or_path} gives {token}, and the model has embeddings for {known} tokens:"
            " take the tokenizer that belongs to the weights, or save the model with resized embeddings"
        )


def read_text(tokenizer: PreTrainedTokenizerBase, source: str) -> str:
    """A text as one string: its documents, chats by the tokenizer's template, with a blank line between them."""
    return "\n\n".join(text for text, _ in _rendered(tokenizer, read_documents(source), source))


def pack(tokenizer: PreTrainedTokenizerBase, sources: list[str]) -> Tensor:
    """The ids (n,) int64 of texts one after the other.

    Plain files alone are one text, with a blank line between files. Otherwise an EOS token follows every document (a
    blank line if the tokenizer has none), and a chat is what the template makes of it.
    """
    if all(is_plain(source) for source in sources):
        return tokenize(tokenizer, "\n\n".join(read_text(tokenizer, source) for source in sources))
    own: Any = tokenizer.eos_token_id
    end = tokenize(tokenizer, "\n\n").tolist() if own is None else [own]
    ids: list[int] = []
    for source in sources:
        rendered = _rendered(tokenizer, read_documents(source), source)
        texts = [text for text, _ in rendered]
        each: Any = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        for tokens, (_, is_chat) in zip(each["input_ids"], rendered, strict=True):
            ids += tokens if is_chat else tokens + end
    return torch.tensor(ids, dtype=torch.int64)


def _rendered(tokenizer: PreTrainedTokenizerBase, documents: list[Document], source: str) -> list[tuple[str, bool]]:
    """Each document as a string, and whether it is a chat. Chats that the template refuses are left out."""
    found, refused = [], []
    for content, where in documents:
        if isinstance(content, str):
            found.append((content, False))
            continue
        if not tokenizer.chat_template:
            raise VQCompressError(
                f"{where} is a chat, and the tokenizer of {tokenizer.name_or_path} has no chat template"
            )
        try:
            found.append((str(tokenizer.apply_chat_template(content, tokenize=False)), True))
        except Exception as error:  # a template raises what its author likes
            refused.append(f"{where}: the chat template says: {one_line(error)}")
    warn_of_skipped(source, refused)
    if not found:
        raise VQCompressError(f"no chat is usable: {refused[0]}")
    return found
