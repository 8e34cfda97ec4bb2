"""Hidden states of all calibration rows between two blocks, by batch: in memory or in a temporary file.

128 rows of 2,048 tokens at 8,192 channels take 4 GB in 16 bits, and twice that with the dense model's states.
Shape legend: B rows, L tokens of a row, H hidden channels.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vqcompress.errors import VQCompressError


def keep(states: Iterable[Tensor], folder: Path | None) -> States:
    """The hidden states (B, L, H) by batch: a list or, with a folder, a file on its disk."""
    return list(states) if folder is None else StatesOnDisk(states, folder)


class StatesOnDisk(Sequence[Tensor]):
    """Tensors of one dtype in a file without a name, which disappears with the process however that ends.

    Reading copies; an item is replaced by a tensor of the same shape. Plain reads and writes, since the pages of a
    mapped file count as memory of the process, and a full disk ends a process that writes through a mapping.
    """

    def __init__(self, states: Iterable[Tensor], folder: Path):
        self.folder = folder
        self._file: Any = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (lives as long as this object)
        # Of each item: where it begins in the file, its shape, type and device.
        self._items: list[tuple[int, torch.Size, torch.dtype, torch.device]] = []
        for state in states:
            self.append(state)

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, k: Any) -> Any:
        start, shape, dtype, device = self._items[k]
        data = bytearray(shape.numel() * dtype.itemsize)
        self._file.seek(start)
        self._file.readinto(data)
        return torch.frombuffer(data, dtype=dtype).view(shape).to(device)

    def __setitem__(self, k: int, state: Tensor) -> None:
        if (state.shape, state.dtype) != self._items[k][1:3]:
            raise ValueError(f"item {k} holds {self._items[k][1:3]}, not {state.shape} {state.dtype}")
        self._write(state, self._items[k][0])

    def append(self, state: Tensor) -> None:
        """Add a tensor at the end."""
        start = self._file.seek(0, 2)
        self._write(state, start)
        self._items.append((start, state.shape, state.dtype, state.device))

    def clear(self) -> None:
        """Drop all of them."""
        self._items.clear()
        self._file.truncate(0)

    def _write(self, state: Tensor, start: int) -> None:
        data: Any = state.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        try:
            self._file.seek(start)
            self._file.write(data)
            self._file.flush()
        except OSError as error:
            raise VQCompressError(
                f"cannot keep the hidden states in {self.folder}: {error}; make room or give --states memory"
            ) from error


States = list[Tensor] | StatesOnDisk
