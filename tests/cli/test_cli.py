"""The command line: its options, its errors, and the whole way from a checkpoint to text and back to a dense one."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from rich.console import Console
from toys import toy_checkpoint, toy_text
from typer.main import get_command
from typer.testing import CliRunner

import vqcompress
from vqcompress import errors
from vqcompress.cli import console as session
from vqcompress.cli import progress as live
from vqcompress.cli import tables as show
from vqcompress.cli.main import app
from vqcompress.cli.options import FORMATS
from vqcompress.storage.targets import Block, Target

CONFIGS = Path(__file__).parent.parent.parent / "configs"
QUANTIZE = {
    "--recipe",
    "--target-bits",
    "--calibration",
    "--samples",
    "--seqlen",
    "--seed",
    "--device",
    "--json",
    "--debug",
}
TRUST = {"--trust-remote-code"}
HUB = {"--revision", *TRUST}
UPLOAD = {"--push-to-hub", "--private"}
# The scripts of users rely on every one of these; one that goes away, or a new one, is a decision.
OPTIONS = {
    "": {"--version", "--debug", "--install-completion", "--show-completion"},
    "quantize": QUANTIZE | HUB | UPLOAD | {"--output", "-o", "--dry-run", "--overwrite", "--states", "--kv-cache"},
    "plan": QUANTIZE | HUB | {"--states", "--kv-cache"},
    "eval perplexity": HUB | {
        "--text", "--seqlen", "--stride", "--windows", "--baseline", "--device", "--json", "--debug", "--kv-cache",
        "--report",
    },
    "eval speed": HUB | {
        "--prompt-tokens", "--new-tokens", "--batch", "--baseline", "--cpu-weights", "--device", "--json", "--debug",
        "--kv-cache",
    },
    "compare": TRUST
    | {"--text", "--baseline", "--seqlen", "--stride", "--windows", "--html", "--device", "--json", "--debug"},
    "export": UPLOAD | TRUST | {"--format", "--output", "-o", "--verify", "--overwrite", "--json", "--debug"},
    "inspect": TRUST | {"--json", "--debug"},
    "verify": TRUST | {"--json", "--debug"},
    "generate": HUB
    | {"--prompt", "--max-new-tokens", "--temperature", "--seed", "--cpu-weights", "--debug", "--kv-cache"},
    "doctor": HUB | {"--json", "--debug"},
    "recipes": {"--debug"},
}  # fmt: skip
COMMANDS = [name for name in OPTIONS if name]


def call(*words: str | Path) -> Any:
    """The result of a command, run in this process."""
    return CliRunner().invoke(app, [str(word) for word in words], prog_name="vqcompress")


def line(result: Any) -> str:
    """The one line that a failure wrote to stderr."""
    assert result.stdout == ""
    lines = [text for text in result.stderr.splitlines() if not text.startswith("reading ")]
    assert len(lines) == 1, result.stderr
    return lines[0]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_checkpoint(tmp_path_factory.mktemp("toy") / "llama")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(toy_text(1500))
    return path


@pytest.fixture(scope="module")
def job(text: Path) -> list[str]:
    """The options of a small run."""
    return ["--recipe", "vq-2bit", "--calibration", str(text), "--samples", "8", "--seqlen", "32", "--device", "cpu"]


@pytest.fixture(scope="module")
def artifact(toy: Path, job: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "artifact"
    result = call("quantize", toy, "-o", out, *job, "--json", out.parent / "report.json")
    assert result.exit_code == 0, result.stderr
    lines = result.stderr.splitlines()
    assert lines[1] == "14 weights in 2 blocks to do"
    assert re.fullmatch(
        r"block 1/2 model\.layers\.0: 7 weights, 2\.\d\d bits, relative error 0\.\d+, [\d.]+ s, about [\d.]+ s left",
        lines[2],
    )
    assert f"vqcompress eval perplexity {out} --text FILE --baseline {toy}" in result.stdout
    assert json.loads((out.parent / "report.json").read_text()) == json.loads((out / "report.json").read_text())
    return out


def test_help_recipes_and_typos_load_no_torch(tmp_path: Path) -> None:
    calls = [["--help"], ["recipes"], ["--version"], *([*name.split(), "--help"] for name in COMMANDS)]
    calls += [["quantize", "demo", "-o", "out", "--recipe", "vq-2bt"], ["quantize", "demo", "-o", "demo"]]
    calls += [["plan", "demo", "--recipe", "fp8-tile", "--calibration", "no.txt"]]
    calls += [
        ["generate", "out", "--prompt", "x", "--kv-cache", "kv"],
        ["export", "out", "--format", "gguf", "-o", "x"],
    ]
    calls += [["eval", "perplexity", "demo", "--text", "no.txt"], ["compare", "demo", "--text", "no.txt"]]
    job = ["quantize", "demo", "-o", "out"]
    calls += [job, [*job, "--target-bits", "9"], [*job, "--recipe", "fp8-tile", "--private"], ["inspect", "./nowhere"]]
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "vqcompress"}}')
    calls += [["quantize", "demo", "-o", str(tmp_path), "--recipe", "fp8-tile"]]
    script = f"""
