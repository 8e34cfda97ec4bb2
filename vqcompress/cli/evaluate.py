"""The commands that measure: `eval perplexity`, `eval speed` and `compare`."""

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

Text = Annotated[str, typer.Option("--text", metavar="FILE", help="Text, JSONL, Parquet or dataset id.")]
Window = Annotated[int | None, typer.Option("--seqlen", min=2, help="Tokens a window. Default: the model's context.")]
Stride = Annotated[
    int | None, typer.Option("--stride", min=1, help="Tokens from window to window. Default: no overlap.")
]
Windows = Annotated[int | None, typer.Option("--windows", min=1, help="Only the first so many windows.")]
evaluation = typer.Typer(no_args_is_help=True, help="Measure how good or how fast a model is.")


@evaluation.command()
def perplexity(
    model: Either,
    text: Text,
    seqlen: Window = None,
    stride: Stride = None,
    windows: Windows = None,
    baseline: Annotated[
        str | None, typer.Option("--baseline", metavar="MODEL", help="The original: also KL and top-1 agreement.")
    ] = None,
    kv_cache: KVCache = None,
    report: Annotated[
        bool, typer.Option("--report", help="Add the result to the artifact's report.json, report.html and README.md.")
    ] = False,
    device: Where = Device.auto,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    json_file: Json = None,
    debug: Debug = False,
) -> None:
    """Perplexity on a text; with --baseline also KL divergence and top-1 agreement.

    Example: vqcompress eval perplexity out --text test.txt --baseline demo
    """
    model = pinned(model, revision)
    with session([model, baseline], json_file, (kv_cache,), [text]) as (console, write):
        from vqcompress.cli import tables as show
        from vqcompress.evaluate import model_card as documents
        from vqcompress.evaluate import perplexity as evaluate

        if report:
            documents.check_writable(model)
        with show.counting(f"perplexity of {model}") as progress:
            cut = evaluate.Windowing(seqlen=seqlen, stride=stride, limit=windows)
            result = evaluate.perplexity(model, text, baseline, device.value, progress, kv_cache, **cut)
        result["seconds"] = took()
        write(result)
        show.perplexity(console, result, text)
        if report:
            told = documents.add_evaluation(model, result)
            kept = "" if "README.md" in told else "; README.md has been edited, and stays as it is"
            console.print(f"report      added to {', '.join(told)} of {model}{kept}")


@evaluation.command()
def speed(
    model: Either,
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", min=1, help="Length of the prompt.")] = 128,
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=2, help="Tokens to decode.")] = 64,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Prompts at once.")] = 1,
    baseline: Annotated[
        str | None, typer.Option("--baseline", metavar="MODEL", help="The original, measured after it.")
    ] = None,
    kv_cache: KVCache = None,
    cpu_weights: CpuWeights = Weights.auto,
    device: Where = Device.auto,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    json_file: Json = None,
    debug: Debug = False,
) -> None:
    """Prefill and decode tokens per second, time to first token, peak memory.

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
    models: Annotated[list[str], typer.Argument(metavar="MODEL…", help="Artifacts or other models; ID@REV works.")],
    text: Text,
    baseline: Annotated[
        str | None,
        typer.Option(
            "--baseline",
            metavar="MODEL",
            help="The original. Default: the one MODEL that is no artifact, else what all artifacts were made from.",
        ),
    ] = None,
    seqlen: Window = None,
    stride: Stride = None,
    windows: Windows = None,
    html_file: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write a page with pictures there.")
    ] = None,
    device: Where = Device.auto,
    trust_remote_code: Trust = False,
    json_file: Json = None,
    debug: Debug = False,
) -> None:
    """Bits per weight against perplexity, KL divergence and top-1 agreement of several models on one text.

    Example: vqcompress compare out-2bit out-4bit --text test.txt --html compared.html
    """
    page = html_file and output_file("--html", html_file)
    with session([*models, baseline], json_file, texts=[text]) as (console, write):
        from vqcompress.cli import tables as show
        from vqcompress.evaluate.compare import compare as run
        from vqcompress.evaluate.compare import only_caches
        from vqcompress.evaluate.perplexity import Windowing
        from vqcompress.evaluate.report_html import comparison_page

        with show.counting(f"comparing {len(models)} model{'s' * (len(models) > 1)}") as progress:
            cut = Windowing(seqlen=seqlen, stride=stride, limit=windows)
            result = run(models, text, baseline, device.value, progress, **cut)
        result["seconds"] = took()
        write(result)
        show.compared(console, result, only_caches(models))
        if page:
            page.write_text(comparison_page(result), encoding="utf-8")
            console.print(f"pictures    {html_file}")
