"""report.html of an artifact and the page of `compare --html`: one file each, no scripts, nothing fetched."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from rich.filesize import decimal as size

from vqcompress.evaluate import charts
from vqcompress.evaluate.charts import Line
from vqcompress.evaluate.read_report import mean
from vqcompress.evaluate.wording import (
    LOAD,
    QUALITY,
    cache_line,
    calibration_line,
    duration,
    evaluation_table,
    names_of,
    protocol_line,
    quality_cells,
    shell_commands,
    short,
    shrunk,
)
from vqcompress.storage.targets import kind

Rows = list[dict[str, Any]]
# Title of a chart → the chart.
Charts = dict[str, Markup]
# Of each target: the number of its block, and its path within the block with * for numbers (`experts.*.w1`).
Places = list[tuple[int, str]]


def _printable(value: object) -> object:
    return charts.printable(str(value)) if not isinstance(value, Markup) else value


def _render(template: str, **content: Any) -> str:
    pages = Environment(
        loader=PackageLoader("vqcompress.evaluate"), autoescape=True, finalize=_printable, trim_blocks=True
    )
    pages.filters |= {"size": size, "duration": duration, "cache_line": cache_line}
    return pages.get_template(template).render(**content)


def report_page(report: dict[str, Any], here: str) -> str:
    """report.html for an artifact's report. here: the name of the artifact's directory."""
    base, recipe = names_of(report)
    blocks = {name: i for i, name in enumerate(n for n in report["blocks"] if not n.startswith("("))}
    targets, places = report["targets"], [_place(row["name"], blocks) for row in report["targets"]]
    outlier_charts, outlier_rows = _outliers(targets, places)
    codebook_charts, codebook_rows = _codebooks(report["codebooks"], blocks)
    return _render(
        "report.html.j2",
        report=report,
        base=base,
        recipe=recipe,
        shrunk=shrunk(report["source_bytes"], report["artifact_bytes"]),
        # A figure that was measured with a plain cache goes first.
        evaluations=sorted(report.get("evaluations", []), key=lambda each: bool(each["kv_cache"])),
        evaluation_rows=evaluation_table(report.get("evaluations", [])),
        code=(LOAD.format(here=here), shell_commands(report, here)),
        error_charts=_error_charts(report, places),
        error_rows=_error_rows(targets, places),
        outlier_charts=outlier_charts,
        outlier_rows=outlier_rows,
        codebook_charts=codebook_charts,
        codebook_rows=codebook_rows,
        expert_charts=_expert_charts(report["experts"], blocks),
        borrowed=sum(len(tokens["borrowed"]) for tokens in report["experts"].values()),
        time_charts=_time_charts(report, blocks),
        # Names in parentheses are steps outside of the blocks.
        steps=[(name.strip("()"), s) for name, s in report["blocks"].items() if name not in blocks],
        calibration=calibration_line(report["calibration"]),
    )


def _place(name: str, blocks: dict[str, int]) -> tuple[int, str]:
    """The number of the block that holds a module, and the module's path there with * for numbers."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        if (head := ".".join(parts[:end])) in blocks:
            return blocks[head], _local_kind(".".join(parts[end:]))
    return 0, kind(name)


def _local_kind(path: str) -> str:
    """A module's path within its block, * for its numbers."""
    return kind(f".{path}.").strip(".")


def _line_chart(points: Iterable[tuple[str, int, float | None]], y_label: str, name: str) -> Charts:
    """A chart over blocks of (label, block, value): a line of means for each label, with a band from least to most.

    Unknown values (None) are left out; {} if none is known.
    """
    known: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for label, block, value in points:
        if value is not None:
            known[label][block].append(value)
    series = {}
    for label, by_block in known.items():
        values = [by_block[block] for block in sorted(by_block)]
        low_high = [min(v) for v in values], [max(v) for v in values]
        series[label] = Line([float(block) for block in sorted(by_block)], [fmean(v) for v in values], *low_high)
    return {name: charts.lines(series, "block", y_label, name)} if series else {}


def _error_charts(report: dict[str, Any], places: Places) -> Charts:
    found: Charts = {}
    for key in ("relative_error", "proxy_error", *(["bits_per_weight"] if len(report["settings"]) > 1 else [])):
        points = ((path, block, row[key]) for row, (block, path) in zip(report["targets"], places, strict=True))
        # The title says what the axis is, whose numbers are long.
        found |= _line_chart(points, "", key.replace("_", " "))
    return found


def _error_rows(targets: Rows, places: Places) -> list[list[str]]:
    """For each kind of weight: methods, number of matrices and weights, bits, mean errors, and the worst matrix."""
    by_kind: dict[str, Rows] = defaultdict(list)
    for row, (_, path) in zip(targets, places, strict=True):
        by_kind[path].append(row)
    lines = []
    for path, rows in by_kind.items():
        worst = max(rows, key=lambda row: row["relative_error"])
        errors = mean(rows, "relative_error"), mean(rows, "proxy_error"), worst["relative_error"]
        lines.append(
            [path, ", ".join(dict.fromkeys(row["method"] for row in rows)), f"{len(rows):,}"]
            + [f"{sum(math.prod(row['shape']) for row in rows):,}", f"{mean(rows, 'bits_per_weight'):.3f}"]
            + ["-" if error is None else short(error) for error in errors]
            + [worst["name"]]
        )
    return lines


