"""What the calibration rows are between two blocks, by batch: in memory or in a temporary file.

128 rows of 2,048 tokens at 8,192 channels take 4 GB in 16 bits, and twice that with the dense model's states.
Shape legend: B rows, L tokens of a row, H hidden channels.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, register_dataclass, tree_flatten, tree_map_only, tree_unflatten

from vqcompress.errors import VQCompressError


@dataclass(frozen=True)
class State:
    """A batch between two blocks.

    hidden: hidden states (B, L, H); some models have more axes. ids: tokens (B, L). rest: the other items that the
    block before answered. shared: contents of the mappings that blocks fill for later ones, by name of the argument.
    is_tuple: whether the block before answered a tuple.
    """

    hidden: Tensor
    ids: Tensor
    rest: tuple[Any, ...] = ()
    shared: dict[str, dict[Any, Any]] = field(default_factory=dict)
    is_tuple: bool = False

    def split(self) -> list[State]:
        """Each row as a state of its own."""
        rows = len(self.ids)
        return [tree_map_only(Tensor, itemgetter(slice(k, k + 1)), self) for k in range(rows)] if rows > 1 else [self]

    def to(self, device: torch.device | str) -> State:
        """The same on a device."""
        moved: State = tree_map_only(Tensor, lambda x: x.to(device), self)
        return moved


register_dataclass(State)


def keep(states: Iterable[State], folder: Path | None) -> States:
    """The states by batch: a list or, with a folder, a file on its disk."""
    return list(states) if folder is None else StatesOnDisk(states, folder)


@dataclass(frozen=True)
class _Stored:
    """A tensor in the file."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @property
    def bytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


@dataclass
class _Item:
    """A state in the file: where it begins and ends, its leaves (tensors as _Stored), its spec."""

    start: int
    end: int
    leaves: list[Any]
    spec: TreeSpec


class StatesOnDisk(Sequence[State]):
    """States in a file without a name, which disappears with the process however that ends.

    Reading copies. Plain reads and writes, since the pages of a mapped file count as memory of the process, and a full
    disk ends a process that writes through a mapping.
    """

    def __init__(self, states: Iterable[State], folder: Path):
        self.folder = folder
        self._file: Any = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (lives as long as this object)
        self._items: list[_Item] = []
        for state in states:
            self.append(state)

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, k: Any) -> Any:
        item = self._items[k]
        self._file.seek(item.start)
        leaves = [self._read(leaf) if isinstance(leaf, _Stored) else leaf for leaf in item.leaves]
        return tree_unflatten(leaves, item.spec)

    def __setitem__(self, k: int, state: State) -> None:
        self._items[k] = self._write(state, k)

    def append(self, state: State) -> None:
        """Add a state at the end."""
        self._items.append(self._write(state, len(self._items)))

    def clear(self) -> None:
        """Drop all of them."""
        self._items.clear()
        self._file.truncate(0)

    def _read(self, stored: _Stored) -> Tensor:
        data = bytearray(stored.bytes)
        self._file.readinto(data)
        flat = torch.frombuffer(data, dtype=stored.dtype) if data else torch.empty(0, dtype=stored.dtype)
        return flat.view(stored.shape).to(stored.device)

    def _place(self, size: int, k: int) -> int:
        """Where the first gap of `size` bytes between all states but the k-th begins; their end if there is none."""
        begin = 0
        for start, end in sorted((item.start, item.end) for n, item in enumerate(self._items) if n != k):
            if start - begin >= size:
                break
            begin = end
        return begin

    def _write(self, state: State, k: int) -> _Item:
        """Write a state in the place of the k-th."""
        tensors, spec = tree_flatten(state)
        leaves = [_Stored(x.shape, x.dtype, x.device) if isinstance(x, Tensor) else x for x in tensors]
        size = sum(leaf.bytes for leaf in leaves if isinstance(leaf, _Stored))
        try:
            start = self._file.seek(self._place(size, k))
            for x in tensors:
                if isinstance(x, Tensor):
                    data: Any = x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
                    self._file.write(data)
            self._file.flush()
        except OSError as error:
            raise VQCompressError(
                f"cannot keep the hidden states in {self.folder}: {error}; make room or give --states memory"
            ) from error
        return _Item(start, start + size, leaves, spec)


States = list[State] | StatesOnDisk
