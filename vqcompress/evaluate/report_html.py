"""Pages for people: one file each, that asks for nothing from elsewhere, legible on a phone, in light and in dark.

`report_page` is report.html, made of the report alone; `comparison_page` is what `compare --html` writes.
"""

from __future__ import annotations

import math
import shlex
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from rich.filesize import decimal as size

from vqcompress.evaluate.read_report import calibration_line, duration, mean, shrunk
from vqcompress.evaluate.svg import (
    BOTTOM,
    LEFT,
    LEVEL_NAMES,
    RIGHT,
    TOP,
    Axis,
    Point,
    bars,
    escape,
    mark,
    over,
    short,
    strip,
)
from vqcompress.storage.targets import kind

STYLE = Path(__file__).parent / "page.css"
# Nothing is fetched and no script runs, whatever a name in a report says.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
PAGE = """<!DOCTYPE html>
<html lang="en" xmlns="http://www.w3.org/1999/xhtml"><head><meta charset="utf-8"/>
<meta http-equiv="Content-Security-Policy" content="{policy}"/>
<meta name="viewport" content="width=device-width, initial-scale=1"/><link rel="icon" href="data:,"/>
<title>{title}</title><style>
{style}</style></head><body>
<main><h1>{title}</h1>{lead}{sections}</main>
</body></html>
"""
LOAD = """import vqcompress  # registers the format with transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({here!r})
tokenizer = AutoTokenizer.from_pretrained({here!r})
inputs = tokenizer("The first thing to know is", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))"""
# An axis is logarithmic from this ratio of its largest value to its smallest on.
WIDE = 30
Rows = list[dict[str, Any]]


def page(title: str, lead: str, sections: Mapping[str, str]) -> str:
    """A page of sections, by their headings; those without content are left out."""
    body = "".join(
        f'<section id="{name.split()[0].lower()}"><h2>{escape(name)}</h2>{content}</section>\n'
        for name, content in sections.items()
        if content
    )
    style = STYLE.read_text(encoding="utf-8")
    return PAGE.format(policy=POLICY, style=style, title=escape(title), lead=lead, sections=body)


def table(head: Sequence[str], rows: Iterable[Sequence[object]], words: Sequence[int] = (0,)) -> str:
    """A table that scrolls by itself if it is wide. words: the columns that are not numbers."""

    def cell(i: int, value: object, tag: str) -> str:
        kind_of = "n" if i not in words else "long" if len(str(value)) > 40 else "word"
        return f'<{tag} class="{kind_of}">{escape(value)}</{tag}>'

    def line(cells: Sequence[object], tag: str) -> str:
        return f"<tr>{''.join(cell(i, value, tag) for i, value in enumerate(cells))}</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f'<div class="wide" tabindex="0"><table><thead>{line(head, "th")}</thead><tbody>{body}</tbody></table></div>'


def folded(words: str, content: str) -> str:
    """Content that is shown when asked for."""
    return f"<details><summary>{escape(words)}</summary>{content}</details>"


def figure(heading: str, plot: str, names: Iterable[str] = (), shades: bool = False) -> str:
    """A picture with its heading and the names of its series, or of the shades of a strip."""
    if shades:
        box = '<svg class="key" viewBox="0 0 10 10" aria-hidden="true"><rect class="h{}" width="10" height="10"/></svg>'
        keys = [box.format(n) + escape(name) for n, name in enumerate(LEVEL_NAMES)]
    else:
        keys = [mark(n) + escape(name) for n, name in enumerate(names)]
    legend = f"<figcaption><ul>{''.join(f'<li>{key}</li>' for key in keys)}</ul></figcaption>" if keys else ""
    return f"<figure><h3>{escape(heading)}</h3>{plot}{legend}</figure>"


def side_by_side(figures: Iterable[str]) -> str:
    """As many figures in a row as there is room for."""
    return f'<div class="plots">{"".join(figures)}</div>'


