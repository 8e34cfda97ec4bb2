"""Where the matrices of experts lie in the parameters of a fused module, and checkpoints that store them like that.

Shape legend: E experts, R rows of a matrix, I its inputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vqcompress.storage.checkpoint import Checkpoint, DerivedCheckpoint, TensorInfo


@dataclass(frozen=True)
class Layout:
    """The fused parameters of an experts module. first: the matrices that read the input, gate before up. last: the
    one that reads what they make. parameters: name → (the matrices in it, whether as `weight` or as `bias`).

    transposed: weights are (E, I, R). interleaved: rows of gate and up take turns, else up follows gate. fused: the
    checkpoint stores these parameters; else it stores every matrix, and transformers merges them.
    """

    experts: int
    first: tuple[str, ...]
    last: str
    parameters: Mapping[str, tuple[tuple[str, ...], str]]
    transposed: bool = False
    interleaved: bool = False
    fused: bool = False

    def split(self, name: str, fused: Tensor) -> Iterator[tuple[str, Tensor]]:
        """(`E.MATRIX.weight` or `.bias`, a copy of it) for everything in the parameter of that name."""
        matrices, kind = self.parameters[name]
        rows = fused.transpose(1, 2) if self.transposed and kind == "weight" else fused
        for n, matrix in enumerate(matrices):
            own = rows[:, n :: len(matrices)] if self.interleaved else rows.chunk(len(matrices), 1)[n]
            for e in range(self.experts):
                yield f"{e}.{matrix}.{kind}", own[e].clone(memory_format=torch.contiguous_format)

    def join(self, name: str, parts: Mapping[str, Tensor]) -> Tensor:
        """The parameter of that name, from what `split` makes of it."""
        matrices, kind = self.parameters[name]
        stacks = [torch.stack([parts[f"{e}.{matrix}.{kind}"] for e in range(self.experts)]) for matrix in matrices]
        fused = torch.stack(stacks, 2).flatten(1, 2) if self.interleaved else torch.cat(stacks, 1)
        return fused.transpose(1, 2).contiguous() if self.transposed and kind == "weight" else fused


def candidates(module: nn.Module) -> Iterator[Layout]:
    """The layouts that the shapes of a module with two 3-D parameters allow; 2-D ones are biases, named after them."""
    own = dict(module.named_parameters())
    names = [name for name, p in own.items() if p.dim() == 3]
    up, down = (own[name] for name in names)
    for transposed in (False, True):
        rows, inputs = up.shape[1:][::-1] if transposed else up.shape[1:]
        outputs, inner = down.shape[1:][::-1] if transposed else down.shape[1:]
        first = {inner: ("up_proj",), 2 * inner: ("gate_proj", "up_proj")}.get(rows)
        if first is None or inputs != outputs:
            continue
        matrices = {names[0]: first, names[1]: ("down_proj",)}
        parameters = {
            name: (matrices[next(n for n in names if name.startswith(n))], "weight" if p.dim() == 3 else "bias")
            for name, p in own.items()
            if name.startswith(tuple(names))
        }
        for interleaved in (False, True)[: len(first)]:
            yield Layout(len(up), first, "down_proj", parameters, transposed, interleaved, True)


@dataclass(frozen=True)
class Mixture:
    """Experts that a checkpoint stores fused. prefix: of the names of their matrices, where those are stored apart.

    holders: parameter of the fused module → the name of its tensor on disk.
    """

    prefix: str
    layout: Layout
    holders: Mapping[str, str]


def unfuse_tensors(tensors: Mapping[str, Tensor], mixtures: Iterable[Mixture]) -> dict[str, Tensor]:
    """Tensors by name with the matrices of experts in place of fused parameters."""
    found = dict(tensors)
    for mixture in mixtures:
        for name, holder in mixture.holders.items():
            # One that has fewer dimensions is what stops a process that forgot to import vqcompress.
            if (fused := found.get(holder)) is not None and fused.dim() > 1:
                del found[holder]
                found |= {f"{mixture.prefix}.{part}": t for part, t in mixture.layout.split(name, fused)}
    return found


class UnfusedCheckpoint(DerivedCheckpoint):
    """A checkpoint that stores experts fused, as if it stored every matrix under a name of its own."""

    def __init__(self, source: Checkpoint, mixtures: list[Mixture]):
        super().__init__(source)
        self._mixtures = mixtures
        # Matrix → the tensor that holds it.
        self._holder: dict[str, str] = {}
        for mixture in mixtures:
            for name, holder in mixture.holders.items():
                info = self.tensors.pop(holder)
                for part, tensor in mixture.layout.split(name, torch.empty(info.shape, device="meta")):
                    self.tensors[f"{mixture.prefix}.{part}"] = TensorInfo(info.file, info.dtype, tuple(tensor.shape))
                    self._holder[f"{mixture.prefix}.{part}"] = holder

    def tiles(self, name: str) -> dict[str, Tensor] | None:
        """The source's, of a weight that is not fused."""
        return None if name in self._holder else self._source.tiles(name)

    def _made_of(self, name: str) -> Iterable[str]:
        return [self._holder.get(name, name)]

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors, on the CPU in their stored type; one fused tensor is in memory at a time."""
        wanted = set(names)
        found = self._source.read(wanted - self._holder.keys())
        for holder in dict.fromkeys(self._holder[name] for name in wanted if name in self._holder):
            parts = unfuse_tensors(self._source.read([holder]), self._mixtures)
            found |= {name: tensor for name, tensor in parts.items() if name in wanted}
        return found