import sys, contextlib, io
from vqcompress.cli.main import app
for words in {calls}:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        app(words)
print([m for m in ("torch", "transformers", "numpy") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_help_answers_at_once() -> None:
    seconds = []
    # The best of three: other tests may run beside this one.
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "vqcompress", "--help"], capture_output=True, check=True)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "recipes"])
def test_what_is_read_is_named_before_the_imports(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop() -> None:
        raise errors.VQCompressError("enough")

    monkeypatch.setattr(session, "_quiet", stop)
    needed = {"quantize": "-o x --recipe fp8-tile", "plan": "--recipe fp8-tile", "export": "--format fp8 -o x"}
    needed |= dict.fromkeys(("eval perplexity", "compare"), f"--text {__file__}") | {"generate": "--prompt x"}
    result = call(*name.split(), "demo", *needed.get(name, "").split())
    assert result.stderr == "reading demo\nerror: enough\n"


def test_a_command_takes_as_long_as_its_process(toy: Path, artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    began = time.perf_counter() - 1000
    result = CliRunner().invoke(app, ["verify", str(artifact)], obj=began)
    assert ", 16 min 4" in result.stdout
    assert ", 16 min 4" not in call("verify", artifact).stdout


def test_commands_and_options_are_frozen() -> None:
    found: dict[str, set[str]] = {}

    def walk(command: Any, name: str) -> None:
        options = {o for p in command.params if p.param_type_name == "option" for o in (*p.opts, *p.secondary_opts)}
        if not hasattr(command, "commands") or not name:
            found[name] = options
        for child, inner in getattr(command, "commands", {}).items():
            walk(inner, f"{name} {child}".strip())

    walk(get_command(app), "")
    assert found == OPTIONS


def examples() -> list[str]:
    """The examples in the help of all commands, without what a shell makes of them."""
    found: list[str] = []

    def walk(command: Any) -> None:
        found.extend(re.findall(r"^Example: (.+)$", command.help or "", re.MULTILINE))
        for inner in getattr(command, "commands", {}).values():
            walk(inner)

    walk(get_command(app))
    return found


@pytest.mark.parametrize("example", examples())
def test_examples_can_be_typed(example: str) -> None:
    """Every word is a command's, an option's or an argument's; nothing is run."""
    name, *words = shlex.split(example)
    assert name == "vqcompress"
    command: Any = get_command(app)
    context = command.make_context(name, words)
    while hasattr(command, "commands"):
        _, command, words = command.resolve_command(context, [*context._protected_args, *context.args])
        context = command.make_context(command.name, words, parent=context)
    if "format" in context.params:
        assert context.params["format"] in FORMATS
    if recipe := context.params.get("recipe"):
        assert (CONFIGS / f"{recipe}.yaml").is_file()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("quantize demo --recipe vq-2", ["vq-2bit", "vq-2bit-aqlm", "vq-2bit-tuned"]),
        ("plan demo --recipe kv", []),
        ("generate out --kv-cache kv-f", ["kv-fp8"]),
        ("export out --format d", ["dense"]),
        ("eval perplexity out --kv-cache kv-vq-2", ["kv-vq-2bit"]),
        ("quan", ["quantize"]),
        ("quantize de", ["demo"]),
        ("eval perplexity demo", ["demo"]),
        ("doctor /de", []),
    ],
)
def test_values_complete(words: str, expected: list[str]) -> None:
    """By the protocol that the scripts of --install-completion speak."""
    lines = f"vqcompress {words}"
    bash = {"COMP_WORDS": lines, "COMP_CWORD": str(len(lines.split()) - 1), "_VQCOMPRESS_COMPLETE": "complete_bash"}
    assert sorted(CliRunner().invoke(app, [], env=bash, prog_name="vqcompress").stdout.split()) == expected
    zsh = {"_TYPER_COMPLETE_ARGS": lines, "_VQCOMPRESS_COMPLETE": "complete_zsh"}
    shown = CliRunner().invoke(app, [], env=zsh, prog_name="vqcompress").stdout
    assert all(f'"{name}"' in shown for name in expected)


