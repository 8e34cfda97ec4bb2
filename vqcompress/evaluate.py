"""How good and how fast a model is: perplexity, KL divergence and agreement with its original, tokens per second.

Shape legend: N windows, B windows of a batch, L tokens of a window, V vocabulary.
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from vqcompress.artifact import Artifact
from vqcompress.blocks import BlockStream
from vqcompress.calibration import read_text
from vqcompress.checkpoint import Checkpoint, resolve
from vqcompress.errors import UsageError, VQCompressError
from vqcompress.runtime.device import choose_device, model_dtype, peak_device_bytes, peak_rss_bytes
from vqcompress.runtime.load import load_any
from vqcompress.runtime.tokens import load_tokenizer, tokenize

LOGITS = 2**24


def open_model(model: str) -> Checkpoint:
    """The artifact or the dense checkpoint that MODEL names; an artifact's files are checked first."""
    path = resolve(model)
    if Artifact.is_one(path):
        artifact = Artifact(path)
        artifact.check_files()
        return artifact
    source = Checkpoint(path)
    if not source.tensors:
        raise VQCompressError(f"{path} has no safetensors weights")
    return source


def windows(tokens: Tensor, seqlen: int, stride: int, limit: int | None) -> Tensor:
    """Windows (N, L) of a text's tokens (n,), one every `stride`; the tail that fills none is dropped."""
    if seqlen < 2 or not 1 <= stride <= seqlen or (limit is not None and limit < 1):
        raise UsageError(f"--seqlen {seqlen} --stride {stride} --windows {limit}: need seqlen ≥ stride ≥ 1, seqlen ≥ 2")
    if len(tokens) < seqlen:
        raise VQCompressError(f"the text has {len(tokens)} tokens, less than one window of --seqlen {seqlen}")
    cut = tokens.unfold(0, seqlen, stride)
    return cut[:limit] if limit else cut


def scored(number: int, seqlen: int, stride: int) -> int:
    """The first position of a window's predictions that counts: later windows score only what is new to them."""
    return 0 if number == 0 else max(seqlen - stride - 1, 0)


