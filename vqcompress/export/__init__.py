"""An artifact rewritten in a format that other runtimes load. A format is a pure function over one block's tensors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vqcompress.artifact import SHARD, Artifact
from vqcompress.blocks import BlockStream
from vqcompress.checkpoint import INDEX, resolve
from vqcompress.errors import UsageError, VQCompressError, did_you_mean
from vqcompress.export import dense
from vqcompress.runtime.device import peak_rss_bytes

Exporter = Callable[[BlockStream, Artifact], tuple[dict[str, Any], Iterator[dict[str, Tensor]]]]
# Name → a function that gives the new config and then, one block at a time, tensors by their new names.
FORMATS: dict[str, Exporter] = {"dense": dense.export}
VERIFY_TOKENS = 256
# Mean KL divergence (nat) that an export may have from its artifact: rounding to 16 bits costs about 1e-4, and an
# artifact that quantizes activations differs by that much more.
TOLERANCE = 0.01
READ = """
import json, sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, logging
logging.set_verbosity_error()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
ids = torch.tensor(json.loads(sys.argv[2]))
with torch.inference_mode():
    save_file({"logits": model(ids).logits.contiguous()}, sys.argv[3])
"""


def export(artifact: str, format: str, out: Path, verify: bool = False, overwrite: bool = False) -> dict[str, Any]:
    """Write the artifact to `out` in another format; returns what was written, and how it was verified if asked.

    verify: load the result with its own reader in a fresh process and compare logits with the artifact's.
    """
    start = time.perf_counter()
    if format not in FORMATS:
        raise UsageError(f"no export format '{format}'.{did_you_mean(format, FORMATS)}")
    source = Artifact(resolve(artifact))
    source.check_files()
    _empty(out, overwrite)
    stream = BlockStream(source, torch.device("cpu"), torch.float32)
    config, groups = FORMATS[format](stream, source)
    count = len(stream.blocks) + 1
    weight_map: dict[str, str] = {}
    total = 0
    for number, tensors in enumerate(groups, 1):
        file = SHARD.format(number, count)
        save_file({name: t.contiguous() for name, t in tensors.items()}, out / file, metadata={"format": "pt"})
        (out / file).chmod(0o644)
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(t.numel() * t.element_size() for t in tensors.values())
    for path in source.companions():
        (out / path.name).write_bytes(path.read_bytes())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (out / INDEX).write_text(json.dumps(index, indent=1, sort_keys=True))
    # Last, so that an export that was interrupted is no checkpoint.
    (out / "config.json").write_text(json.dumps(config, indent=2))
    result: dict[str, Any] = {"format": format, "files": count, "bytes": total}
    if verify:
        result["verified"] = _verify(stream, source, out)
    return {**result, "seconds": round(time.perf_counter() - start, 3), "peak_rss_bytes": peak_rss_bytes()}


def _empty(out: Path, overwrite: bool) -> None:
    if out.is_dir() and any(out.iterdir()):
        if not overwrite:
            raise VQCompressError(f"{out} is not empty; choose another directory or give --overwrite")
        if Artifact.is_one(out):
            raise VQCompressError(f"{out} holds an artifact; an export does not overwrite one")
        (out / "config.json").unlink(missing_ok=True)
        for old in (*out.glob("model-*-of-*.safetensors"), out / INDEX):
            old.unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)


@torch.inference_mode()
def _verify(stream: BlockStream, source: Artifact, out: Path) -> dict[str, Any]:
    """KL divergence of the export, read by transformers in a fresh process, from the artifact on random tokens."""
    vocabulary = stream.model.config.get_text_config().vocab_size
    ids_BL = torch.randint(vocabulary, (1, VERIFY_TOKENS), generator=torch.Generator().manual_seed(0))
    states = [stream.begin(ids_BL)]
    for i in range(len(stream.blocks)):
        stream.advance(stream.load_block(i), i, states)
    ours = stream.finish(ids_BL, states[0]).float().log_softmax(-1)
    logits_file = out / "logits.partial"
    command = [sys.executable, "-c", READ, str(out), json.dumps(ids_BL.tolist()), str(logits_file)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if done.returncode:
        raise VQCompressError(f"transformers cannot load {out}: {done.stderr.strip().splitlines()[-1]}")
    theirs = load_file(logits_file)["logits"].float().log_softmax(-1)
    logits_file.unlink()
    divergence = (ours.exp() * (ours - theirs)).sum(-1).mean().item()
    if not divergence <= TOLERANCE:
        raise VQCompressError(f"{out} differs from {source.path}: mean KL divergence {divergence:.4f} > {TOLERANCE}")
    return {"reader": "transformers", "tokens": VERIFY_TOKENS, "mean_kl_divergence": divergence}