def test_formats_that_complete_are_those_that_exist() -> None:
    from vqcompress.export import FORMATS as exporters

    assert set(FORMATS) == set(exporters)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_an_example(name: str) -> None:
    result = call(*name.split(), "--help")
    assert result.exit_code == 0
    assert f"Example: vqcompress {name}" in result.stdout


def test_version() -> None:
    assert call("--version").stdout == f"vqcompress {vqcompress.__version__}\n"
    assert {"load", "__version__"} <= set(dir(vqcompress))


def test_recipes_lists_every_packaged_file() -> None:
    lines = call("recipes").stdout.splitlines()
    expected = {path.stem: yaml.safe_load(path.read_text())["description"] for path in CONFIGS.glob("*.yaml")}
    assert {text.split()[0]: text.split(maxsplit=1)[1] for text in lines} == expected


def test_wrong_words_exit_2(toy: Path, artifact: Path, tmp_path: Path) -> None:
    unknown = call("plan", toy, "--recipe", "vq-2bt")
    assert (unknown.exit_code, line(unknown)) == (2, "error: no recipe 'vq-2bt'. Did you mean 'vq-2bit'?")
    unknown = call("plan", toy, "--recipe", "vq-2bit", "--sample", "3")
    assert (unknown.exit_code, "--samples" in unknown.stderr) == (2, True)
    assert "Did you mean 'quantize'?" in call("quantise").stderr
    assert call("plan", toy, "--recipe", "vq-2bit", "--device", "tpu").exit_code == 2
    missing = call("quantize", toy, "--recipe", "vq-2bit")
    assert missing.exit_code == 2
    assert "-o OUT is missing" in line(missing)
    unknown = call("export", artifact, "--format", "dens", "-o", tmp_path / "x")
    assert unknown.exit_code == 2
    assert "'dense'" in line(unknown)
    seed = call("plan", toy, "--recipe", "vq-2bit", "--seed", 2**63)
    assert (seed.exit_code, "Invalid value for '--seed'" in seed.stderr) == (2, True)


