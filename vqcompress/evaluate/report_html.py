"""report.html of an artifact and the page of `compare --html`: one file each, no scripts, nothing fetched."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
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


@dataclass
class Table:
    """A table of a page. words: columns that are not numbers. summary: folded away under these words."""

    titles: Sequence[str]
    rows: Sequence[Sequence[object]]
    words: Sequence[int] = (0,)
    summary: str = ""


@dataclass
class Section:
    """A part of a page; left out if it has neither code, charts, tables nor a warning."""

    title: str
    note: str = ""
    code: Sequence[str] = ()
    charts: list[tuple[str, Markup]] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    warning: str = ""


def _printable(value: object) -> object:
    return charts.printable(str(value)) if not isinstance(value, Markup) else value


def _page(title: str, lead: str, tiles: Iterable[tuple[str, str, str]], sections: list[Section]) -> str:
    pages = Environment(
        loader=PackageLoader("vqcompress.evaluate"), autoescape=True, finalize=_printable, trim_blocks=True
    )
    filled = [s for s in sections if s.code or s.charts or s.tables or s.warning]
    return pages.get_template("page.html.j2").render(title=title, lead=lead, tiles=tiles, sections=filled)


@dataclass
class _Blocks:
    """The blocks of a report by name → number."""

    numbers: dict[str, int]

    def split(self, name: str) -> tuple[int, str]:
        """The number of the block that holds a module, and the kind of the module there: `experts.*.w1`."""
        parts = name.split(".")
        for end in range(len(parts), 0, -1):
            if (head := ".".join(parts[:end])) in self.numbers:
                return self.numbers[head], local_kind(".".join(parts[end:]))
        return 0, kind(name)


def local_kind(path: str) -> str:
    """A module's path within its block, * for its numbers."""
    return kind(f".{path}.").strip(".")


def report_page(report: dict[str, Any], here: str) -> str:
    """report.html for an artifact's report. here: the name of the artifact's directory."""
    blocks = _Blocks({name: i for i, name in enumerate(n for n in report["blocks"] if not n.startswith("("))})
    base, recipe = names_of(report)
    quality = evaluation_table(report.get("evaluations", []))
    note = "Perplexities compare only under one protocol. KL divergences (nat) are from the original's predictions."
    left = Table(("weight", "why"), list(report["left_dense"].items()), (0, 1))
    sections = [
        Section("Quality", note, tables=[Table(quality[0], quality[1:], (0, 6))] if quality else []),
        Section("Load it", code=(LOAD.format(here=here), shell_commands(report, here))),
        _errors(report, blocks),
        _outliers(report, blocks),
        _codebooks(report, blocks),
        _experts(report, blocks),
        _time(report, blocks.numbers),
        _settings(report),
        Section(
            "Dense weights", "Norms and biases stay dense, too. * is any number.", tables=[left] if left.rows else []
        ),
        _inputs(report),
    ]
    lead = f"{base} compressed by vqcompress {report['versions']['vqcompress']} with the recipe {recipe}."
    return _page(f"{Path(base).name} · {recipe}", lead, _tiles(report), sections)


