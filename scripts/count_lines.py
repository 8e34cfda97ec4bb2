"""Lines of code of the package: no blanks, comments or docstrings.

Usage: python scripts/count_lines.py            a line per folder, the largest files and functions, the total
"""

from __future__ import annotations

import ast
import io
import tokenize
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "vqcompress"
LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def code_lines(text: str) -> set[int]:
    """Numbers of the lines that hold a token of code."""
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            docstrings |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    used: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in LAYOUT:
            used |= set(range(token.start[0], token.end[0] + 1))
    return used - docstrings


def functions(text: str) -> dict[str, tuple[int, int]]:
    """Name → (lines of code, number of arguments) of every function of a file, nested ones included."""
    code = code_lines(text)
    found = {}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            own = node.args
            arguments = len(own.posonlyargs) + len(own.args) + len(own.kwonlyargs)
            lines = len(code & set(range(node.lineno, (node.end_lineno or 0) + 1)))
            found[f"{node.name}:{node.lineno}"] = (lines, arguments)
    return found


def main() -> None:
    """Print what the module's docstring says."""
    texts = {file.relative_to(PACKAGE): file.read_text(encoding="utf-8") for file in PACKAGE.rglob("*.py")}
    counts = {file: len(code_lines(text)) for file, text in texts.items()}
    folders: dict[str, int] = {}
    for file, count in counts.items():
        folder = file.parts[0] if len(file.parts) > 1 else "."
        folders[folder] = folders.get(folder, 0) + count
    for folder, count in sorted(folders.items()):
        print(f"{count:6}  {folder}/")
    print("largest files:", ", ".join(f"{f} {counts[f]}" for f in sorted(counts, key=lambda f: -counts[f])[:8]))
    every = [
        (lines, arguments, f"{f}:{name}")
        for f, text in texts.items()
        for name, (lines, arguments) in functions(text).items()
    ]
    print("longest functions:", ", ".join(f"{name} {lines}" for lines, _, name in sorted(every, reverse=True)[:8]))
    most = sorted(every, key=lambda row: -row[1])[:8]
    print("most arguments:", ", ".join(f"{name} {arguments}" for _, arguments, name in most))
    print(f"{sum(counts.values())} lines of code in {len(counts)} files")


if __name__ == "__main__":
    main()
