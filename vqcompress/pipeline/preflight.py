"""Refuses, before anything is written, a run whose artifact its readers would refuse."""

from __future__ import annotations

from torch import Tensor

import vqcompress
from vqcompress.errors import VQCompressError
from vqcompress.evaluate.verify import check_readers, run_ends, without_memory
from vqcompress.model.device import free_bytes, release_freed_memory
from vqcompress.model.stream import BlockStream
from vqcompress.pipeline.estimate import ends_bytes
from vqcompress.pipeline.plan import Plan
from vqcompress.storage.artifact import part_name, quantization_config


def check_plan(stream: BlockStream, plan: Plan) -> None:
    """VQCompressError naming a tensor that the artifact's readers would miss or refuse. Reads headers only.

    A checkpoint without weights, of which only a plan can be made, has none to check.
    """
    if stream.source.tensors:
        settings = quantization_config(plan.entries, vqcompress.__version__) if plan.targets else None
        check_readers(stream, settings, _artifact_tensors(stream, plan))


def try_blocks(stream: BlockStream) -> None:
    """Run the dense first and last block on a few tokens, see `run_ends`; not where memory does not hold them."""
    if ends_bytes(stream) < free_bytes(stream.device):
        # A stream of its own: weights outside of the blocks stay in the memory of the one that loaded them.
        run_ends(BlockStream(stream.checkpoint, stream.device, stream.dtype))
        release_freed_memory()


def _artifact_tensors(stream: BlockStream, plan: Plan) -> dict[str, Tensor]:
    """The tensors of the artifact by their names on disk, without memory; smoothing vectors are not known yet."""
    source = without_memory({name: (info.dtype, info.shape) for name, info in stream.source.tensors.items()})
    tensors = {name: source[name] for name in stream.non_block_weights}
    for block in plan.blocks:
        found = {name: source[name] for name in stream.names.under(block.name)}
        for entry in plan.entries_of(block):
            weight = stream.names.tensor.get(f"{entry.target.name}.weight")
            if weight is None:
                raise VQCompressError(f"{stream.source.path} has no tensor of its own for {entry.target.name}.weight")
            del found[weight]
            layout = {part_name(weight, part): info for part, info in entry.layout().items()}
            if entry.shared is not None:
                place = stream.names.stored_prefix(block.name) + entry.shared.removeprefix(block.name)
                layout |= {f"{place}.{part}": info for part, info in entry.method.shared_layout().items()}
            found |= without_memory(layout)
        tensors |= stream.as_stored(found, [target.name for target in plan.targets])
    return tensors
