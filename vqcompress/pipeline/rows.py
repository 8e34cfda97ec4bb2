"""Calibration rows: from texts, from a mixture of texts by shares, or sampled from the model itself.

Shape legend: N rows, L tokens of a row.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from vqcompress.errors import Notice, UsageError
from vqcompress.evaluate.read_report import named
from vqcompress.model.device import check_fits
from vqcompress.model.stream import BlockStream
from vqcompress.model.tokenizer import check_ids, cut_rows, load_tokenizer, pack, start_tokens
from vqcompress.pipeline.estimate import SAMPLED_ROWS, sampling_memory
from vqcompress.pipeline.options import QuantizeOptions
from vqcompress.pipeline.plan import Progress
from vqcompress.runtime.load import load
from vqcompress.storage.text import BUILT_IN, SELF, split_share

DEFAULT_SAMPLES, FEWEST_SAMPLES = 128, 8
TEMPERATURE = 1.0
Facts = dict[str, Any]
# With fewer different tokens, statistics tell nothing about most channels.
FEW_TOKENS = 64


def calibration_rows(stream: BlockStream, options: QuantizeOptions, progress: Progress) -> tuple[Tensor, Facts]:
    """The calibration rows (N, L) int64 of a run, and JSON about them for its report.

    L is 2,048 or the model's context if that is shorter. Each row begins with the BOS token if the model was trained
    with it (`start_tokens`). Without shares the rows are cut from all texts as one; with shares, each text or the model
    itself gives its part of the rows, which are then shuffled by the seed.
    """
    length, tokenizer = stream.source.row_length(options.seqlen), load_tokenizer(stream.source.path)
    # The model itself comes last: texts that are too short are found before it writes for minutes.
    given = sorted((split_share(text) for text in options.texts or ()), key=lambda pair: pair[0] == SELF)
    names = [name for name, _ in given] or [str(BUILT_IN)]
    shares = [share for _, share in given if share is not None]
    if len(shares) not in (0, len(names)) or (SELF in names and not shares and len(names) > 1):
        raise UsageError("--calibration: give a share to every text, such as FILE=0.7, or to none ('self' needs one)")
    parts, shares = ([[name] for name in names], shares) if shares else ([names], [1.0])
    start, rows, total = start_tokens(tokenizer, options.bos), [], options.samples or DEFAULT_SAMPLES
    for k, part in enumerate(parts):
        begin, end = (round(total * sum(shares[:n]) / sum(shares)) for n in (k, k + 1))
        if begin == end:
            rows.append(torch.empty(0, length, dtype=torch.int64))
            continue
        if part == [SELF]:
            rows.append(_sampled(stream, options, (end - begin, length), progress))
            continue
        ids, body = pack(tokenizer, part), max(1, length - len(start))
        check_ids(ids, stream.model, tokenizer)
        if options.samples is None and len(parts) == 1:
            end = max(FEWEST_SAMPLES, min(end, len(ids) // body))
        own = cut_rows(ids, end - begin, body, options.seed, ", ".join(part))
        rows.append(torch.cat([torch.tensor(start, dtype=torch.int64).expand(len(own), -1), own], 1))
    rows_NL = torch.cat(rows)
    different = len(rows_NL.unique())
    facts = {"samples": len(rows_NL), "seqlen": length, "texts": [named(name) for name, _ in given]}
    facts |= {"bos": bool(start), "distinct_tokens": different}
    if different < min(FEW_TOKENS, rows_NL.numel() // 8):
        few = f"{', '.join(names)}: the calibration rows hold only {different} different tokens"
        warnings.warn(f"{few}; give a text like those that the model will read", Notice, stacklevel=2)
        facts["few_tokens"] = True
    facts |= {"temperature": TEMPERATURE} if SELF in names else {}
    if len(rows) > 1:
        facts["rows"] = [len(part) for part in rows]
        rows_NL = rows_NL[torch.randperm(len(rows_NL), generator=torch.Generator().manual_seed(options.seed))]
    return rows_NL, facts


@torch.inference_mode()
def _sampled(stream: BlockStream, options: QuantizeOptions, shape: tuple[int, int], progress: Progress) -> Tensor:
    """Rows of a shape (N, L) that the model writes itself: the first process samples, all get them.

    They begin with what begins every row, else with a random token (LLM-QAT, arXiv 2305.17888, section 3.1).
    """
    (count, length), group = shape, stream.group
    rows: list[Tensor] = []
    if group.is_main:
        # It is read on the host.
        for device in {stream.device, torch.device("cpu")}:
            check_fits(sampling_memory(stream, shape), device, "--calibration self", "give a text instead")
        network: Any = load(options.model, stream.device.type)
        # The model's own may penalize, stop or filter.
        network.generation_config = GenerationConfig(do_sample=True, temperature=TEMPERATURE, top_k=0, top_p=1.0)
        tokenizer = load_tokenizer(stream.source.path)
        # Sampling reads torch's global generator.
        torch.manual_seed(options.seed)
        start = torch.tensor(start_tokens(tokenizer, options.bos), dtype=torch.int64)
        known = min(len(tokenizer), len(network.get_input_embeddings().weight))
        first_N1 = start.expand(count, -1) if len(start) else torch.randint(known, (count, 1))
        for begin in first_N1.to(stream.device).split(SAMPLED_ROWS):
            progress("after", {"what": "sampling rows from the model", "done": sum(map(len, rows)), "total": count})
            new = length - begin.shape[1]
            rows.append(network.generate(begin, attention_mask=torch.ones_like(begin), max_new_tokens=new).cpu())
    return group.broadcast(0, torch.cat(rows) if rows else None)