def _tiles(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The figures at the top: title, figure, what it is of."""
    before, after, bits = report["source_bytes"], report["artifact_bytes"], report["bits_per_weight"]
    tiles = [
        ("size", f"{size(before)} → {size(after)}", shrunk(before, after)),
        ("bits per weight", "-" if bits is None else f"{bits:.3f}", "compressed weights, with all that they need"),
        ("weights compressed", f"{report['weights_quantized']:,}", f"in {len(report['targets']):,} matrices"),
        ("time", duration(report["seconds"]), f"peak memory {size(report['peak_rss_bytes'])}"),
    ]
    if cache := report["kv_cache"]:
        tiles.append(("keys and values", f"{cache['bits']} bits", f"{cache['codebook']}, with --kv-cache"))
    # A figure with a plain cache first.
    for found in sorted(report.get("evaluations", []), key=lambda each: bool(each["kv_cache"]))[:1]:
        against = f"{found['ratio']:.4f} times the original's" if "ratio" in found else str(found["text"])
        against += f", cache {found['kv_cache']}" if found["kv_cache"] else ""
        tiles.append(("perplexity", f"{found['perplexity']:.3f}", against))
    return tiles


def _line(by_block: dict[int, list[float]]) -> Line:
    numbers = sorted(by_block)
    values = [by_block[n] for n in numbers]
    return Line(
        list(map(float, numbers)), [fmean(v) for v in values], [min(v) for v in values], [max(v) for v in values]
    )


def _error_chart(by_kind: dict[str, dict[int, Rows]], key: str) -> Markup | None:
    """A figure over blocks, a line for each kind of weight for which it is known."""
    series = {}
    for path, by_block in by_kind.items():
        known = {n: [row[key] for row in rows] for n, rows in by_block.items() if mean(rows, key) is not None}
        if known:
            series[path] = _line(known)
    what = key.replace("_", " ")
    return charts.lines(series, "block", what, what) if series else None


def _errors(report: dict[str, Any], blocks: _Blocks) -> Section:
    by_kind: dict[str, dict[int, Rows]] = defaultdict(lambda: defaultdict(list))
    for row in report["targets"]:
        number, path = blocks.split(row["name"])
        by_kind[path][number].append(row)
    lines = []
    for path, by_block in by_kind.items():
        same = [row for rows in by_block.values() for row in rows]
        worst = max(same, key=lambda row: row["relative_error"])
        errors = mean(same, "relative_error"), mean(same, "proxy_error"), worst["relative_error"]
        lines.append(
            [path, ", ".join(dict.fromkeys(row["method"] for row in same)), f"{len(same):,}"]
            + [f"{sum(math.prod(row['shape']) for row in same):,}", f"{mean(same, 'bits_per_weight'):.3f}"]
            + ["-" if error is None else short(error) for error in errors]
            + [worst["name"]]
        )
    keys = ["relative_error", "proxy_error", *(["bits_per_weight"] if len(report["settings"]) > 1 else [])]
    titles = ["weight", "method", "count", "weights", "bits", "relative error", "proxy error", "worst", "in"]
    note = (
        "Relative error: share of a weight's energy that is lost. Proxy error, known after calibration: share of its "
        "output's energy that is lost on the calibration rows. A band is the range over experts."
    )
    drawn = [(key.replace("_", " "), chart) for key in keys if (chart := _error_chart(by_kind, key))]
    return Section("Error by layer", note, charts=drawn, tables=[Table(titles, lines, (0, 1, 8))] if lines else [])


def _outliers(report: dict[str, Any], blocks: _Blocks) -> Section:
    """How far the largest channel of each smoothed input stands out; targets that share an input share its note."""
    inputs: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    for row in report["targets"]:
        smoothing = row["smoothing"]
        if smoothing and None not in smoothing.get("outlier", [None]):
            number, path = blocks.split(row["name"])
            folded = smoothing["folded_into"]
            place = "run time" if folded is None else f"folded into {local_kind(folded)}"
            inputs[number, place, smoothing["alpha"], *smoothing["outlier"]].append(path)
    by_readers: dict[tuple[str, str], Rows] = defaultdict(list)
    for (number, place, alpha, before, after), paths in inputs.items():
        fact = {"block": number, "alpha": alpha, "before": before, "after": after}
        by_readers[_join(dict.fromkeys(paths)), place].append(fact)
    drawn, lines = [], []
    for when in ("before", "after") if inputs else ():
        series = {}
        for (readers, _), facts in by_readers.items():
            by_block: dict[int, list[float]] = defaultdict(list)
            for fact in facts:
                by_block[fact["block"]].append(fact[when])
            series[readers] = _line(by_block)
        title = f"{when} smoothing"
        drawn.append((title, charts.lines(series, "block", "largest ÷ median", f"outliers {title}")))
    for (readers, place), facts in by_readers.items():
        alphas = [fact["alpha"] for fact in facts if fact["alpha"] is not None]
        strength = f"{min(alphas):g} to {max(alphas):g}" if alphas else "-"
        means = [short(fmean(fact[when] for fact in facts)) for when in ("before", "after")]
        lines.append([readers, place, len(facts), strength, *means])
    titles = ["read by", "factors", "inputs", "strength α", "mean before", "mean after"]
    note = "The largest magnitude of an input's largest channel, divided by that of its median channel."
    tables = [Table(titles, lines, (0, 1))] if lines else []
    return Section("Outliers before and after smoothing", note, charts=drawn, tables=tables)


def _join(paths: Iterable[str]) -> str:
    """Paths with a common parent named once: self_attn: q_proj, k_proj."""
    parents, leaves = zip(*((parent, leaf) for parent, _, leaf in (p.rpartition(".") for p in paths)), strict=True)
    return f"{parents[0]}: {', '.join(leaves)}" if len(set(parents)) == 1 and parents[0] else ", ".join(paths)


def _codebooks(report: dict[str, Any], blocks: _Blocks) -> Section:
    by_kind: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for place, book in report["codebooks"].items():
        by_kind[kind(place.replace(":", ".:")).replace(".:", ":")][place] = book
    drawn, lines = [], []
    for name, books in by_kind.items():
        strips: dict[str, list[float]] = {}
        for place, book in books.items():
            number, counts = blocks.split(place.partition(":")[0])[0], book.get("counts", [])
            strips |= {f"{number}.{i}" if len(counts) > 1 else f"{number}": uses for i, uses in enumerate(counts)}
        if strips:
            drawn.append((name, charts.strip(strips, "entry, in the order stored", f"uses of {name}")))
        hottest = (f"{100 * sum(b['hottest'][n] for b in books.values()) / len(books):.0f} %" for n in range(3))
        unused = sum(count == 0 for uses in strips.values() for count in uses) if strips else "-"
        lines.append([name, len(books), max(b["entries"] for b in books.values()), *hottest, unused])
    titles = ["codebook", "count", "entries", "first 1/8", "first 1/4", "first 1/2", "never used"]
    note = (
        "Uses of each entry by the stored codes: a row for each block (and stage), shaded against the mean of the row."
    )
    return Section("Codebooks", note, charts=drawn, tables=[Table(titles, lines)] if lines else [])


def _experts(report: dict[str, Any], blocks: _Blocks) -> Section:
    section = Section(
        "Experts",
        "Calibration tokens of each expert, a row for each block, shaded against the mean of the row. Borrowed: "
        "experts with too few tokens, encoded with the statistics of all experts of their layer.",
    )
    if mixtures := report["experts"]:
        rows = {str(blocks.split(place)[0]): tokens["routed"] for place, tokens in mixtures.items()}
        section.charts = [("tokens per expert", charts.strip(rows, "expert", "tokens per expert"))]
        lines = [
            [place, len(n), *(f"{f(n):,.0f}" for f in (min, median, max)), n.count(0), len(t["borrowed"])]
            for place, t in mixtures.items()
            if (n := t["routed"])
        ]
        titles = ["mixture", "experts", "fewest tokens", "median", "most", "with none", "borrowed"]
        section.tables = [Table(titles, lines, summary="tokens in numbers")]
    if names := report["uncalibrated"]:
        more = f" and {len(names) - 20:,} more" if len(names) > 20 else ""
        section.warning = f"No token of the calibration came to {', '.join(names[:20])}{more}."
    return section


def _time(report: dict[str, Any], blocks: dict[str, int]) -> Section:
    seconds = {n: report["blocks"][name] for name, n in blocks.items()}
    drawn = [
        ("seconds per block", charts.bars([*seconds], [*seconds.values()], "block", "seconds", "seconds per block"))
    ]
    titles, rows = ["block", "seconds"], [[n, f"{s:.2f}"] for n, s in seconds.items()]
    for which, where in enumerate(("memory", "GPU memory")):
        peaks = {blocks[name]: each[which] for name, each in report["peaks"].items()}
        if any(peaks.values()):
            title, gigabytes = f"peak {where}", [peak / 1e9 for peak in peaks.values()]
            drawn.append((title, charts.bars([*peaks], gigabytes, "block", "GB", title)))
            titles.append(title)
            rows = [[*row, size(peaks.get(n, 0))] for n, row in enumerate(rows)]
    # Names in parentheses are steps outside of the blocks.
    others = ", ".join(f"{b.strip('()')} {duration(s)}" for b, s in report["blocks"].items() if b not in blocks)
    note = "Peaks are those of the process up to the end of the block; a resumed run starts from zero."
    note = f"Besides the blocks: {others}. {note}" if others else note
    table = Table(titles, list(rows), summary="time and memory in numbers")
    return Section("Time and memory", note, charts=drawn, tables=[table])


def _settings(report: dict[str, Any]) -> Section:
    bits, cache = report["target_bits"], report["kv_cache"]
    facts = {
        "recipe": names_of(report)[1],
        "seed": report["seed"],
        "calibration": calibration_line(report["calibration"]),
        "rotation": report["rotation"],
        "bits asked for": bits,
        "keys and values": ", ".join(f"{key} {value}" for key, value in cache.items()) if cache else None,
    }
    tables = [Table(("setting", "value"), [(k, v) for k, v in facts.items() if v is not None], (0, 1))]
    if chosen := [(s["setting"], f"{s['targets']:,}", f"{s['weights']:,}") for s in report["settings"]]:
        tables.append(Table(("method", "matrices", "weights"), list(chosen)))
    return Section("Settings", tables=tables)


def _inputs(report: dict[str, Any]) -> Section:
    versions = Table(("package", "version"), list(report["versions"].items()), (0, 1))
    inputs = [(name, value) for name, value in report["inputs"].items() if value != "None"]
    prints = Table(("input", "fingerprint"), list(inputs), (0, 1), "fingerprints")
    note = "Two runs with the same inputs and versions end in the same bytes."
    return Section("Inputs and versions", note, tables=[versions, prints])


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
    drawn = []
    for cost, x in costs.items():
        for loss, y in losses.items():
            points = {n: Line.exact([a], [b]) for n, a, b in zip(names, x, y, strict=True) if b is not None}
            title = f"{loss} over {cost}"
            if points:
                drawn.append((title, charts.lines(points, cost, loss, title, whole=False)))
    rows = [[row["model"], f"{row['bits_per_weight']:.3f}", size(row["bytes"]), *quality_cells(row)] for row in models]
    against = f" against {found['baseline']}" if found["baseline"] else ""
    lead = f"{found['text']}{against}: {protocol_line(found['protocol'])}."
    table = Section("Table", tables=[Table(["model", "bits per weight", "size", *QUALITY], list(rows))])
    return _page("Models compared", lead, [], [table, Section("Charts", charts=drawn)])
