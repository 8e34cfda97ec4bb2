"""Pictures as SVG text: points joined by lines, bars, strips of shades.

Colours are classes of the page's style sheet. A picture is 360 wide, like the screen of a phone, so that its words need
not be made smaller there; a wider page shows several in a row. Each has a title and a description, for screen readers.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 360, 210
LEFT, RIGHT, TOP, BOTTOM = 54, 350, 10, 172
COLOURS = 8
# Relative to their middle; told apart without colours too.
SHAPES = ("m-3 0a3 3 0 1 0 6 0a3 3 0 1 0-6 0z", "m-3-3h6v6h-6z", "m0-4l4 4l-4 4l-4-4z", "m0-4l4 7h-8z")
# Of a strip, darker from one to the next: a value is compared with the mean of its row.
LEVELS = (0.0, 1 / 8, 1 / 4, 1 / 2, 1.0, 2.0, 4.0)
LEVEL_NAMES = ("none", "under 1/8 of the mean", "1/8 to 1/4", "1/4 to 1/2", "1/2 to 1", "1 to 2", "2 to 4", "over 4")
MOST_COLUMNS = 256


@dataclass(frozen=True)
class Point:
    """A value over a place on the x axis. low, high: the range that it is the mean of. note: what it says of itself."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    note: str = ""


Series = Mapping[str, Sequence[Point]]


