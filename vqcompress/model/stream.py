"""A model run block by block, with one block in memory at a time.

The calls to the blocks are learned by running the model's own `forward` once with every block replaced by a recorder,
so no architecture needs a table. Shape legend: B rows, L tokens of a row, H hidden channels, V vocabulary.
"""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from vqcompress.errors import VQCompressError
from vqcompress.methods.base import is_finite
from vqcompress.model.expert_layout import Layout, UnfusedCheckpoint, unfuse_tensors
from vqcompress.model.experts import Experts, unfuse
from vqcompress.model.linear import replace_linears, unfuse_for
from vqcompress.model.projections import TransposedCheckpoint, straighten, transposed
from vqcompress.model.targets import blocks_of, find_blocks
from vqcompress.model.weights import Names, assign, check_headers, finish_loading, load_config, skeleton, tie_weights
from vqcompress.storage.artifact import Artifact, Entry, part_name
from vqcompress.storage.checkpoint import Checkpoint
from vqcompress.storage.distributed import ALONE, ProcessGroup
from vqcompress.storage.hidden_states import States

Call = tuple[tuple[Any, ...], dict[str, Any]]
BATCH_TOKENS = 4096


class _Reached(Exception):
    """Ends a forward pass at the last block."""


class _Hidden(Tensor):
    """Hidden states as the output of a block: indexed with 0 they are themselves, as if a tuple held them.

    Some models take the first item of their blocks' outputs, others the outputs as they are.
    """

    # Results of operations are plain tensors.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __getitem__(self, key: Any) -> Tensor:
        return self if isinstance(key, int) and key == 0 else super().__getitem__(key)


