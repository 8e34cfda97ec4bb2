"""Train the demo checkpoint: a small Llama on text which every Python installation carries.

A compressor is best tried on a model which has *learned* something: the weights of an untrained network
have no structure to keep, and no error in them shows in its (uniform) predictions. This script makes such a
model in less than half an hour on two idle CPU cores, from nothing that has to be downloaded:

1. **Text.** The language reference behind ``help()`` (``pydoc_data.topics``), the docstrings and longer
   comments of the standard library (its sources are parsed, not imported; one document per module), and the
   docstrings of some modules written in C. A paragraph which occurs twice is kept once, over all documents,
   so that the held-out part shares no long paragraph with the training part. A seeded hash of each
   document's text decides which part it belongs to; the few very long documents all go to training, lest
   one dominate the held-out part.
2. **Tokenizer.** Byte-level BPE, 2,048 entries, learned from the training part alone.
3. **Model.** Llama architecture, 2.3 M parameters, every matrix dimension a multiple of 128 (four heads of
   64): small, yet it has grouped-query attention, a gated MLP, rotary positions and tied embeddings.
4. **Check.** The perplexity of the *saved* (bfloat16) checkpoint on the held-out text, beside that of a
   smoothed bigram model counted on the same training tokens. A model far below the bigram uses its context.

Usage::

    python scripts/train_demo.py [--out vqcompress/demo] [--steps N] [--seed 0]

The last line printed is one JSON object with both perplexities. One seed fixes the split, the initial
weights and the order of the batches; another Python has other docstrings, and another CPU or PyTorch rounds
differently.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib
import inspect
import json
import math
import platform
import random
import re
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

EOS = "<|endoftext|>"
VOCAB, SEQLEN, BATCH, LEARNING_RATE = 2048, 512, 4, 3e-3
HELD_OUT, HELD_OUT_LONGEST, CALIBRATION_BYTES = 0.1, 20_000, 700_000
SKIP = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
C_MODULES = ("_collections", "_functools", "_io", "_thread", "builtins", "itertools", "math", "sys", "time")

README = """# Demo checkpoint

A Llama of {parameters:,} parameters, trained from scratch on text which every Python installation carries:
the topics of `help()`, and the docstrings and comments of the standard library. It is large enough for the
damage of a compressor to show in its perplexity, and small enough to ship. It is no use as a language
model.

Made with Python {python}, PyTorch {torch} and transformers {transformers} by

    python scripts/train_demo.py --steps {steps} --seed {seed}

| on `evaluation.txt`, windows of 512 tokens | perplexity |
|---|---|
| this checkpoint (bfloat16 weights, float32 arithmetic) | {perplexity:.4f} |
| bigram model (Kneser-Ney) of the same training tokens | {bigram_perplexity:.4f} |

