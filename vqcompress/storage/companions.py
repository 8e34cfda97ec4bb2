"""The files beside a model's weights: which of them an artifact takes along. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from vqcompress.errors import VQCompressError
from vqcompress.storage.damage import damage

# Ends of the names of weights, of whatever program, and of archives.
ENDS = "safetensors bin pt pth ckpt h5 hdf5 keras msgpack gguf ggml onnx onnx_data data tflite litertlm npz npy pkl"
ENDS += " pickle ot nemo mlmodel mlpackage engine plan pb pdparams distcp llamafile task tar gz zip"
WEIGHTS = tuple(f".{end}" for end in ENDS.split())
# What an artifact has of its own, and what describes weights that are not taken along.
REPLACED = re.compile(
    r"config\.json|README\.md|SHA256SUMS|report\.(json|html)|recipe\.yaml|journal\.json"
    # Also the texts beside the packaged model.
    r"|(calibration|evaluation)\.txt|(.*/)?([^/]*\.index\.json|[^/]*quant[^/]*\.json|adapter_config\.json)"
)
# Traces of programs: caches, git, downloads that broke off, compiled code.
TRACES = re.compile(r"\..*|__pycache__|.*\.(pyc|lock|incomplete|partial|part|aria2|crdownload)")
# A larger file is no tokenizer, code or picture, whatever its name.
LARGEST = 2**28


def is_safe(name: str) -> bool:
    """Whether SHA256SUMS can list a file: its name is one line, and leads nowhere else."""
    return name.isprintable() and "\\" not in name and not {"", ".", ".."} & set(name.split("/"))


def companions(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """The files that an artifact takes along, by name in the folder, and the names of those that it leaves out.

    Neither lists config.json and traces of programs. VQCompressError naming a file that was fetched by halves.
    """
    taken: dict[str, Path] = {}
    left: list[str] = []
    for name, path in _files(folder):
        known = name.lower().endswith(WEIGHTS) or REPLACED.fullmatch(name)
        # Another model, a link to a directory, a socket; or a large file.
        other = path.exists() and (not path.is_file() or path.stat().st_size > LARGEST)
        if known or other or not is_safe(name):
            left.append(name)
        elif problem := damage(path):
            raise VQCompressError(f"{path} {problem}")
        else:
            taken[name] = path
    left.remove("config.json")
    return taken, left


def _files(folder: Path, below: str = "") -> Iterator[tuple[str, Path]]:
    """The files of a directory and of those in it, by name; directories that hold another model are given as such."""
    for path in sorted(folder.iterdir()):
        if TRACES.fullmatch(path.name):
            continue
        if path.is_dir() and not path.is_symlink() and not _is_model(path):
            yield from _files(path, f"{below}{path.name}/")
        else:
            yield f"{below}{path.name}", path


def _is_model(folder: Path) -> bool:
    names = [path.name for path in folder.iterdir()]
    return "journal.json" in names or ("config.json" in names and any(name.endswith(WEIGHTS) for name in names))
