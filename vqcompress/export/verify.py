"""Loads an export with its own reader, in a process without this package, and compares it with the artifact."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from vqcompress.errors import UsageError, VQCompressError
from vqcompress.model.drafts import draft_layers
from vqcompress.model.linear import decode_layers
from vqcompress.model.stream import BlockStream
from vqcompress.model.weights import auto_class, load_config
from vqcompress.storage.artifact import Artifact
from vqcompress.storage.checkpoint import COMPUTED
from vqcompress.storage.trust import trusted

TOKENS = 256
READ = """
import json, sys, torch
from safetensors.torch import save_file
from transformers import {auto}, logging
logging.set_verbosity_error()
{setup}
model, info = {auto}.from_pretrained(
    sys.argv[1], dtype=torch.float32, output_loading_info=True, trust_remote_code={trusted})
skipped = tuple(json.loads(sys.argv[4]))
info["unexpected_keys"] = [name for name in info["unexpected_keys"] if not name.startswith(skipped)]
if any(info.values()):
    sys.exit("tensors do not fit: " + ", ".join(f"{{kind}} {{names}}" for kind, names in info.items() if names)[:500])
with torch.inference_mode():
    model.config.return_dict = model.config.get_text_config().return_dict = True
    logits = model.eval()(torch.tensor(json.loads(sys.argv[2]))).logits
save_file({{"logits": logits.contiguous()}}, sys.argv[3])
"""


@dataclass(frozen=True)
class Reader:
    """How transformers loads a format in float32 on a CPU.

    package: the pip requirement that transformers needs for the format. setup: code to run before loading. rounds:
    whether the reader rounds activations. bound: the largest mean KL divergence accepted, in nat. If activations are
    not rounded, only the order of sums and the rounding of dense weights to the model's dtype differ; the bound leaves
    room for a tie between experts that a router breaks differently.
    """

    package: str = ""
    setup: str = ""
    rounds: bool = False
    bound: float = 1e-3

    def check_installed(self) -> None:
        """UsageError if the package is not installed."""
        name = re.split(r"\W", self.package.replace("-", "_"))[0]
        if name and importlib.util.find_spec(name) is None:
            raise UsageError(f"--verify needs the format's reader: pip install '{self.package}'")

    def line(self, out: Path) -> str:
        """The Python expression that loads an export, with the package that it needs."""
        needs = f"  # needs pip install '{self.package}'" if self.package else ""
        return f"AutoModelForCausalLM.from_pretrained({json.dumps(str(out))}){needs}"


@torch.inference_mode()
def compare(
    stream: BlockStream, source: Artifact, out: Path, reader: Reader, compressed: Collection[str]
) -> dict[str, Any]:
    """JSON: mean KL divergence of the export's predictions from the artifact's; VQCompressError beyond the bound.

    compressed: the targets that the export has compressed. The artifact rounds activations only for them, and only if
    the reader does. The tokens are random, so that every model has some.
    """
    vocabulary, length = stream.model.config.get_text_config().vocab_size, min(TOKENS, source.row_length(None))
    ids_BL = torch.randint(vocabulary, (1, length), generator=torch.Generator().manual_seed(0))
    ours = _logits(stream, ids_BL, compressed if reader.rounds else ()).double().log_softmax(-1)
    # What the model does not read of the original either.
    unread = [*stream.unread, *(name for name in stream.source.tensors if re.search(COMPUTED, name))]
    unread += [f"{layer}." for layer in draft_layers(stream)]
    theirs = _read(out, reader, ids_BL, unread).double().log_softmax(-1)
    divergence, bound = _divergence(ours, theirs), reader.bound
    if reader.rounds and not stream.learn().refusal:
        # Two roundings that know nothing of each other are twice as far apart as each is from none.
        exact = _logits(stream, ids_BL, ()).double().log_softmax(-1)
        bound = max(bound, 2 * _divergence(exact, ours))
    if not divergence <= bound:
        raise VQCompressError(f"{out} differs from {source.path}: mean KL divergence {divergence:.4f} > {bound:.4f}")
    return {
        "reader": f"transformers with {reader.package}" if reader.package else "transformers",
        "tokens": ids_BL.numel(),
        "activations": "rounded" if reader.rounds else "exact",
        "mean_kl_divergence": divergence,
        "bound": bound,
    }


def _divergence(first: Tensor, second: Tensor) -> float:
    """The mean KL divergence of the second from the first; both are logarithms of probabilities (B, L, V)."""
    return float((first.exp() * (first - second)).sum(-1).mean())


def _logits(stream: BlockStream, ids_BL: Tensor, rounded: Collection[str]) -> Tensor:
    """Logits (B, L, V) of the artifact, block by block if it can be run so. rounded: targets that round activations."""
    if stream.learn().refusal:
        # The first call loads the blocks.
        stream.whole(ids_BL)
        decode_layers(stream.model, rounded)
        return stream.whole(ids_BL)
    states = [stream.embed(ids_BL)]
    for i in range(len(stream.blocks)):
        block = stream.load_block(i)
        decode_layers(block, rounded)
        stream.forward(block, i, states)
    return stream.logits(states[0])


def _read(out: Path, reader: Reader, ids_BL: Tensor, skipped: list[str]) -> Tensor:
    """Logits (B, L, V) of an export in a process of its own; VQCompressError with its last line if that fails.

    skipped: beginnings of names that transformers does not read.
    """
    logits = out / "logits.partial"
    code = READ.format(auto=auto_class(load_config(out)).__name__, setup=reader.setup, trusted=trusted())
    # -P: do not import modules from the current directory.
    command = [sys.executable, "-P", "-c", code, str(out), json.dumps(ids_BL.tolist()), str(logits)]
    command.append(json.dumps(skipped))
    # On a GPU transformers would keep FP8 weights as they are.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", env=environment)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise VQCompressError(f"transformers cannot load {out}: {reason}")
    found = load_file(logits)["logits"]
    logits.unlink()
    return found
