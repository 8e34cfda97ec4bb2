"""Hidden states of all calibration rows between two blocks, by batch: in memory or in a temporary file.

128 rows of 2,048 tokens at 8,192 channels take 4 GB in 16 bits, and twice that with the dense model's states.
Shape legend: B rows, L tokens of a row, H hidden channels.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, MutableSequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vqcompress.errors import VQCompressError

# A list, or a `StatesOnDisk`.
States = MutableSequence[Tensor]


def keep(states: Iterable[Tensor], folder: Path | None) -> States:
    """The hidden states (B, L, H) by batch: a list or, with a folder, a file on its disk."""
    return list(states) if folder is None else StatesOnDisk(states, folder)


class StatesOnDisk(MutableSequence[Tensor]):
    """Tensors of one dtype in a file without a name, which disappears with the process however that ends.

    Reading copies; an item is replaced by a tensor of the same shape. Plain reads and writes, since the pages of a
    mapped file count as memory of the process, and a full disk ends a process that writes through a mapping.
    """

    def __init__(self, states: Iterable[Tensor], folder: Path):
        self.folder = folder
        self._file: Any = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (lives as long as this object)
        self._shapes: list[torch.Size] = []
        self._starts = [0]
        for state in states:
            self.append(state)

    def __len__(self) -> int:
        return len(self._shapes)

    def __getitem__(self, k: Any) -> Any:
        data = bytearray(self._shapes[k].numel() * self._dtype.itemsize)
        self._file.seek(self._starts[k])
        self._file.readinto(data)
        return torch.frombuffer(data, dtype=self._dtype).view(self._shapes[k]).to(self._device)

    def __setitem__(self, k: Any, state: Any) -> None:
        if state.shape != self._shapes[k] or state.dtype != self._dtype:
            raise ValueError(f"item {k} holds {tuple(self._shapes[k])} {self._dtype}, not {tuple(state.shape)}")
        self._write(state, self._starts[k])

    def insert(self, index: int, value: Tensor) -> None:
        """Append a tensor; other indices raise ValueError."""
        if index != len(self):
            raise ValueError("states on disk only grow at their end")
        self._dtype, self._device = value.dtype, value.device
        self._write(value, self._starts[index])
        self._shapes.append(value.shape)
        self._starts.append(self._starts[index] + value.nbytes)

    def __delitem__(self, k: Any) -> None:
        raise TypeError("states on disk are dropped all at once")

    def clear(self) -> None:
        """Drop all of them."""
        self._shapes, self._starts = [], [0]
        self._file.truncate(0)

    def _write(self, state: Tensor, start: int) -> None:
        data: Any = state.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        try:
            self._file.seek(start)
            self._file.write(data)
            self._file.flush()
        except OSError as error:
            raise VQCompressError(
                f"cannot keep the hidden states in {self.folder}: {error.strerror}; a batch needs {state.nbytes} bytes"
                f" and {shutil.disk_usage(self.folder).free} are free; make room or give --states memory"
            ) from error
