"""Results for people: tables and closing lines. Programs read the JSON instead."""

from __future__ import annotations

import os
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.filesize import decimal as size
from rich.table import Table

from vqcompress.evaluate.wording import cache_line, calibration_line, duration, protocol_line, quality_cells, shrunk
from vqcompress.storage.recipe_files import AS_STORED
from vqcompress.storage.targets import kind

# Columns of a terminal that hold the names of most models' weights beside their figures.
WIDE = 110


def _table(to: Console, titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows whose first cell is a name. In a narrow terminal titles are folded, but no name and no figure."""
    narrow, widths = to.width < WIDE, [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    padding = (0, 1, 0, 0 if narrow else 1)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=not narrow, padding=padding)
    for number, title in enumerate(titles):
        justify: Any = "right" if number else "left"
        table.add_column(title, justify=justify, overflow="fold", min_width=widths[number])
    for row in rows:
        table.add_row(*row)
    to.print(table, width=max(to.width, sum(widths) + 3 * len(widths)), crop=False)


def _lines(to: Console, width: int, lines: Mapping[str, str | None]) -> None:
    """Print labels, padded to a width, and their texts, leaving out those without a text."""
    for label, text in lines.items():
        if text:
            to.print(f"{label:{width}}{text}")


def _bits(facts: dict[str, Any]) -> str:
    """Bits per weight and the number of quantized weights."""
    if facts["bits_per_weight"] is None:
        return "weights unchanged"
    return f"{facts['bits_per_weight']:.3f} bits per weight over {facts['weights_quantized']:,} weights"


def _memory(facts: dict[str, Any]) -> str:
    """Peak memory of the process and of its GPU, if one was used."""
    device = f", {size(facts['peak_device_bytes'])} on the GPU" if facts["peak_device_bytes"] else ""
    return f"{size(facts['peak_rss_bytes'])}{device}"


def _shape(row: dict[str, Any]) -> str:
    return " × ".join(map(str, row["shape"]))


def _dense(to: Console, left_dense: dict[str, str]) -> None:
    """Print the weights that stay dense and the reasons, a line per kind of weight."""
    for (name, why), count in Counter((kind(name), kind(why)) for name, why in left_dense.items()).items():
        to.print(f"dense   {name}{f' (×{count})' if count > 1 else ''}: {why}")


def quantized(to: Console, report: dict[str, Any], out: str, model: str) -> None:
    """Print the result of `quantize` and the command to type next."""
    before, after = report["source_bytes"], report["artifact_bytes"]
    to.print(f"{out}: {_bits(report)}")
    worst = max(report["targets"], key=lambda row: row["relative_error"], default=None)
    cached = f" --kv-cache {AS_STORED}" if report["kv_cache"] else ""
    command = f"vqcompress eval perplexity {shlex.quote(out)} --text FILE --baseline {shlex.quote(model)}{cached}"
    lines = {
        "size": f"{size(before)} → {size(after)}, {shrunk(before, after)}",
        "rows": report["calibration"] and calibration_line(report["calibration"]),
        "warning": report["uncalibrated"] and f"no calibration token reached {', '.join(report['uncalibrated'])}",
        "error": worst and f"at most {worst['relative_error']:.3g} of a weight's energy ({worst['name']})",
        "cache": report["kv_cache"] and f"{cache_line(report['kv_cache'])}; turn it on by{cached}",
        "aside": "; ".join(f"{layer}: {report['left_dense'][layer]}" for layer in report["draft_layers"]),
        "beside": report["left_out"] and f"not copied: {', '.join(report['left_out'])}",
        "took": f"{duration(report['seconds'])}, peak memory {_memory(report)}",
    }
    _lines(to, 8, lines)
    to.print(f"next    {command}", soft_wrap=True)


def planned(to: Console, plan: dict[str, Any]) -> None:
    """Print a plan: a row per kind of weight, sizes, memory and the weights that stay dense."""
    counts: Counter[tuple[str, str, str, str]] = Counter()
    for row in plan["targets"]:
        bits = "-" if row["bits_per_weight"] is None else f"{row['bits_per_weight']:.3f}"
        counts[kind(row["name"]), _shape(row), row["method"] or "measured", bits] += 1
    rows = [(name, f"{count:,}", *others) for (name, *others), count in counts.items()]
    if rows:
        _table(to, ("weight", "count", "shape", "method", "bits per weight"), rows)
    for name, bits in plan.get("candidates", {}).items():
        to.print(f"choice  {name}: {bits:.3f} bits per weight")
    before, after, tokens = plan["source_bytes"], plan["artifact_bytes"], plan["calibration_tokens"]
    cache = plan["kv_cache"] and f"{cache_line(plan['kv_cache'])}; codebooks of {size(plan['codebook_bytes'])}"
    data = f"{tokens:,} tokens of calibration" if tokens else "no calibration"
    lines = {
        "rotate": "the residual stream and attention values, folded into the weights" if plan["rotation"] else None,
        "total": f"{len(plan['targets'])} targets, {_bits(plan)}",
        "cache": cache,
        "size": f"{size(before)} → about {size(after)}, {shrunk(before, after)}",
        "needs": f"at most about {_memory(plan)} of memory a process; {data}",
    }
    _lines(to, 8, lines)
    _dense(to, plan["left_dense"])


def inspected(to: Console, facts: dict[str, Any]) -> None:
    """Print an artifact: a row per target, the options of its methods and totals.

    In a narrow terminal the beginning that all names share is the title of their column.
    """
    names = [row["name"] for row in facts["targets"]]
    shared = os.path.commonprefix(names) if to.width < WIDE and len(names) > 1 else ""  # noqa: RUF071
    above = shared[: shared.rfind(".") + 1]
    cells = []
    for row in facts["targets"]:
        errors = ["-" if row[key] is None else f"{row[key]:.2e}" for key in ("relative_error", "proxy_error")]
        tokens = "-" if row["tokens"] is None else f"{row['tokens']:,}"
        name, bits = row["name"].removeprefix(above), f"{row['bits_per_weight']:.3f}"
        cells.append((name, row["method"], _shape(row), bits, *errors, tokens))
    if cells:
        titles = above or "weight", "method", "shape", "bits per weight", "relative error", "proxy error", "tokens"
        _table(to, titles, cells)
    settings = Counter((row["method"], tuple(row["options"].items())) for row in facts["targets"])
    for (method, options), count in settings.items():
        to.print(f"{method} ({count} weights): {', '.join(f'{key}={value}' for key, value in options)}")
    for name, tokens in facts["experts"].items():
        low, high, few = min(tokens["routed"]), max(tokens["routed"]), tokens["borrowed"]
        shared = f"; statistics of the whole layer for {', '.join(map(str, few))}" if few else ""
        to.print(f"experts {name}: {len(tokens['routed'])}, of {low:,} to {high:,} tokens each{shared}")
    before = f"{size(facts['source_bytes'])} → " if facts["source_bytes"] else ""
    lines = {
        "cache": facts["kv_cache"] and cache_line(facts["kv_cache"]),
        "aside": ", ".join(f"{layer}: {size(count)}, dense, not run" for layer, count in facts["draft_layers"].items()),
        "total": f"{len(facts['targets'])} targets, {_bits(facts)}",
        "size": f"{before}{size(facts['artifact_bytes'])} in {facts['files']} files",
    }
    _lines(to, 8, lines)


def verified(to: Console, facts: dict[str, Any], artifact: str) -> None:
    """Print what `verify` has checked."""
    counts = f"{facts['files']} files, {facts['targets']} targets, {size(facts['bytes'])}"
    sums = "" if facts["checksums"] else ", no checksums"
    ran = f", ran {' and '.join(facts['ran'])}" if facts["ran"] else ""
    to.print(f"{artifact}: ok ({counts}{sums}{ran}, {duration(facts['seconds'])})")


def perplexity(to: Console, facts: dict[str, Any], text: str) -> None:
    """Print a perplexity and its protocol: figures of different protocols are not comparable."""
    lines = {"perplexity": f"{facts['perplexity']:.4f}   ({facts['bits_per_byte']:.4f} bits per byte)"}
    if "baseline" in facts:
        kl = facts["kl_divergence"]
        lines["baseline"] = f"{facts['baseline']['perplexity']:.4f}   (ratio {facts['ratio']:.4f})"
        lines["KL"] = f"mean {kl['mean']:.5f}, p99 {kl['p99']:.4f}, max {kl['max']:.3f}"
        lines["same top-1"] = f"{100 * facts['top1_agreement']:.2f} %"
    lines["protocol"] = f"{text}: {protocol_line(facts)}, float32"
    lines["took"] = f"{duration(facts['seconds'])}, peak memory {size(facts['peak_rss_bytes'])}"
    _lines(to, 12, lines)


def speed(to: Console, facts: dict[str, Any]) -> None:
    """Print tokens per second, memory and the conditions they were measured under; a row per model."""
    rows = []
    for model in (facts, *([facts["baseline"]] if "baseline" in facts else [])):
        rates = (f"{model[f'{phase}_tokens_per_second']:,.1f}" for phase in ("prefill", "decode"))
        memory = size(model["peak_device_bytes"] or model["peak_rss_bytes"])
        cache = f" (cache {model['kv_cache']})" if model["kv_cache"] else ""
        first = f"{1000 * model['time_to_first_token']:.1f} ms"
        rows.append((f"{model['model']}{cache}", *rates, first, memory, size(model["cache_bytes"])))
    _table(to, ("model", "prefill tokens/s", "decode tokens/s", "first token", "peak memory", "cache"), rows)
    sizes = f"{facts['prompt_tokens']} prompt tokens, {facts['new_tokens']} new, batch {facts['batch']}"
    to.print(f"measured  {sizes}, on {facts['device']} in {facts['dtype']}")


def exported(to: Console, facts: dict[str, Any], out: str) -> None:
    """Print the files of an export, the weights that it decoded, and the result of --verify."""
    to.print(f"{out}: {facts['format']}, {facts['files']} files, {size(facts['bytes'])}, {duration(facts['seconds'])}")
    _dense(to, facts["left_dense"])
    if "verified" in facts:
        read = facts["verified"]
        loss = f"mean KL divergence {read['mean_kl_divergence']:.2g} from the artifact (at most {read['bound']:.2g})"
        over = f"{read['tokens']} random tokens, activations {read['activations']}"
        to.print(f"verified: loads in {read['reader']}; {loss} over {over}")
    to.print(f"next    {facts['next']}", soft_wrap=True)


def examined(to: Console, facts: dict[str, Any]) -> None:
    """Print the checks of `doctor`, the norms that smoothing folds into, and the weights that stay dense."""
    to.print(f"{facts['architecture']}: {'ok' if facts['ok'] else 'FAIL'}")
    for check in facts["checks"]:
        to.print(f"{'ok  ' if check['ok'] else 'FAIL'}  {check['name']}: {check['detail']}")
    to.print(f"{facts['targets']} targets hold {100 * facts['coverage']:.1f} % of the weights in blocks")
    # All experts of a mixture share a line.
    kinds = (([kind(path) for path in f["input"].split(", ")], kind(f["producer"] or "")) for f in facts["folds"])
    for reads, producer in dict.fromkeys((", ".join(dict.fromkeys(paths)), producer) for paths, producer in kinds):
        to.print(f"smooth  {reads}: {f'folds into {producer}' if producer else 'at run time'}")
    _dense(to, facts["left_dense"])


def compared(to: Console, found: dict[str, Any]) -> None:
    """Print a row per model, from the most bits to the fewest, and the protocol."""
    titles = "model", "bits", "size", "perplexity", "ratio", "mean KL", "top-1"
    cells = [(f"{row['bits_per_weight']:.3f}", size(row["bytes"]), *quality_cells(row)) for row in found["models"]]
    _table(to, titles, [(row["model"], *rest) for row, rest in zip(found["models"], cells, strict=True)])
    lines = {"protocol": f"{found['text']}: {protocol_line(found['protocol'])}, float32"}
    _lines(to, 12, {**lines, "took": duration(found["seconds"])})