def paragraph(text: str) -> str:
    """Words."""
    return f"<p>{escape(text)}</p>"


def names_of(report: dict[str, Any]) -> tuple[str, str]:
    """What to call model and recipe: of a path the last part only, since the others mean nothing to others."""
    return report["base_model"] or Path(report["model"]).name, Path(report["recipe"]).name


def _bits(report: dict[str, Any]) -> str:
    return "-" if report["bits_per_weight"] is None else f"{report['bits_per_weight']:.3f}"


def report_page(report: dict[str, Any], here: str) -> str:
    """report.html for an artifact's report. here: the name of its directory."""
    blocks = {name: i for i, name in enumerate(n for n in report["blocks"] if not n.startswith("("))}
    base, recipe = names_of(report)
    lead = f"<p><code>{escape(base)}</code> compressed by vqcompress {escape(report['versions']['vqcompress'])} "
    lead += f"with the recipe <code>{escape(recipe)}</code>.</p>{_tiles(report)}"
    snippet = f"<pre><code>{escape(LOAD.format(here=here))}</code></pre>"
    sections = {
        "Quality": _quality(report),
        "Load it": snippet + f"<pre><code>{escape(shell(report, here))}</code></pre>",
        "Error of each weight": _errors(report, blocks),
        "Outliers before and after smoothing": _outliers(report, blocks),
        "Codebooks": _codebooks(report, blocks),
        "Experts": _experts(report, blocks),
        "Time and memory": _costs(report, blocks),
        "Settings": _settings(report),
        "Dense weights that are left": _left(report),
        "Inputs and versions": _inputs(report),
    }
    return page(f"{Path(base).name} · {recipe}", lead, sections)


def shell(report: dict[str, Any], here: str) -> str:
    """What to type to use an artifact, a command a line. here: the name of its directory."""
    name, original = shlex.quote(here), shlex.quote(report["model"] if report["base_model"] else names_of(report)[0])
    return f"""vqcompress generate {name} --prompt "The first thing to know is"
vqcompress eval perplexity {name} --text FILE --baseline {original}
vqcompress verify {name}"""


def _tiles(report: dict[str, Any]) -> str:
    before, after = report["source_bytes"], report["artifact_bytes"]
    facts = {
        "size": (f"{size(before)} → {size(after)}", shrunk(before, after)),
        "bits per weight": (_bits(report), "of those compressed, all that is stored counted"),
        "weights compressed": (f"{report['weights_quantized']:,}", f"in {len(report['targets']):,} matrices"),
        "took": (duration(report["seconds"]), f"peak memory {size(report['peak_rss_bytes'])}"),
    }
    if cache := report["kv_cache"]:
        facts["keys and values"] = (f"{cache['bits']} bits", f"{cache['codebook']}, if --kv-cache is given")
    for found in sorted(report.get("evaluations", []), key=lambda each: bool(each["kv_cache"]))[:1]:
        against = f"{found['ratio']:.4f} times the original's" if "ratio" in found else str(found["text"])
        against += f", cache {found['kv_cache']}" if found["kv_cache"] else ""
        facts["perplexity"] = (f"{found['perplexity']:.3f}", against)
    cells = (
        f"<div><dt>{escape(k)}</dt><dd>{escape(v)}<span>{escape(s)}</span></dd></div>" for k, (v, s) in facts.items()
    )
    return f'<dl class="tiles">{"".join(cells)}</dl>'


def protocol(found: dict[str, Any]) -> str:
    """How a perplexity was measured, in words: figures of unequal protocols do not compare."""
    cache = f", cache {found['kv_cache']}" if found["kv_cache"] else ""
    cut = f"{found['windows']} windows × {found['seqlen']} tokens, stride {found['stride']}"
    return f"{cut}, {'BOS' if found['bos'] else 'no BOS'}{cache}, {found['tokens']:,} tokens predicted"


QUALITY = ("perplexity", "ratio", "mean KL", "same top-1")


