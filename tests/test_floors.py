"""The shape of the code: folders are floors, imports point down, and everything stays small."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from count_lines import PACKAGE, code_lines, functions

# From the ground up. A folder may import itself and what stands before it.
FLOORS = ["methods", "storage", "model", "kv_cache", "runtime", "export", "evaluate", "pipeline", "cli"]
# Importable from every floor: they import nothing of the package, or only set up what happens later.
OUTSIDE = {"errors", "__init__", "__main__"}
LINES_OF_ALL, LINES_OF_A_FILE, LINES_OF_A_FUNCTION, ARGUMENTS, KERNEL_ARGUMENTS = 10200, 350, 60, 8, 16

FILES = sorted(PACKAGE.rglob("*.py"))


def floor_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(file: Path, top: bool = False) -> Iterator[str]:
    """Dotted names of what a file imports; top: only where importing the file itself does it."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in tree.body if top else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative imports are not read by this test"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def file_of(name: str) -> Path | None:
    """The file of the package that a dotted name is or lies in."""
    parts = name.split(".")
    for end in range(len(parts), 1, -1):
        path = PACKAGE.joinpath(*parts[1:end])
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.is_file():
                return file
    return None


def own_imports(file: Path, top: bool = False) -> set[Path]:
    found = {file_of(name) for name in imports(file, top) if name.startswith("vqcompress.")}
    return {f for f in found if f is not None} - {file}


def test_every_file_stands_on_a_floor() -> None:
    assert {floor_of(file) for file in FILES} <= {*FLOORS, *OUTSIDE}


def test_imports_point_down() -> None:
    height = {name: i for i, name in enumerate(FLOORS)}
    offenders = [
        f"{file.relative_to(PACKAGE)} → {other.relative_to(PACKAGE)}"
        for file in FILES
        for other in own_imports(file)
        if floor_of(file) not in OUTSIDE
        and floor_of(other) not in OUTSIDE
        and height[floor_of(other)] > height[floor_of(file)]
    ]
    assert offenders == []


def test_no_files_import_each_other_in_a_circle() -> None:
    below = {file: own_imports(file) for file in FILES if file.name != "__init__.py"}
    while below:
        free = {file for file, needs in below.items() if not needs & below.keys()}
        assert free, f"these import each other in a circle: {sorted(str(f) for f in below)}"
        below = {file: needs for file, needs in below.items() if file not in free}


def test_methods_see_only_tensors() -> None:
    forbidden = {"transformers", "safetensors", "accelerate", "pathlib", "os", "io", "shutil"}
    offenders = []
    for file in FILES:
        if floor_of(file) == "methods":
            found = {n for n in imports(file) if n.split(".")[0] in forbidden or n.startswith("torch.distributed")}
            names = {n.attr for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Attribute)}
            offenders += [f"{file.name}: {name}" for name in found | (names & {"Module"})]
    assert offenders == []


def test_help_needs_no_torch() -> None:
    """Nothing that the command line imports at its top may bring torch along."""
    seen, waiting, offenders = set[Path](), [PACKAGE / "cli" / "main.py"], []
    while waiting:
        file = waiting.pop()
        if file not in seen:
            seen.add(file)
            roots = {name.split(".")[0] for name in imports(file, top=True)}
            offenders += [f"{file.name}: {r}" for r in roots & {"torch", "transformers", "safetensors", "triton"}]
            waiting += own_imports(file, top=True)
            waiting += [
                p for parent in file.parents if (p := parent / "__init__.py").is_file() and parent != PACKAGE.parent
            ]
    assert offenders == []


def test_the_package_stays_small() -> None:
    assert sum(len(code_lines(file.read_text(encoding="utf-8"))) for file in FILES) <= LINES_OF_ALL


def test_files_and_functions_stay_short() -> None:
    offenders = []
    for file in FILES:
        text, where = file.read_text(encoding="utf-8"), file.relative_to(PACKAGE)
        if (count := len(code_lines(text))) > LINES_OF_A_FILE:
            offenders.append(f"{where}: {count} lines")
        nodes = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef))
        kernels = {node.lineno for node in nodes if any("jit" in ast.unparse(d) for d in node.decorator_list)}
        for name, (lines, arguments) in functions(text).items():
            # A command's arguments are its options.
            most = (
                99 if floor_of(file) == "cli" else KERNEL_ARGUMENTS if int(name.split(":")[1]) in kernels else ARGUMENTS
            )
            if lines > LINES_OF_A_FUNCTION or arguments > most:
                offenders.append(f"{where}:{name}: {lines} lines, {arguments} arguments")
    assert offenders == []


def test_there_is_no_drawer_for_everything() -> None:
    assert [file for file in FILES if file.stem in ("utils", "common", "helpers", "misc")] == []
