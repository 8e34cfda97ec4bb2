"""The options of `quantize`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class QuantizeOptions:
    """The options of `quantize`, named as on the command line. texts: files or data sets to calibrate on,
    or `self`, perhaps each with its share of the rows, as in `FILE=0.7`. bos: `auto`, `always` or `never`.

    out: the directory of the artifact, unless the run is dry. states: where hidden states are kept, "memory" or "disk";
    the artifact is the same.
    """

    model: str
    out: Path | None = None
    recipe: str | None = None
    texts: Sequence[str] | None = None
    samples: int | None = None
    seqlen: int | None = None
    seed: int = 0
    device: str = "auto"
    overwrite: bool = False
    target_bits: float | None = None
    states: str = "memory"
    kv_cache: str | None = None
    bos: str = "auto"
