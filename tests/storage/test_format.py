"""Another implementer, with docs/artifact.md and numpy alone, decodes what we store."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import deserialize

from vqcompress import methods
from vqcompress.storage.artifact import Artifact

GOLDEN = Path(__file__).parent.parent / "golden" / "v1"
TYPES = {"I8": "i1", "U8": "u1", "I16": "<i2", "U16": "<u2", "F16": "<f2", "F32": "<f4", "BF16": "<u2", "F8_E4M3": "u1"}


# The reader: written from the page. Nothing of vqcompress is called up to `decoded`.


def e4m3() -> np.ndarray:
    """The value of each byte."""
    byte = np.arange(256)
    sign, e, m = np.where(byte & 128, -1.0, 1.0), byte >> 3 & 15, byte & 7
    return np.where(e > 0, (1 + m / 8) * 2.0 ** (e - 7), m / 8 * 2.0**-6) * sign


def tensors(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of the shards that numpy has a type for, bfloat16 and E4M3 as float32."""
    index = json.loads((path / "model.safetensors.index.json").read_text())["weight_map"]
    found = {}
    for file in sorted(set(index.values())):
        for name, stored in deserialize((path / file).read_bytes()):
            kind = stored["dtype"]
            if kind in TYPES:
                array = np.frombuffer(stored["data"], TYPES[kind]).reshape(stored["shape"])
                if kind == "BF16":
                    array = (array.astype("<u4") << 16).view("<f4")
                found[name] = e4m3()[array].astype("f4") if kind == "F8_E4M3" else array
    return found


def codes_of(streams: np.ndarray, bits: int, count: int) -> np.ndarray:
    """(streams, count) codes of so many bits."""
    each = np.unpackbits(streams, axis=1, bitorder="little")[:, : count * bits].reshape(len(streams), count, bits)
    return each @ (1 << np.arange(bits))


