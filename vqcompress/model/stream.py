"""A model run block by block, with one block in memory at a time.

The calls to the blocks are learned by running the model's own `forward` once with every block replaced by a recorder,
so no architecture needs a table. Shape legend: B rows, L tokens of a row, H hidden channels, V vocabulary.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from vqcompress.errors import VQCompressError
from vqcompress.methods.base import is_finite
from vqcompress.model.calls import Calls
from vqcompress.model.expert_layout import Mixture, UnfusedCheckpoint, unfuse_tensors
from vqcompress.model.experts import Experts, unfuse
from vqcompress.model.linear import replace_linears, unfuse_for
from vqcompress.model.projections import TransposedCheckpoint, straighten, transposed
from vqcompress.model.targets import blocks_of, find_blocks
from vqcompress.model.weight_reads import weights_read
from vqcompress.model.weights import Names, assign, check_headers, finish_loading, load_config, skeleton, tie_weights
from vqcompress.storage.artifact import Artifact, Entry, part_name
from vqcompress.storage.checkpoint import Checkpoint
from vqcompress.storage.distributed import ALONE, ProcessGroup
from vqcompress.storage.hidden_states import State, States
from vqcompress.storage.targets import Block

BATCH_TOKENS = 4096


class BlockStream:
    """Runs the model of a checkpoint or of an artifact on rows of tokens, one block after the other.

    blocks: their names and targets. skeletons: the blocks without memory. names: how checkpoint names map to the
    model's. mixtures: experts that a plain checkpoint stores fused, by path. fused_reason: why the experts of a mixture
    are no targets, or "". group: the processes that share the rows. weights_read: paths in a block of the weights that
    the model's own code reads. scratch: folder for hidden states, None to keep them in memory. Tensors are read when
    needed.
    """

    def __init__(
        self,
        source: Checkpoint,
        device: torch.device,
        dtype: torch.dtype,
        group: ProcessGroup = ALONE,
        scratch: Path | None = None,
    ):
        # What was given; `source` may read it under other names.
        self.checkpoint = self.source = source
        self.group, self.scratch = group, scratch
        self.device, self.dtype = device, dtype
        self.config = load_config(self.source.path)
        if self.source.config.get("tie_word_embeddings") is False:
            # A rotated checkpoint has embeddings and head of its own, whatever the file says.
            self.config.tie_word_embeddings = False
        self.model = skeleton(self.config, dtype)
        path, self._layers = find_blocks(self.model)
        self.weights_read = weights_read(self.config, self._layers)
        straightened = [f"{path}.{below}" for below in straighten(self._layers)]
        self.fused_reason = ""
        if isinstance(source, Artifact):
            unfuse_for(self.model, source.entries.values())
        else:
            names = Names(self.model, source.tensors)
            self.fused_reason = unfuse(self.model, Counter(names.parameter.values()) or None)
            self.mixtures = self._find_mixtures(names)
            if any(not source.tensors.keys().isdisjoint(m.holders.values()) for m in self.mixtures.values()):
                self.source = UnfusedCheckpoint(source, list(self.mixtures.values()))
        self.blocks = blocks_of(self.model, self.weights_read)
        if isinstance(source, Artifact):
            replace_linears(self.model, "", source.entries.values(), dtype)
        self.names = Names(self.model, self.source.tensors)
        apart = [[t for t in b.targets if not self.names.held(f"{t.name}.weight")] for b in self.blocks]
        self.blocks = [Block(b.name, tuple(own)) for b, own in zip(self.blocks, apart, strict=True)]
        # Path → the weight's name on disk, of linear layers whose weight the checkpoint stores transposed.
        self.transposed = {path: f"{self.names.stored_prefix(path)}.weight" for path in straightened}
        if self.transposed and not source.straight:
            self.source = TransposedCheckpoint(self.source, self.transposed.values())
        if isinstance(source, Artifact):
            self.mixtures = self._find_mixtures(self.names)
        self.skeletons = list(self._layers)
        check_headers(self.model, self.names, self.source.tensors)
        self.calls = Calls(self.model, self._layers, device)
        self._recorders = list(self._layers)
        self._rest_loaded = False

    def _find_mixtures(self, names: Names) -> dict[str, Mixture]:
        """The experts that a plain checkpoint stores fused, by their path in the model."""
        layouts = {path: m.layout for path, m in self.model.named_modules() if isinstance(m, Experts)}
        return {
            path: Mixture(names.stored_prefix(path), own, {p: names.original(f"{path}.{p}") for p in own.parameters})
            for path, own in layouts.items()
            if own.fused
        }

    def as_stored(self, tensors: dict[str, Tensor], compressed: Iterable[str] = ()) -> dict[str, Tensor]:
        """Tensors as the original stores them; `from_stored` is the inverse.

        Weights are transposed, and experts fused, where a plain checkpoint has them so; experts only if none of the
        names is an expert's.
        """
        tensors = transposed(tensors, self.transposed.values())
        if {name.rsplit(".", 2)[0] for name in compressed} & self.mixtures.keys():
            return tensors
        found = dict(tensors)
        for mixture in self.mixtures.values():
            prefix = f"{mixture.prefix}."
            below = {n.removeprefix(prefix): found.pop(n) for n in tensors if n.startswith(prefix)}
            if below:
                found |= {holder: mixture.layout.join(name, below) for name, holder in mixture.holders.items()}
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
        mixture = self.mixtures.get(target.rsplit(".", 2)[0])
        return next(iter(mixture.holders.values())) if mixture else weight

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
            # Biases of tied heads are padded in place, which tensors made in inference mode do not allow.
            with torch.inference_mode(False), torch.no_grad():
                if tensors is None:
                    tensors = self.source.read(set(self.non_block_weights).difference(self.unread))
                normal = {name: t.clone() if t.is_inference() else t for name, t in tensors.items()}
                assign(self.model, normal, self.dtype)
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
            self._share(self.blocks[i].name + ".")
        finally:
            self._layers[i] = self._recorders[i]
        finish_loading(self.model, block, self.blocks[i].name + ".", self.device)
        return block

    def _share(self, prefix: str) -> None:
        """Fill what a block shares with others, and the checkpoint stores under another name."""
        stored, tied = self.names.tensor, self.names.tied
        paths = {*tied, *tied.values()}
        # Any one of those that share a weight may be the one that is stored.
        holders = {tied.get(path, path): stored[path] for path in paths & stored.keys()}
        wanted = {path: holders[tied.get(path, path)] for path in paths - stored.keys() if path.startswith(prefix)}
        found = self.source.read(set(wanted.values()))
        for path, name in wanted.items():
            module, _, parameter = path.rpartition(".")
            self.model.get_submodule(module)._parameters[parameter] = nn.Parameter(found[name].to(self.dtype), False)

    def learn(self) -> Calls:
        """How the blocks are called; the weights outside of the blocks are loaded for it."""
        self.load_non_block_weights()
        return self.calls.learn()

    def require(self) -> None:
        """VQCompressError if the model cannot be run block by block."""
        self.learn().require()

    @torch.inference_mode()
    def embed(self, ids_BL: Tensor) -> State:
        """The state before the first block; of a plain model also records the calls of blocks for this shape."""
        self.load_non_block_weights()
        return self.calls.embed(ids_BL)

    def runs(self, i: int) -> bool:
        """Whether text goes through block i."""
        return self.calls.number(i) is not None

    @torch.inference_mode()
    def step(self, block: nn.Module, i: int, state: State) -> State:
        """The state after block i, loaded; `embed` must have seen rows of this shape."""
        number = self.calls.number(i)
        return state if number is None else self.calls.step(block, number, state)

    def run(self, block: nn.Module, i: int, state: State) -> Tensor:
        """The hidden states that block i puts out."""
        return self.step(block, i, state).hidden

    def outputs(self, block: nn.Module, i: int, state: State) -> Tensor:
        """All that block i puts out, for later blocks too, in one tensor: (B, L, H) if that is hidden states alone."""
        out = self.step(block, i, state)
        more = [x for x in tree_leaves((out.rest, out.shared)) if isinstance(x, Tensor) and x.is_floating_point()]
        return torch.cat([x.flatten().to(out.hidden) for x in (out.hidden, *more)]) if more else out.hidden

    def forward(self, block: nn.Module, i: int, states: States) -> None:
        """Replace each batch's state by that after the block, in place."""
        number = self.calls.number(i) if states else None
        if number is None:
            return
        for k in range(len(states)):
            state = self.step(block, i, states[k])
            if not is_finite(state.hidden):
                raise VQCompressError(f"{self.blocks[i].name} puts out NaN or Inf")
            states[k] = self.calls.kept(number, state)

    @torch.inference_mode()
    def logits(self, state: State) -> Tensor:
        """The logits (B, L, V) that follow from the state after the last block."""
        return self.calls.logits(state)

    @torch.inference_mode()
    def whole(self, ids_BL: Tensor) -> Tensor:
        """The logits (B, L, V) of the model with all blocks in memory, for one that cannot be run block by block."""
        self.load_non_block_weights()
        for i, recorder in enumerate(self._recorders):
            if self._layers[i] is recorder:
                self._layers[i] = self.load_block(i)
        return self.model(ids_BL.to(self.device), use_cache=False).logits

    def batches(self, rows_NL: Tensor) -> list[Tensor]:
        """Rows cut into batches of about 4,096 tokens; the same whatever the machine, since sums depend on it.

        Rows of a model that is not plain go one by one: only its code knows which axis of a tensor is that of rows.
        """
        return list(rows_NL.split(max(1, BATCH_TOKENS // rows_NL.shape[1]) if self.learn().plain else 1))
