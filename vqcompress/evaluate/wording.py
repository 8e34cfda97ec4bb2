"""Figures and settings of a report in words, as the terminal, the pages and the model card show them."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def cache_line(settings: dict[str, Any]) -> str:
    """How keys and values are stored."""
    exact = f"the newest {settings['window']} and the first {settings['sinks']} tokens as they are"
    return f"keys and values in {settings['bits']} bits, {settings['codebook']}, {exact}"


def calibration_line(rows: dict[str, Any] | None) -> str:
    """The calibration rows of a run and the texts that they are from."""
    if rows is None:
        return "none"
    texts = list(rows["texts"]) or ["the built-in text"]
    if counts := rows.get("rows"):
        texts = [f"{text} ({count})" for text, count in zip(texts, counts, strict=True)]
    sampled = f", sampled at temperature {rows['temperature']:g}" if "temperature" in rows else ""
    start = ", each with a BOS token first" if rows.get("bos") else ""
    return f"{rows['samples']} rows of {rows['seqlen']} tokens of {', '.join(texts)}{sampled}{start}"


def protocol_line(found: dict[str, Any]) -> str:
    """How a perplexity was measured: figures of different protocols do not compare."""
    cache = f", cache {found['kv_cache']}" if found["kv_cache"] else ""
    cut = f"{found['windows']} windows × {found['seqlen']} tokens, stride {found['stride']}"
    return f"{cut}, {'BOS' if found['bos'] else 'no BOS'}{cache}, {found['tokens']:,} tokens predicted"


def quality_cells(found: dict[str, Any]) -> list[str]:
    """Perplexity, its ratio to the original's, mean KL divergence and top-1 agreement; a dash where unknown."""
    ratio, kl, same = (found.get(key) for key in ("ratio", "kl_divergence", "top1_agreement"))
    # Beyond float64 a report holds the string "inf".
    cells = [f"{float(found['perplexity']):.3f}", "-" if ratio is None else f"{float(ratio):.4f}"]
    return [*cells, "-" if kl is None else f"{kl['mean']:.5f}", "-" if same is None else f"{100 * same:.2f} %"]


def evaluation_cells(found: dict[str, Any]) -> list[str]:
    """A result of `eval perplexity --report`: text, quality, perplexity of the original, protocol."""
    original = f"{float(found['baseline']['perplexity']):.3f}" if "baseline" in found else "-"
    return [found["text"], *quality_cells(found), original, protocol_line(found)]


def names_of(report: dict[str, Any]) -> tuple[str, str]:
    """Names of the model and the recipe; of a local path only its last part."""
    return report["base_model"] or Path(report["model"]).name, Path(report["recipe"]).name


def duration(seconds: float) -> str:
    """A time: 0.8 s, 42 s, 3 min 20 s, 2 h 5 min."""
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def shrunk(before: float, after: float) -> str:
    """How a size has changed: 3.03 times smaller."""
    larger = after > before
    return f"{max(before, after) / max(min(before, after), 1):.2f} times {'larger' if larger else 'smaller'}"
