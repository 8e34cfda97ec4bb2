"""Loads an export with its own reader, in a process without this package, and compares it with the artifact."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from vqcompress.errors import VQCompressError
from vqcompress.model.linear import CompressedLinear, decode_layers
from vqcompress.model.stream import BlockStream
from vqcompress.model.tokenizer import load_tokenizer, tokenize
from vqcompress.storage.artifact import Artifact
from vqcompress.storage.checkpoint import resolve, stored_dtype
from vqcompress.storage.text import read_text
from vqcompress.storage.trust import trusted

TOKENS = 256
READ = """
import json, sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, logging
logging.set_verbosity_error()
{setup}
settings = {{"dtype": torch.float32, "output_loading_info": True, "trust_remote_code": {trusted}}}
model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], **settings)
if any(info.values()):
    sys.exit("tensors do not fit: " + ", ".join(f"{{kind}} {{names}}" for kind, names in info.items() if names)[:500])
with torch.inference_mode():
    logits = model.eval()(torch.tensor(json.loads(sys.argv[2]))).logits
save_file({{"logits": logits.contiguous()}}, sys.argv[3])
"""


@dataclass(frozen=True)
class Reader:
    """What loads a format, in float32 on a CPU.

    package: the pip requirement that transformers needs for the format. setup: code to run before loading. rounds:
    whether the reader rounds activations. bound: the largest mean KL divergence accepted, in nat. If activations are
    not rounded, weights agree bit for bit and only the order of sums differs; the bound leaves room for a tie between
    experts that a router breaks differently.
    """

    package: str = ""
    setup: str = ""
    rounds: bool = False
    bound: float = 1e-3

    @property
    def name(self) -> str:
        """The package's name alone."""
        return self.package.partition(">")[0].partition("[")[0]

    def line(self, out: Path) -> str:
        """The Python expression that loads an export, with the package that it needs."""
        dtype = ', dtype="float32"' if self.setup else ""
        needs = f"  # needs pip install '{self.package}'" if self.package else ""
        return f"AutoModelForCausalLM.from_pretrained({json.dumps(str(out))}{dtype}){needs}"

    def check_installed(self) -> None:
        """VQCompressError naming the package to install if it is missing."""
        if self.package:
            try:
                importlib.metadata.version(self.name)
            except importlib.metadata.PackageNotFoundError as error:
                how = f"pip install '{self.package}', or vqcompress with the extra 'export'"
                raise VQCompressError(f"--verify needs the package {self.name}: {how}") from error


@torch.inference_mode()
def compare(stream: BlockStream, source: Artifact, out: Path, reader: Reader, held: Collection[str]) -> dict[str, Any]:
    """JSON: mean KL divergence of the export's predictions from the artifact's; VQCompressError beyond the bound.

    held: targets that the export stores compressed; the others were rounded to the model's dtype. The artifact rounds
    its activations only if the reader does.
    """
    ids_BL, text = _tokens(stream, source)
    states, dtype = [stream.embed(ids_BL)], stored_dtype(source.config)

    def weight(layer: CompressedLinear) -> Tensor:
        return layer.weight if layer.entry.target.name in held else layer.weight.to(dtype).float()

    for i in range(len(stream.blocks)):
        block = stream.load_block(i)
        if not reader.rounds:
            decode_layers(block, weight)
        stream.forward(block, i, states)
    ours = stream.logits(ids_BL, states[0]).double().log_softmax(-1)
    logits_file = out / "logits.partial"
    command = [
        sys.executable,
        # Do not import modules from the current directory.
        "-P",
        "-c",
        READ.format(setup=reader.setup, trusted=trusted()),
        str(out),
        json.dumps(ids_BL.tolist()),
    ]
    # On a GPU transformers would keep FP8 weights as they are.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    done = subprocess.run([*command, str(logits_file)], capture_output=True, text=True, env=environment)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise VQCompressError(f"transformers cannot load {out}: {reason}")
    theirs = load_file(logits_file)["logits"].double().log_softmax(-1)
    logits_file.unlink()
    divergence = (ours.exp() * (ours - theirs)).sum(-1).mean().item()
    if not divergence <= reader.bound:
        raise VQCompressError(f"{out} differs from {source.path}: mean KL divergence {divergence:.4f} > {reader.bound}")
    return {
        "reader": f"transformers with {reader.name}" if reader.package else "transformers",
        "tokens": ids_BL.numel(),
        "text": text,
        "activations": "rounded" if reader.rounds else "exact",
        "mean_kl_divergence": divergence,
        "bound": reader.bound,
    }


def _tokens(stream: BlockStream, source: Artifact) -> tuple[Tensor, str]:
    """Token ids (1, L) of the packaged evaluation text, or random ids without a tokenizer; and which of the two."""
    vocabulary = stream.model.config.get_text_config().vocab_size
    count = min(TOKENS, source.row_length(None))
    try:
        ids_n = tokenize(load_tokenizer(source.path), read_text(str(resolve("demo") / "evaluation.txt"))[: 64 * count])
    except VQCompressError:
        ids_n = torch.empty(0, dtype=torch.int64)
    if len(ids_n) >= count and int(ids_n.max()) < vocabulary:
        return ids_n[None, :count], "the packaged text"
    return torch.randint(vocabulary, (1, count), generator=torch.Generator().manual_seed(0)), "random tokens"
