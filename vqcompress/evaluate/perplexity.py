"""Perplexity of a model on a text; KL divergence from its original and agreement with it.

Shape legend: N windows, L tokens of a window, P predictions, V vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from vqcompress.errors import UsageError, VQCompressError
from vqcompress.evaluate.read_report import named
from vqcompress.kv_cache.attention import CACHE, AttentionHook, decoding
from vqcompress.kv_cache.cache import KVCache
from vqcompress.model.device import (
    check_fits,
    choose_device,
    model_dtype,
    peak_rss_bytes,
)
from vqcompress.model.stream import BlockStream
from vqcompress.model.tokenizer import load_tokenizer, tokenize
from vqcompress.runtime.load import kv_cache_config, load_any
from vqcompress.storage.artifact import Artifact
from vqcompress.storage.checkpoint import Checkpoint, resolve
from vqcompress.storage.text import fingerprint, read_text

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


def windows(tokens: Tensor, seqlen: int, stride: int, limit: int | None) -> Tensor:
    """Windows (N, L) of a text's tokens (n,), one every `stride`; the tail that fills none is dropped."""
    if stride > seqlen:
        raise UsageError(f"--stride {stride} is more than --seqlen {seqlen}: tokens in between would not count")
    if seqlen < 2 or stride < 1 or (limit is not None and limit < 1):
        raise UsageError(f"--seqlen {seqlen} --stride {stride} --windows {limit} must be at least 2, 1 and 1")
    if len(tokens) < seqlen:
        hint = "give a longer text or a smaller --seqlen"
        raise VQCompressError(f"the text has {len(tokens)} tokens, less than one window of --seqlen {seqlen}; {hint}")
    cut = tokens.unfold(0, seqlen, stride)
    return cut[:limit] if limit else cut


def scored(number: int, seqlen: int, stride: int) -> int:
    """The first position of a window's predictions that counts: later windows score only what is new to them."""
    return 0 if number == 0 else max(seqlen - stride - 1, 0)


class Pass:
    """One model streamed over windows block by block; then logits, window by window."""

    def __init__(self, stream: BlockStream, windows_NL: Tensor, step: Callable[[float], None]):
        self.stream = stream
        states = [stream.embed(batch) for batch in stream.batches(windows_NL)]
        for i, block in enumerate(stream.blocks):
            stream.forward(stream.load_block(i), i, states)
            step(sum(target.weights for target in block.targets))
        self.windows_NL = windows_NL
        self.rows = [row for state in states for row in state.split(1)]

    def logits(self, number: int, first: int) -> Tensor:
        """The logits (P, V) that predict the tokens after position `first` of a window."""
        return self.stream.logits(self.windows_NL[number : number + 1], self.rows[number])[0, first:-1]