`evaluation.txt` holds documents kept out of training, `calibration.txt` a sample of those trained on. Both
are text of CPython's documentation, docstrings and comments, (c) Python Software Foundation, under the PSF
License Agreement (<https://docs.python.org/3/license.html>).
"""


def prose(path: Path) -> list[str]:
    """The docstrings of one source file, in its order, then its comments of two lines or more."""
    try:
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source)
    except (SyntaxError, ValueError):  # a file in another encoding, a template
        return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = sorted((n for n in ast.walk(tree) if isinstance(n, kinds)), key=lambda n: getattr(n, "lineno", 0))
    comments = re.findall(r"(?:^[ \t]*#.*\n){2,}", source, re.MULTILINE)
    comments = [re.sub(r"^[ \t]*#+ ?", "", block, flags=re.MULTILINE) for block in comments]
    return [ast.get_docstring(node) or "" for node in nodes] + comments


def c_docstrings(name: str) -> list[str]:
    """The docstrings of a module written in C: its own, its functions' and classes', their members'."""
    module = importlib.import_module(name)
    found: list[object] = [module]
    for _, thing in sorted(vars(module).items()):
        if callable(thing):
            found.append(thing)
        if isinstance(thing, type):
            found += [member for _, member in sorted(vars(thing).items())]
    return [inspect.cleandoc(t.__doc__) for t in found if isinstance(t.__doc__, str)]


def documents() -> Iterator[str]:
    """All documents, in a fixed order, without short texts and without paragraphs seen before."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(p.relative_to(stdlib) for p in stdlib.rglob("*.py"))
    files = [p for p in files if not SKIP & set(p.parts) and not p.name.startswith("_sysconfigdata")]
    topics = importlib.import_module("pydoc_data.topics").topics
    sources = [[topics[name]] for name in sorted(topics)]
    sources += [prose(stdlib / p) for p in files] + [c_docstrings(name) for name in C_MODULES]
    seen: set[str] = set()
    for texts in sources:
        kept: list[str] = []
        for text in texts:
            paragraphs = "\n".join(line.rstrip() for line in text.strip().splitlines()).split("\n\n")
            fresh = [p for p in paragraphs if p.strip() and (len(p) < 40 or p not in seen)]
            seen.update(fresh)
            if len("\n\n".join(fresh)) >= 40:
                kept.append("\n\n".join(fresh))
        if sum(map(len, kept)) >= 200:
            yield "\n\n".join(kept)


def split(seed: int) -> tuple[list[str], list[str]]:
    """Training and held-out documents, each in a seeded order."""
    train: list[str] = []
    held: list[str] = []
    for text in documents():
        digest = hashlib.sha256(f"{seed}\n{text}".encode()).digest()
        chosen = int.from_bytes(digest[:8], "big") < HELD_OUT * 2**64 and len(text) <= HELD_OUT_LONGEST
        (held if chosen else train).append(text)
    random.Random(seed).shuffle(train)
    random.Random(seed).shuffle(held)
    return train, held


def train_tokenizer(texts: list[str], out: Path) -> Tokenizer:
    """Learn the byte-level BPE and write it in the form which ``AutoTokenizer`` reads."""
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=[EOS], initial_alphabet=level.alphabet(), show_progress=False
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = level, decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(out / "tokenizer.json"))
    config: dict[str, str | bool] = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": EOS}
    config |= {"eos_token": EOS, "clean_up_tokenization_spaces": False}
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return tokenizer


def train_model(tokens: torch.Tensor, steps: int, seed: int) -> LlamaForCausalLM:
    """AdamW with warm-up and cosine decay; each epoch cuts the stream into windows at another offset."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1, lr=LEARNING_RATE, betas=(0.9, 0.95))
    pool: list[torch.Tensor] = []
    warmup = max(1, steps // 25)
    start, mean = time.monotonic(), math.log(VOCAB)
    for step in range(1, steps + 1):
        if len(pool) < BATCH:
            offset = int(torch.randint(SEQLEN, ()))
            windows = tokens[offset:][: (len(tokens) - offset) // SEQLEN * SEQLEN].view(-1, SEQLEN)
            pool = [*windows[torch.randperm(len(windows))], *pool]
        rows = torch.stack([pool.pop() for _ in range(BATCH)])
        progress = max(0.0, (step - warmup) / max(1, steps - warmup))
        fraction = min(1.0, step / warmup) * (0.505 + 0.495 * math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * fraction
        loss = model(input_ids=rows, labels=rows, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        mean += 0.05 * (loss.item() - mean)
        if step % 20 == 0:
            print(f"step {step}/{steps}  loss {mean:.3f}  {time.monotonic() - start:.0f} s", flush=True)
    return model.eval()


@torch.inference_mode()
def perplexity(model: LlamaForCausalLM, tokens: torch.Tensor) -> float:
    """Windows of 512 tokens without overlap, the tail dropped; tokens 2..512 of each are predicted."""
    rows = tokens[: len(tokens) // SEQLEN * SEQLEN].view(-1, SEQLEN)
    total = 0.0
    for part in rows.split(8):
        logits = model(input_ids=part, use_cache=False).logits[:, :-1].flatten(0, 1)
        total += cross_entropy(logits, part[:, 1:].flatten(), reduction="sum").item()
    return math.exp(total / (len(rows) * (SEQLEN - 1)))


def bigram_perplexity(train: torch.Tensor, held: torch.Tensor) -> float:
    """Interpolated Kneser-Ney on the same predicted tokens; the discount is the best *for that text*."""
    counts = torch.bincount(train[:-1] * VOCAB + train[1:], minlength=VOCAB**2).view(VOCAB, VOCAB).double()
    kinds, seen = (counts > 0).double(), counts.sum(1, keepdim=True)
    unigram = (kinds.sum(0) + 0.5) / (kinds.sum() + 0.5 * VOCAB)
    rows = held[: len(held) // SEQLEN * SEQLEN].view(-1, SEQLEN)
    results = []
    for discount in (0.5, 0.6, 0.7, 0.8, 0.9, 0.95):
        backoff = discount * kinds.sum(1, keepdim=True) * unigram
        p = ((counts - discount).clamp(min=0) + backoff) / seen.clamp(min=1)
        p = torch.where(seen > 0, p, unigram)
        results.append(math.exp(-p[rows[:, :-1], rows[:, 1:]].log().mean().item()))
    return min(results)


def main() -> None:
    """Gather, train, save, measure."""
    parser = argparse.ArgumentParser(description="Train the demo checkpoint.")
    parser.add_argument("--out", type=Path, default=Path("vqcompress/demo"))
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    train, held = split(args.seed)
    sample = train[:1]
    for text in train[1:]:
        if sum(len(t.encode()) + 2 for t in [*sample, text]) <= CALIBRATION_BYTES:
            sample.append(text)
    (args.out / "calibration.txt").write_text("\n\n".join(sample) + "\n", encoding="utf-8")
    evaluation = "\n\n".join(held) + "\n"
    (args.out / "evaluation.txt").write_text(evaluation, encoding="utf-8")
    tokenizer = train_tokenizer(train, args.out)
    tokens = torch.tensor([i for e in tokenizer.encode_batch(train) for i in (0, *e.ids)])
    print(f"training: {len(train)} documents, {sum(map(len, train)):,} characters, {len(tokens):,} tokens")
    print(f"held out: {len(held)} documents, {len(evaluation):,} characters", flush=True)

    model = train_model(tokens, args.steps, args.seed)
    model.to(torch.bfloat16).save_pretrained(args.out)
    saved = AutoModelForCausalLM.from_pretrained(args.out, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(args.out)(evaluation, add_special_tokens=False)["input_ids"]
    result = {
        "perplexity": perplexity(saved, torch.tensor(ids)),
        "bigram_perplexity": bigram_perplexity(tokens, torch.tensor(ids)),
        "parameters": saved.num_parameters(),
        "steps": args.steps,
        "seed": args.seed,
    }
    versions = {"python": platform.python_version(), "torch": torch.__version__.split("+")[0]}
    versions["transformers"] = transformers.__version__
    (args.out / "README.md").write_text(README.format(**result, **versions), encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
