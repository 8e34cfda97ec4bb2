"""Checks an artifact against its own description: checksums, shapes, ranges of codes, finite numbers; and runs it.

Shape legend: B rows, L tokens of a row.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from torch import Tensor

from vqcompress.errors import VQCompressError, one_line
from vqcompress.methods import Layout
from vqcompress.methods.base import is_finite
from vqcompress.model.device import free_bytes
from vqcompress.model.stream import BlockStream
from vqcompress.model.weights import Names, check_headers
from vqcompress.storage.artifact import KV_CACHE, SMOOTHING, Artifact, Entry, tensors_of
from vqcompress.storage.checkpoint import check_finite, resolve
from vqcompress.storage.trust import reason

# Tokens of a row, of which there are two, that a model is tried on.
TOKENS = 8


def check_values(entry: Entry, packed: dict[str, Tensor]) -> None:
    """VQCompressError naming the weight and the tensor if a code is out of range or a number is not finite."""
    own = dict(packed)
    smoothing = own.pop(SMOOTHING, None)
    try:
        if smoothing is not None and not (torch.isfinite(smoothing).all() and (smoothing > 0).all()):
            raise ValueError(f"{SMOOTHING} is not finite and positive")
        entry.method.check(own, entry.target.shape)
    except ValueError as error:
        raise VQCompressError(f"{entry.target.name}: {error}") from error


def without_memory(layout: Layout) -> dict[str, Tensor]:
    """Tensors of these types and shapes on the meta device."""
    return {name: torch.empty(shape, dtype=dtype, device="meta") for name, (dtype, shape) in layout.items()}


def check_readers(stream: BlockStream, settings: dict[str, Any] | None, tensors: dict[str, Tensor]) -> None:
    """Build models without memory as `load` and `from_pretrained` do; VQCompressError naming what they would refuse.

    stream: of the checkpoint or the artifact. settings: the artifact's quantization_config, None if all is dense.
    tensors: of the artifact, by their names on disk, without memory.
    """
    named: Any = getattr(transformers, next(iter(stream.config.architectures or []), ""), None)
    # The class of AutoModel, and the one that config.json names, if transformers has it.
    known = isinstance(named, type) and issubclass(named, transformers.PreTrainedModel)
    for reader in dict.fromkeys((type(stream.model), named if known else type(stream.model))):
        # That of the text part alone where that is what AutoModelForCausalLM gives.
        config: Any = copy.deepcopy(stream.model.config if reader is type(stream.model) else stream.config)
        if settings is not None:
            # Memory is no question here, so no warning about it either.
            config.quantization_config = {**settings, "cpu_weights": "packed"}
        try:
            model: Any = reader.from_pretrained(
                None, config=config, state_dict=dict(tensors), dtype=stream.dtype, device_map="meta"
            )
        except VQCompressError:
            raise
        except Exception as error:  # loaders of models raise every type of error
            raise VQCompressError(f"transformers cannot build a {reader.__name__}: {reason(error)}") from error
        headers: Any = tensors
        check_headers(model, Names(model, headers), headers)


def run_ends(stream: BlockStream) -> list[str]:
    """Run the first and the last block, and the head, on a few random tokens; returns the names of the blocks.

    The first alone where later blocks read what those between answer. One block at a time is in memory. Where blocks
    cannot run one by one, all do at once, or none if memory does not hold them.
    VQCompressError naming the part that cannot run or puts out NaN or Inf.
    """
    vocabulary, generator = stream.config.get_text_config().vocab_size, torch.Generator().manual_seed(0)
    # Two rows: what blocks are called with may depend on the tokens, and a stream then has to know.
    rows = torch.randint(vocabulary, (2, TOKENS), generator=generator).split(1)
    part = "what comes before the first block"
    try:
        calls = stream.learn()
        if calls.refusal:
            if _decoded_bytes(stream) > free_bytes(stream.device):
                return []
            ends, part = dict.fromkeys(range(len(stream.blocks))), "the model"
            finite = is_finite(stream.whole(rows[0]))
        else:
            states = [stream.embed(ids_BL) for ids_BL in rows]
            # Only now it is known whether a call depends on the tokens.
            ends = dict.fromkeys(calls.order[:1] + calls.order[-1:] * calls.plain)
            for i in ends:
                part = stream.blocks[i].name
                tensors = stream.source.read(stream.names.under(part))
                check_finite(tensors)
                stream.forward(stream.load_block(i, tensors), i, states)
            part = "what comes after the last block"
            finite = is_finite(stream.logits(states[0]))
    except (VQCompressError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the code of a model may raise anything
        raise VQCompressError(f"{stream.source.path} cannot run: {part}: {one_line(error)}") from error
    if not finite:
        raise VQCompressError(f"{stream.source.path}: {part} puts out NaN or Inf")
    return [stream.blocks[i].name for i in ends]


def _decoded_bytes(stream: BlockStream) -> int:
    """Bytes of all tensors in float32, those of compressed weights also as they are stored."""
    entries = stream.checkpoint.entries.values() if isinstance(stream.checkpoint, Artifact) else ()
    return 4 * (stream.source.numbers + sum(entry.target.weights for entry in entries))


def verify(path: str, quick: bool = False) -> dict[str, Any]:
    """JSON: how many files, targets and bytes were checked; VQCompressError naming the first file or tensor at fault.

    Reads every byte, one block at a time; builds the model as its readers do, and runs its first and last block, unless
    `quick`. `ran`: the names of those blocks.
    """
    artifact = Artifact(resolve(path))
    sealed = artifact.check_files(reports=True)
    # The stream compares the stored shapes with the layouts.
    stream = BlockStream(artifact, torch.device("cpu"), torch.float32)
    entries = list(artifact.entries.values())
    if (artifact.path / KV_CACHE).is_file():
        check_finite(tensors_of(artifact.path / KV_CACHE))
    check_finite(stream.source.read(stream.non_block_weights))
    # Loading refuses dense tensors that are missing or have another shape.
    stream.load_non_block_weights()
    for i, block in enumerate(stream.blocks):
        tensors = stream.source.read(stream.names.under(block.name))
        check_finite(tensors)
        stream.load_block(i, tensors)
        for entry in entries:
            if entry.target in block.targets:
                check_values(entry, {part: tensors[name] for part, name in stream.stored_parts(entry).items()})
    ran = []
    if not quick:
        headers = without_memory({name: (info.dtype, info.shape) for name, info in artifact.tensors.items()})
        check_readers(stream, artifact.config["quantization_config"], headers)
        ran = run_ends(stream)
    return {
        "files": len(artifact.files),
        "targets": len(entries),
        "checksums": sealed,
        "bytes": sum(file.stat().st_size for file in artifact.files),
        "ran": ran,
    }