@dataclass(frozen=True)
class Axis:
    """From values low…high to places start…end, evenly or by logarithms."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    @classmethod
    def around(cls, values: Iterable[float], start: float, end: float, log: bool = False, zero: bool = False) -> Axis:
        """An axis that holds the values, with some room. zero: from 0 on."""
        found = [v for v in values if math.isfinite(v) and (v > 0 or not log)]
        low, high = (min(found), max(found)) if found else (1.0, 1.0)
        if log:
            return cls(low / 1.25, high * 1.25, start, end, True)
        low = min(0.0, low) if zero else low
        room = (high - low or abs(high) or 1.0) * 0.06
        return cls(low if zero else low - room, high + room, start, end)

    def at(self, value: float) -> float:
        """The place of a value; of one outside the nearer end."""
        value = min(max(value, self.low), self.high)
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return round(self.start + (value - low) / (high - low) * (self.end - self.start), 1)

    def ticks(self, count: int = 5) -> list[float]:
        """About so many round values."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            steps = (1,) if self.high > 200 * self.low else (1, 2, 5)
            found = [s * 10.0**d for d in decades[:: max(1, len(decades) // count)] for s in steps]
        else:
            rough = (self.high - self.low) / count
            unit = 10.0 ** math.floor(math.log10(rough))
            step = next(s * unit for s in (1, 2, 5, 10) if s * unit >= rough)
            found = [n * step for n in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]
        return [v for v in found if self.low <= v <= self.high]


def escape(value: object) -> str:
    """A value as the text of a page: no tag, no quote, and no character that XML may not hold."""
    return html.escape("".join(c if c.isprintable() or c in "\n\t" else "�" for c in str(value)))


def short(value: float) -> str:
    """A number for an axis or a cell, in three digits: 0.0123, 1.2e-5, 12,300."""
    if value == 0 or not math.isfinite(value) or 0.001 <= abs(value) < 100_000:
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    digits, exponent = f"{value:.2e}".split("e")
    return f"{float(digits):g}e{int(exponent)}"


def mark(series: int) -> str:
    """The sign of a series beside its name."""
    shape = SHAPES[series % len(SHAPES)]
    sign = f'<path class="s{series % COLOURS}" d="M5 5{shape}"/>'
    return f'<svg class="key" viewBox="0 0 10 10" aria-hidden="true">{sign}</svg>'


def picture(title: str, about: str, body: str, height: float = HEIGHT) -> str:
    """An SVG with its title and description."""
    words = f"<title>{escape(title)}</title><desc>{escape(about)}</desc>"
    return f'<svg class="plot" role="img" viewBox="0 0 {WIDTH} {height:g}">{words}{body}</svg>'


def _frame(x: Axis, y: Axis, x_label: str, y_label: str, whole: bool = False) -> str:
    """Lines, ticks and names of the axes. whole: x counts things."""
    parts = []
    for value in y.ticks():
        at = y.at(value)
        parts.append(f'<path class="grid" d="M{LEFT} {at}H{RIGHT}"/>')
        parts.append(f'<text class="end" x="{LEFT - 5}" y="{at + 4:g}">{short(value)}</text>')
    for value in x.ticks(12 if whole else 5):
        if not whole or value == int(value):
            parts.append(f'<text class="mid" x="{x.at(value)}" y="{BOTTOM + 15}">{short(value)}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {BOTTOM}H{RIGHT}"/>')
    parts.append(f'<text class="mid" x="{(LEFT + RIGHT) / 2:g}" y="{BOTTOM + 32}">{escape(x_label)}</text>')
    parts.append(
        f'<text class="mid" transform="translate(11 {(TOP + BOTTOM) / 2:g}) rotate(-90)">{escape(y_label)}</text>'
    )
    return "".join(parts)


def over(title: str, about: str, series: Series, x_label: str, y_label: str, y: Axis, x: Axis | None = None) -> str:
    """Series of points, joined by lines, with their ranges, finite values only. x: its ticks need not be whole."""
    whole = x is None
    x = x or Axis.around((p.x for points in series.values() for p in points), LEFT + 8, RIGHT - 6)
    body = [_frame(x, y, x_label, y_label, whole)]
    for number, (name, every) in enumerate(series.items()):
        points = [p for p in every if math.isfinite(p.y)]
        shape, colour = SHAPES[number % len(SHAPES)], f"s{number % COLOURS}"
        places = [(x.at(p.x), y.at(p.y)) for p in points]
        body.append(f'<path class="line {colour}" d="M{"L".join(f"{a} {b}" for a, b in places)}"/>')
        ranges = "".join(
            f"M{x.at(p.x)} {y.at(p.low)}V{y.at(p.high)}"
            for p in points
            if p.low is not None and p.high is not None and p.low < p.high
        )
        body.append(f'<path class="range {colour}" d="{ranges}"/>' if ranges else "")
        for point, (a, b) in zip(points, places, strict=True):
            note = f"<title>{escape(f'{name}, {point.note}')}</title>"
            body.append(f'<path class="{colour}" d="M{a} {b}{shape}">{note}</path>')
    return picture(title, about, "".join(body))


def bars(title: str, about: str, values: Sequence[Point], x_label: str, y_label: str, colour: int = 0) -> str:
    """A bar from 0 for each value over a whole number."""
    x = Axis.around((p.x for p in values), LEFT + 12, RIGHT - 8)
    y = Axis.around((p.y for p in values), BOTTOM, TOP, zero=True)
    width = max(1.0, min(24.0, (RIGHT - LEFT - 24) / max(len(values), 1) * 0.8))
    body = [_frame(x, y, x_label, y_label, whole=True)]
    for p in values:
        box = f'x="{x.at(p.x) - width / 2:.1f}" y="{y.at(p.y)}" width="{width:.1f}" height="{BOTTOM - y.at(p.y):.1f}"'
        body.append(f'<rect class="s{colour}" {box}><title>{escape(p.note)}</title></rect>')
    return picture(title, about, "".join(body))


def level(value: float, mean: float) -> int:
    """The number of a shade: 0 for nothing, then by how the value compares with the mean."""
    return 0 if value <= 0 else sum(value > bound * mean for bound in LEVELS)


def strip(title: str, about: str, rows: Mapping[str, Sequence[float]], x_label: str) -> str:
    """A row of shades for each list of counts; more than 256 neighbours are put together. Rows may differ in length.

    Neighbours of one shade are one stroke, so thousands of cells are a few kilobytes.
    """
    tall = max(3.0, min(16.0, 400 / max(len(rows), 1)))
    most = max((len(counts) for counts in rows.values()), default=1)
    together = -(-most // MOST_COLUMNS)
    wide = (RIGHT - LEFT) / -(-most // together)
    strokes: list[list[str]] = [[] for _ in LEVEL_NAMES]
    body = []
    for r, (name, counts) in enumerate(rows.items()):
        sums = [sum(counts[i : i + together]) for i in range(0, len(counts), together)]
        mean, middle, start = sum(sums) / max(len(sums), 1), TOP + (r + 0.5) * tall, 0
        shades = [level(value, mean) for value in sums]
        for i in range(1, len(shades) + 1):
            if i == len(shades) or shades[i] != shades[start]:
                strokes[shades[start]].append(f"M{LEFT + start * wide:.1f} {middle:.1f}h{(i - start) * wide:.1f}")
                start = i
        if r % max(1, math.ceil(12 / tall)) == 0:
            body.append(f'<text class="end" x="{LEFT - 5}" y="{middle + 4:.1f}">{escape(name)}</text>')
    bottom = TOP + len(rows) * tall
    body += [
        f'<path class="h{n}" stroke-width="{tall * 0.9:.2f}" d="{"".join(d)}"/>' for n, d in enumerate(strokes) if d
    ]
    body.append(f'<text class="mid" x="{(LEFT + RIGHT) / 2}" y="{bottom + 15:.1f}">{escape(x_label)}</text>')
    return picture(title, about, "".join(body), bottom + 22)