def quality(found: dict[str, Any]) -> list[str]:
    """Perplexity, ratio to the original's, mean KL and agreement as cells of a table; a dash for the unknown."""
    ratio, kl, same = (found.get(key) for key in ("ratio", "kl_divergence", "top1_agreement"))
    cells = [f"{found['perplexity']:.3f}", "-" if ratio is None else f"{ratio:.4f}"]
    return [*cells, "-" if kl is None else f"{kl['mean']:.5f}", "-" if same is None else f"{100 * same:.2f} %"]


def evaluations(found: Rows) -> list[list[str]]:
    """A table of what `eval perplexity --report` has added, its head first; empty if nothing."""
    originals = [f"{e['baseline']['perplexity']:.3f}" if "baseline" in e else "-" for e in found]
    rows = [[e["text"], *quality(e), original, protocol(e)] for e, original in zip(found, originals, strict=True)]
    return [["text", *QUALITY, "original", "protocol"], *rows] if rows else []


def _quality(report: dict[str, Any]) -> str:
    rows = evaluations(report.get("evaluations", []))
    note = "Perplexities compare only under one protocol. KL divergences (nat) are from the original's predictions."
    return table(rows[0], rows[1:], words=(0, 6)) + paragraph(note) if rows else ""


def _point(block: int, values: list[float], middle: float) -> Point:
    """What one block has: the mean and the range."""
    spread = f", {short(min(values))} to {short(max(values))} over {len(values)}" if len(values) > 1 else ""
    return Point(block, middle, min(values), max(values), f"block {block}: {short(middle)}{spread}")


