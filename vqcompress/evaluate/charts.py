"""Charts as SVG text: matplotlib draws them, the page's style sheet colours them.

Text stays text and colours become CSS variables, so a chart follows the page's light or dark scheme. A chart is as wide
as the screen of a phone; a wider page shows several in a row. matplotlib is imported with the first chart.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

# What matplotlib draws with → the CSS variable that stands in its place.
INK, RULE = "#010101", "#020202"
COLOURS = tuple(f"#0303{n:02x}" for n in range(8))
VARIABLES = {INK: "soft", RULE: "rule", **{colour: f"c{n}" for n, colour in enumerate(COLOURS)}}
MARKERS = "osD^v"
# Bounds of the shades of a strip, relative to the mean of its row.
LEVELS = (1 / 8, 1 / 4, 1 / 2, 1, 2, 4)
LEVEL_NAMES = ("under 1/8 of mean", "to 1/4", "to 1/2", "to 1", "to 2", "to 4", "over 4")
SHADES = tuple(f"#0404{n:02x}" for n in range(len(LEVELS) + 1))
VARIABLES |= {shade: f"h{n + 1}" for n, shade in enumerate(SHADES)}
MOST_COLUMNS = 256
# An axis is logarithmic where its largest value is this many times its smallest.
WIDE_RANGE = 30
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "vqcompress",
    "text.parse_math": False,
    "font.size": 8,
    "legend.frameon": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "grid.color": RULE,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
}


@dataclass
class Line:
    """Values y over x, with the ranges low…high whose means they are."""

    x: list[float]
    y: list[float]
    low: list[float]
    high: list[float]

    @classmethod
    def exact(cls, x: list[float], y: list[float]) -> Line:
        """A line without ranges."""
        return cls(x, y, y, y)


def printable(text: str) -> str:
    """The text without characters that XML cannot hold."""
    return "".join(c if c.isprintable() or c in "\n\t" else "�" for c in text)


def lines(series: Mapping[str, Line], x_label: str, y_label: str, name: str, whole: bool = True) -> Markup:
    """Lines with markers, a band from low to high, and a legend. name: of the chart, unique in its page.

    whole: x counts things, from block to block, and points are joined.
    """

    from matplotlib.ticker import LogLocator, NullLocator

    columns = 2 if max(map(len, series), default=0) > 12 else 4

    def draw(axes: Any) -> None:
        found = [v for line in series.values() for v in (*line.low, *line.high) if math.isfinite(v)]
        if found and min(found) > 0 and max(found) > WIDE_RANGE * min(found):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1,) if max(found) > 300 * min(found) else (1, 2, 5)))
            axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter("{x:g}")
        for n, (label, line) in enumerate(series.items()):
            colour, marker = COLOURS[n % len(COLOURS)], MARKERS[n % len(MARKERS)]
            join = "-" if whole else "none"
            axes.plot(
                line.x,
                line.y,
                linestyle=join,
                color=colour,
                marker=marker,
                markersize=3,
                linewidth=1,
                label=printable(label),
            )
            if line.low != line.high:
                axes.fill_between(line.x, line.low, line.high, color=colour, alpha=0.2, linewidth=0)
        axes.figure.legend(loc="lower center", ncols=columns)
        if whole:
            axes.xaxis.get_major_locator().set_params(integer=True)
        else:
            axes.set_xlim(left=0)

    return _chart(draw, x_label, y_label, name, legend_rows=-(-len(series) // columns))


def bars(x: list[int], y: list[float], x_label: str, y_label: str, name: str) -> Markup:
    """A bar from 0 for each value over a whole number."""

    def draw(axes: Any) -> None:
        axes.bar(x, y, color=COLOURS[0])
        axes.xaxis.get_major_locator().set_params(integer=True)

    return _chart(draw, x_label, y_label, name)


def strip(rows: Mapping[str, Sequence[float]], x_label: str, name: str) -> Markup:
    """A row of cells for each list of counts, shaded by their ratio to the mean of the row; no shade for 0.

    Neighbours are added up where there are more than 256; rows may differ in length.
    """
    from matplotlib.patches import Patch

    def draw(axes: Any) -> None:
        for r, counts in enumerate(rows.values()):
            together = -(-len(counts) // MOST_COLUMNS)
            sums = [sum(counts[i : i + together]) for i in range(0, len(counts), together)]
            mean = sum(sums) / max(len(sums), 1)
            for shade, colour in enumerate(SHADES):
                # Neighbours of one shade are one rectangle.
                spans: list[tuple[float, float]] = []
                for i, value in enumerate(sums):
                    if value > 0 and sum(value > level * mean for level in LEVELS) == shade:
                        start, width = spans[-1] if spans else (-1.0, 0.0)
                        if start + width == i * together:
                            spans[-1] = (start, width + together)
                        else:
                            spans.append((i * together, together))
                axes.broken_barh(spans, (r - 0.45, 0.9), color=colour, linewidth=0)
        step = max(1, len(rows) // 12)
        axes.set_yticks(range(0, len(rows), step), list(rows)[::step])
        axes.invert_yaxis()
        axes.grid(False)
        axes.margins(0)
        axes.xaxis.get_major_locator().set_params(integer=True)
        keys = [
            Patch(color=colour, linewidth=0, label=label) for colour, label in zip(SHADES, LEVEL_NAMES, strict=True)
        ]
        axes.figure.legend(handles=keys, loc="lower center", ncols=4, handlelength=1)

    return _chart(draw, x_label, "", name, legend_rows=2)


def _chart(draw: Callable[[Any], None], x_label: str, y_label: str, name: str, legend_rows: int = 0) -> Markup:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    out = io.StringIO()
    with rc_context(STYLE):
        below = 0.45 + 0.18 * legend_rows
        figure = Figure(figsize=(4.4, 2.2 + below))
        figure.subplots_adjust(left=0.16, right=0.98, top=0.97, bottom=below / (2.2 + below))
        axes = figure.add_subplot()
        draw(axes)
        axes.set_xlabel(printable(x_label))
        axes.set_ylabel(printable(y_label))
        figure.savefig(out, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return Markup(_inline(out.getvalue(), name))


def _inline(svg: str, name: str) -> str:
    """An SVG file as an element of a page: ids of its own, colours and fonts of the page, a name for screen readers."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>|<metadata>.*?</metadata>", "", svg, flags=re.S)
    prefix = re.sub(r"\W+", "-", name)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    svg = re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', "", svg.replace("\n", " "), count=1)
    svg = re.sub(r"#0[1-4]0[1-4][0-9a-f]{2}", lambda m: f"var(--{VARIABLES[m[0]]})", svg)
    svg = re.sub(r" ?font-family: [^;]*;", "", svg)
    # A hundredth of a pixel is precise enough, in tags; text between them stays.
    svg = re.sub(r"<[^>]+>", lambda tag: re.sub(r"(\.\d\d)\d+", r"\1", tag[0]), svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{Markup.escape(printable(name))}"', 1)