class _Recorder(nn.Module):
    """Stands for a block: records the hidden states and the other arguments of its last call, and returns the former.

    The recorder of the last block ends the forward pass, unless it has a reply to return.
    """

    hidden: Any = None
    arguments: Any = None
    reply: Tensor | None = None

    def __init__(self, block: nn.Module, is_last: bool):
        super().__init__()
        # Not as a submodule: the model's state then names no tensor of a block that is not in memory.
        self.block, self.is_last = (block,), is_last

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["block"][0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The reply, or the hidden states of the call."""
        if self.hidden is not None:
            raise VQCompressError("a block is called several times in one pass: the model cannot be run block by block")
        self.hidden, *rest = args or (kwargs.pop("hidden_states"),)
        if self.reply is None:
            self.arguments = tuple(rest), kwargs
            if self.is_last:
                raise _Reached
        return (self.hidden if self.reply is None else self.reply).as_subclass(_Hidden)


class BlockStream:
    """Runs the model of a checkpoint or of an artifact on rows of tokens, one block after the other.

    blocks: their names and targets. skeletons: the blocks without memory. names: how checkpoint names map to the
    model's. fused_reason: why the experts of a mixture are no targets, or "". group: the processes that share the
    rows. scratch: folder for hidden states, None to keep them in memory. Tensors are read when needed.
    """

    def __init__(
        self,
        source: Checkpoint,
        device: torch.device,
        dtype: torch.dtype,
        group: ProcessGroup = ALONE,
        scratch: Path | None = None,
    ):
        self.source, self.group, self.scratch = source, group, scratch
        self.device, self.dtype = device, dtype
        self.config = load_config(self.source.path)
        if self.source.config.get("tie_word_embeddings") is False:
            # A rotated checkpoint has embeddings and head of its own, whatever the file says.
            self.config.tie_word_embeddings = False
        self.model = skeleton(self.config, dtype)
        path, layers = find_blocks(self.model)
        straightened = [f"{path}.{below}" for below in straighten(layers)]
        self.fused_reason = ""
        if isinstance(source, Artifact):
            unfuse_for(self.model, source.entries.values())
        else:
            names = Names(self.model, source.tensors)
            self.fused_reason = unfuse(self.model, Counter(names.parameter.values()) or None)
            fused = [(names.stored_prefix(path), layout) for path, layout in self._fused_layouts()]
            if any(f"{prefix}.{name}" in source.tensors for prefix, layout in fused for name in layout.parameters):
                self.source = UnfusedCheckpoint(source, fused)
        self.blocks = blocks_of(self.model)
        if isinstance(source, Artifact):
            replace_linears(self.model, "", source.entries.values(), dtype)
        self.names = Names(self.model, self.source.tensors)
        # Path → the weight's name on disk, of linear layers whose weight the checkpoint stores transposed.
        self.transposed = {path: f"{self.names.stored_prefix(path)}.weight" for path in straightened}
        if self.transposed and not source.straight:
            self.source = TransposedCheckpoint(self.source, self.transposed.values())
        # Path → the path on disk, and the layout there, of experts that a plain checkpoint stores fused.
        self.mixtures = {path: (self.names.stored_prefix(path), layout) for path, layout in self._fused_layouts()}
        _, self._layers = find_blocks(self.model)
        self.skeletons = list(self._layers)
        check_headers(self.model, self.names, self.source.tensors)
        self._recorders = [_Recorder(b, i == len(self._layers) - 1) for i, b in enumerate(self.skeletons)]
        for i, recorder in enumerate(self._recorders):
            self._layers[i] = recorder
        self._calls: dict[tuple[int, int], list[Call]] = {}
        self._rest_loaded = False

    def _fused_layouts(self) -> list[tuple[str, Layout]]:
        mixtures = [(path, m.layout) for path, m in self.model.named_modules() if isinstance(m, Experts)]
        return [(path, layout) for path, layout in mixtures if layout.fused]

    def as_stored(self, tensors: dict[str, Tensor], compressed: Iterable[str] = ()) -> dict[str, Tensor]:
        """Tensors as the original stores them; `from_stored` is the inverse.

        Weights are transposed, and experts fused, where a plain checkpoint has them so; experts only if none of the
        names is an expert's.
        """
        tensors = transposed(tensors, self.transposed.values())
        if {name.rsplit(".", 2)[0] for name in compressed} & self.mixtures.keys():
            return tensors
        found = dict(tensors)
        for prefix, layout in self.mixtures.values():
            below = {n.removeprefix(f"{prefix}."): found.pop(n) for n in tensors if n.startswith(f"{prefix}.")}
            if below:
                found |= {f"{prefix}.{name}": layout.join(name, below) for name in layout.parameters}
        return found

    def from_stored(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors read from a file of an artifact, with weights (O, I) and experts apart."""
        return unfuse_tensors(transposed(tensors, self.transposed.values()), self.mixtures.values())

    @property
    def non_block_weights(self) -> list[str]:
        """The checkpoint names of what lies outside of the blocks."""
        inside = {name for block in self.blocks for name in self.names.under(block.name)}
        return [name for name in self.source.tensors if name not in inside]

    @property
    def unread(self) -> list[str]:
        """The checkpoint names of what no module of the model reads: draft layers, parts that another class has."""
        known = self.model.state_dict()
        return [name for name in self.non_block_weights if self.names.parameter[name] not in known]

    def marker_name(self, target: str, weight: str) -> str:
        """The name on disk under which programs that do not know the format look for a target's weight.

        weight: the name of the weight itself, which is another one where a plain checkpoint fuses experts.
        """
        prefix, layout = self.mixtures.get(target.rsplit(".", 2)[0], ("", None))
        return f"{prefix}.{next(iter(layout.parameters))}" if layout else weight

    def stored_parts(self, entry: Entry) -> dict[str, str]:
        """Part → its name on disk, shared parts included; VQCompressError naming one that is missing."""
        wanted = {part: part_name(f"{entry.target.name}.weight", part) for part in entry.layout()}
        if entry.shared is not None:
            wanted |= {part: f"{entry.shared}.{part}" for part in entry.method.shared_layout()}
        for part, name in wanted.items():
            if name not in self.names.tensor:
                raise VQCompressError(f"{self.source.path} has no tensor {name}")
            wanted[part] = self.names.tensor[name]
        return wanted

    def load_non_block_weights(self, tensors: dict[str, Tensor] | None = None) -> None:
        """Load embeddings, final norm and head; embed and logits need them. tensors: instead of reading the source."""
        if not self._rest_loaded:
            if tensors is None:
                tensors = self.source.read(set(self.non_block_weights).difference(self.unread))
            assign(self.model, tensors, self.dtype)
            tie_weights(self.model, self.names)
            finish_loading(self.model, self.model, "", self.device)
            self._rest_loaded = True

    def load_block(self, i: int, tensors: dict[str, Tensor] | None = None, entries: Iterable[Entry] = ()) -> nn.Module:
        """Block i, filled, on the device. Its memory is freed when the caller lets go of it.

        tensors: what to fill it with, by checkpoint name, instead of reading the source. entries: of targets that
        those tensors hold compressed. See `from_stored` for tensors of a file.
        """
        block = copy.deepcopy(self.skeletons[i])
        replace_linears(block, self.blocks[i].name + ".", entries, self.dtype)
        if tensors is None:
            tensors = self.source.read(self.names.under(self.blocks[i].name))
        self._layers[i] = block
        try:
            assign(self.model, tensors, self.dtype)
        finally:
            self._layers[i] = self._recorders[i]
        finish_loading(self.model, block, self.blocks[i].name + ".", self.device)
        return block

    def _pass(self, ids_BL: Tensor) -> Any:
        for recorder in self._recorders:
            recorder.hidden = None
        return self.model(ids_BL.to(self.device), use_cache=False)

    @torch.inference_mode()
    def embed(self, ids_BL: Tensor) -> Tensor:
        """The hidden states (B, L, H) that enter the first block; also records the calls of blocks for this shape."""
        self.load_non_block_weights()
        with contextlib.suppress(_Reached):
            self._pass(ids_BL)
        calls = [recorder.arguments for recorder in self._recorders]
        self._compare(self._calls.setdefault((ids_BL.shape[0], ids_BL.shape[1]), calls), calls)
        hidden_BLH: Tensor = self._recorders[0].hidden
        return hidden_BLH

    def _compare(self, earlier: list[Call], calls: list[Call]) -> None:
        for block, a, b in zip(self.blocks, earlier, calls, strict=True):
            for x, y in zip(tree_leaves(a), tree_leaves(b), strict=False):
                if isinstance(x, Tensor) and not torch.equal(x, y):
                    raise VQCompressError(
                        f"{block.name} is called with a tensor that depends on the tokens (beside the hidden states);"
                        f" {type(self.model).__name__} cannot be run block by block"
                    )

    @torch.inference_mode()
    def run(self, block: nn.Module, i: int, hidden_BLH: Tensor) -> Tensor:
        """The output (B, L, H) of block i, loaded; `embed` must have seen rows of this shape."""
        args, kwargs = self._calls[hidden_BLH.shape[0], hidden_BLH.shape[1]][i]
        out = block(hidden_BLH, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    def forward(self, block: nn.Module, i: int, states: States) -> None:
        """Replace each batch of hidden states by the block's output, in place."""
        for k in range(len(states)):
            out = self.run(block, i, states[k])
            if not is_finite(out):
                raise VQCompressError(f"{self.blocks[i].name} puts out NaN or Inf")
            states[k] = out

    @torch.inference_mode()
    def logits(self, ids_BL: Tensor, hidden_BLH: Tensor) -> Tensor:
        """The logits (B, L, V) that follow from the last block's output."""
        self._recorders[-1].reply = hidden_BLH
        try:
            return self._pass(ids_BL).logits
        finally:
            self._recorders[-1].reply = None

    def batches(self, rows_NL: Tensor) -> list[Tensor]:
        """Rows cut into batches of about 4,096 tokens; the same whatever the machine, since sums depend on it."""
        return list(rows_NL.split(max(1, BATCH_TOKENS // rows_NL.shape[1])))
