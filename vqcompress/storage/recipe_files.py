"""The recipes that come with the package, as files; imports no torch, so that listing them is quick."""

from __future__ import annotations

from pathlib import Path

from vqcompress.errors import UsageError, VQCompressError, did_you_mean

# What --kv-cache calls the way of an artifact itself.
AS_STORED = "artifact"
# Bits per weight that can be asked for.
LEAST, MOST = 1.5, 6.0


def packaged() -> dict[str, Path]:
    """Name → file of the recipes that come with the package."""
    installed = Path(__file__).parent.parent / "configs"
    # In a checkout `configs/` lies beside the package; a wheel carries it inside.
    folder = installed if installed.is_dir() else Path(__file__).parent.parent.parent / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"), key=lambda path: path.stem)}


def check_choice(name: str | None, target_bits: float | None, kv_cache: str | None) -> None:
    """UsageError if neither a recipe nor a budget is given, or one that no recipe can keep to."""
    if name is None and target_bits is None:
        or_else = f"--recipe {kv_cache} codes the cache alone" if kv_cache else "or give --target-bits, such as 2.5"
        raise UsageError(f"--recipe is missing (see `vqcompress recipes`); {or_else}")
    if target_bits is not None and not LEAST <= target_bits <= MOST:
        raise UsageError(f"--target-bits {target_bits:g} must be from {LEAST:g} to {MOST:g}")


def recipe_file(name: str, known: dict[str, Path]) -> Path:
    """The file of one of the known recipes, or a file of that name; VQCompressError if there is neither."""
    path = known.get(name, Path(name))
    if not path.is_file():
        # As for a text or a model, a file that is missing is no wrong usage.
        kind = VQCompressError if path.suffix else UsageError
        raise kind(f"no recipe or recipe file '{name}'.{did_you_mean(name, known)}")
    return path


def description(path: Path) -> str:
    """What a recipe file says of itself, in one line; empty if it says nothing."""
    # Help, which lists no recipe, need not wait for it.
    import yaml

    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    return str(data.get("description", "")) if isinstance(data, dict) else ""