def _aggregated(rows: Rows, blocks: dict[str, int], key: str) -> dict[str, list[Point]]:
    """Kind of weight → a point for each block where the figure is known; experts are of one kind."""
    found: dict[str, dict[int, Rows]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        block, local = _split(row["name"], blocks)
        found[local][block].append(row)
    series = {
        local: [
            _point(n, [row[key] for row in same], middle)
            for n, same in sorted(by_block.items())
            if (middle := mean(same, key)) is not None
        ]
        for local, by_block in found.items()
    }
    return {local: each for local, each in series.items() if each}


def _split(name: str, blocks: dict[str, int]) -> tuple[int, str]:
    """The number of the block that holds what has this name, and what kind of thing it is there."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        if (head := ".".join(parts[:end])) in blocks:
            return blocks[head], _local(".".join(parts[end:]))
    return 0, kind(name)


def _local(path: str) -> str:
    """The kind of what has this path in a block; numbers at its ends are found too."""
    return kind(f".{path}.").strip(".")


def _plots(what: str, series: dict[str, list[Point]]) -> str:
    """Series over blocks, those of one module in one picture, all with one scale; and a table of the numbers."""
    values = [v for points_of in series.values() for p in points_of for v in (p.y, p.low, p.high) if v is not None]
    positive = [v for v in values if v > 0]
    log = bool(positive) and max(positive) > WIDE * min(positive)
    y = Axis.around(values, BOTTOM, TOP, log, zero=not log)
    modules: dict[str, dict[str, list[Point]]] = defaultdict(dict)
    for local, points_of in series.items():
        modules[local.rpartition(".")[0]][local.rpartition(".")[2]] = points_of
    figures = []
    for module, group in modules.items():
        heading = f"{module or 'block'}: {what}"
        about = f"{what} of {', '.join(group)} by block, {short(min(values))} to {short(max(values))} in all"
        figures.append(figure(heading, over(heading, about, group, "block", what, y), group))
    numbers = sorted({int(p.x) for points_of in series.values() for p in points_of})
    cells = {local: {int(p.x): short(p.y) for p in points_of} for local, points_of in series.items()}
    rows = [[n, *(cells[local].get(n, "-") for local in series)] for n in numbers]
    return side_by_side(figures) + folded(f"{what} in numbers", table(["block", *series], rows))


def _errors(report: dict[str, Any], blocks: dict[str, int]) -> str:
    rows: Rows = report["targets"]
    if not rows:
        return ""
    kinds: dict[str, Rows] = defaultdict(list)
    for row in rows:
        kinds[_split(row["name"], blocks)[1]].append(row)
    lines = []
    for local, same in kinds.items():
        worst = max(same, key=lambda row: row["relative_error"])
        errors = mean(same, "relative_error"), mean(same, "proxy_error"), worst["relative_error"]
        shown = f"{mean(same, 'bits_per_weight'):.3f}", *("-" if error is None else short(error) for error in errors)
        methods, count = dict.fromkeys(row["method"] for row in same), sum(math.prod(row["shape"]) for row in same)
        lines.append([local, ", ".join(methods), f"{len(same):,}", f"{count:,}", *shown, worst["name"]])
    note = (
        "The relative error is the share of a weight's energy that is lost; the proxy error, known after calibration, "
        "the share of its output's energy on those rows. With experts a point is their mean, a line their range."
    )
    head = ["weight", "method", "count", "weights", "bits", "relative error", "proxy error", "worst", "in"]
    content = paragraph(note) + _plots("relative error", _aggregated(rows, blocks, "relative_error"))
    if proxy := _aggregated(rows, blocks, "proxy_error"):
        content += _plots("proxy error", proxy)
    if len(report["settings"]) > 1:
        content += _plots("bits per weight", _aggregated(rows, blocks, "bits_per_weight"))
    return content + table(head, lines, words=(0, 1, 8))


def _outliers(report: dict[str, Any], blocks: dict[str, int]) -> str:
    """Per input that was smoothed, how far its largest channel stands out; targets of one input have one note."""
    inputs: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    for row in report["targets"]:
        note = row["smoothing"]
        if note and None not in note.get("outlier", [None]):
            block, local = _split(row["name"], blocks)
            place = "run time" if note["folded_into"] is None else f"folded into {_local(note['folded_into'])}"
            inputs[block, place, note["alpha"], *note["outlier"]].append(local)
    found: dict[tuple[str, str], dict[int, list[Any]]] = defaultdict(lambda: defaultdict(list))
    for (block, place, *facts), paths in inputs.items():
        found[_together(dict.fromkeys(paths)), place][block].append(facts)
    if not found:
        return ""
    figures, lines = [], []
    y = Axis.around((v for note in inputs for v in note[3:]), BOTTOM, TOP, log=True)
    for (readers, place), by_block in found.items():
        series = {
            when: [_point(n, v, fmean(v)) for n, same in sorted(by_block.items()) if (v := [each[i] for each in same])]
            for i, when in ((1, "before"), (2, "after"))
        }
        about = f"largest channel over median, before and after smoothing, by block: {short(y.low)} to {short(y.high)}"
        plot = over(f"Outliers at {readers}", about, series, "block", "largest ÷ median", y)
        figures.append(figure(f"into {readers}", plot, series))
        every = [each for same in by_block.values() for each in same]
        alphas = [each[0] for each in every if each[0] is not None]
        strength = f"{min(alphas):g} to {max(alphas):g}" if alphas else "-"
        lines.append([readers, place, len(every), strength, *(short(fmean(e[i] for e in every)) for i in (1, 2))])
    note = "The largest magnitude of an input's largest channel, divided by that of its median channel."
    head = ["read by", "factors", "inputs", "strength α", "mean before", "mean after"]
    return paragraph(note) + side_by_side(figures) + table(head, lines, words=(0, 1))


def _together(paths: Iterable[str]) -> str:
    """Several paths with what they begin with said once, if it is the same: self_attn: q_proj, k_proj."""
    heads, leaves = zip(*((head, leaf) for head, _, leaf in (path.rpartition(".") for path in paths)), strict=True)
    return f"{heads[0]}: {', '.join(leaves)}" if len(set(heads)) == 1 and heads[0] else ", ".join(paths)


def _codebooks(report: dict[str, Any], blocks: dict[str, int]) -> str:
    books: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for place, book in report["codebooks"].items():
        books[kind(place.replace(":", ".:")).replace(".:", ":")][place] = book
    figures, lines = [], []
    for name, same in books.items():
        strips: dict[str, list[float]] = {}
        for place, book in same.items():
            block = _split(place.partition(":")[0], blocks)[0]
            for stage, counts in enumerate(book.get("counts", [])):
                strips[f"{block}" if len(book["counts"]) == 1 else f"{block}.{stage}"] = counts
        if strips:
            about = f"uses of the entries of {len(strips)} codebooks, a row for each; shades compare with its mean"
            plot = strip(f"Codebook usage, {name}", about, strips, "entries, in the order in which they are stored")
            figures.append(figure(name, plot, shades=True))
        hottest = (f"{100 * sum(b['hottest'][n] for b in same.values()) / len(same):.0f} %" for n in range(3))
        unused = sum(count == 0 for counts in strips.values() for count in counts) if strips else "-"
        lines.append([name, len(same), max(b["entries"] for b in same.values()), *hottest, unused])
    note = "How often the stored codes use each entry: a row for each block (and stage), a column for each entry."
    head = ["codebook", "count", "entries", "first 1/8", "first 1/4", "first 1/2", "never used"]
    return paragraph(note) + side_by_side(figures) + table(head, lines) if lines else ""


def _experts(report: dict[str, Any], blocks: dict[str, int]) -> str:
    content = ""
    if mixtures := report["experts"]:
        rows = {str(_split(place, blocks)[0]): tokens["routed"] for place, tokens in mixtures.items()}
        about = "tokens that came to each expert, a row for each block; shades compare with the mean of the row"
        plot = strip("Tokens per expert", about, rows, "expert")
        lines = [
            [place, len(n), *(f"{f(n):,.0f}" for f in (min, median, max)), n.count(0), len(t["borrowed"])]
            for place, t in mixtures.items()
            if (n := t["routed"])
        ]
        head = ["mixture", "experts", "fewest tokens", "median", "most", "with none", "borrowed"]
        note = (
            "Tokens of the calibration that came to each expert, a row for each block. Borrowed: experts that saw too "
            "few, and were encoded with the statistics of all experts of their layer."
        )
        figures = [figure("tokens per expert", plot, shades=True)]
        content = paragraph(note) + side_by_side(figures) + folded("tokens in numbers", table(head, lines))
    if names := report["uncalibrated"]:
        more = f" and {len(names) - 20:,} more" if len(names) > 20 else ""
        said = f"No token of the calibration came to {', '.join(names[:20])}{more}."
        content += f'<p class="warning">{escape(said)}</p>'
    return content


def _costs(report: dict[str, Any], blocks: dict[str, int]) -> str:
    seconds = [Point(n, report["blocks"][b], note=f"block {n}: {report['blocks'][b]:.1f} s") for b, n in blocks.items()]
    plots = [figure("seconds per block", bars("Seconds per block", "time of each block", seconds, "block", "seconds"))]
    rows: list[list[object]] = [[n, f"{report['blocks'][b]:.2f}"] for b, n in blocks.items()]
    head = ["block", "seconds"]
    for which, where in enumerate(("memory", "GPU memory")):
        peaks = {blocks[b]: each[which] for b, each in report.get("peaks", {}).items()}
        if not any(peaks.values()):
            continue
        unit, name = (1e9, "GB") if max(peaks.values()) >= 1e9 else (1e6, "MB")
        values = [Point(n, peak / unit, note=f"block {n}: {size(peak)}") for n, peak in sorted(peaks.items())]
        title = f"peak {where} by the end of each block"
        plots.append(figure(title, bars(title.capitalize(), title, values, "block", name, 1 + which)))
        head.append(f"peak {where}")
        rows = [[*row, size(peaks.get(n, 0))] for n, row in enumerate(rows)]
    note = "Peaks are those of the whole process until the end of the block; a run that was continued starts anew."
    # What is no block is in parentheses.
    others = ", ".join(f"{b.strip('()')} {duration(s)}" for b, s in report["blocks"].items() if b not in blocks)
    note = f"Besides: {others}. {note}" if others else note
    content = side_by_side(plots) + paragraph(note)
    return content + folded("time and memory in numbers", table(head, rows)) if blocks else ""


def _settings(report: dict[str, Any]) -> str:
    bits, cache = report["target_bits"], report["kv_cache"]
    facts = {
        "recipe": names_of(report)[1],
        "seed": report["seed"],
        "calibration": calibration_line(report["calibration"]),
        "rotation": report["rotation"],
        "bits asked for": bits,
        "keys and values": ", ".join(f"{key} {value}" for key, value in cache.items()) if cache else None,
    }
    chosen = [(s["setting"], f"{s['targets']:,}", f"{s['weights']:,}") for s in report["settings"]]
    content = table(["what", "value"], [(k, v) for k, v in facts.items() if v is not None], words=(0, 1))
    return content + (table(["setting", "matrices", "weights"], chosen) if chosen else "")


def _left(report: dict[str, Any]) -> str:
    left = report["left_dense"].items()
    note = "Norms and biases, which are small, stay too. In a name, * stands for any number."
    return table(["weight", "why"], left, words=(0, 1)) + paragraph(note) if left else ""


def _inputs(report: dict[str, Any]) -> str:
    note = "Two runs with the same inputs and versions end in the same bytes."
    inputs = [(name, value) for name, value in report["inputs"].items() if value != "None"]
    prints = folded("fingerprints", table(["input", "fingerprint"], inputs, words=(0, 1)))
    return table(["package", "version"], report["versions"].items(), words=(0, 1)) + paragraph(note) + prints


def comparison_page(found: dict[str, Any]) -> str:
    """What `compare --html` writes: pictures of what each model costs and loses, and the table."""
    models = found["models"]
    names = [Path(row["model"]).name for row in models]
    names = names if len(set(names)) == len(names) else [row["model"] for row in models]
    losses: dict[str, Callable[[dict[str, Any]], float | None]] = {
        "perplexity": lambda row: row["perplexity"],
        "mean KL divergence": lambda row: row["kl_divergence"] and row["kl_divergence"]["mean"],
        "same top-1, %": lambda row: row["top1_agreement"] and 100 * row["top1_agreement"],
    }
    costs: dict[str, Callable[[dict[str, Any]], float]] = {
        "bits per weight": lambda row: row["bits_per_weight"],
        "MB": lambda row: row["bytes"] / 1e6,
    }
    figures = []
    for cost, of in costs.items():
        for loss, lost in losses.items():
            notes = {n: (of(row), y) for n, row in zip(names, models, strict=True) if (y := lost(row)) is not None}
            named = {n: [Point(a, b, note=f"{short(a)}, {short(b)}")] for n, (a, b) in notes.items()}
            if named:
                title, found_at = f"{loss} over {cost}", [p for (p,) in named.values()]
                listed = "; ".join(f"{name}: {p.note}" for name, (p,) in named.items())
                across = Axis.around((p.x for p in found_at), LEFT + 8, RIGHT - 8, zero=True)
                up = Axis.around((p.y for p in found_at), BOTTOM, TOP)
                figures.append(figure(title, over(title, listed, named, cost, loss, up, across), named))
    rows = [[row["model"], f"{row['bits_per_weight']:.3f}", size(row["bytes"]), *quality(row)] for row in models]
    head = ["model", "bits per weight", "size", *QUALITY]
    against = f" against <code>{escape(found['baseline'])}</code>" if found["baseline"] else ""
    lead = f"<p><code>{escape(found['text'])}</code>{against}: {escape(protocol(found['protocol']))}.</p>"
    return page("Models compared", lead, {"Table": table(head, rows), "Pictures": side_by_side(figures)})
