"""Results for people: tables and closing lines. Programs read the JSON instead."""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.filesize import decimal as size
from rich.table import Table

from vqcompress.evaluate.wording import cache_line, duration, protocol_line, quality_cells, shrunk
from vqcompress.storage.recipe_files import AS_STORED
from vqcompress.storage.targets import kind


def _table(to: Console, titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows whose first cell is a name; in a narrow terminal names are folded."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, title in enumerate(titles):
        table.add_column(title, justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    to.print(table)


def _error(value: float | None) -> str:
    return "-" if value is None else f"{value:.2e}"


def _experts(to: Console, facts: dict[str, Any], each: bool) -> None:
    """Tokens per expert, for each mixture or for all together, and the weights that no calibration token reached."""
    mixtures = facts["experts"] if each else {"total": _together(facts["experts"])} if facts["experts"] else {}
    for place, tokens in mixtures.items():
        text = f"{len(tokens['routed'])} experts, {min(tokens['routed']):,} to {max(tokens['routed']):,} tokens each"
        if tokens["counted"] != tokens["routed"]:
            text += f", counted {min(tokens['counted']):,} to {max(tokens['counted']):,}"
        if tokens["borrowed"]:
            which = ", ".join(map(str, tokens["borrowed"])) if each else f"{len(tokens['borrowed'])} of them"
            text += f"; too few tokens, so statistics of the whole layer are used: {which}"
        to.print(f"experts {place}: {text}")
    if names := facts["uncalibrated"]:
        to.print(f"warning no calibration token reached {', '.join(names)}")


def _together(mixtures: dict[str, dict[str, list[int]]]) -> dict[str, list[int]]:
    return {key: [n for tokens in mixtures.values() for n in tokens[key]] for key in ("routed", "counted", "borrowed")}


def quantized(to: Console, report: dict[str, Any], out: str, model: str, texts: Sequence[str] | None) -> None:
    """The result of `quantize` and the command to type next. texts: the --calibration options."""
    before, after = report["source_bytes"], report["artifact_bytes"]
    device = f", {size(report['peak_device_bytes'])} on the GPU" if report["peak_device_bytes"] else ""
    if report["target_bits"] is not None:
        rows = [(row["setting"], f"{row['targets']:,}", f"{row['weights']:,}") for row in report["settings"]]
        _table(to, ("setting", "targets", "weights"), rows)
    to.print(f"{out}: {_bits(report)}")
    to.print(f"size    {size(before)} → {size(after)}, {shrunk(before, after)}")
    _experts(to, report, each=False)
    if texts and report["calibration"] is None:
        to.print(f"note    {report['recipe']} needs no data, so --calibration was ignored")
    if worst := max(report["targets"], key=lambda row: row["relative_error"], default=None):
        to.print(f"error   at most {worst['relative_error']:.3g} of a weight's energy ({worst['name']})")
    if report["kv_cache"]:
        to.print(f"cache   {cache_line(report['kv_cache'])}; turn it on by --kv-cache {AS_STORED}")
    before = report["seconds_before"]
    run = f", {duration(report['seconds'] - before)} of it in this run" if before else ""
    to.print(f"took    {duration(report['seconds'])}{run}, peak memory {size(report['peak_rss_bytes'])}{device}")
    command = f"vqcompress eval perplexity {shlex.quote(out)} --text FILE --baseline {shlex.quote(model)}"
    if report["kv_cache"]:
        command += f" --kv-cache {AS_STORED}"
    to.print(f"next    {command}", soft_wrap=True)


def _bits(facts: dict[str, Any]) -> str:
    """Bits per weight and the number of quantized weights."""
    if facts["bits_per_weight"] is None:
        return "weights unchanged"
    return f"{facts['bits_per_weight']:.3f} bits per weight over {facts['weights_quantized']:,} weights"


def _left(to: Console, left_dense: dict[str, str]) -> None:
    """Weights that stay dense and the reasons, a line per kind of weight."""
    for (name, why), count in Counter((kind(name), kind(why)) for name, why in left_dense.items()).items():
        to.print(f"dense   {name}{f' (×{count})' if count > 1 else ''}: {why}")


def planned(to: Console, plan: dict[str, Any]) -> None:
    """A plan: a row per kind of weight, sizes, memory and the weights that stay dense."""
    counts: Counter[tuple[str, str, str, str]] = Counter()
    for row in plan["targets"]:
        shape = " × ".join(map(str, row["shape"]))
        bits = "-" if row["bits_per_weight"] is None else f"{row['bits_per_weight']:.3f}"
        counts[kind(row["name"]), shape, row["method"] or "measured", bits] += 1
    rows = [(name, f"{count:,}", *others) for (name, *others), count in counts.items()]
    if rows:
        _table(to, ("weight", "count", "shape", "method", "bits per weight"), rows)
    for name, bits in plan.get("candidates", {}).items():
        to.print(f"choice  {name}: {bits:.3f} bits per weight")
    before, after = plan["source_bytes"], plan["artifact_bytes"]
    if plan["rotation"]:
        to.print("rotate  the residual stream and attention values, folded into the weights")
    to.print(f"total   {len(plan['targets'])} targets, {_bits(plan)}")
    if plan["kv_cache"]:
        to.print(f"cache   {cache_line(plan['kv_cache'])}; codebooks of {size(plan['codebook_bytes'])}")
    to.print(f"size    {size(before)} → about {size(after)}, {shrunk(before, after)}")
    tokens = f"{plan['calibration_tokens']:,} tokens of calibration" if plan["calibration_tokens"] else "no calibration"
    device = f" and {size(plan['peak_device_bytes'])} on its GPU" if plan["peak_device_bytes"] else ""
    to.print(f"needs   at most about {size(plan['peak_rss_bytes'])} of memory{device} a process; {tokens}")
    _left(to, plan["left_dense"])


def inspected(to: Console, facts: dict[str, Any]) -> None:
    """An artifact: a row per target, the options of its methods and totals."""
    cells = []
    for row in facts["targets"]:
        tokens = "-" if row["tokens"] is None else f"{row['tokens']:,}"
        errors = (_error(row["relative_error"]), _error(row["proxy_error"]))
        shape = " × ".join(map(str, row["shape"]))
        cells.append((row["name"], row["method"], shape, f"{row['bits_per_weight']:.3f}", *errors, tokens))
    if cells:
        titles = "weight", "method", "shape", "bits per weight", "relative error", "proxy error", "tokens"
        _table(to, titles, cells)
    settings = Counter((row["method"], tuple(row["options"].items())) for row in facts["targets"])
    for (method, options), count in settings.items():
        to.print(f"{method} ({count} weights): {', '.join(f'{key}={value}' for key, value in options)}")
    if books := facts["codebooks"].values():
        means = ", ".join(f"{100 * sum(book['hottest'][i] for book in books) / len(books):.0f}" for i in range(3))
        to.print(f"entries the most used 1/8, 1/4, 1/2 of a codebook cover {means} % of uses (mean of {len(books)})")
    _experts(to, facts, each=True)
    before = f"{size(facts['source_bytes'])} → " if facts["source_bytes"] else ""
    if facts["kv_cache"]:
        to.print(f"cache   {cache_line(facts['kv_cache'])}")
    to.print(f"total   {len(facts['targets'])} targets, {_bits(facts)}")
    to.print(f"size    {before}{size(facts['artifact_bytes'])} in {facts['files']} files")


def perplexity(to: Console, facts: dict[str, Any], text: str) -> None:
    """A perplexity and its protocol: figures of different protocols are not comparable."""
    to.print(f"perplexity  {facts['perplexity']:.4f}   ({facts['bits_per_byte']:.4f} bits per byte)")
    if "baseline" in facts:
        divergence = facts["kl_divergence"]
        to.print(f"baseline    {facts['baseline']['perplexity']:.4f}   (ratio {facts['ratio']:.4f})")
        to.print(f"KL          mean {divergence['mean']:.5f}, p99 {divergence['p99']:.4f}, max {divergence['max']:.3f}")
        to.print(f"same top-1  {100 * facts['top1_agreement']:.2f} %")
    to.print(f"protocol    {text}: {protocol_line(facts)}, float32")
    to.print(f"took        {duration(facts['seconds'])}, peak memory {size(facts['peak_rss_bytes'])}")


def speed(to: Console, facts: dict[str, Any]) -> None:
    """Tokens per second, memory and the conditions they were measured under."""
    device = f", {size(facts['peak_device_bytes'])} on the GPU" if facts["peak_device_bytes"] else ""
    to.print(f"prefill              {facts['prefill_tokens_per_second']:,.1f} tokens/s")
    to.print(f"decode               {facts['decode_tokens_per_second']:,.1f} tokens/s")
    to.print(f"time to first token  {1000 * facts['time_to_first_token']:.1f} ms")
    to.print(f"peak memory          {size(facts['peak_rss_bytes'])}{device}")
    to.print(f"cache                {size(facts['cache_bytes'])}, {facts['kv_cache'] or 'plain'}")
    shape = f"{facts['prompt_tokens']} prompt tokens, {facts['new_tokens']} new, batch {facts['batch']}"
    to.print(f"measured             {shape}, on {facts['device']} in {facts['dtype']}")
    if other := facts.get("baseline"):
        ratios = (f"{kind} {facts[f'{kind}_relative_to_baseline']:.2f}" for kind in ("prefill", "decode"))
        to.print(f"relative to baseline {other['model']}: {', '.join(ratios)}")
        memory = size(other["peak_device_bytes"] or other["peak_rss_bytes"])
        theirs = f"peak memory {memory}, cache {size(other['cache_bytes'])}"
        to.print(f"baseline             decode {other['decode_tokens_per_second']:,.1f} tokens/s, {theirs}")


def exported(to: Console, facts: dict[str, Any], out: str) -> None:
    """The files of an export, the weights that it decoded, and the result of --verify."""
    written = f"{facts['files']} files, {size(facts['bytes'])}, {duration(facts['seconds'])}"
    to.print(f"{out}: {facts['format']}, {written}")
    _left(to, facts["left_dense"])
    if "verified" in facts:
        read = facts["verified"]
        loss = f"mean KL divergence {read['mean_kl_divergence']:.2g} from the artifact (at most {read['bound']:g})"
        what = f"{read['tokens']} tokens of {read['text']}, activations {read['activations']}"
        to.print(f"verified: loads in {read['reader']}; {loss} over {what}")
    to.print(f"next    {facts['next']}", soft_wrap=True)


def examined(to: Console, facts: dict[str, Any]) -> None:
    """The checks of `doctor`, and the weights that stay dense."""
    to.print(f"{facts['architecture']}: {'ok' if facts['ok'] else 'FAIL'}")
    for check in facts["checks"]:
        to.print(f"{'ok  ' if check['ok'] else 'FAIL'}  {check['name']}: {check['detail']}")
    to.print(f"{facts['targets']} targets hold {100 * facts['coverage']:.1f} % of the weights in blocks")
    # All experts of a mixture share a line.
    kinds = (([kind(path) for path in f["input"].split(", ")], kind(f["producer"] or "")) for f in facts["folds"])
    for reads, producer in dict.fromkeys((", ".join(dict.fromkeys(paths)), producer) for paths, producer in kinds):
        to.print(f"smooth  {reads}: {f'folds into {producer}' if producer else 'at run time'}")
    _left(to, facts["left_dense"])


def compared(to: Console, found: dict[str, Any]) -> None:
    """A row per model, from the most bits to the fewest, and a bar of its KL divergence."""
    models = found["models"]
    titles = "model", "bits", "size", "perplexity", "ratio", "mean KL", "top-1"
    rows = [(row["model"], f"{row['bits_per_weight']:.3f}", size(row["bytes"]), *quality_cells(row)) for row in models]
    _table(to, titles, rows)
    if found["baseline"] is None:
        to.print("note        no KL divergence without an original; give --baseline")
    else:
        to.print("mean KL by bits per weight")
        losses = [row["kl_divergence"]["mean"] for row in models]
        most = max((loss for loss in losses if math.isfinite(loss)), default=0) or 1
        for row, loss in zip(models, losses, strict=True):
            bar = "█" * round(40 * loss / most) or "▏" if math.isfinite(loss) else f"{loss}"
            name = row["model"] if len(row["model"]) <= 20 else f"…{row['model'][-19:]}"
            to.print(f"{row['bits_per_weight']:6.3f}  {name:20} {bar}")
    to.print(f"protocol    {found['text']}: {protocol_line(found['protocol'])}, float32")
    to.print(f"took        {duration(found['seconds'])}")
