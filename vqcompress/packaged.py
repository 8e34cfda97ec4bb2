"""The recipes that come with the package, as files; imports no torch, so that listing them is quick."""

from __future__ import annotations

from pathlib import Path


def packaged() -> dict[str, Path]:
    """Name → file of the recipes that come with the package."""
    installed = Path(__file__).parent / "configs"
    # In a checkout `configs/` lies beside the package; a wheel carries it inside.
    folder = installed if installed.is_dir() else Path(__file__).parent.parent / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def description(path: Path) -> str:
    """What a recipe file says of itself, in one line; empty if it says nothing."""
    # Help, which lists no recipe, need not wait for it.
    import yaml

    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    return str(data.get("description", "")) if isinstance(data, dict) else ""
