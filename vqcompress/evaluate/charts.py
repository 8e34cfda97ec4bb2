"""Charts as SVG elements of a page, drawn by matplotlib, which is imported with the first chart.

Text stays text and has the colour of the page's text; the other colours can be told apart on white and on black.
"""

from __future__ import annotations

import io
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from statistics import fmean
from typing import Any

from markupsafe import Markup

# Title of a chart → its SVG.
Charts = dict[str, Markup]
# matplotlib draws text in this colour; it is then replaced by the page's.
INK = "#010101"
COLOURS = ["#3b82d6", "#c2661a", "#2b9348", "#b34fc9", "#1496a6", "#d64560", "#94762f", "#77828e"]
# An axis is logarithmic where its largest value is this many times its smallest.
WIDE_RANGE = 30
STYLE: Any = {
    "svg.fonttype": "none",
    # A fixed salt gives the same ids in every run.
    "svg.hashsalt": "vqcompress",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "legend.frameon": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": f"cycler('marker', {list('osD^v')}) * cycler('color', {COLOURS})",
    "lines.markersize": 4,
    "grid.alpha": 0.25,
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "grid.color", "xtick.color", "ytick.color"), INK
    ),
}


def over_blocks(title: str, unit: str, points: Iterable[tuple[str, int, float | None]]) -> Charts:
    """A chart of (label, block, value), a line for each label. Values of None are left out; {} if none is known."""
    series: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for label, block, value in points:
        if value is not None:
            series[label][block].append(value)
    return {title: chart(title, "block", unit, series)} if series else {}


def chart(
    title: str,
    x_label: str,
    y_label: str,
    series: Mapping[str, Mapping[float, list[float]]],
    level: tuple[str, float] | None = None,
) -> Markup:
    """A line through the means of the values at each x, with a band from least to most; a legend names several.

    title: unique in the page. series: label → x → values. level: label and y of a dashed horizontal line.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    labels = [*series, *([level[0]] if level else [])]
    columns = 1 if max(map(len, labels)) > 24 else 2
    with rc_context(STYLE):
        legend_rows = -(-len(labels) // columns) if len(labels) > 1 else 0
        # In inches, the labels of the x axis included.
        below = 0.45 + 0.18 * legend_rows
        figure = Figure(figsize=(4.4, 2.2 + below))
        figure.subplots_adjust(left=0.16, right=0.98, top=0.97, bottom=below / (2.2 + below))
        axes = figure.add_subplot(xlabel=x_label, ylabel=y_label)
        every = [value for by_x in series.values() for values in by_x.values() for value in values]
        if min(every) > 0 and max(every) > WIDE_RANGE * min(every):
            axes.set_yscale("log")
            axes.minorticks_off()
        axes.yaxis.set_major_formatter("{x:g}")
        axes.locator_params(axis="x", integer=True)
        for label, by_x in series.items():
            x = sorted(by_x)
            (line,) = axes.plot(x, [fmean(by_x[each]) for each in x], label=label)
            if any(len(values) > 1 for values in by_x.values()):
                low, high = [min(by_x[each]) for each in x], [max(by_x[each]) for each in x]
                axes.fill_between(x, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
        if level:
            axes.axhline(level[1], color=INK, linestyle="--", label=level[0])
        elif axes.get_yscale() == "linear":
            axes.set_ylim(bottom=0)
        if legend_rows:
            figure.legend(loc="lower center", ncols=columns)
        out = io.StringIO()
        figure.savefig(
            out, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    svg = out.getvalue().replace(INK, "currentColor")
    # Charts of one page must not share ids.
    prefix = re.sub(r"\W+", "-", title)
    return Markup(re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", svg[svg.index("<svg") :]))
