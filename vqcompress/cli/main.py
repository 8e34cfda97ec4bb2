"""The commands. Heavy modules are imported inside a command, so that --help is quick."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

import vqcompress
from vqcompress.cli.console import Commands, check_free, console, session, took, uploading
from vqcompress.cli.evaluate import compare, evaluation
from vqcompress.cli.options import (
    FORMATS,
    Calibration,
    CpuWeights,
    Debug,
    Device,
    Format,
    Json,
    Kept,
    KVCache,
    Model,
    Overwrite,
    Private,
    Push,
    Recipe,
    Revision,
    Samples,
    Seed,
    Seqlen,
    Source,
    States,
    TargetBits,
    Trust,
    Weights,
    Where,
    pinned,
)
from vqcompress.errors import UsageError, did_you_mean
from vqcompress.storage.recipe_files import check_choice, description, packaged

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Compress large language models: SmoothQuant INT8, tile-wise FP8 and vector quantization.",
)
app.add_typer(evaluation, name="eval")


def _print_version(value: bool) -> None:
    if value:
        print(f"vqcompress {vqcompress.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
    debug: Debug = False,
) -> None:
    """Compress large language models: SmoothQuant INT8, tile-wise FP8 and vector quantization."""


@app.command()
def quantize(
    model: Model,
    recipe: Recipe = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="OUT", help="Output directory.")] = None,
    target_bits: TargetBits = None,
    calibration: Calibration = None,
    samples: Samples = None,
    seqlen: Seqlen = None,
    seed: Seed = 0,
    device: Where = Device.auto,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and write nothing.")] = False,
    states: Kept = States.memory,
    kv_cache: KVCache = None,
    overwrite: Overwrite = False,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    push_to_hub: Push = None,
    private: Private = False,
    json_file: Json = None,
    debug: Debug = False,
) -> None:
    """Compress a model. Running the same command again continues an interrupted run.

    Example: vqcompress quantize demo -o out --recipe vq-2bit
    """
    model = pinned(model, revision)
    if dry_run:
        if push_to_hub or private:
            raise UsageError("--dry-run cannot be combined with --push-to-hub or --private")
        plan(
            model,
            recipe,
            target_bits,
            calibration,
            samples,
            seqlen,
            seed,
            device,
            states,
            kv_cache,
            json_file=json_file,
        )  # fmt: skip
        return
    if output is None:
        raise UsageError("-o OUT is missing: give an output directory, or --dry-run")
    if str(output) == "demo":
        raise UsageError("-o demo: this name means the packaged checkpoint; choose another directory")
    check_choice(recipe, target_bits, kv_cache)
    check_free(output, overwrite)
    given = session([model], json_file, (recipe, kv_cache), calibration)
    with uploading(push_to_hub, private) as upload, given as (console, write):
        from vqcompress.cli import tables as show
        from vqcompress.cli.progress import watching
        from vqcompress.pipeline.quantize import QuantizeOptions
        from vqcompress.pipeline.quantize import quantize as run

        options = QuantizeOptions(
            model, output, recipe, calibration, samples, seqlen, seed, device.value, overwrite, target_bits,
            states.value, kv_cache,
        )  # fmt: skip
        with watching() as watch:
            report = run(options, watch, Commands.began)
        write(report)
        show.quantized(console, report, str(output), model, calibration)
        upload(output, console)


@app.command()
def plan(
    model: Model,
    recipe: Recipe = None,
    target_bits: TargetBits = None,
    calibration: Calibration = None,
    samples: Samples = None,
    seqlen: Seqlen = None,
    seed: Seed = 0,
    device: Where = Device.auto,
    states: Kept = States.memory,
    kv_cache: KVCache = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    json_file: Json = None,
    debug: Debug = False,
) -> None:
    """Show the targets, sizes and memory of a run of quantize. Needs only a config.json.

    Example: vqcompress plan demo --recipe vq-2bit
    """
    model = pinned(model, revision)
    check_choice(recipe, target_bits, kv_cache)
    with session([model], json_file, (recipe, kv_cache), calibration) as (console, write):
        from vqcompress.cli import tables as show
        from vqcompress.pipeline.quantize import QuantizeOptions, dry_run

        options = QuantizeOptions(
            model, None, recipe, calibration, samples, seqlen, seed, device.value, False, target_bits,
            states.value, kv_cache,
        )  # fmt: skip
        summary = dry_run(options)
        write(summary)
        show.planned(console, summary)


app.command()(compare)


@app.command()
def export(
    artifact: Source,
    format: Format,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="Output directory.")],
    verify: Annotated[bool, typer.Option("--verify", help="Load it with its own library; compare logits.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Overwrite an earlier export.")] = False,
    trust_remote_code: Trust = False,
    push_to_hub: Push = None,
    private: Private = False,
    json_file: Json = None,
    debug: Debug = False,
) -> None:
    """Convert an artifact to a format that other runtimes load (see docs/export.md).

    Example: vqcompress export out --format dense -o out-dense --verify
    """
    if format not in FORMATS:
        raise UsageError(f"no export format '{format}'.{did_you_mean(format, FORMATS)}")
    with uploading(push_to_hub, private) as upload, session([artifact], json_file) as (console, write):
        from vqcompress.cli import tables as show
        from vqcompress.export import export as run

        result = run(artifact, format, output, verify, overwrite) | {"seconds": took()}
        write(result)
        show.exported(console, result, str(output))
        upload(output, console)


@app.command()
def inspect(
    artifact: Source,
    trust_remote_code: Trust = False,
    json_file: Json = None,
    debug: Debug = False,
) -> None:
    """Show the bits, errors and options of each compressed weight.

    Example: vqcompress inspect out
    """
    with session([artifact], json_file) as (console, write):
        from vqcompress.cli import tables as show
        from vqcompress.evaluate.inspect import inspect as run

        facts = run(artifact)
        write(facts)
        show.inspected(console, facts)


@app.command()
def verify(artifact: Source, trust_remote_code: Trust = False, json_file: Json = None, debug: Debug = False) -> None:
    """Check the checksums, shapes and values of an artifact.

    Example: vqcompress verify out
    """
    with session([artifact], json_file) as (console, write):
        from rich.filesize import decimal as size

        from vqcompress.evaluate.verify import verify as run
        from vqcompress.evaluate.wording import duration

        facts = run(artifact) | {"seconds": took()}
        write(facts)
        counts = f"{facts['files']} files, {facts['targets']} targets, {size(facts['bytes'])}"
        counts += "" if facts["checksums"] else ", no checksums"
        console.print(f"{artifact}: ok ({counts}, {duration(facts['seconds'])})")


@app.command()
def generate(
    artifact: Source,
    prompt: Annotated[str, typer.Option("--prompt", metavar="TEXT", help="Text to continue.")],
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", metavar="N", min=1, help="Maximum number of new tokens.")
    ] = 64,
    temperature: Annotated[
        float, typer.Option("--temperature", metavar="N", min=0, help="Sampling temperature; 0 is greedy.")
    ] = 0.0,
    seed: Seed = 0,
    kv_cache: KVCache = None,
    cpu_weights: CpuWeights = Weights.auto,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    debug: Debug = False,
) -> None:
    """Continue a prompt.

    Example: vqcompress generate out --prompt "Once upon a time"
    """
    artifact = pinned(artifact, revision)
    with session([artifact], None, (kv_cache,)):
        from vqcompress.runtime.generate import generate as run

        knobs = max_new_tokens, temperature, seed
        result = run(artifact, prompt, *knobs, cpu_weights.value, kv_cache)
        print(f"{result['new_tokens']} tokens, {result['tokens_per_second']} tokens/s", file=sys.stderr)


@app.command()
def doctor(
    model: Model,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    json_file: Json = None,
    debug: Debug = False,
) -> None:
    """Check whether an architecture is supported and which weights can be compressed.

    Example: vqcompress doctor demo
    """
    model = pinned(model, revision)
    with session([model], json_file) as (console, write):
        from vqcompress.cli import tables as show
        from vqcompress.evaluate.doctor import examine

        facts = examine(model)
        write(facts)
        show.examined(console, facts)
        if not facts["ok"]:
            raise typer.Exit(1)


@app.command()
def recipes(debug: Debug = False) -> None:
    """List the packaged recipes.

    Example: vqcompress recipes
    """
    known, to = packaged(), console()
    width = max((len(name) for name in known), default=0)
    for name, path in known.items():
        to.print(f"{name:{width}}  {description(path)}")


def set_up_memory() -> None:
    """Configure malloc: large tensors use huge pages and are returned when freed (docs/performance.md)."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    with contextlib.suppress(OSError, AttributeError, TypeError):
        # M_MMAP_THRESHOLD: by default it grows to 32 MiB, and freed memory below a live block is never returned.
        # M_TRIM_THRESHOLD: without it the pages of every strip of a weight are mapped again.
        # M_ARENA_MAX: up to 8 arenas per core would take 64 MB of address space each.
        for option, value in ((-3, 8 * 2**20), (-1, 16 * 2**20), (-8, 2)):
            ctypes.CDLL(None).mallopt(option, value)


def main() -> None:
    """The entry point of the `vqcompress` command."""
    set_up_memory()
    app(prog_name="vqcompress", obj=vqcompress.STARTED)