class Pass:
    """One model streamed over windows block by block; then logits, few windows at a time."""

    def __init__(self, source: Checkpoint, device: torch.device, windows_NL: Tensor):
        self.stream = BlockStream(source, device, model_dtype(source.config, device))
        batches = self.stream.batches(windows_NL)
        states = [self.stream.begin(batch) for batch in batches]
        for i in range(len(self.stream.blocks)):
            self.stream.advance(self.stream.load_block(i), i, states)
        self.windows_NL = windows_NL
        self.rows = [row for state in states for row in state.split(1)]

    @property
    def windows_at_once(self) -> int:
        """How many windows' logits fit into 64 MiB."""
        vocabulary = self.stream.model.config.get_text_config().vocab_size
        return max(1, LOGITS // (vocabulary * self.windows_NL.shape[1]))

    def logits(self, start: int, stop: int) -> Tensor:
        """The float32 logits (B, L−1, V) that predict tokens 2…L of windows start…stop−1."""
        hidden = torch.cat(self.rows[start:stop])
        return self.stream.finish(self.windows_NL[start:stop], hidden)[:, :-1].float()


def perplexity(
    model: str,
    text: str,
    seqlen: int | None = None,
    stride: int | None = None,
    limit: int | None = None,
    baseline: str | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Perplexity of a model on a text, by the protocol of the GPTQ and AQLM papers; with a baseline also KL and top-1.

    The text is tokenized once without special tokens and cut into consecutive windows of `seqlen` without overlap, the
    tail dropped; tokens 2…seqlen of each are predicted; the mean negative log-likelihood over all of them, in float32,
    is exponentiated. With a smaller `stride` a window scores only the tokens that the one before it did not.
    """
    start = time.perf_counter()
    source, chosen = open_model(model), choose_device(device)
    length = seqlen if seqlen is not None else min(2048, int(source.config.get("max_position_embeddings") or 2048))
    step = stride if stride is not None else length
    tokenizer = load_tokenizer(source.path)
    windows_NL = windows(tokenize(tokenizer, read_text(text)), length, step, limit)
    ours = Pass(source, chosen, windows_NL)
    theirs = Pass(open_model(baseline), chosen, windows_NL) if baseline else None
    sums = {"nll": 0.0, "baseline": 0.0, "same": 0.0, "tokens": 0}
    divergences, scored_tokens = [], []
    for number in range(0, len(windows_NL), ours.windows_at_once):
        batch = windows_NL[number : number + ours.windows_at_once]
        stop = number + len(batch)
        first = torch.tensor([scored(number + row, length, step) for row in range(len(batch))])
        counts = torch.arange(length - 1) >= first[:, None]
        logits, labels = ours.logits(number, stop)[counts], batch[:, 1:][counts].to(chosen)
        scored_tokens.append(labels.cpu())
        sums["nll"] += cross_entropy(logits, labels, reduction="sum").item()
        sums["tokens"] += len(labels)
        if theirs:
            reference = theirs.logits(number, stop)[counts]
            if reference.shape != logits.shape:
                raise VQCompressError(f"{model} and {baseline} have vocabularies of different sizes")
            sums["baseline"] += cross_entropy(reference, labels, reduction="sum").item()
            sums["same"] += (logits.argmax(-1) == reference.argmax(-1)).sum().item()
            p, q = log_softmax(reference, -1), log_softmax(logits, -1)
            divergences.append(kl_div(q, p, reduction="none", log_target=True).sum(-1).cpu())
    nll = sums["nll"] / sums["tokens"]
    bytes_scored = len(str(tokenizer.decode(torch.cat(scored_tokens))).encode())
    seconds = time.perf_counter() - start
    result: dict[str, Any] = {
        "perplexity": math.exp(nll),
        "nll_per_token": nll,
        "bits_per_byte": sums["nll"] / math.log(2) / max(bytes_scored, 1),
        "tokens": sums["tokens"],
        "windows": len(windows_NL),
        "seqlen": length,
        "stride": step,
        "bos": False,
        "seconds": round(seconds, 3),
        "tokens_per_second": round(sums["tokens"] / seconds, 1),
        "peak_rss_bytes": peak_rss_bytes(),
    }
    if theirs:
        kl = torch.cat(divergences)
        result["baseline"] = {"perplexity": math.exp(sums["baseline"] / sums["tokens"])}
        result["kl_divergence"] = {
            "mean": kl.mean(dtype=torch.float64).item(),
            "p99": kl.sort().values[min(len(kl) - 1, int(0.99 * len(kl)))].item(),
            "max": kl.max().item(),
        }
        result["top1_agreement"] = sums["same"] / sums["tokens"]
    return result


@torch.inference_mode()
def speed(model: str, prompt_tokens: int = 128, new_tokens: int = 64, batch: int = 1) -> dict[str, Any]:
    """Prefill and decode tokens per second, time to first token (s) and peak memory, after one warm-up.

    Greedy decoding with a cache, on random prompts, on the device that `load` chooses.
    """
    if min(prompt_tokens, new_tokens, batch) < 1 or new_tokens < 2:
        raise UsageError("--prompt-tokens and --batch must be at least 1, --new-tokens at least 2")
    network = load_any(model)
    device = next(network.parameters()).device
    vocabulary = network.config.get_text_config().vocab_size
    prompt_BL = torch.randint(vocabulary, (batch, prompt_tokens), generator=torch.Generator().manual_seed(0)).to(device)

    def wait() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def once() -> tuple[float, float]:
        start = wait()
        out = network(prompt_BL, use_cache=True)
        token = out.logits[:, -1:].argmax(-1)
        first = wait()
        for _ in range(new_tokens - 1):
            out = network(token, past_key_values=out.past_key_values, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
        return first - start, wait() - first

    once()
    prefill, decode = once()
    return {
        "model": model,
        "device": str(device),
        "dtype": str(network.dtype).removeprefix("torch."),
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "batch": batch,
        "prefill_tokens_per_second": round(batch * prompt_tokens / prefill, 1),
        "decode_tokens_per_second": round(batch * (new_tokens - 1) / decode, 1),
        "time_to_first_token": round(prefill, 4),
        "peak_rss_bytes": peak_rss_bytes(),
        "peak_device_bytes": peak_device_bytes(),
    }
