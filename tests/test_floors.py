"""The shape of the code: imports only point down, and everything stays small enough to hold in the head."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "vqcompress"
# From the ground up. A package stands for all of its modules.
FLOORS: list[set[str]] = [
    {"ops", "packing", "hadamard", "errors", "kernels"},
    {"methods", "codebooks", "transforms", "statistics"},
    {
        "hub",
        "trust",
        "targets",
        "checkpoint",
        "artifact",
        "writer",
        "packaged",
        "recipe",
        "calibration",
        "distributed",
        "states",
    },
    {"runtime", "blocks", "inputs", "rotation", "plan", "costs", "cache_calibration", "cache_costs"},
    {
        "quantize",
        "compress",
        "gather",
        "compensation",
        "tuning",
        "allocate",
        "evaluate",
        "compare",
        "export",
        "report",
        "svg",
        "page",
        "documents",
        "doctor",
        "verify",
        "inspect",
        "generate",
    },
    {"cli", "cli_evaluate", "options", "session", "show", "live"},
]
# The package itself only sets up what happens when transformers is imported; it may be imported by all from floor 2 up.
ENTRANCES = {"__init__", "__main__", "_autoload"}
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}
LINES_OF_ALL, LINES_OF_A_FILE, LINES_OF_A_FUNCTION = 16750, 450, 90

FILES = sorted(PACKAGE.rglob("*.py"))
every_file = pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))


def module_of(file: Path) -> str:
    """The name on its floor: the first part of the path below the package."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(file: Path) -> set[str]:
    """Every dotted name that a file imports, wherever in it, with what it takes from there."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative imports are not read by this test"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def own_imports(file: Path) -> set[str]:
    """The modules of the package that a file imports, by their names on a floor."""
    parts = {name.split(".")[1] for name in imports(file) if name.startswith("vqcompress.")}
    return {part for part in parts if part in FLOOR_OF}


@every_file
def test_every_module_has_a_floor(file: Path) -> None:
    assert module_of(file) in FLOOR_OF.keys() | ENTRANCES


@every_file
def test_imports_point_to_the_same_floor_or_down(file: Path) -> None:
    if module_of(file) not in ENTRANCES:
        floor = FLOOR_OF[module_of(file)]
        assert {name for name in own_imports(file) if FLOOR_OF[name] > floor} == set()


def test_no_modules_import_each_other_in_a_circle() -> None:
    below = {module: set[str]() for module in FLOOR_OF}
    for file in FILES:
        if module_of(file) not in ENTRANCES:
            below[module_of(file)] |= own_imports(file) - {module_of(file)}
    while below:
        free = {module for module, needs in below.items() if not needs & below.keys()}
        assert free, f"these import each other in a circle: {sorted(below)}"
        below = {module: needs for module, needs in below.items() if module not in free}


@pytest.mark.parametrize("file", [f for f in FILES if FLOOR_OF.get(module_of(f), 9) <= 1], ids=lambda f: f.name)
def test_the_lowest_floors_see_only_tensors(file: Path) -> None:
    roots = {name.split(".")[0] for name in imports(file)}
    assert roots & {"transformers", "safetensors", "accelerate", "pathlib", "os", "io", "shutil"} == set()
    assert {name for name in imports(file) if name in {"torch.nn", "torch.nn.Module", "torch.distributed"}} == set()
    names = {n.attr for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Attribute)}
    assert "Module" not in names


def test_help_needs_no_torch() -> None:
    """Nothing that the command line imports at its top may bring torch along."""
    seen, waiting = set[str](), ["cli"]
    while waiting:
        module = waiting.pop()
        file = PACKAGE / f"{module}.py"
        if module in seen or not file.is_file():
            continue
        seen.add(module)
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            assert not [n for n in names if n.split(".")[0] in ("torch", "transformers", "safetensors")], module
            waiting += [name.split(".")[1] for name in names if name.startswith("vqcompress.")]


def test_the_package_stays_within_its_lines() -> None:
    assert sum(len(file.read_text(encoding="utf-8").splitlines()) for file in FILES) <= LINES_OF_ALL


@every_file
def test_files_and_functions_stay_short(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LINES_OF_A_FILE
    long = {
        node.name: node.end_lineno - node.lineno + 1
        for node in ast.walk(ast.parse(text))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and node.end_lineno is not None
        and node.end_lineno - node.lineno + 1 > LINES_OF_A_FUNCTION
    }
    assert long == {}


@pytest.mark.parametrize("name", ["utils", "common", "base", "helpers", "misc"])
def test_there_is_no_drawer_for_everything(name: str) -> None:
    assert not [file for file in FILES if file.stem == name]
