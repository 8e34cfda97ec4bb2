"""Perplexity of a model on a text; KL divergence from its original and agreement with it.

Shape legend: N windows, L tokens of a window, P predictions, V vocabulary.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from typing import Any, Protocol, TypedDict, Unpack, cast

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from vqcompress.errors import UsageError, VQCompressError
from vqcompress.evaluate.read_report import named
from vqcompress.kv_cache.attention import CACHE, install
from vqcompress.kv_cache.cache import KVCache
from vqcompress.model.device import (
    check_fits,
    choose_device,
    model_dtype,
    peak_rss_bytes,
)
from vqcompress.model.stream import BlockStream
from vqcompress.model.tokenizer import load_tokenizer, tokenize
from vqcompress.runtime.load import kv_cache_config, load
from vqcompress.storage.artifact import Artifact
from vqcompress.storage.checkpoint import Checkpoint, resolve
from vqcompress.storage.text import fingerprint, read_text

# Called with the steps done and their total.
Progress = Callable[[int, int], None]
# Numbers in the float32 logits that are scored at once.
LOGITS = 2**24
# Characters of the text by which tokenizers are compared.
SAMPLE = 20_000


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
    if other := source.config.get("quantization_config"):
        words = f"{model} is quantized in another format ({other.get('quant_method')})"
        raise VQCompressError(f"{words}: measure the artifact that it came from, or export --format dense")
    return source


def _loaded_bytes(source: Checkpoint, dtype: torch.dtype) -> int:
    """The least memory that a loaded model takes: codes as they are, all else in the type that is computed in."""
    tensors = source.tensors.values()
    return sum(t.bytes if t.dtype.itemsize == 1 else t.bytes // t.dtype.itemsize * dtype.itemsize for t in tensors)


class Windowing(TypedDict, total=False):
    """How a text is cut: tokens of a window, tokens from one window to the next, the most windows."""

    seqlen: int | None
    stride: int | None
    limit: int | None


def windows(tokens: Tensor, seqlen: int, stride: int, limit: int | None) -> Tensor:
    """Windows (N, L) of a text's tokens (n,), one every `stride`; a tail shorter than a window is dropped."""
    if stride > seqlen:
        raise UsageError(f"--stride {stride} is more than --seqlen {seqlen}: tokens in between would not count")
    if seqlen < 2 or stride < 1 or (limit is not None and limit < 1):
        raise UsageError(f"--seqlen {seqlen} --stride {stride} --windows {limit} must be at least 2, 1 and 1")
    if len(tokens) < seqlen:
        hint = "give a longer text or a smaller --seqlen"
        raise VQCompressError(f"the text has {len(tokens)} tokens, less than one window of --seqlen {seqlen}; {hint}")
    cut = tokens.unfold(0, seqlen, stride)
    return cut[:limit] if limit else cut


def first_scored(number: int, seqlen: int, stride: int) -> int:
    """The first position of a window's predictions that counts: later windows score only what is new to them."""
    return 0 if number == 0 else max(seqlen - stride - 1, 0)


class Logits(Protocol):
    """The logits of one model, window by window."""

    def logits(self, number: int, first: int) -> Tensor:
        """The logits (P, V) that predict the tokens after position `first` of a window."""


class StreamedLogits:
    """Logits of a model that is streamed over all windows block by block: one block at a time is in memory."""

    def __init__(self, stream: BlockStream, windows_NL: Tensor, step: Callable[[], None]):
        self.stream, self.windows_NL = stream, windows_NL
        states = [stream.embed(batch) for batch in stream.batches(windows_NL)]
        for i in range(len(stream.blocks)):
            stream.forward(stream.load_block(i), i, states)
            step()
        self.rows = [row for state in states for row in state.split(1)]

    def logits(self, number: int, first: int) -> Tensor:
        """As `Logits` says."""
        return self.stream.logits(self.windows_NL[number : number + 1], self.rows[number])[0, first:-1]


