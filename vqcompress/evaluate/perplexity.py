"""Perplexity of a model on a text; KL divergence from its original and agreement with it.

Shape legend: N windows, L tokens of a window, P predictions, V vocabulary.
"""

from __future__ import annotations

import itertools
import math
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from vqcompress.errors import UsageError, VQCompressError
from vqcompress.evaluate.read_report import named
from vqcompress.kv_cache.attention import CACHE, install
from vqcompress.kv_cache.cache import KVCache
from vqcompress.model import tokenizer
from vqcompress.model.device import choose_device, model_dtype, peak_rss_bytes
from vqcompress.model.stream import BlockStream
from vqcompress.runtime.load import kv_cache_config, load
from vqcompress.storage.artifact import Artifact, open_checkpoint
from vqcompress.storage.checkpoint import Checkpoint, resolve

# Called with the steps done and their total.
Progress = Callable[[int, int], None]
# The number of a window → its logits (L, V).
Logits = Callable[[int], Tensor]
# Float32 logits that are scored at a time: those of a long window and a large vocabulary would be gigabytes.
MAX_LOGITS = 2**24
# Characters of the text by which tokenizers are compared.
SAMPLE = 20_000


def open_model(model: str) -> Checkpoint:
    """The artifact or the dense checkpoint that MODEL names; an artifact's files are compared with their checksums."""
    path = resolve(model)
    if not Artifact.is_one(path):
        return open_checkpoint(model)
    artifact = Artifact(path)
    artifact.check_files()
    return artifact


class Windowing(TypedDict, total=False):
    """How a text is cut: tokens of a window, tokens from one window to the next, most windows; None is the default.

    bos: whether each window begins with a BOS token: `auto`, `always` or `never`.
    """

    seqlen: int | None
    stride: int | None
    limit: int | None
    bos: str


def windows(
    tokens: Tensor, seqlen: int, stride: int, limit: int | None, start: Sequence[int] = (), name: str = "the text"
) -> Tensor:
    """Windows (N, L) of a text's tokens (n,), one every `stride`; a tail shorter than a window is dropped.

    start: tokens that begin every window; the other L − len(start) are of the text. name: of the text.
    """
    length = seqlen - len(start)
    if stride > seqlen:
        raise UsageError(f"--stride {stride} is more than --seqlen {seqlen}: tokens in between would not count")
    if length < 1 or len(tokens) < length:
        raise tokenizer.too_short(name, len(tokens), max(length, 1), 1, "a smaller --seqlen")
    own_NL = tokens.unfold(0, length, min(stride, length))[:limit]
    return torch.cat([torch.tensor(start, dtype=tokens.dtype).expand(len(own_NL), -1), own_NL], 1)


def first_scored(number: int, seqlen: int, stride: int, start: int = 0) -> int:
    """The first position of a window's predictions that counts: later windows score only what is new to them.

    start: tokens that begin every window and are no text.
    """
    return max((start if number == 0 else seqlen - stride) - 1, 0)


def streamed_logits(stream: BlockStream, windows_NL: Tensor, step: Callable[[], None]) -> Logits:
    """Logits of a model that is run over all windows block by block, with one block at a time in memory."""
    if stream.learn().refusal:
        return lambda number: stream.whole(windows_NL[number : number + 1])[0]
    states = [stream.embed(batch) for batch in stream.batches(windows_NL)]
    for i in range(len(stream.blocks)):
        stream.forward(stream.load_block(i), i, states)
        step()
    rows = [row for state in states for row in state.split()]
    return lambda number: stream.logits(rows[number])[0]


def coded_cache_logits(model: str, recipe: str, device: str, windows_NL: Tensor) -> Logits:
    """Logits of a model in memory whose tokens attend to coded keys and values.

    Tokens go one by one where the attention of the model cannot be replaced.
    """
    network: Any = load(model, device)
    config = kv_cache_config(network, resolve(model), recipe)
    at_once = install(network)

    @torch.inference_mode()
    def logits(number: int) -> Tensor:
        ids_BL = windows_NL[number : number + 1].to(network.device)
        cache = KVCache(network, config, strict=at_once)
        parts = [ids_BL] if at_once else ids_BL.split(1, 1)
        return torch.cat([network(part, **{CACHE: cache}, use_cache=True).logits[0] for part in parts])

    return logits


