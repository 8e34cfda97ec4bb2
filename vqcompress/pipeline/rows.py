"""Calibration rows: from texts, from a mixture of texts by shares, or sampled from the model itself.

Shape legend: N rows, L tokens of a row.
"""

from __future__ import annotations

import itertools
import math
import warnings
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from vqcompress.errors import Notice, UsageError
from vqcompress.evaluate.read_report import named
from vqcompress.model.device import check_fits
from vqcompress.model.stream import BlockStream
from vqcompress.model.tokenizer import check_ids, load_tokenizer, pack, start_tokens
from vqcompress.pipeline.options import QuantizeOptions
from vqcompress.pipeline.plan import Progress
from vqcompress.runtime.load import load
from vqcompress.storage.rows import DEFAULT_SAMPLES, FEWEST_SAMPLES, cut_rows
from vqcompress.storage.text import BUILT_IN, SELF, split_share

TEMPERATURE = 1.0
# Rows that are sampled at once; fixed, since the rows depend on it.
SAMPLED_ROWS = 32
# With fewer different tokens, statistics tell nothing about most channels.
FEW_TOKENS = 64


def calibration_rows(
    stream: BlockStream, options: QuantizeOptions, progress: Progress
) -> tuple[Tensor, dict[str, Any]]:
    """The calibration rows (N, L) int64 of a run, and JSON about them for its report.

    L is 2,048 or the model's context if that is shorter. Each row begins with the BOS token if the model was trained
    with it (`start_tokens`). Without shares the rows are cut from all texts as one; with shares, each text or the model
    itself gives its part of the rows, which are then shuffled by the seed.
    """
    length, tokenizer = stream.source.row_length(options.seqlen), load_tokenizer(stream.source.path)
    start, given = start_tokens(tokenizer, options.bos), [split_share(text) for text in options.texts or ()]
    names = [name for name, _ in given] or [str(BUILT_IN)]
    shares = [share for _, share in given if share is not None]
    if len(shares) not in (0, len(names)) or (SELF in names and not shares and len(names) > 1):
        raise UsageError("--calibration: give a share to every text, such as FILE=0.7, or to none ('self' needs one)")
    body = length - len(start)
    if body < 1:
        raise UsageError(f"--seqlen {length} leaves no room for text behind the BOS token")
    parts = [[name] for name in names] if shares else [names]
    tokens = [None if part == [SELF] else pack(tokenizer, part) for part in parts]
    counts = _counts(tokens, shares or [1.0], options.samples, body)
    rows: list[Tensor] = []
    for part, ids, count in zip(parts, tokens, counts, strict=True):
        # A text that is too short is found before the model writes the rows of its part, which takes minutes.
        rows.append(torch.empty(0))
        if ids is not None:
            check_ids(ids, stream.model, tokenizer)
            cut = cut_rows(ids, count, body, options.seed, ", ".join(part))
            rows[-1] = torch.cat([torch.tensor(start, dtype=torch.int64).expand(count, -1), cut], 1)
    for n in (n for n, ids in enumerate(tokens) if ids is None):
        rows[n] = _sampled(stream, options, tokenizer, (counts[n], length), progress)
    rows_NL = torch.cat(rows)
    facts = {
        "samples": len(rows_NL),
        "seqlen": length,
        "texts": [named(name) for name, _ in given],
        "bos": bool(start),
        "distinct_tokens": len(rows_NL.unique()),
    }
    if facts["distinct_tokens"] < min(FEW_TOKENS, rows_NL.numel() // 8):
        few = f"{', '.join(names)}: the calibration rows hold only {facts['distinct_tokens']} different tokens"
        warnings.warn(f"{few}; give a text like those that the model will read", Notice, stacklevel=2)
    if len(rows) > 1:
        facts["rows"] = [len(part) for part in rows]
        rows_NL = rows_NL[torch.randperm(len(rows_NL), generator=torch.Generator().manual_seed(options.seed))]
    return rows_NL, facts | ({"temperature": TEMPERATURE} if SELF in names else {})


def _counts(tokens: list[Tensor | None], shares: list[float], samples: int | None, length: int) -> list[int]:
    """The rows of each part: `samples` by the shares, or as many as the texts have, from 8 to 128 in all."""
    total, pairs = sum(shares), zip(tokens, shares, strict=True)
    most = [len(ids) // length * (total / share) for ids, share in pairs if ids is not None]
    # One less, so that a part that is rounded up is still there.
    fewest = int(min(most, default=DEFAULT_SAMPLES + 1)) - (len(shares) > 1)
    wanted = samples or max(FEWEST_SAMPLES, min(DEFAULT_SAMPLES, fewest))
    ends = [round(wanted * sum(shares[:k]) / total) for k in range(len(shares) + 1)]
    counts = [end - begin for begin, end in itertools.pairwise(ends)]
    if 0 in counts:
        raise UsageError(f"--calibration: a share of {shares[counts.index(0)]:g} gives none of {wanted} rows")
    return counts


@torch.inference_mode()
def _sampled(
    stream: BlockStream,
    options: QuantizeOptions,
    tokenizer: PreTrainedTokenizerBase,
    shape: tuple[int, int],
    progress: Progress,
) -> Tensor:
    """Rows of a shape (N, L) that the model writes itself, the same in every process.

    They begin with what begins every row, else with a random token that is not special (LLM-QAT, arXiv 2305.17888,
    section 3.1). The first process samples.
    """
    (count, length), group, rows = shape, stream.group, []
    if group.is_main:
        numbers = sum(math.prod(info.shape) for info in stream.source.tensors.values())
        check_fits(numbers * stream.dtype.itemsize, stream.device, "--calibration self", "give a text instead")
        network: Any = load(options.model, stream.device.type)
        # The model's own may penalize, stop or filter.
        network.generation_config = GenerationConfig()
        draw, special = torch.Generator().manual_seed(options.seed), set(tokenizer.all_special_ids)
        known = min(len(tokenizer), network.get_input_embeddings().weight.shape[0])
        plain = torch.tensor([i for i in range(known) if i not in special])
        first_N1 = plain[torch.randint(len(plain), (count, 1), generator=draw)]
        if start := start_tokens(tokenizer, options.bos):
            first_N1 = torch.tensor(start).expand(count, -1)
        # Sampling reads torch's global generator.
        torch.manual_seed(options.seed)
        for begin in first_N1.split(SAMPLED_ROWS):
            progress("after", {"what": "sampling rows from the model", "done": sum(map(len, rows)), "total": count})
            ids_BL = begin.to(stream.device)
            settings = {"do_sample": True, "temperature": TEMPERATURE, "top_k": 0, "top_p": 1.0}
            mask_BL, new = torch.ones_like(ids_BL), length - begin.shape[1]
            rows.append(network.generate(ids_BL, attention_mask=mask_BL, max_new_tokens=new, **settings).cpu())
    return group.broadcast(0, torch.cat(rows) if rows else None)