def test_a_file_that_cannot_be_written_is_found_out_before_the_work(
    toy: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(place: Path | str) -> set[str]:
        words = (["plan", toy, "--recipe", "vq-2bit", "--json"], ["compare", toy, "--text", text, "--html"])
        results = [call(*command, place) for command in words]
        assert [result.exit_code for result in results] == [2, 2]
        return {line(result).partition(f"{place}: ")[2] for result in results}

    monkeypatch.setattr("vqcompress.evaluate.compare.compare", None)
    monkeypatch.setattr("vqcompress.pipeline.quantize.dry_run", None)
    assert wrong(tmp_path) == {"is a directory; name a file in it"}
    for place in (tmp_path / "no" / "x", "~nobody2/x"):
        assert wrong(place) == {"its directory does not exist"}
    # As root, who runs tests in a container, may write everywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    assert wrong(tmp_path / "x") == {"may not be written by this user"}


def test_failures_exit_1_with_one_line(toy: Path, text: Path, artifact: Path, tmp_path: Path) -> None:
    for words in (["inspect"], ["verify"], ["doctor"], ["plan", "--recipe", "vq-2bit"], ["eval", "speed"]):
        for place in (tmp_path / "nowhere", "~nobody2/nowhere"):
            result = call(*words, place)
            assert (result.exit_code, line(result)) == (1, f"error: no such directory: {place}")
    plain = call("inspect", toy)
    assert plain.exit_code == 1
    assert "is a plain checkpoint, not an artifact" in line(plain)
    short = call("eval", "perplexity", toy, "--text", tmp_path / "no.txt")
    assert (short.exit_code, line(short)) == (1, f"error: no such text file: {tmp_path / 'no.txt'}")
    again = call("quantize", toy, "-o", artifact, "--recipe", "fp8-tile")
    assert again.exit_code == 1
    assert "already holds a finished artifact; choose another directory or give --overwrite" in line(again)


@pytest.mark.parametrize("error", [errors.VQCompressError("it broke"), ZeroDivisionError("it broke")])
def test_a_traceback_only_with_debug(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr("vqcompress.cli.main.packaged", fail)
    result = call("recipes")
    assert result.exit_code == 1
    hint = "" if isinstance(error, errors.VQCompressError) else " (give --debug for the traceback)"
    assert line(result).startswith("error: ")
    assert line(result).endswith("it broke" + hint)
    for words in (["recipes", "--debug"], ["--debug", "recipes"]):
        result = call(*words)
        assert result.exit_code == 1
        assert "Traceback" in result.stderr
    assert "Traceback" not in call("recipes").stderr


def test_json_on_stdout_is_all_there_is(toy: Path, job: list[str], tmp_path: Path) -> None:
    result = call("plan", toy, *job, "--json", "-")
    plan = json.loads(result.stdout)
    assert len(plan["targets"]) == 14
    assert "model.layers.*.mlp.down_proj" in result.stderr
    dry = call("quantize", toy, "-o", tmp_path / "out", *job, "--dry-run", "--json", tmp_path / "plan.json")
    assert json.loads((tmp_path / "plan.json").read_text())["targets"] == plan["targets"]
    assert not (tmp_path / "out").exists()
    assert re.search(r"model\.layers\.\*\.self_attn\.q_proj +2 +128 × 128 +vq", dry.stdout)
    assert "dense   lm_head.weight" in dry.stdout


def test_a_plan_needs_only_a_config(toy: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((toy / "config.json").read_bytes())
    result = call("plan", tmp_path, "--recipe", "vq-4bit")
    assert result.exit_code == 0, result.stderr


def test_inspect_agrees_with_the_report(artifact: Path) -> None:
    facts = json.loads(call("inspect", artifact, "--json", "-").stdout)
    report = json.loads((artifact / "report.json").read_text())
    for key in ("bits_per_weight", "weights_quantized", "artifact_bytes", "source_bytes"):
        assert facts[key] == pytest.approx(report[key]), key
    for row, expected in zip(facts["targets"], report["targets"], strict=True):
        assert (row["options"]["codebook"], row["options"]["bits"]) == ("trellis", 2)
        for key in ("name", "shape", "bits_per_weight", "relative_error", "proxy_error", "tokens"):
            assert row[key] == (pytest.approx(expected[key]) if isinstance(expected[key], float) else expected[key])
    shown = call("inspect", artifact).stdout
    assert all(row["name"] in shown for row in report["targets"])


@pytest.mark.parametrize("columns", [24, 40, 60, 80, 100, 200])
def test_tables_keep_names_in_a_narrow_terminal(columns: int, artifact: Path, toy: Path) -> None:
    from vqcompress.evaluate.inspect import inspect
    from vqcompress.pipeline.quantize import QuantizeOptions, dry_run

    facts, plan, shown = (
        inspect(str(artifact)),
        dry_run(QuantizeOptions(str(toy), None, None, target_bits=2.5)),
        io.StringIO(),
    )
    for print_table, given in ((show.inspected, facts), (show.planned, plan)):
        print_table(Console(file=shown, width=columns), given)
        table = [text for text in shown.getvalue().splitlines() if text.startswith(" ")]
        assert all(len(text) <= columns for text in table)
        lines = [text[1:].split("  ")[0].strip() for text in table]
        names = {show.kind(row["name"]) if given is plan else row["name"] for row in given["targets"]}
        assert [name for name in names if name not in "".join(lines)] == []
        # Where there is room for that, lines end at dots.
        assert columns < 60 or any(text.endswith("self_attn.q_proj") for text in lines)
        shown.seek(shown.truncate(0))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_breaks_lines_between_words_and_a_log_keeps_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    words = " ".join(f"--option-{n}" for n in range(40))
    for stream, lines in ((Terminal(), 11), (io.StringIO(), 1)):
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", "50")
        session.console().print(f":x: [b] {words}")
        assert len(stream.getvalue().splitlines()) == lines
        assert stream.getvalue().split() == [":x:", "[b]", *words.split()]


def test_inspect_without_a_report(artifact: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in artifact.iterdir():
        if path.name != "report.json":
            (copy / path.name).symlink_to(path)
    result = call("inspect", copy, "--json", tmp_path / "facts.json")
    assert result.exit_code == 0, result.stderr
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert facts["targets"][0]["relative_error"] is None
    (copy / "report.json").write_text("[]")
    assert "is not a report of vqcompress" in line(call("inspect", copy))


def test_verify(artifact: Path) -> None:
    result = call("verify", artifact)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith(f"{artifact}: ok (3 files, 14 targets, ")


def test_generate(artifact: Path, toy: Path) -> None:
    result = call("generate", artifact, "--prompt", "river stone", "--max-new-tokens", "9")
    assert result.exit_code == 0, result.stderr
    assert re.fullmatch(r"reading .*\n\d tokens, [\d.]+ tokens/s\n", result.stderr)
    assert result.stdout == call("generate", artifact, "--prompt", "river stone", "--max-new-tokens", "9").stdout
    drawn = [
        call("generate", toy, "--prompt", "river", "--max-new-tokens", "9", "--temperature", "2", "--seed", seed).stdout
        for seed in "112"
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    for prompt, said in (("", "--prompt is empty"), ("\udcff", "is not UTF-8 text")):
        wrong = call("generate", toy, "--prompt", prompt)
        assert (wrong.exit_code, said in line(wrong)) == (2, True)


def test_generate_takes_one_text_whatever_the_model_says_of_generating(toy: Path, tmp_path: Path) -> None:
    words, copy = ["--prompt", "river", "--max-new-tokens", "4"], tmp_path / "copy"
    expected = call("generate", toy, *words).stdout
    shutil.copytree(toy, copy)
    for settings in (
        {"num_beams": 2},
        {"num_return_sequences": 2, "do_sample": True},
        {"return_dict_in_generate": True},
    ):
        (copy / "generation_config.json").write_text(json.dumps(settings))
        assert call("generate", copy, *words).stdout == expected
    (copy / "generation_config.json").write_text(json.dumps({"stop_strings": [expected.strip()[:1]]}))
    assert expected.startswith(stopped := call("generate", copy, *words).stdout.strip("\n"))
    assert stopped != expected.strip("\n")
    for temperature in ("1e-40", "1e-7"):
        assert call("generate", toy, *words, "--temperature", temperature).stdout == expected


def test_a_prompt_as_long_as_the_context_is_too_long_by_itself(artifact: Path) -> None:
    result = call("generate", artifact, "--prompt", "river stone " * 400)
    assert result.exit_code == 2
    assert re.search(
        r"--prompt has \d+ tokens, and the model's context of \d+ leaves no room .*; shorten it", line(result)
    )


def test_generate_streams_the_text_that_it_returns(artifact: Path) -> None:
    from vqcompress.runtime.generate import generate

    pieces: list[str] = []
    result = generate(str(artifact), "river stone", 12, 1.0, 4, pieces.append)
    assert "".join(pieces) == result["text"]
    assert result["new_tokens"] <= 12


def test_eval(artifact: Path, toy: Path, text: Path) -> None:
    words = ["--text", text, "--seqlen", "32", "--windows", "4"]
    result = call("eval", "perplexity", artifact, *words, "--baseline", toy, "--json", "-")
    facts = json.loads(result.stdout)
    assert facts["baseline"]["perplexity"] > 1
    assert f"{text}: 4 windows × 32 tokens, stride 32, no BOS, 124 tokens predicted" in result.stderr
    speed = call("eval", "speed", artifact, "--prompt-tokens", "8", "--new-tokens", "3")
    assert speed.exit_code == 0, speed.stderr
    assert "measured             8 prompt tokens, 3 new, batch 1, on" in speed.stdout
    words = ["--prompt-tokens", "8", "--new-tokens", "3", "--baseline", toy, "--cpu-weights", "packed"]
    speed = call("eval", "speed", artifact, *words, "--json", "-")
    facts = json.loads(speed.stdout)
    assert facts["decode_relative_to_baseline"] > 0
    assert facts["baseline"]["model"] == str(toy)
    assert f"speed relative to {toy}: prefill" in speed.stderr


def test_export(artifact: Path, tmp_path: Path) -> None:
    out = tmp_path / "dense"
    result = call("export", artifact, "--format", "dense", "-o", out, "--json", "-")
    assert result.exit_code == 0, result.stderr
    assert result.stderr.splitlines()[-1] == f'next    AutoModelForCausalLM.from_pretrained("{out}")'
    assert json.loads(result.stdout)["format"] == "dense"
    assert call("generate", out, "--prompt", "river", "--max-new-tokens", "2").exit_code == 0


def test_doctor(toy: Path) -> None:
    result = call("doctor", toy)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("LlamaForCausalLM: ok\n")


def test_doctor_fails(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {
        "architecture": "Odd", "ok": False, "checks": [{"name": "a check", "ok": False, "detail": "no"}],
        "targets": 0, "coverage": 0.0, "folds": [], "left_dense": {},
    }  # fmt: skip
    monkeypatch.setattr("vqcompress.evaluate.doctor.examine", lambda model: facts)
    result = call("doctor", toy)
    assert (result.exit_code, result.stderr) == (1, f"reading {toy}\n")
    assert "FAIL  a check: no" in result.stdout


def test_an_interrupted_run_says_how_to_go_on(job: list[str], tmp_path: Path) -> None:
    # Layers enough that the run is not over before the signal arrives.
    toy = toy_checkpoint(tmp_path / "toy", layers=5)
    command = [sys.executable, "-m", "vqcompress", "quantize", str(toy), "-o", str(tmp_path / "out"), *job]
    # Python leaves Ctrl-C ignored if its parent does, as a job in the background of a shell is.
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert process.stderr is not None
    seen = []
    for output in process.stderr:
        seen.append(output)
        if output.startswith("block 1/5"):
            process.send_signal(signal.SIGINT)
    assert process.wait() == 130, seen
    assert seen[-1] == "interrupted: the finished blocks are kept, the same command again continues after them\n"
    assert "model.layers.0" in json.loads((tmp_path / "out" / "journal.json").read_text())["blocks"]


def test_ctrl_c_before_anything_is_finished_promises_nothing(job: list[str], toy: Path, tmp_path: Path) -> None:
    def pressed(*args: Any) -> Any:
        raise KeyboardInterrupt

    for name, said in (("compress_block", "does the rest"), ("_prepare", "does the rest")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(f"vqcompress.pipeline.quantize.{name}", pressed)
            result = call("quantize", toy, "-o", tmp_path / "out", *job)
        assert result.exit_code == 130
        assert result.stderr.splitlines()[-1] == f"interrupted: the same command again {said}"


def test_ctrl_c_during_imports_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("raise KeyboardInterrupt")
    path = os.pathsep.join([str(tmp_path), *sys.path])
    words = [sys.executable, "-m", "vqcompress", "recipes"]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


class TwoBlocks:
    """As much of a plan as progress reads."""

    blocks = (
        Block("layers.0", (Target("layers.0.a", (8, 8), False), Target("layers.0.b", (8, 8), False))),
        Block("layers.1", (Target("layers.1.a", (8, 8), False),)),
    )

    targets = (*blocks[0].targets, *blocks[1].targets)
    goes_on = False

    def compressed(self, block: Block) -> tuple[Target, ...]:
        return block.targets


def test_the_log_of_a_continued_run(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"shape": [8, 8], "bits_per_weight": 2.0, "relative_error": 0.0711}
    with live.watching() as watch:
        watch("plan", {"plan": TwoBlocks(), "done": ["layers.0"]})
        watch("done", {"index": 0, "count": 2, "name": "layers.0", "record": {"targets": [row, row], "seconds": 9}})
        watch("target", {"name": "layers.1.a"})
        watch("done", {"index": 1, "count": 2, "name": "layers.1", "record": {"targets": [row], "seconds": 1.25}})
    assert capsys.readouterr().err.splitlines() == [
        "1 weight in 1 block to do, 1 block is done already",
        "block 1/2 layers.0: done by an earlier run",
        "block 2/2 layers.1: 1 weight, 2.00 bits, relative error 0.0711, 1.2 s",
    ]


def test_the_log_of_a_cache_alone(capsys: pytest.CaptureFixture[str]) -> None:
    plan = SimpleNamespace(blocks=TwoBlocks.blocks, targets=(), compressed=lambda block: (), goes_on=True)
    with live.watching() as watch:
        watch("plan", {"plan": plan, "done": []})
        for n in range(2):
            record = {"targets": [], "seconds": 1}
            watch("done", {"index": n, "count": 2, "name": f"layers.{n}", "record": record})
        for done in range(17):
            watch("after", {"what": "gathering, batch", "done": done, "total": 16})
        for done in range(3):
            watch("after", {"what": "learning, layer", "done": done, "total": 2})
    first, *lines = capsys.readouterr().err.splitlines()
    assert first == "the weights stay as they are: 2 blocks to copy"
    told = [f"gathering, batch {n}/16" for n in range(0, 17, 2)] + [f"learning, layer {n}/2" for n in range(3)]
    assert [line.partition(",")[0] + "," + line.split(",")[1] for line in lines] == told
    assert all(re.search(r", about [\d.]+ s left$", line) for line in (*lines[1:8], lines[10]))


def run_for_a_moment(watch: Callable[[str, dict[str, Any]], None]) -> None:
    row = {"shape": [8, 8], "bits_per_weight": 2.0, "relative_error": 0.0711}
    watch("plan", {"plan": TwoBlocks(), "done": []})
    watch("block", {"index": 0, "count": 2, "name": "layers.0"})
    watch("target", {"name": "layers.0.a", "row": row})


def test_the_live_table_of_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "150")
    with contextlib.suppress(KeyboardInterrupt), live.watching() as watch:
        run_for_a_moment(watch)
        # Wait for the next refresh, ten of which come each second.
        time.sleep(0.3)
        raise KeyboardInterrupt
    written = sys.stderr.getvalue()  # type: ignore[attr-defined]
    # Whatever ends it, the cursor is shown again.
    assert written.rindex("\x1b[?25h") > written.rindex("\x1b[?25l")
    seen = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", written)
    assert re.search(r"1/2 +a +2\.00 +7\.11e-02", seen)
    assert re.search(r"block 1/2 +━.* about [\d.]+ s left  [\d.]+ M weights/s", seen)


@pytest.mark.parametrize("columns", [30, 40, 80])
def test_the_live_table_fits_into_a_narrow_terminal(columns: int) -> None:
    screen, shown = live._Screen(), io.StringIO()
    run_for_a_moment(screen.draw)
    Console(file=shown, width=columns).print(screen)
    # Title, rule, row, blank line and bar: nothing is broken into two lines.
    lines = [text for text in shown.getvalue().splitlines() if text.strip()]
    assert len(lines) == 4
    assert "2.00" in lines[2]
    assert "block 1/2" in lines[3]


def test_targets_may_come_while_the_table_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = live._Screen()
    run_for_a_moment(screen.draw)
    monkeypatch.setattr(live.Table, "add_row", lambda table, *row: screen.recent.append(row))
    screen.__rich__()
    assert len(screen.recent) == 2


def test_the_time_left_leaves_the_first_step_out(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([100.0, 101.0, 102.0, 103.0])
    monkeypatch.setattr("vqcompress.cli.tables.time.perf_counter", lambda: next(clock))
    with show.counting("perplexity") as watch:
        for done in (25, 50, 75, 100):
            watch(done, 100)
    assert capsys.readouterr().err.splitlines() == [
        "perplexity: 25 %",
        "perplexity: 50 %, about 2.0 s left",
        "perplexity: 75 %, about 1.0 s left",
        "perplexity: 100 %, done",
    ]


def test_the_time_left_goes_by_whole_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("vqcompress.cli.progress.time.perf_counter", lambda: now)
    run, plan = live._Run(), TwoBlocks()
    run.plan({"plan": plan, "done": []})
    run.done, now = 64, 10.0
    # The weights of the first block: twice as many are left.
    assert run.left() == "about 20 s left"
    run.done, now = 128, 16.0
    run.mark = run.done, now
    assert run.left() == "about 8.0 s left"
    now = 18.0
    assert run.left() == "about 6.0 s left"
    plan.goes_on = True
    run.plan({"plan": plan, "done": []})
    run.done, now = 64, 28.0
    assert run.left() == "about 20 s left for the blocks"
    run.after({"done": 0, "total": 4})
    now = 38.0
    run.after({"done": 2, "total": 4})
    now = 42.0
    assert run.left() == "about 6.0 s left"