class CodedPass:
    """Logits of a model in memory whose tokens attend to coded keys and values, window by window."""

    def __init__(self, model: str, recipe: str, device: str, windows_NL: Tensor):
        self.network, self.windows_NL = load_any(model, device), windows_NL
        self.config = kv_cache_config(self.network, resolve(model), recipe)

    @torch.inference_mode()
    def logits(self, number: int, first: int) -> Tensor:
        """As those of a `Pass`; tokens go one by one where the attention of the model cannot be replaced."""
        ids_BL, network = self.windows_NL[number : number + 1].to(self.network.device), cast(Any, self.network)
        at_once = AttentionHook(self.network).covers_all_layers
        cache = KVCache(self.network, self.config, strict=at_once)
        with decoding(self.network) if at_once else nullcontext():
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
    seqlen: int | None = None,
    stride: int | None = None,
    limit: int | None = None,
    baseline: str | None = None,
    device: str = "auto",
    watch: Callable[[int, int], None] = lambda done, total: None,
    kv_cache: str | None = None,
) -> tuple[list[Scores], dict[str, Any]]:
    """The scores of each model on the windows of a text, against a baseline that runs once; and the protocol, JSON.

    Of every model one block at a time is in memory, and its hidden states of all windows. Other arguments: as those of
    `perplexity`; kv_cache: for the first model.
    """
    chosen = choose_device(device)
    names = [*models, *([baseline] if baseline is not None else [])]
    sources = [open_model(name) for name in names]
    length = seqlen if seqlen is not None else sources[0].default_seqlen
    step = stride if stride is not None else length
    tokenizers, content = [load_tokenizer(source.path) for source in sources], read_text(text)
    starts = [tokenize(tokenizer, content[:SAMPLE]) for tokenizer in tokenizers]
    for name, start in zip(names, starts, strict=True):
        if not torch.equal(start, starts[0]):
            raise VQCompressError(f"{names[0]} and {name} have other tokens or vocabularies, so they do not compare")
    windows_NL = windows(tokenize(tokenizers[0], content), length, step, limit)
    for source in sources:
        source.check_length(length)
    streams = [BlockStream(source, chosen, model_dtype(source.config, chosen)) for source in sources]
    if kv_cache is not None:
        needed = _loaded_bytes(sources[0], streams[0].dtype)
        check_fits(needed, chosen, "eval perplexity --kv-cache", "without --kv-cache it reads block by block")
    # Work is counted in weights: a block passes all windows at once, the output head one after the other.
    inside = sum(target.weights for stream in streams for block in stream.blocks for target in block.targets)
    # A model whose cache is coded is whole in memory, and passes them one after the other, too.
    coded = sum(t.weights for block in streams[0].blocks for t in block.targets) if kv_cache is not None else 0
    heads = sum(stream.model.get_output_embeddings().weight.numel() for stream in streams)
    done = 0.0

    def tell(work: float) -> None:
        nonlocal done
        done += work
        watch(round(done), inside + heads)

    passes: list[Any] = [Pass(s, windows_NL, tell) for s in (streams if kv_cache is None else streams[1:])]
    if kv_cache is not None:
        passes.insert(0, CodedPass(models[0], kv_cache, device, windows_NL))
    found, labels = [Scores() for _ in models], []
    for number, window_L in enumerate(windows_NL):
        first = scored(number, length, step)
        labels.append(window_L[first + 1 :])
        truth = passes[-1].logits(number, first) if baseline is not None else None
        for scores, each in zip(found, passes, strict=False):
            logits = each.logits(number, first)
            if truth is not None and logits.shape != truth.shape:
                raise VQCompressError(f"{', '.join(models)} and {baseline} have vocabularies of different sizes")
            scores.add(logits, labels[-1].to(chosen), truth)
        tell((heads + coded) / len(windows_NL))
    return found, {
        "tokens": found[0].tokens,
        "windows": len(windows_NL),
        "seqlen": length,
        "stride": step,
        "bos": False,
        "kv_cache": kv_cache,
        "device": chosen.type,
        "tokens_sha256": fingerprint(windows_NL),
        "text_bytes": len(str(tokenizers[0].decode(torch.cat(labels))).encode()),
    }


def perplexity(
    model: str,
    text: str,
    seqlen: int | None = None,
    stride: int | None = None,
    limit: int | None = None,
    baseline: str | None = None,
    device: str = "auto",
    watch: Callable[[int, int], None] = lambda done, total: None,
    kv_cache: str | None = None,
) -> dict[str, Any]:
    """Perplexity of a model on a text, by the protocol of the GPTQ and AQLM papers; with a baseline also KL and top-1.

    The text is tokenized once without special tokens and cut into consecutive windows of `seqlen` without overlap, the
    tail dropped; tokens 2…seqlen of each are predicted; the mean negative log-likelihood over all of them, in float32,
    is exponentiated. With a smaller `stride` a window scores only the tokens that the one before it did not.
    kv_cache: a recipe with a `cache`: every token attends to the past as it would be stored by then, as in decoding;
    the whole model is in memory. watch: called with the work done and its total.
    """
    start = time.perf_counter()
    (scores,), protocol = score([model], text, seqlen, stride, limit, baseline, device, watch, kv_cache)
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