def exponential(x: float) -> float:
    """e to the power of x; inf where float64 ends."""
    return math.inf if x > math.log(sys.float_info.max) else math.exp(x)


class Scores:
    """Sums over predictions: negative log-likelihood, and against a baseline's KL divergence and agreement."""

    def __init__(self) -> None:
        self.nll = self.baseline_nll = 0.0
        self.tokens = self.same = 0
        self.divergences: list[Tensor] = []

    def add(self, logits_PV: Tensor, labels_P: Tensor, baseline_PV: Tensor | None) -> None:
        """Score the predictions of labels."""
        at_once = max(1, MAX_LOGITS // logits_PV.shape[1])
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
        return exponential(self.nll / self.tokens)

    def against_baseline(self, baseline: str) -> dict[str, Any]:
        """JSON: the baseline, KL divergence of ours from it, how often the likeliest token is the same."""
        kl = torch.cat(self.divergences).sort().values
        return {
            "baseline": {"model": named(baseline), "perplexity": exponential(self.baseline_nll / self.tokens)},
            "ratio": exponential((self.nll - self.baseline_nll) / self.tokens),
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
    seqlen = sources[0].row_length(cut.get("seqlen"))
    stride = cut.get("stride") or seqlen
    tokenizers = [tokenizer.load_tokenizer(source.path) for source in sources]
    content = tokenizer.read_text(tokenizers[0], text)
    start = tokenizer.start_tokens(tokenizers[0], cut.get("bos", "auto"))
    streams = [BlockStream(source, chosen, model_dtype(source.config, chosen)) for source in sources]
    _check_comparable(names, tokenizers, streams, content)
    windows_NL = windows(tokenizer.tokenize(tokenizers[0], content), seqlen, stride, cut.get("limit"), start, text)
    # The beginning is no text, so windows follow each other sooner.
    stride = min(stride, seqlen - len(start))
    for source, stream in zip(sources, streams, strict=True):
        source.row_length(seqlen)
        tokenizer.check_ids(windows_NL, stream.model, tokenizers[0])
    # A model with a coded cache is not streamed, so its blocks are no steps.
    blocks = sum(len(stream.blocks) for stream in (streams[1:] if kv_cache else streams))
    total, done = blocks + len(models) * len(windows_NL), itertools.count(1)

    def step() -> None:
        progress(next(done), total)

    reference = streamed_logits(streams[-1], windows_NL, step) if baseline is not None else None
    firsts = [first_scored(number, seqlen, stride, len(start)) for number in range(len(windows_NL))]
    labels = [window_L[first + 1 :] for window_L, first in zip(windows_NL, firsts, strict=True)]
    found = []
    for n, model in enumerate(models):
        if kv_cache and n == 0:
            own = coded_cache_logits(model, kv_cache, device, windows_NL)
            del streams[0]
        else:
            own = streamed_logits(streams.pop(0), windows_NL, step)
        scores = Scores()
        for number, first in enumerate(firsts):
            logits_PV = own(number)[first:-1]
            reference_PV = reference(number)[first:-1] if reference is not None else None
            scores.add(logits_PV, labels[number].to(logits_PV.device), reference_PV)
            step()
        found.append(scores)
        # The next model is loaded when this one, and its hidden states, are gone.
        del own
    return found, {
        "tokens": found[0].tokens,
        "windows": len(windows_NL),
        "seqlen": seqlen,
        "stride": stride,
        "bos": bool(start),
        "kv_cache": kv_cache,
        "device": chosen.type,
        "tokens_sha256": tokenizer.fingerprint(windows_NL),
        "text_bytes": len(str(tokenizers[0].decode(torch.cat(labels))).encode()),
    }


def _check_comparable(names: list[str], tokenizers: list[Any], streams: list[BlockStream], text: str) -> None:
    """VQCompressError naming the first model that cuts the text into other tokens than the first model does."""
    found = [
        (tokenizer.tokenize(own, text[:SAMPLE]).tolist(), stream.config.get_text_config().vocab_size)
        for own, stream in zip(tokenizers, streams, strict=True)
    ]
    for name, own in zip(names, found, strict=True):
        if own != found[0]:
            raise VQCompressError(f"{names[0]} and {name} differ in tokens or vocabularies, so they do not compare")


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
