"""The commands `eval perplexity`, `eval speed` and `compare`."""

from __future__ import annotations

from typing import Annotated

import typer

from vqcompress.cli import options, tables
from vqcompress.cli.console import Command, Commands, session

evaluation = typer.Typer(cls=Commands, no_args_is_help=True, help="Measure the quality or speed of a model.")


@evaluation.command(cls=Command)
@options.flat
def perplexity(
    model: options.AnyModel,
    text: options.Text,
    baseline: options.Baseline = None,
    kv_cache: options.KVCache = None,
    report: Annotated[bool, typer.Option("--report", help="Add the result to the report of the artifact.")] = False,
    *,
    windows: options.WindowOptions,
    device: options.Device = "auto",
    revision: options.Revision = None,
    common: options.Common,
) -> None:
    """Measure perplexity on a text; with --baseline also KL divergence and top-1 agreement.

    Example: vqcompress eval perplexity out --text test.txt --baseline demo
    """
    model = options.pinned(model, revision)
    with session(common.json) as show:
        from vqcompress.cli.progress import StepBar
        from vqcompress.evaluate import model_card
        from vqcompress.evaluate.perplexity import perplexity

        if report:
            model_card.check_writable(model)
        with StepBar(f"perplexity of {model}") as bar:
            result = perplexity(model, text, baseline, device, bar.count, kv_cache, **vars(windows))
        show(tables.perplexity, result, text)
        if report:
            changed = model_card.add_evaluation(model, result)
            print(f"report      added to {', '.join(changed)} of {model}")


@evaluation.command(cls=Command)
@options.flat
def speed(
    model: options.AnyModel,
    prompt_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens in the prompt.")] = 128,
    new_tokens: Annotated[int, typer.Option(metavar="N", min=2, help="Tokens to generate.")] = 64,
    batch: Annotated[int, typer.Option(metavar="N", min=1, help="Number of prompts.")] = 1,
    baseline: options.Baseline = None,
    kv_cache: options.KVCache = None,
    cpu_weights: options.CpuWeights = "auto",
    device: options.Device = "auto",
    revision: options.Revision = None,
    *,
    common: options.Common,
) -> None:
    """Measure prefill and decode speed, time to first token and peak memory.

    Example: vqcompress eval speed out --prompt-tokens 512 --baseline demo
    """
    with session(common.json) as show:
        from vqcompress.evaluate.speed import speed

        sizes = prompt_tokens, new_tokens, batch
        result = speed(options.pinned(model, revision), *sizes, baseline, device, cpu_weights, kv_cache)
        show(tables.speed, result)


@options.flat
def compare(
    models: options.Models,
    text: options.Text,
    baseline: options.Baseline = None,
    html: options.Html = None,
    *,
    windows: options.WindowOptions,
    device: options.Device = "auto",
    common: options.Common,
) -> None:
    """Compare the size, perplexity, KL divergence and top-1 agreement of models.

    The default of --baseline is the one MODEL that is not an artifact, or the model that all artifacts were made from.

    Example: vqcompress compare out-2bit out-4bit --text test.txt --html compared.html
    """
    with session(common.json) as show:
        from vqcompress.cli.progress import StepBar
        from vqcompress.evaluate.compare import compare
        from vqcompress.evaluate.report_html import comparison_page

        with StepBar("comparing models") as bar:
            result = compare(models, text, baseline, device, bar.count, **vars(windows))
        show(tables.compared, result)
        if html is not None:
            html.write_text(comparison_page(result), encoding="utf-8")
            print(f"charts      {html}")
