"""A checkpoint whose model is rotated: the same function, with weights that no outlier channel spoils.

The residual stream x becomes Q x, with Q = Hadamard · diag(±1) orthonormal: what reads the stream through an RMSNorm
takes in Qᵀ and the norm's weight, what writes to it gives out Q, and embeddings and head do so too. The values of an
attention head are turned by v_proj and turned back by o_proj. Nothing is left to do at run time (QuaRot, arXiv
2404.00456, section 4, stage 1a; SpinQuant, arXiv 2405.16406, R1 and R2).
Who reads and who writes is found by watching probe tokens, and every block must prove that it does to Q x what it did
to x. Shape legend: B rows of L tokens, H hidden channels, R rows of v_proj, C columns of o_proj, T tokens, N ≤ T.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import NoReturn

import torch
from torch import Generator, Tensor, nn

from vqcompress.errors import VQCompressError
from vqcompress.methods.hadamard import hadamard, random_signs
from vqcompress.model.folds import row_candidates
from vqcompress.model.stream import BlockStream
from vqcompress.storage.checkpoint import Checkpoint, check_finite

PROBE_TOKENS = 64


def _weights(root: nn.Module, dim: int) -> dict[str, nn.Parameter]:
    """The weights of so many dimensions below a module, by the path of the module that they belong to."""
    found = {path: getattr(module, "weight", None) for path, module in root.named_modules()}
    return {path: w for path, w in found.items() if isinstance(w, nn.Parameter) and w.dim() == dim}


def _watch(root: nn.Module, run: Callable[[], Tensor]) -> tuple[dict[str, str | None], Tensor]:
    """Run once. The path of every module with a matrix → the norm whose output it reads, or None; and the output."""
    read: dict[str, Tensor] = {}
    made: dict[str, Tensor] = {}

    def look(path: str, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        if args and args[0].is_floating_point():
            seen, x = (made, out) if module.get_parameter("weight").dim() == 1 else (read, args[0])
            seen[path] = x.reshape(-1, x.shape[-1])

    watched = [*_weights(root, 1), *_weights(root, 2)]
    handles = [root.get_submodule(path).register_forward_hook(partial(look, path)) for path in watched]
    try:
        output = run()
    finally:
        for handle in handles:
            handle.remove()

    def source(x_NI: Tensor) -> str | None:
        # By value: an expert reads a selection of a norm's rows.
        norms = (path for path, y_TI in made.items() if y_TI.shape[1] == x_NI.shape[1])
        return next((p for p in norms if (x_NI[:, None] == made[p]).all(2).any(1).all()), None)

    return {path: source(x_NI) for path, x_NI in read.items() if len(x_NI)}, output


def _offset(norm: nn.Module, x: Tensor) -> float:
    """What a norm adds to its weight before it multiplies: 0, or 1 (Gemma)."""
    weight = norm.get_parameter("weight")
    saved, weight.data = weight.data, torch.zeros_like(weight)
    offset = float(norm(x).any())
    weight.data = saved
    return offset


def _close(out: Tensor, wanted: Tensor, before: float | Tensor = 0.0) -> bool:
    """Whether two results of float32 arithmetic agree to 0.1 % in what was added to `before`."""
    return bool((out - wanted).norm() <= 1e-3 * (wanted - before).norm() + 1e-5 * wanted.norm())


def _refuse(where: str, why: str) -> NoReturn:
    raise VQCompressError(
        f"{where} cannot be rotated: {why}; leave out 'rotation: fold' and give the rules of the vq method"
        " 'rotation: true', which turns the inputs at run time"
    )


class RotatedCheckpoint(Checkpoint):
    """The rotated form of a stream's checkpoint, with a head of its own; VQCompressError if it cannot be rotated.

    Blocks are read in float32, what lies outside of them in its stored type. draw: name → random state. Everything
    outside of the blocks is proven at once, and one block of each structure; the others when they are read.
    """

    @torch.no_grad()
    def __init__(self, stream: BlockStream, draw: Callable[[str], Generator]):
        self._source, self._draw = stream.source, draw
        embedding, head = stream.model.get_input_embeddings(), stream.model.get_output_embeddings()
        paths = {module: f"{path}.weight" for path, module in stream.model.named_modules()}
        names = stream.names.tensor
        self._embedding, self._head = names[paths[embedding]], names.get(paths[head], paths[head])
        self._norm, self._offset = "", 0.0
        # Rotated, the two differ by the final norm's weight.
        self._original = {self._head: self._embedding} if embedding.weight is head.weight else {}
        self.path, self.tensors = self._source.path, dict(self._source.tensors)
        self.config = {**self._source.config, "tie_word_embeddings": False}
        self.tensors |= {name: self.tensors[original] for name, original in self._original.items()}
        self._stream = BlockStream(self, stream.device, torch.float32)
        self._block_of = {n: i for i, b in enumerate(stream.blocks) for n in self._stream.names.under(b.name)}
        self._signs_H = random_signs(self.tensors[self._embedding].shape[1], draw("rotation")).to(stream.device)
        self._probe = self._prove_rest(paths[head].removesuffix(".weight"))
        structures = {repr(layer): i for i, layer in reversed(list(enumerate(self._stream.skeletons)))}
        for i in structures.values():
            self._block(i)

    @property
    def bytes(self) -> int:
        """Size of what is on disk, which has no second copy of tied embeddings."""
        return self._source.bytes

    def holders(self, names: Iterable[str]) -> tuple[Checkpoint, set[str]]:
        """The source's, of the tensors as they were."""
        return self._source.holders({self._original.get(name, name) for name in names})

    @torch.no_grad()
    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors on the CPU, rotated."""
        wanted = list(names)
        found: dict[str, Tensor] = {}
        for i in sorted({self._block_of.get(name, -1) for name in wanted}):
            found |= self._block(i) if i >= 0 else self._rest()
        return {name: found[name] for name in wanted}

    def _turn(self, x: Tensor, dim: int = -1) -> Tensor:
        """Q x along an axis of H channels. A reader's weight becomes W Qᵀ by dim 1, a writer's Q W by dim 0."""
        return hadamard((x.movedim(dim, -1) * self._signs_H).movedim(-1, dim), dim)

    def _raw_rest(self) -> dict[str, Tensor]:
        """What lies outside of the blocks as it was, tied embeddings twice."""
        names = {name: self._original.get(name, name) for name in self._stream.non_block_weights}
        raw = self._source.read(set(names.values()))
        check_finite(raw)
        return {name: raw[original] for name, original in names.items()}

    def _turned_rest(self) -> dict[str, Tensor]:
        """What changes outside of the blocks: embeddings, head and final norm, in float32."""
        raw, device = self._raw_rest(), self._signs_H.device
        changed = {name: raw[name].to(device).float() for name in (self._embedding, self._head)}
        if self._norm:
            gain_H = raw[self._norm].to(device).float() + self._offset
            # Not in place: tied embeddings are one tensor here.
            changed[self._head] = changed[self._head] * gain_H
            changed[self._norm] = torch.full_like(gain_H, 1 - self._offset)
        return changed | {name: self._turn(changed[name]) for name in (self._embedding, self._head)}

    def _rest(self) -> dict[str, Tensor]:
        rest = self._raw_rest() | self._turned_rest()
        return {name: tensor.to("cpu", self.tensors[name].dtype) for name, tensor in rest.items()}

    def _prove_rest(self, head: str) -> Tensor:
        """Prove what lies outside of the blocks; the hidden states (1, L, H) of the probe tokens."""
        stream = self._stream
        model: nn.Module = stream.model
        stream.load_non_block_weights(self._raw_rest())
        vocabulary = stream.model.config.get_text_config().vocab_size
        ids_BL = torch.randint(vocabulary, (1, PROBE_TOKENS), generator=torch.Generator().manual_seed(0))
        x_BLH = stream.embed(ids_BL)
        norms, logits = _watch(model, lambda: stream.logits(ids_BL, x_BLH))
        norm = norms[head]
        if norm is not None:
            self._norm, self._offset = stream.names.tensor[f"{norm}.weight"], _offset(model.get_submodule(norm), x_BLH)
        for name, tensor in self._turned_rest().items():
            model.get_parameter(stream.names.parameter[name]).data = tensor
        if not _close(stream.logits(ids_BL, self._turn(x_BLH)), logits):
            _refuse("the model", _reason(model, set(norms.values())))
        if not _close(stream.embed(ids_BL), self._turn(x_BLH)):
            _refuse("the model", "more than the embeddings enters the first block")
        # Blocks need only how they are called, which is known now.
        model.to("meta")
        return x_BLH

    def _block(self, i: int) -> dict[str, Tensor]:
        """The tensors of a block, rotated, in float32."""
        stream, name = self._stream, self._stream.blocks[i].name
        tensors = self._source.read(stream.names.under(name))
        check_finite(tensors)
        module = stream.load_block(i, tensors)
        roles, reference = _watch(module, lambda: stream.run(module, i, self._probe))
        # Experts that no token chose are as their siblings.
        siblings = {re.sub(r"\d+", "*", path): norm for path, norm in roles.items()}
        for path in _weights(module, 2):
            kind = re.sub(r"\d+", "*", path)
            if kind not in siblings or f"{name}.{path}.weight" not in stream.names.tensor:
                _refuse(f"{name}.{path}", "it is not called, or not stored, as a linear layer of its own")
            roles.setdefault(path, siblings[kind])
        for path in [path for path, norm in roles.items() if norm is None]:
            self._turn_heads(i, module, path, roles, reference)
        self._turn_stream(module, roles)
        if not _close(stream.run(module, i, self._turn(self._probe)), self._turn(reference), self._turn(self._probe)):
            _refuse(name, _reason(module, set(roles.values())))
        disk = {path: stream.names.tensor.get(f"{name}.{path}") for path, _ in module.named_parameters()}
        return tensors | {n: module.get_parameter(path).data.cpu() for path, n in disk.items() if n is not None}

    def _turn_stream(self, module: nn.Module, roles: dict[str, str | None]) -> None:
        """Give a block's readers W diag(γ) Qᵀ, its writers Q W and Q b, and the norms that are read no weight."""
        hidden, matrices, gains = len(self._signs_H), _weights(module, 2), {}
        for path, weight_H in _weights(module, 1).items():
            if path in roles.values() and len(weight_H) == hidden:
                offset = _offset(module.get_submodule(path), self._probe)
                gains[path], weight_H.data = weight_H.data + offset, torch.full_like(weight_H, 1 - offset)
        for path, norm in roles.items():
            weight, bias = matrices[path], getattr(module.get_submodule(path), "bias", None)
            if norm in gains:
                weight.data = self._turn(weight * gains[norm])
            elif norm is None and len(weight) == hidden:
                weight.data = self._turn(weight, 0)
                if bias is not None:
                    bias.data = self._turn(bias)

    def _turn_heads(
        self, i: int, module: nn.Module, path: str, roles: dict[str, str | None], reference: Tensor
    ) -> None:
        """Turn the values that o_proj, at `path`, reads head by head, if a layer beside it provably makes them."""
        parent, weight = path.rpartition(".")[0], module.get_submodule(path).get_parameter("weight")
        size = getattr(module.get_submodule(parent), "head_dim", None)
        earlier = [p for p, norm in roles.items() if norm and p.rpartition(".")[0] == parent]
        if not isinstance(size, int) or weight.shape[1] % size:
            return
        for producer in row_candidates(module, earlier, weight.shape[1]):
            parameters = [weight, *module.get_submodule(producer.module).parameters(recurse=False)]
            saved = [parameter.data for parameter in parameters]
            draw = self._draw(f"{self._stream.blocks[i].name}.{producer.module}")
            signs_R = random_signs(len(saved[1]), draw).to(weight.device)
            weight.data = hadamard((weight * signs_R[producer.rows_I]).unflatten(1, (-1, size))).flatten(1)
            for parameter in parameters[1:]:
                signed = (parameter.movedim(0, -1) * signs_R).movedim(-1, 0)
                parameter.data = hadamard(signed.unflatten(0, (-1, size)), 1).flatten(0, 1)
            if _close(self._stream.run(module, i, self._probe), reference, self._probe):
                return
            for parameter, data in zip(parameters, saved, strict=True):
                parameter.data = data


def _reason(root: nn.Module, read: set[str | None]) -> str:
    """What most likely stands in the way of a rotation."""
    for path, module in root.named_modules():
        if isinstance(module, nn.LayerNorm):
            return f"{path} is a LayerNorm, which subtracts the mean"
    for path, parameter in root.named_parameters():
        if parameter.dim() > 2:
            return f"{path} is no linear layer"
    for path in _weights(root, 1):
        if path not in read and "norm" in path:
            return f"no linear layer reads the norm {path}, so it acts on what is added to the residual stream"
    return "something other than a linear layer reads or writes the residual stream"
