"""A checkpoint whose model is rotated: it computes the same function with weights that have no outlier channels.

The hidden states x between blocks become Q x, with Q = Hadamard · diag(±1) orthonormal. A layer that reads them through
an RMSNorm absorbs Qᵀ and the norm's weight, a layer that adds to them absorbs Q, and so do embeddings and head. The
values of each attention head are rotated by v_proj and rotated back by o_proj. Nothing is left to do at run time
(QuaRot, arXiv 2404.00456, section 4, stage 1a; SpinQuant, arXiv 2405.16406, R1 and R2).
The layers that read or add to hidden states are found by observing probe tokens. Every block must prove that it maps
Q x to Q y where the original maps x to y.
Shape legend: B rows of L tokens, H hidden channels, R rows of v_proj.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import NoReturn

import torch
from torch import Generator, Tensor, nn

from vqcompress.errors import VQCompressError
from vqcompress.methods.hadamard import hadamard, random_signs
from vqcompress.model.drafts import draft_layers
from vqcompress.model.folds import row_candidates
from vqcompress.model.readers import observe, weight_of
from vqcompress.model.stream import BlockStream
from vqcompress.storage.checkpoint import DerivedCheckpoint, check_finite
from vqcompress.storage.hidden_states import State

PROBE_TOKENS = 64


def _offset(norm: nn.Module, x: Tensor) -> float:
    """The number that a norm adds to its weight before it multiplies: 0, or 1 (Gemma)."""
    weight = norm.get_parameter("weight")
    saved, weight.data = weight.data, torch.zeros_like(weight)
    offset = float(norm(x).any())
    weight.data = saved
    return offset


def _close(out: Tensor, wanted: Tensor, before: float | Tensor = 0.0) -> bool:
    """Whether two results of float32 arithmetic agree to 0.1 % in what was added to `before`."""
    return bool((out - wanted).norm() <= 1e-3 * (wanted - before).norm() + 1e-5 * wanted.norm())


def _refuse(name: str) -> NoReturn:
    raise VQCompressError(
        f"{name} cannot be rotated: it has a LayerNorm, a norm behind a layer, or something else than linear layers"
        " that reads or adds to the hidden states; leave out 'rotation: fold' and give the rules of the vq method"
        " 'rotation: true', which rotates the inputs at run time"
    )


class RotatedCheckpoint(DerivedCheckpoint):
    """The rotated form of a stream's checkpoint, always with a head; VQCompressError if it cannot be rotated.

    Blocks are read in float32, all other tensors in their stored type. draw: name → random state. Embeddings, head and
    one block of each structure are proven at once, the other blocks when they are read.
    """

    straight = True

    @torch.no_grad()
    def __init__(self, stream: BlockStream, draw: Callable[[str], Generator]):
        super().__init__(stream.source)
        self._draw = draw
        embedding, head = stream.model.get_input_embeddings(), stream.model.get_output_embeddings()
        for path in stream.names.tied:
            if any(path.startswith(f"{block.name}.") for block in stream.blocks):
                _refuse(f"{path}, which blocks share,")
        paths = {module: f"{path}.weight" for path, module in stream.model.named_modules()}
        ends = [paths[embedding], paths[head]]
        self._embedding, self._head = (stream.names.tensor.get(name, name) for name in ends)
        # The final norm, and the number that it adds to its weight.
        self._norm, self._offset = "", 0.0
        # Rotated, tied embeddings and head differ by the final norm's weight.
        self._original = {self._head: self._embedding} if self._head not in self._source.tensors else {}
        self._original |= {self._embedding: self._head} if self._embedding not in self._source.tensors else {}
        self.config = {**self._source.config, "tie_word_embeddings": False}
        self.tensors |= {name: self.tensors[original] for name, original in self._original.items()}
        self._stream = BlockStream(self, stream.device, torch.float32)
        self._block_of = {n: i for i, b in enumerate(stream.blocks) for n in self._stream.names.under(b.name)}
        self._signs_H = random_signs(self.tensors[self._embedding].shape[1], draw("rotation")).to(stream.device)
        self._probe = self._prove_outside(paths[head].removesuffix(".weight"))
        structures = {repr(layer): i for i, layer in reversed(list(enumerate(self._stream.skeletons)))}
        for i in structures.values():
            self._block(i)
        for layer in draft_layers(stream):
            _refuse(f"{layer}, which the model itself does not run,")
        # A tower's projector adds to the hidden states, which no text shows.
        for name in stream.non_block_weights:
            if name not in (self._embedding, self._head) and len(self.tensors[name].shape) > 1:
                _refuse(name)

    def _made_of(self, name: str) -> Iterable[str]:
        return [self._original.get(name, name)]

    @torch.no_grad()
    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors on the CPU, rotated."""
        wanted = list(names)
        found: dict[str, Tensor] = {}
        for i in sorted({self._block_of.get(name, -1) for name in wanted}):
            if i >= 0:
                found |= self._block(i)
            else:
                outside = self._original_outside() | self._rotated_outside()
                found |= {name: tensor.to("cpu", self.tensors[name].dtype) for name, tensor in outside.items()}
        return {name: found[name] for name in wanted}

    def _rotate(self, x: Tensor, dim: int = -1) -> Tensor:
        """Q x along an axis of H channels. A weight that reads hidden states becomes W Qᵀ by dim 1, else Q W by 0."""
        return hadamard((x.movedim(dim, -1) * self._signs_H).movedim(-1, dim), dim)

    def _original_outside(self) -> dict[str, Tensor]:
        """The tensors outside of the blocks before rotation, tied embeddings twice."""
        names = {name: self._original.get(name, name) for name in self._stream.non_block_weights}
        read = self._source.read(set(names.values()))
        check_finite(read)
        return {name: read[original] for name, original in names.items()}

    def _rotated_outside(self) -> dict[str, Tensor]:
        """Embeddings, head and final norm, rotated, in float32."""
        original, device = self._original_outside(), self._signs_H.device
        changed = {name: original[name].to(device).float() for name in (self._embedding, self._head)}
        if self._norm:
            gain_H = original[self._norm].to(device).float() + self._offset
            # Not in place: tied embeddings are one tensor here.
            changed[self._head] = changed[self._head] * gain_H
            changed[self._norm] = torch.full_like(gain_H, 1 - self._offset)
        return changed | {name: self._rotate(changed[name]) for name in (self._embedding, self._head)}

    def _prove_outside(self, head: str) -> State:
        """Prove embeddings, head and final norm; returns the state of the probe tokens, hidden states (1, L, H)."""
        stream = self._stream
        model: nn.Module = stream.model
        stream.load_non_block_weights(self._original_outside())
        vocabulary = stream.model.config.get_text_config().vocab_size
        ids_BL = torch.randint(vocabulary, (1, PROBE_TOKENS), generator=torch.Generator().manual_seed(0))
        state = stream.embed(ids_BL)
        if not stream.calls.plain or len(stream.calls.order) < len(stream.blocks):
            _refuse(f"{type(model).__name__}, whose blocks read or answer more than hidden states,")
        seen = observe(model, lambda: stream.logits(state))
        if norm := seen.norm_of()[head]:
            self._norm, self._offset = (
                stream.names.tensor[f"{norm}.weight"],
                _offset(model.get_submodule(norm), state.hidden),
            )
        for name, tensor in self._rotated_outside().items():
            model.get_parameter(stream.names.parameter[name]).data = tensor
        rotated = replace(state, hidden=self._rotate(state.hidden))
        again = stream.embed(ids_BL)
        if not _close(stream.logits(rotated), seen.output) or not _close(again.hidden, rotated.hidden):
            _refuse(f"{type(model).__name__}, outside of its blocks,")
        # Blocks need only the arguments that they are called with, which are known now.
        model.to("meta")
        return state

    def _block(self, i: int) -> dict[str, Tensor]:
        """The tensors of a block, rotated, in float32."""
        stream, name = self._stream, self._stream.blocks[i].name
        tensors = self._source.read(stream.names.under(name))
        check_finite(tensors)
        module = stream.load_block(i, tensors)
        seen = observe(module, lambda: stream.run(module, i, self._probe))
        norm_of = seen.norm_of()
        for path, layer in module.named_modules():
            weight, stored = weight_of(layer), f"{name}.{path}.weight" in stream.names.tensor
            if weight is not None and weight.dim() == 2 and not (stored and path in norm_of):
                _refuse(f"{name}.{path}")
        for path in [path for path, norm in norm_of.items() if norm is None]:
            self._rotate_heads(i, module, path, norm_of, seen.output)
        self._rotate_hidden(module, norm_of)
        rotated = replace(self._probe, hidden=self._rotate(self._probe.hidden))
        if not _close(stream.run(module, i, rotated), self._rotate(seen.output), rotated.hidden):
            _refuse(name)
        on_disk = {path: stream.names.tensor.get(f"{name}.{path}") for path, _ in module.named_parameters()}
        return tensors | {n: module.get_parameter(path).data.cpu() for path, n in on_disk.items() if n is not None}

    def _rotate_hidden(self, module: nn.Module, norm_of: dict[str, str | None]) -> None:
        """Layers that read hidden states get W diag(γ) Qᵀ, those that add to them Q W and Q b, and norms no weight."""
        hidden, gains = len(self._signs_H), {}
        for path in {norm for norm in norm_of.values() if norm is not None}:
            norm, weight_H = module.get_submodule(path), module.get_submodule(path).get_parameter("weight")
            if len(weight_H) == hidden:
                offset = _offset(norm, self._probe.hidden)
                gains[path], weight_H.data = weight_H.data + offset, torch.full_like(weight_H, 1 - offset)
        for path, read in norm_of.items():
            layer = module.get_submodule(path)
            weight, bias = layer.get_parameter("weight"), getattr(layer, "bias", None)
            if read in gains:
                weight.data = self._rotate(weight * gains[read])
            elif read is None and len(weight) == hidden:
                weight.data = self._rotate(weight, 0)
                if bias is not None:
                    bias.data = self._rotate(bias)

    def _rotate_heads(
        self, i: int, module: nn.Module, path: str, norm_of: dict[str, str | None], reference: Tensor
    ) -> None:
        """Rotate the values that o_proj, at `path`, reads head by head, if a layer beside it provably makes them."""
        parent, weight = path.rpartition(".")[0], module.get_submodule(path).get_parameter("weight")
        size = getattr(module.get_submodule(parent), "head_dim", None)
        if not isinstance(size, int) or weight.shape[1] % size:
            return
        earlier = [p for p, norm in norm_of.items() if norm and p.rpartition(".")[0] == parent]
        for producer in row_candidates(module, earlier, weight.shape[1]):
            parameters = [weight, *module.get_submodule(producer.module).parameters(recurse=False)]
            saved = [parameter.data for parameter in parameters]
            draw = self._draw(f"{self._stream.blocks[i].name}.{producer.module}")
            signs_R = random_signs(len(saved[1]), draw).to(weight.device)
            weight.data = hadamard((weight * signs_R[producer.rows_I]).unflatten(1, (-1, size))).flatten(1)
            for parameter in parameters[1:]:
                signed = (parameter.movedim(0, -1) * signs_R).movedim(-1, 0)
                parameter.data = hadamard(signed.unflatten(0, (-1, size)), 1).flatten(0, 1)
            if _close(self._stream.run(module, i, self._probe), reference, self._probe.hidden):
                return
            for parameter, data in zip(parameters, saved, strict=True):
                parameter.data = data
