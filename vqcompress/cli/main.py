"""The command line. Everything heavy is imported inside a command, so that help answers at once."""

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
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="OUT", help="Directory to write the artifact to.")
    ] = None,
    target_bits: TargetBits = None,
    calibration: Calibration = None,
    samples: Samples = None,
    seqlen: Seqlen = None,
    seed: Seed = 0,
    device: Where = Device.auto,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan, write nothing.")] = False,
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
    """Compress a model; the same command again continues a run that was cut off.

    Example: vqcompress quantize demo -o out --recipe vq-2bit
    """
    model = pinned(model, revision)
    if dry_run:
        if push_to_hub or private:
            raise UsageError("--dry-run writes nothing to upload; leave it out, or --push-to-hub and --private")
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
        raise UsageError("-o OUT is missing: the directory to write the artifact to (or give --dry-run)")
    if str(output) == "demo":
        raise UsageError("-o demo: every command takes that name for the packaged checkpoint; choose another")
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
    """Show what quantize would do: targets, bits, sizes, memory. A config.json is enough.

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
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="Directory to write to.")],
    verify: Annotated[bool, typer.Option("--verify", help="Load it with its own reader; compare logits.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export there.")] = False,
    trust_remote_code: Trust = False,
    push_to_hub: Push = None,
    private: Private = False,
    json_file: Json = None,
    debug: Debug = False,
) -> None:
    """Rewrite an artifact in a format that other runtimes load: docs/export.md says what each holds.

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
    """Show what an artifact holds, a row per compressed weight.

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
    """Check an artifact: checksums, shapes, ranges of codes, finiteness.

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
    prompt: Annotated[str, typer.Option("--prompt", metavar="TEXT", help="The text to continue.")],
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="At most so many tokens.")] = 64,
    temperature: Annotated[float, typer.Option("--temperature", min=0, help="0 takes the likeliest token.")] = 0.0,
    seed: Seed = 0,
    kv_cache: KVCache = None,
    cpu_weights: CpuWeights = Weights.auto,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    debug: Debug = False,
) -> None:
    """Continue a prompt; then tokens per second, on stderr.

    Example: vqcompress generate out --prompt "Once upon a time"
    """
    artifact = pinned(artifact, revision)
    with session([artifact], None, (kv_cache,)):
        from vqcompress.runtime.generate import generate as run

        knobs = max_new_tokens, temperature, seed
        say = lambda text: print(text, end="", flush=True)  # noqa: E731
        result = run(artifact, prompt, *knobs, say, cpu_weights.value, kv_cache)
        print(flush=True)
        print(f"{result['new_tokens']} tokens, {result['tokens_per_second']} tokens/s", file=sys.stderr)


@app.command()
def doctor(
    model: Model,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    json_file: Json = None,
    debug: Debug = False,
) -> None:
    """Try an architecture: does it run block by block, what can be compressed, what stays dense.

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
    """Large tensors in large pages of Linux, given back when they are freed, unlike small ones: docs/performance.md."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    with contextlib.suppress(OSError, AttributeError, TypeError):
        # M_MMAP_THRESHOLD of glibc, which otherwise grows to 32 MiB; what lies below the next thing then stays.
        # M_TRIM_THRESHOLD: without it every strip of a weight takes its pages anew.
        # M_ARENA_MAX: each of up to 8 heaps a core takes 64 MB of address space.
        for option, value in ((-3, 8 * 2**20), (-1, 16 * 2**20), (-8, 2)):
            ctypes.CDLL(None).mallopt(option, value)


def main() -> None:
    """The entry point of the `vqcompress` command."""
    set_up_memory()
    app(prog_name="vqcompress", obj=vqcompress.STARTED)