def _outliers(targets: Rows, places: Places) -> tuple[Charts, list[list[object]]]:
    """How far the largest channel of each smoothed input stands out; targets that share an input share its figures."""
    inputs: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    for row, (block, path) in zip(targets, places, strict=True):
        smoothing = row["smoothing"]
        if smoothing and None not in smoothing.get("outlier", [None]):
            folded = smoothing["folded_into"]
            factors = "run time" if folded is None else f"folded into {_local_kind(folded)}"
            inputs[block, factors, smoothing["alpha"], *smoothing["outlier"]].append(path)
    by_readers: dict[tuple[str, str], Rows] = defaultdict(list)
    for (block, factors, alpha, before, after), paths in inputs.items():
        figures = {"block": block, "alpha": alpha, "before": before, "after": after}
        by_readers[_join(dict.fromkeys(paths)), factors].append(figures)
    drawn: Charts = {}
    for when in ("before", "after"):
        points = ((readers, f["block"], f[when]) for (readers, _), found in by_readers.items() for f in found)
        drawn |= _line_chart(points, "largest ÷ median", f"{when} smoothing")
    rows: list[list[object]] = []
    for (readers, factors), found in by_readers.items():
        alphas = [f["alpha"] for f in found if f["alpha"] is not None]
        strength = f"{min(alphas):g} to {max(alphas):g}" if alphas else "-"
        means = [short(fmean(f[when] for f in found)) for when in ("before", "after")]
        rows.append([readers, factors, len(found), strength, *means])
    return drawn, rows


def _join(paths: Iterable[str]) -> str:
    """Paths with a common parent named once: self_attn: q_proj, k_proj."""
    parents, leaves = zip(*((parent, leaf) for parent, _, leaf in (p.rpartition(".") for p in paths)), strict=True)
    return f"{parents[0]}: {', '.join(leaves)}" if len(set(parents)) == 1 and parents[0] else ", ".join(paths)


def _codebooks(books: dict[str, Any], blocks: dict[str, int]) -> tuple[Charts, list[list[object]]]:
    """For each kind of codebook: how often its entries are used; number of codebooks, entries, entries never used."""
    by_kind: dict[str, dict[str, Any]] = defaultdict(dict)
    for name, book in books.items():
        by_kind[kind(name.replace(":", ".:")).replace(".:", ":")][name] = book
    drawn: Charts = {}
    rows: list[list[object]] = []
    for path, same in by_kind.items():
        strips: dict[str, list[float]] = {}
        for name, book in same.items():
            number, counts = _place(name.partition(":")[0], blocks)[0], book.get("counts", [])
            strips |= {f"{number}.{i}" if len(counts) > 1 else f"{number}": uses for i, uses in enumerate(counts)}
        if strips:
            drawn[path] = charts.strip(strips, "entry, in the order stored", f"uses of {path}")
        unused = sum(count == 0 for uses in strips.values() for count in uses) if strips else "-"
        rows.append([path, len(same), max(book["entries"] for book in same.values()), unused])
    return drawn, rows


def _expert_charts(experts: dict[str, Any], blocks: dict[str, int]) -> Charts:
    rows = {str(_place(name, blocks)[0]): tokens["routed"] for name, tokens in experts.items()}
    return {"tokens per expert": charts.strip(rows, "expert", "tokens per expert")} if rows else {}


def _time_charts(report: dict[str, Any], blocks: dict[str, int]) -> Charts:
    figures = {"seconds per block": ("seconds", {n: report["blocks"][name] for name, n in blocks.items()})}
    for index, title in enumerate(("peak memory", "peak GPU memory")):
        figures[title] = ("GB", {blocks[name]: peaks[index] / 1e9 for name, peaks in report["peaks"].items()})
    return {
        title: charts.bars([*found], [*found.values()], "block", unit, title)
        for title, (unit, found) in figures.items()
        if any(found.values())
    }


def comparison_page(found: dict[str, Any]) -> str:
    """The page of `compare --html`, from the result of `compare`: charts of cost against loss, and the table."""
    models = found["models"]
    names = [Path(row["model"]).name for row in models]
    names = names if len(set(names)) == len(names) else [row["model"] for row in models]
    losses = {
        "perplexity": [row["perplexity"] for row in models],
        "mean KL divergence": [row["kl_divergence"] and row["kl_divergence"]["mean"] for row in models],
        "same top-1, %": [row["top1_agreement"] and 100 * row["top1_agreement"] for row in models],
    }
    costs = {
        "bits per weight": [row["bits_per_weight"] for row in models],
        "MB": [row["bytes"] / 1e6 for row in models],
    }
    drawn: Charts = {}
    for cost, x in costs.items():
        for loss, y in losses.items():
            points = {n: Line.exact([a], [b]) for n, a, b in zip(names, x, y, strict=True) if b is not None}
            title = f"{loss} over {cost}"
            if points:
                drawn[title] = charts.lines(points, cost, loss, title, whole=False)
    rows = [[row["model"], f"{row['bits_per_weight']:.3f}", size(row["bytes"]), *quality_cells(row)] for row in models]
    titles = ["model", "bits per weight", "size", *QUALITY]
    protocol = protocol_line(found["protocol"])
    return _render("compare.html.j2", found=found, protocol=protocol, titles=titles, rows=rows, charts=drawn)
