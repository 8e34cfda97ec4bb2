"""The commands. Heavy modules are imported inside a command, so that --help is quick."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

import vqcompress
from vqcompress.cli import options, tables
from vqcompress.cli.console import Command, Commands, console, degrade_symbols, session, took
from vqcompress.cli.evaluate import compare, evaluation
from vqcompress.errors import UsageError
from vqcompress.storage.output import INDEX, JOURNAL, check_output
from vqcompress.storage.recipe_files import check_choice, description, packaged

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
command = partial(app.command, cls=Command)


def _print_version(value: bool) -> None:
    if value:
        print(f"vqcompress {vqcompress.__version__}")
        raise typer.Exit


@app.callback()
def _program(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Compress large language models: SmoothQuant INT8, tile-wise FP8 and vector quantization."""


@command()
@options.flat
def quantize(
    run: options.RunOptions,
    output: options.OptionalOutput = None,
    overwrite: options.Overwrite = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and write nothing.")] = False,
    *,
    upload: options.Upload,
    common: options.Common,
) -> None:
    """Compress a model. The same command again continues an interrupted run.

    Example: vqcompress quantize demo -o out --recipe vq-2bit
    """
    if dry_run:
        if upload.push_to_hub is not None:
            raise UsageError("--dry-run writes nothing to upload: leave out --push-to-hub")
        _plan(run, common)
        return
    if output is None or output == Path("demo"):
        raise UsageError("-o OUT: give a directory to write to (not demo, the packaged model), or --dry-run")
    check_choice(run.recipe, run.target_bits, run.kv_cache)
    check_output(output, overwrite, JOURNAL)
    upload.check()
    with session(common.json) as show:
        from vqcompress.cli.progress import QuantizeProgress
        from vqcompress.pipeline.quantize import quantize

        job = run.job(output, overwrite)
        with QuantizeProgress() as progress:
            report = quantize(job, progress, vqcompress.STARTED)
        show(tables.quantized, report, str(output), job.model)
        upload.push(output)


@command()
@options.flat
def plan(run: options.RunOptions, common: options.Common) -> None:
    """Show the targets, sizes and memory of a run of quantize. Needs only a config.json.

    Example: vqcompress plan demo --recipe vq-2bit
    """
    _plan(run, common)


def _plan(run: options.RunOptions, common: options.Common) -> None:
    check_choice(run.recipe, run.target_bits, run.kv_cache)
    with session(common.json) as show:
        from vqcompress.pipeline.quantize import dry_run

        summary = dry_run(run.job())
        show(tables.planned, summary)


app.add_typer(evaluation, name="eval")
command()(compare)


@command()
@options.flat
def export(
    artifact: options.Artifact,
    format: options.Format,
    output: options.Output,
    verify: Annotated[bool, typer.Option("--verify", help="Load it with its reader; compare predictions.")] = False,
    overwrite: options.Overwrite = False,
    *,
    upload: options.Upload,
    common: options.Common,
) -> None:
    """Convert an artifact to a format that other runtimes load.

    Example: vqcompress export out --format dense -o out-dense --verify
    """
    check_output(output, overwrite, INDEX)
    upload.check()
    with session(common.json) as show:
        from vqcompress.export import export
        from vqcompress.model.device import peak_rss_bytes

        result = export(artifact, format, output, verify, overwrite)
        result |= {"seconds": took(), "peak_rss_bytes": peak_rss_bytes()}
        show(tables.exported, result, str(output))
        upload.push(output)


@command()
@options.flat
def inspect(artifact: options.Artifact, common: options.Common) -> None:
    """Show the bits, errors and options of each compressed weight.

    Example: vqcompress inspect out
    """
    with session(common.json) as show:
        from vqcompress.evaluate.inspect import inspect

        facts = inspect(artifact)
        show(tables.inspected, facts)


@command()
@options.flat
def verify(
    artifact: options.Artifact,
    quick: Annotated[bool, typer.Option("--quick", help="Do not build and run the model.")] = False,
    *,
    common: options.Common,
) -> None:
    """Check the checksums, shapes and values of an artifact, and run its first and last block.

    Example: vqcompress verify out
    """
    with session(common.json) as show:
        from vqcompress.evaluate.verify import verify

        facts = verify(artifact, quick) | {"seconds": took()}
        show(tables.verified, facts, artifact)


@command()
def generate(
    model: options.AnyModel,
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="New tokens at most.")] = 64,
    temperature: Annotated[float, typer.Option(metavar="T", min=0, help="Sampling temperature; 0 is greedy.")] = 0.0,
    seed: options.Seed = 0,
    kv_cache: options.KVCache = None,
    cpu_weights: options.CpuWeights = "auto",
    revision: options.Revision = None,
    trust_remote_code: options.Trust = False,
    debug: options.Debug = False,
) -> None:
    """Continue a prompt.

    Example: vqcompress generate out --prompt "Once upon a time"
    """
    with session():
        from vqcompress.runtime.generate import generate

        model, sampling = options.pinned(model, revision), (max_new_tokens, temperature, seed)
        result = generate(model, prompt, *sampling, cpu_weights, kv_cache)
        print(f"{result['new_tokens']} tokens, {result['tokens_per_second']} tokens/s", file=sys.stderr)


@command()
@options.flat
def doctor(model: options.Model, revision: options.Revision = None, *, common: options.Common) -> None:
    """Check whether an architecture is supported and which weights can be compressed.

    Example: vqcompress doctor demo
    """
    with session(common.json) as show:
        from vqcompress.evaluate.doctor import examine

        facts = examine(options.pinned(model, revision))
        show(tables.examined, facts)
        if not facts["ok"]:
            raise typer.Exit(1)


@command()
def recipes(debug: options.Debug = False) -> None:
    """List the packaged recipes.

    Example: vqcompress recipes
    """
    for name, path in packaged().items():
        console().print(f"{name:19}  {description(path)}")


def set_up_memory() -> None:
    """Configure malloc: large tensors use huge pages and are returned when freed (docs/performance.md)."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    with contextlib.suppress(OSError, AttributeError, TypeError):
        # M_MMAP_THRESHOLD: by default it grows to 32 MiB, and freed memory below a live block is never returned.
        # M_TRIM_THRESHOLD: without it the pages of every strip of a weight are mapped again.
        # M_ARENA_MAX: up to 8 arenas per core would take 64 MB of address space each.
        for option, value in ((-3, 8 * 2**20), (-1, 16 * 2**20), (-8, 2)):
            ctypes.CDLL(None).mallopt(option, value)


def set_up_caches() -> None:
    """Let libraries keep their caches in a temporary directory, deleted at the end, if there is no home to write to."""
    names = ("NUMBA_CACHE_DIR", "TRITON_CACHE_DIR", "MPLCONFIGDIR")
    if not os.access(os.path.expanduser("~"), os.W_OK) and not all(name in os.environ for name in names):
        folder = tempfile.TemporaryDirectory(prefix="vqcompress-")
        atexit.register(folder.cleanup)
        for name in names:
            os.environ.setdefault(name, str(Path(folder.name, name)))


def main() -> None:
    """Run the `vqcompress` command."""
    set_up_memory()
    set_up_caches()
    degrade_symbols()
    app(prog_name="vqcompress")
