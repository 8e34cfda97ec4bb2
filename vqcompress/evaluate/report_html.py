"""report.html of an artifact and the page of `compare --html`: one file each, no scripts, nothing fetched."""

from __future__ import annotations

import math
import shlex
from collections import defaultdict
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape
from rich.filesize import decimal as size

from vqcompress.evaluate import wording
from vqcompress.evaluate.charts import Charts, chart, over_blocks
from vqcompress.evaluate.read_report import mean
from vqcompress.storage.targets import kind

Rows = list[dict[str, Any]]
TEMPLATES = Environment(
    loader=PackageLoader("vqcompress.evaluate"), autoescape=select_autoescape(("html.j2",)), trim_blocks=True
)
# The functions of wording.py are filters.
TEMPLATES.filters |= {"size": size, "mean": mean, "quote": shlex.quote, "repr": repr} | vars(wording)


def render(template: str, **content: Any) -> str:
    """A template of this package, filled in. Only in templates of HTML is the content escaped."""
    return TEMPLATES.get_template(template).render(**content)


def report_page(report: dict[str, Any]) -> str:
    """report.html for the report of an artifact."""
    # Names in parentheses are steps outside of the blocks.
    blocks = [name for name in report["blocks"] if not name.startswith("(")]
    targets = [
        row | _place(row["name"], blocks) | {"weights": row["shape"][0] * row["shape"][1]} for row in report["targets"]
    ]
    books = [book | _place(name, blocks) for name, book in report["codebooks"].items()]
    inputs = _smoothed_inputs(targets)
    errors: Charts = {}
    for key in ("relative_error", "proxy_error", *(["bits_per_weight"] if len(report["settings"]) > 1 else [])):
        errors |= over_blocks(key.replace("_", " "), "", ((row["path"], row["block"], row[key]) for row in targets))
    outliers: Charts = {}
    for when in ("before", "after"):
        points = ((readers, f["block"], f[when]) for readers, found in inputs.items() for f in found)
        outliers |= over_blocks(f"{when} smoothing", "largest ÷ median", points)
    quarters = ((book["path"], book["block"], 100 * book["hottest"][1]) for book in books)
    mixtures = [(_place(name, blocks), tokens["routed"]) for name, tokens in report["experts"].items()]
    times = (("", number, report["blocks"][name]) for number, name in enumerate(blocks))
    return render(
        "report.html.j2",
        report=report,
        names=wording.names_of(report),
        targets=targets,
        inputs=inputs,
        books=books,
        steps={name.strip("()"): seconds for name, seconds in report["blocks"].items() if name not in blocks},
        error_charts=errors,
        outlier_charts=outliers,
        codebook_charts=over_blocks("uses of the first quarter of the entries, %", "", quarters),
        expert_charts=over_blocks(
            "tokens per expert", "tokens", ((m["path"], m["block"], n) for m, routed in mixtures for n in routed)
        ),
        time_charts=over_blocks("seconds per block", "seconds", times),
    )


def _place(name: str, blocks: list[str]) -> dict[str, Any]:
    """The number of the block that holds a module, and the module's path there with * for numbers."""
    block = next(i for i, block in enumerate(blocks) if name.startswith(f"{block}."))
    return {"block": block, "path": local_kind(name.removeprefix(f"{blocks[block]}."))}


def local_kind(path: str) -> str:
    """A module's path within its block, * for its numbers."""
    return kind(f".{path}.").strip(".")


def _smoothed_inputs(targets: Rows) -> dict[str, Rows]:
    """Names of the weights that read an input → its outliers before and after smoothing, of each block and expert."""
    by_path: dict[str, Rows] = defaultdict(list)
    for row in targets:
        if (smoothing := row["smoothing"]) and None not in smoothing["outlier"]:
            before, after = smoothing["outlier"]
            folded = local_kind(smoothing["folded_into"] or "")
            figures = {"block": row["block"], "alpha": smoothing["alpha"], "before": before, "after": after}
            by_path[row["path"]].append(figures | {"folded_into": folded})
    # Weights that read the same input have the same figures.
    readers: dict[str, Rows] = {}
    for path, found in by_path.items():
        same = next((names for names, other in readers.items() if other == found), None)
        readers[f"{same}, {path}" if same else path] = readers.pop(same) if same else found
    return readers


def comparison_page(found: dict[str, Any]) -> str:
    """The page of `compare --html`, from the result of `compare`: the table, and charts of loss over bits."""
    models = found["models"]
    # The end of a long path fits into a legend.
    names = [row["model"][-40:] for row in models]
    losses = {"perplexity": [row["perplexity"] for row in models]}
    if found["baseline"] is not None:
        losses["mean KL divergence"] = [row["kl_divergence"]["mean"] for row in models]
        losses["same top-1, %"] = [100 * row["top1_agreement"] for row in models]
    drawn: Charts = {}
    for title, values in losses.items():
        rows = [row for row in zip(names, models, values, strict=True) if math.isfinite(row[2])]
        points, level = {name: {model["bits_per_weight"]: [value]} for name, model, value in rows}, None
        if found["baseline"] is not None:
            # The bits of the original would stretch the axis, so it is a line.
            points.pop(names[0])
            level = f"{names[0]} (original)", values[0]
        if points:
            drawn[title] = chart(title, "bits per weight", "", points, level)
    return render("compare.html.j2", found=found, charts=drawn)
