"""The setting of all tests: no network, quiet threads, uninitialized memory filled with NaN; and shared fixtures."""

from __future__ import annotations

import os

# Before torch starts its threads: spinning ones would starve whoever shares the machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import fcntl
import hashlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from kernels import interpreter
from processes import Processes
from toys import toy_checkpoint, toy_text

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

# Recipes by name, small enough to run in a second; a name that is not here is a packaged recipe.
RECIPES = {
    "vq-small": "rules:\n  - {match: '*', method: vq, d: 2, bits: 4, iterations: 3, codebook_updates: 1}\n",
    "int8-plain": "rules:\n  - {match: '*', method: int8}\n",
    "int8-runtime": "rules:\n  - match: '*'\n    method: int8\n"
    "    smoothing: {alpha: 0.5, norm: runtime, attention: runtime, mlp: runtime}\n",
    "kv-small": "cache: {bits: 2, rounds: 2}\n",
    "mixed": "rules:\n"
    "  - {match: 're:.*o_proj', method: keep}\n"
    "  - {match: '*.self_attn.*', method: vq, d: 2, bits: 4, iterations: 2, codebook_updates: 0}\n"
    "  - {match: '*.down_proj', method: fp8}\n"
    "  - {match: '*', method: int8, smoothing: {alpha: 0.5}}\n",
}

Toy = Callable[..., Path]


@pytest.fixture(scope="session", autouse=True)
def poison() -> None:
    """`torch.empty` and its kin are filled with NaN (integers with their maximum), so a forgotten element shows."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    # The switch that makes torch fill; an operator without a deterministic variant is none of our business here.
    torch.use_deterministic_algorithms(True, warn_only=True)
    warnings.filterwarnings("ignore", message=".*does not have a deterministic implementation.*")


@pytest.fixture(scope="session")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    """Starts processes that have imported torch and transformers, and nothing of ours."""
    with Processes(tmp_path_factory.mktemp("processes")) as found:
        yield found


@pytest.fixture(scope="session")
def interpreted() -> Iterator[Callable[..., Any]]:
    """interpreted(function, *arguments) → its result, from a process where kernels run on CPU tensors."""
    with interpreter() as call:
        yield call


@pytest.fixture(scope="session")
def shared() -> Path:
    """The directory of trained models and texts beside the repository."""
    if not SHARED.is_dir():
        pytest.skip("needs the trained models in ../shared, beside the repository")
    return SHARED


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file of a few thousand tokens of the toy tokenizer."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(toy_text(3000), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """once(name, make) → the directory of that name, filled by make(directory) in the first worker that asks for it."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root

    def made(name: str, make: Callable[[Path], object]) -> Path:
        folder, done = root / name, root / f"{name}.done"
        with (root / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                folder.mkdir(exist_ok=True)
                make(folder)
                done.touch()
        return folder

    return made


def _named(prefix: str, *facts: object) -> str:
    return f"{prefix}-{hashlib.sha256(repr(facts).encode()).hexdigest()[:12]}"


@pytest.fixture(scope="session")
def toy(once: Callable[..., Path]) -> Toy:
    """toy(family, **arguments of toy_checkpoint) → a checkpoint's directory, made once; do not write into it."""

    def make(family: str = "llama", **arguments: Any) -> Path:
        arguments = {"hidden": 64, **arguments}
        name = _named(family, sorted(arguments.items()))
        return once(name, lambda folder: toy_checkpoint(folder, family, **arguments))

    return make


@pytest.fixture(scope="session")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """recipe_file(name or YAML text) → what to give as --recipe."""
    folder = tmp_path_factory.mktemp("recipes")

    def write(name: str) -> str:
        text = RECIPES.get(name, name)
        if not {"rules", "candidates", "cache"} & set(text.replace(":", " ").split()):
            return name
        path = folder / f"{name if name in RECIPES else hashlib.sha256(text.encode()).hexdigest()[:12]}.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


@pytest.fixture(scope="session")
def quantized(toy: Toy, recipe_file: Callable[[str], str], text: Path, once: Callable[..., Path]) -> Toy:
    """quantized(recipe, family, seed=0, **of toy_checkpoint) → an artifact, made once; do not write into it."""
    from vqcompress.pipeline.quantize import QuantizeOptions, quantize

    def make(recipe: str = "int8-plain", family: str = "llama", seed: int = 0, **arguments: Any) -> Path:
        job = (str(toy(family, **arguments)), recipe_file(recipe), [str(text)])

        def run(folder: Path) -> None:
            quantize(QuantizeOptions(job[0], folder / "artifact", *job[1:], samples=8, seqlen=64, seed=seed))

        return once(_named("quantized", recipe, family, seed, sorted(arguments.items())), run) / "artifact"

    return make
