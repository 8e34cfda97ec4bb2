"""Refuses, before anything is written, a run whose artifact its readers would refuse."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

import vqcompress
from vqcompress.errors import VQCompressError
from vqcompress.evaluate.verify import run_ends
from vqcompress.methods import Layout
from vqcompress.model.device import available_bytes
from vqcompress.model.stream import BlockStream
from vqcompress.pipeline.estimate import ends_bytes
from vqcompress.pipeline.plan import Plan
from vqcompress.runtime.foresee import check_readers
from vqcompress.storage.artifact import part_name, quantization_config
from vqcompress.storage.checkpoint import TensorInfo


def check_plan(stream: BlockStream, plan: Plan) -> None:
    """VQCompressError naming a tensor that the artifact's readers would miss or refuse. Reads headers only.

    A checkpoint without weights, of which only a plan can be made, has none to check.
    """
    if not stream.source.tensors:
        return
    wanted = stream.model.state_dict()
    for block, skeleton in zip(stream.blocks, stream.skeletons, strict=True):
        wanted |= {f"{block.name}.{path}": tensor for path, tensor in skeleton.state_dict().items()}
    for name, info in stream.source.tensors.items():
        parameter = wanted.get(stream.names.parameter[name])
        if parameter is not None and parameter.is_floating_point() and not _is_dense(info.dtype):
            raise VQCompressError(f"{name} is stored as {info.dtype}, which is no type of dense weights")
    settings = quantization_config(plan.entries, vqcompress.__version__) if plan.targets else None
    tensors = {name: TensorInfo("", t.dtype, tuple(t.shape)) for name, t in _artifact_tensors(stream, plan).items()}
    check_readers(stream, settings, tensors)


def try_blocks(stream: BlockStream) -> None:
    """Run the dense first and last block on a few tokens, see `run_ends`; not where memory does not hold them."""
    if ends_bytes(stream) < available_bytes():
        # A stream of its own: weights outside of the blocks stay in the memory of the one that loaded them.
        run_ends(BlockStream(stream.checkpoint, stream.device, stream.dtype))


def _is_dense(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize > 1


def _artifact_tensors(stream: BlockStream, plan: Plan) -> dict[str, Tensor]:
    """The tensors of the artifact by their names on disk, without memory; smoothing vectors are not known yet."""

    def stored(names: Iterable[str]) -> dict[str, Tensor]:
        return _empty({name: (info.dtype, info.shape) for name in names for info in [stream.source.tensors[name]]})

    tensors, compressed = stored(stream.non_block_weights), [target.name for target in plan.targets]
    for block in plan.blocks:
        found, prefix = stored(stream.names.under(block.name)), stream.names.stored_prefix(block.name)
        for entry in plan.entries_of(block):
            weight = stream.names.tensor.get(f"{entry.target.name}.weight")
            if weight is None:
                raise VQCompressError(f"{stream.source.path} has no tensor of its own for {entry.target.name}.weight")
            del found[weight]
            found |= _empty({part_name(weight, part): info for part, info in entry.layout().items()})
            if entry.shared is not None:
                place = prefix + entry.shared.removeprefix(block.name)
                found |= _empty({f"{place}.{part}": info for part, info in entry.method.shared_layout().items()})
        tensors |= stream.as_stored(found, compressed)
    return tensors


def _empty(layout: Layout) -> dict[str, Tensor]:
    return {name: torch.empty(shape, dtype=dtype, device="meta") for name, (dtype, shape) in layout.items()}
