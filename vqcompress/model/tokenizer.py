"""A checkpoint's tokenizer, as a function from text to token ids."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from vqcompress.errors import VQCompressError
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