class CodedCacheLogits:
    """Logits of a model in memory whose tokens attend to coded keys and values."""

    def __init__(self, model: str, recipe: str, device: str, windows_NL: Tensor):
        self.network, self.windows_NL = load(model, device), windows_NL
        self.config = kv_cache_config(self.network, resolve(model), recipe)

    @torch.inference_mode()
    def logits(self, number: int, first: int) -> Tensor:
        """As `Logits` says; tokens go one by one where the attention of the model cannot be replaced."""
        ids_BL, at_once = self.windows_NL[number : number + 1].to(self.network.device), install(self.network)
        cache, network = KVCache(self.network, self.config, strict=at_once), cast(Any, self.network)
        parts = [ids_BL] if at_once else ids_BL.split(1, 1)
        found = [network(part, **{CACHE: cache}, use_cache=True).logits[0] for part in parts]
        return torch.cat(found)[first:-1]


class Scores:
    """Sums over predictions: negative log-likelihood, and against a baseline's KL divergence and agreement."""

    def __init__(self) -> None:
        self.nll = self.baseline_nll = 0.0
        self.tokens = self.same = 0
        self.divergences: list[Tensor] = []

    def add(self, logits_PV: Tensor, labels_P: Tensor, baseline_PV: Tensor | None) -> None:
        """Score the predictions of labels, a few at a time: float32 logits of a large vocabulary are large."""
        at_once = max(1, LOGITS // logits_PV.shape[1])
        for start in range(0, len(labels_P), at_once):
            part = slice(start, start + at_once)
            labels, logits = labels_P[part], logits_PV[part].float()
            self.nll += cross_entropy(logits, labels, reduction="sum").item()
            self.tokens += len(labels)
            if baseline_PV is not None:
                baseline = baseline_PV[part].float()
                self.baseline_nll += cross_entropy(baseline, labels, reduction="sum").item()
                self.same += int((logits.argmax(-1) == baseline.argmax(-1)).sum())
                p, q = log_softmax(baseline, -1), log_softmax(logits, -1)
                self.divergences.append(kl_div(q, p, reduction="none", log_target=True).sum(-1).cpu())

    @property
    def perplexity(self) -> float:
        """e to the mean negative log-likelihood."""
        return math.exp(self.nll / self.tokens)

    def against_baseline(self, baseline: str) -> dict[str, Any]:
        """JSON: the baseline, KL divergence of ours from it, how often the likeliest token is the same."""
        kl = torch.cat(self.divergences).sort().values
        return {
            "baseline": {"model": named(baseline), "perplexity": math.exp(self.baseline_nll / self.tokens)},
            "ratio": math.exp((self.nll - self.baseline_nll) / self.tokens),
            "kl_divergence": {
                "mean": kl.mean(dtype=torch.float64).item(),
                "p99": kl[min(len(kl) - 1, int(0.99 * len(kl)))].item(),
                "max": kl[-1].item(),
            },
            "top1_agreement": self.same / self.tokens,
        }


def score(
    models: list[str],
    text: str,
    baseline: str | None = None,
    device: str = "auto",
    progress: Progress = lambda done, total: None,
    kv_cache: str | None = None,
    **cut: Unpack[Windowing],
) -> tuple[list[Scores], dict[str, Any]]:
    """The scores of each model on the windows of a text, and the protocol as JSON. Arguments as of `perplexity`.

    The baseline is streamed first and its final hidden states stay in memory; then one model at a time.
    kv_cache: for the first model.
    """
    chosen = choose_device(device)
    names = [*models, *([baseline] if baseline is not None else [])]
    sources = [open_model(name) for name in names]
    length = sources[0].row_length(cut.get("seqlen"))
    stride = length if (given := cut.get("stride")) is None else given
    tokenizers, content = [load_tokenizer(source.path) for source in sources], read_text(text)
    _check_tokenizers(names, tokenizers, content)
    windows_NL = windows(tokenize(tokenizers[0], content), length, stride, cut.get("limit"))
    for source in sources:
        source.row_length(length)
    streams = [BlockStream(source, chosen, model_dtype(source.config, chosen)) for source in sources]
    if kv_cache is not None:
        needed = _loaded_bytes(sources[0], streams[0].dtype)
        check_fits(needed, chosen, "eval perplexity --kv-cache", "without --kv-cache it reads block by block")
    # A model with a coded cache is not streamed, so its blocks are no steps.
    streamed = streams if kv_cache is None else streams[1:]
    step = _counter(progress, sum(len(stream.blocks) for stream in streamed) + len(models) * len(windows_NL))
    reference = StreamedLogits(streams[-1], windows_NL, step) if baseline is not None else None
    firsts = [first_scored(number, length, stride) for number in range(len(windows_NL))]
    found = []
    for n, model in enumerate(models):
        own: Logits
        if n == 0 and kv_cache is not None:
            own = CodedCacheLogits(model, kv_cache, device, windows_NL)
        else:
            own = StreamedLogits(streams[n], windows_NL, step)
        found.append(_score_windows(own, reference, windows_NL, firsts, step))
    labels = [window_L[first + 1 :] for window_L, first in zip(windows_NL, firsts, strict=True)]
    return found, {
        "tokens": found[0].tokens,
        "windows": len(windows_NL),
        "seqlen": length,
        "stride": stride,
        "bos": False,
        "kv_cache": kv_cache,
        "device": chosen.type,
        "tokens_sha256": fingerprint(windows_NL),
        "text_bytes": len(str(tokenizers[0].decode(torch.cat(labels))).encode()),
    }


def _counter(progress: Progress, total: int) -> Callable[[], None]:
    """A function that reports one more step of `total`."""
    done = itertools.count(1)
    return lambda: progress(next(done), total)


def _check_tokenizers(names: list[str], tokenizers: list[Any], content: str) -> None:
    """VQCompressError naming the first model that cuts the text into other tokens than the first model does."""
    starts = [tokenize(tokenizer, content[:SAMPLE]) for tokenizer in tokenizers]
    for name, start in zip(names, starts, strict=True):
        if not torch.equal(start, starts[0]):
            raise VQCompressError(f"{names[0]} and {name} have other tokens or vocabularies, so they do not compare")


def _score_windows(
    own: Logits, reference: Logits | None, windows_NL: Tensor, firsts: list[int], step: Callable[[], None]
) -> Scores:
    """The scores of one model, against a reference if there is one. firsts: of each window, as `first_scored`."""
    scores = Scores()
    for number, first in enumerate(firsts):
        logits_PV = own.logits(number, first)
        reference_PV = reference.logits(number, first) if reference is not None else None
        if reference_PV is not None and logits_PV.shape != reference_PV.shape:
            sizes = f"{logits_PV.shape[1]} and {reference_PV.shape[1]}"
            raise VQCompressError(f"model and baseline have vocabularies of different sizes, {sizes} tokens")
        scores.add(logits_PV, windows_NL[number, first + 1 :].to(logits_PV.device), reference_PV)
        step()
    return scores


def perplexity(
    model: str,
    text: str,
    baseline: str | None = None,
    device: str = "auto",
    progress: Progress = lambda done, total: None,
    kv_cache: str | None = None,
    **cut: Unpack[Windowing],
) -> dict[str, Any]:
    """Perplexity of a model on a text, by the protocol of the GPTQ and AQLM papers; with a baseline also KL and top-1.

    The text is tokenized once without special tokens and cut into consecutive windows of `seqlen` without overlap, the
    tail dropped; tokens 2…seqlen of each are predicted; the mean negative log-likelihood over all of them, in float32,
    is exponentiated. With a smaller `stride` a window scores only the tokens that the one before it did not.
    kv_cache: a recipe with a `cache`: every token attends to the past as it would be stored by then, as in decoding;
    the whole model is in memory. progress: called with the steps done and their total.
    """
    start = time.perf_counter()
    (scores,), protocol = score([model], text, baseline, device, progress, kv_cache, **cut)
    seconds = time.perf_counter() - start
    return {
        "text": named(text),
        "perplexity": scores.perplexity,
        "nll_per_token": scores.nll / scores.tokens,
        "bits_per_byte": scores.nll / math.log(2) / max(protocol["text_bytes"], 1),
        **protocol,
        "seconds": round(seconds, 3),
        "tokens_per_second": round(scores.tokens / seconds, 1),
        "peak_rss_bytes": peak_rss_bytes(),
        **(scores.against_baseline(baseline) if baseline is not None else {}),
    }
