"""Hidden states of many rows between two blocks, by batch: in memory, or in a file that nobody else sees.

Of 128 rows of 2,048 tokens at 8,192 channels they are 4 GB in 16 bits, twice that where the dense model's are followed
too. Shape legend: B rows, L tokens of a row, H hidden channels.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, MutableSequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vqcompress.errors import VQCompressError

# A list, or what behaves like one.
States = MutableSequence[Tensor]


def keep(states: Iterable[Tensor], folder: Path | None) -> States:
    """The hidden states (B, L, H) by batch, as a list or, with a folder, in a file on its disk."""
    return list(states) if folder is None else OnDisk(states, folder)


class OnDisk(MutableSequence[Tensor]):
    """Tensors of one type in a file that has no name, so that it is gone with the process however that ends.

    What is read is a copy; a place is written anew with a tensor of the same shape.
    """

    def __init__(self, states: Iterable[Tensor], folder: Path):
        self.folder = folder
        # Unbuffered: every piece is large.
        self._file: Any = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 (lives as long as we)
        self._shapes: list[torch.Size] = []
        for state in states:
            self.append(state)

    def __len__(self) -> int:
        return len(self._shapes)

    def __getitem__(self, k: Any) -> Any:
        if not 0 <= k < len(self._shapes):
            raise IndexError(k)
        start, size = self._place(k)
        data = bytearray(size)
        view, done = memoryview(data), 0
        while done < size:
            done += os.preadv(self._file.fileno(), [view[done:]], start + done)
        return torch.frombuffer(data, dtype=self._dtype).view(self._shapes[k]).to(self._device)

    def __setitem__(self, k: Any, state: Any) -> None:
        if state.shape != self._shapes[k] or state.dtype != self._dtype:
            raise ValueError(f"place {k} holds {tuple(self._shapes[k])} {self._dtype}, not {tuple(state.shape)}")
        self._write(state, self._place(k)[0])

    def insert(self, index: int, value: Tensor) -> None:
        """Only behind the last."""
        if index != len(self._shapes):
            raise ValueError("states on disk only grow at their end")
        if not self._shapes:
            self._dtype, self._device = value.dtype, value.device
        self._shapes.append(value.shape)
        self._write(value, self._place(index)[0])

    def __delitem__(self, k: Any) -> None:
        raise TypeError("states on disk are dropped all at once")

    def clear(self) -> None:
        """Drop all of them."""
        self._shapes.clear()
        self._file.truncate(0)

    def _place(self, k: int) -> tuple[int, int]:
        sizes = [shape.numel() * self._dtype.itemsize for shape in self._shapes[: k + 1]]
        return sum(sizes[:-1]), sizes[-1]

    def _write(self, state: Tensor, start: int) -> None:
        data: Any = memoryview(state.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())  # type: ignore[arg-type]
        done = 0
        try:
            while done < len(data):
                done += os.pwrite(self._file.fileno(), data[done:], start + done)
        except OSError as error:
            raise VQCompressError(
                f"cannot keep the hidden states in {self.folder}: {error.strerror}; a batch needs {len(data)} bytes and"
                f" {shutil.disk_usage(self.folder).free} are free; make room or give --states memory"
            ) from error
