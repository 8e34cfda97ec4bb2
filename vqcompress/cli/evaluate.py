"""The commands `eval perplexity`, `eval speed` and `compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vqcompress.cli.console import output_file, session, took
from vqcompress.cli.options import (
    CpuWeights,
    Debug,
    Device,
    Either,
    Json,
    KVCache,
    Revision,
    Trust,
    Weights,
    Where,
    pinned,
)

Text = Annotated[str, typer.Option("--text", metavar="FILE", help="Text, JSONL or Parquet file, or dataset id.")]
Window = Annotated[
    int | None, typer.Option("--seqlen", metavar="N", min=2, help="Tokens per window (default: model context).")
]
Stride = Annotated[
    int | None, typer.Option("--stride", metavar="N", min=1, help="Tokens between window starts (default: no overlap).")
]
Windows = Annotated[int | None, typer.Option("--windows", metavar="N", min=1, help="Evaluate the first N windows.")]
evaluation = typer.Typer(no_args_is_help=True, help="Measure the quality or speed of a model.")


@evaluation.command()
def perplexity(
    model: Either,
    text: Text,
    seqlen: Window = None,
    stride: Stride = None,
    windows: Windows = None,
    baseline: Annotated[
        str | None,
        typer.Option("--baseline", metavar="MODEL", help="Original model: adds KL divergence and top-1."),
    ] = None,
    kv_cache: KVCache = None,
    report: Annotated[
        bool, typer.Option("--report", help="Add the result to the report and model card of the artifact.")
    ] = False,
    device: Where = Device.auto,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    json_file: Json = None,
    debug: Debug = False,
) -> None:
    """Measure perplexity on a text; with --baseline also KL divergence and top-1 agreement.

    Example: vqcompress eval perplexity out --text test.txt --baseline demo
    """
    model = pinned(model, revision)
    with session([model, baseline], json_file, (kv_cache,), [text]) as (console, write):
        from vqcompress.cli import tables as show
        from vqcompress.cli.progress import counting
        from vqcompress.evaluate import model_card as documents
        from vqcompress.evaluate import perplexity as evaluate

        if report:
            documents.check_writable(model)
        with counting(f"perplexity of {model}") as progress:
            cut = evaluate.Windowing(seqlen=seqlen, stride=stride, limit=windows)
            result = evaluate.perplexity(model, text, baseline, device.value, progress, kv_cache, **cut)
        result["seconds"] = took()
        write(result)
        show.perplexity(console, result, text)
        if report:
            told = documents.add_evaluation(model, result)
            kept = "" if "README.md" in told else "; README.md was edited by hand and is left alone"
            console.print(f"report      added to {', '.join(told)} of {model}{kept}")


@evaluation.command()
def speed(
    model: Either,
    prompt_tokens: Annotated[
        int, typer.Option("--prompt-tokens", metavar="N", min=1, help="Tokens in the prompt.")
    ] = 128,
    new_tokens: Annotated[int, typer.Option("--new-tokens", metavar="N", min=2, help="Tokens to generate.")] = 64,
    batch: Annotated[int, typer.Option("--batch", metavar="N", min=1, help="Number of prompts.")] = 1,
    baseline: Annotated[
        str | None, typer.Option("--baseline", metavar="MODEL", help="Original model, to measure as well.")
    ] = None,
    kv_cache: KVCache = None,
    cpu_weights: CpuWeights = Weights.auto,
    device: Where = Device.auto,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    json_file: Json = None,
    debug: Debug = False,
) -> None:
    """Measure prefill and decode speed, time to first token and peak memory.

    Example: vqcompress eval speed out --prompt-tokens 512 --baseline demo
    """
    model = pinned(model, revision)
    with session([model, baseline], json_file, (kv_cache,)) as (console, write):
        from vqcompress.cli import tables as show
        from vqcompress.evaluate.speed import speed as run

        sizes = prompt_tokens, new_tokens, batch
        result = run(model, *sizes, baseline, device.value, cpu_weights.value, kv_cache)
        write(result)
        show.speed(console, result)


def compare(
    models: Annotated[list[str], typer.Argument(metavar="MODEL…", help="Artifacts, directories or hub ids.")],
    text: Text,
    baseline: Annotated[
        str | None,
        typer.Option(
            "--baseline",
            metavar="MODEL",
            help="Original model (default: the one MODEL that is not an artifact, or the source of all artifacts).",
        ),
    ] = None,
    seqlen: Window = None,
    stride: Stride = None,
    windows: Windows = None,
    html_file: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write an HTML page with charts.")
    ] = None,
    device: Where = Device.auto,
    trust_remote_code: Trust = False,
    json_file: Json = None,
    debug: Debug = False,
) -> None:
    """Compare the size, perplexity, KL divergence and top-1 agreement of several models.

    Example: vqcompress compare out-2bit out-4bit --text test.txt --html compared.html
    """
    page = html_file and output_file("--html", html_file)
    with session([*models, baseline], json_file, texts=[text]) as (console, write):
        from vqcompress.cli import tables as show
        from vqcompress.cli.progress import counting
        from vqcompress.evaluate.compare import compare as run
        from vqcompress.evaluate.perplexity import Windowing
        from vqcompress.evaluate.report_html import comparison_page

        with counting(f"comparing {len(models)} model{'s' * (len(models) > 1)}") as progress:
            cut = Windowing(seqlen=seqlen, stride=stride, limit=windows)
            result = run(models, text, baseline, device.value, progress, **cut)
        result["seconds"] = took()
        write(result)
        show.compared(console, result)
        if page:
            page.write_text(comparison_page(result), encoding="utf-8")
            console.print(f"charts      {html_file}")