def trellis(streams: np.ndarray, bits: int, states: int, rows: int) -> np.ndarray:
    """(columns, max(rows, 16)) values."""
    rows = max(rows, 16)
    lengths = [rows]
    if rows > 287:
        lengths = [256] * (rows // 256)
        if rows % 256 >= 32:
            lengths.append(rows % 256)
        else:
            lengths[-1] += rows % 256
    every, values, at = np.unpackbits(streams, axis=1, bitorder="little"), [], 0
    for length in lengths:
        ring = every[:, at : at + length * bits]
        at += length * bits
        place = (np.arange(length)[:, None] * bits + np.arange(states)) % (length * bits)
        state = ring[:, place] @ (1 << np.arange(states))
        h = (34038481 * state + 76625530) % 2**32
        w = (sum(h >> shift & 255 for shift in (0, 8, 16, 24)) - 510) / 139.4
        values.append((w * (1 - 0.06 + 0.02 * w**2)).astype("f4"))
    return np.concatenate(values, 1)


def hadamard(n: int) -> np.ndarray:
    """H_n."""
    b = n & -n
    row = np.arange(n)
    both = np.array([[int(i & j).bit_count() for j in range(b)] for i in range(b)])
    same = row[:, None] // b == row // b
    return np.where(same, (-1.0) ** both[row[:, None] % b, row % b] / b**0.5, 0)


def vq(knobs: dict[str, Any], parts: dict[str, np.ndarray], rows: int, columns: int) -> np.ndarray:
    """The weight of a target of method vq."""
    bits = knobs["bits"]
    if knobs["codebook"] == "learned":
        d = knobs["d"]
        stages, groups = knobs["stages"], -(-columns // d)
        code = codes_of(parts["codes"], bits, groups * stages).reshape(rows, groups, stages)
        entries = parts["step"][:, None, None] * parts["codebook"]
        value = sum(entries[r][code[..., r]] for r in range(stages)).reshape(rows, -1)[:, :columns]
    else:
        value = trellis(parts["codes"], bits, knobs["state_bits"], rows).T[:rows]
    if knobs.get("rotation", False):
        signs = 1 - 2.0 * codes_of(parts["signs"], 1, columns)[0]
        value = hadamard(rows) @ value @ hadamard(columns) * signs
    return parts["scale"][:, None] * value


def decoded(path: Path) -> dict[str, np.ndarray]:
    """Every compressed weight, in the original basis, by the name of its target."""
    config = json.loads((path / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["format_version"]) == ("vqcompress", 1)
    found, stored = {}, tensors(path)
    for name, target in config["targets"].items():
        knobs, (rows, columns) = config["methods"][target["method"]], target["shape"]
        assert knobs["version"] == 1
        prefixes = [f"{name}.weight_", *([f"{target['shared']}."] if target["shared"] else [])]
        parts = {key.removeprefix(p): value for p in prefixes for key, value in stored.items() if key.startswith(p)}
        if knobs["method"] == "int8":
            weight = parts["scale"][:, None] * parts["codes"]
        elif knobs["method"] == "fp8":
            tile = parts["scale"][np.arange(rows)[:, None] // 128, np.arange(columns) // 128]
            weight = tile * parts["codes"]
        else:
            weight = vq(knobs, parts, rows, columns)
        found[name] = weight / parts["smoothing"] if target["smoothed"] else weight
    return found


# What it is compared with.

EVERY_FAMILY = """
rules:
  - {match: "*.0.self_attn.q_proj", method: vq, codebook: trellis, bits: 4, state_bits: 10}
  - {match: "*.0.self_attn.k_proj", method: vq, codebook: learned, d: 1, bits: 5, scope: target, entry_bits: 16}
  - {match: "*.0.mlp.up_proj", method: vq, codebook: trellis, bits: 1, state_bits: 8}
  - {match: "*.0.mlp.down_proj", method: vq, codebook: trellis, bits: 3, state_bits: 9, rotation: false}
  - {match: "*.1.self_attn.*", method: vq, d: 3, bits: 5, stages: 2, rotation: true, iterations: 2, codebook_updates: 0}
  - {match: "*.1.mlp.gate_proj", method: vq, codebook: trellis, bits: 2, state_bits: 8}
  - {match: "*", method: fp8}
"""


def compare(path: Path) -> None:
    """Every weight of an artifact by the reader and by `Entry.decode`."""
    artifact = Artifact(path)
    found, stored = decoded(path), artifact.read(artifact.tensors)
    assert found.keys() == artifact.entries.keys()
    for name, entry in artifact.entries.items():
        parts = {
            key.removeprefix(prefix): tensor
            for prefix in (f"{name}.weight_", f"{entry.shared}.")
            for key, tensor in stored.items()
            if key.startswith(prefix)
        }
        ours = entry.decode(parts).numpy()
        assert found[name].shape == ours.shape == tuple(entry.target.shape)
        assert np.abs(found[name] - ours).max() <= 2e-6 * np.abs(ours).max(), name


def test_the_golden_artifact() -> None:
    """int8 smoothed at run time, fp8, learned words of one stage and of two shared by a block."""
    compare(GOLDEN)


@pytest.mark.parametrize("hidden", [64, 152], ids=lambda n: f"hidden-{n}")
def test_every_family_of_words(quantized: Callable[..., Path], hidden: int) -> None:
    """At 64 channels, and with Hadamard blocks of 8, columns of two sequences and tiles and words that are not full."""
    compare(quantized(EVERY_FAMILY, hidden=hidden))


def test_every_method_and_family_is_read(quantized: Callable[..., Path]) -> None:
    known = [
        entry.method
        for path in (GOLDEN, quantized(EVERY_FAMILY, hidden=64))
        for entry in Artifact(path).entries.values()
    ]
    assert {method.name for method in known} == methods.METHODS.keys() - {"keep"}
    assert {type(method).__name__ for method in known if method.name == "vq"} == {"Codebook", "Trellis"}
