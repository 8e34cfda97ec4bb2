"""The command line: its options, its errors, and the whole way from a checkpoint to text and back to a dense one."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import call, line
from toys import toy_checkpoint, toy_text
from typer.main import get_command
from typer.testing import CliRunner

import vqcompress
from vqcompress import errors
from vqcompress.cli.main import app
from vqcompress.cli.options import FORMATS
from vqcompress.cli.progress import StepBar

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
    # A line per block, and the command to type next.
    assert all(f"block {n + 1}/2 model.layers.{n}" in result.stderr for n in range(2))
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
    assert (unknown.exit_code, "'vq-2bit'" in line(unknown)) == (2, True)
    unknown = call("plan", toy, "--recipe", "vq-2bit", "--sample", "3")
    assert (unknown.exit_code, "--samples" in unknown.stderr) == (2, True)
    assert "'quantize'" in call("quantise").stderr
    assert call("plan", toy, "--recipe", "vq-2bit", "--device", "tpu").exit_code == 2
    missing = call("quantize", toy, "--recipe", "vq-2bit")
    assert missing.exit_code == 2
    assert "-o OUT" in line(missing)
    unknown = call("export", artifact, "--format", "dens", "-o", tmp_path / "x")
    assert unknown.exit_code == 2
    assert "'dense'" in line(unknown)
    seed = call("plan", toy, "--recipe", "vq-2bit", "--seed", 2**63)
    assert (seed.exit_code, "--seed" in seed.stderr) == (2, True)


def test_a_file_that_cannot_be_written_is_found_out_before_the_work(
    toy: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check_refused(place: Path | str) -> None:
        words = (["plan", toy, "--recipe", "vq-2bit", "--json"], ["compare", toy, "--text", text, "--html"])
        results = [call(*command, place) for command in words]
        assert [result.exit_code for result in results] == [2, 2]
        assert all(f"{place}: " in line(result) for result in results)

    monkeypatch.setattr("vqcompress.evaluate.compare.compare", None)
    monkeypatch.setattr("vqcompress.pipeline.quantize.dry_run", None)
    for place in (tmp_path, tmp_path / "no" / "x", "~nobody2/x"):
        check_refused(place)
    # Root may write everywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    check_refused(tmp_path / "x")


def test_failures_exit_1_with_one_line(toy: Path, text: Path, artifact: Path, tmp_path: Path) -> None:
    for words in (["inspect"], ["verify"], ["doctor"], ["plan", "--recipe", "vq-2bit"], ["eval", "speed"]):
        for place in (tmp_path / "nowhere", "~nobody2/nowhere"):
            result = call(*words, place)
            assert (result.exit_code, str(place) in line(result)) == (1, True)
    plain = call("inspect", toy)
    assert plain.exit_code == 1
    assert str(toy) in line(plain)
    short = call("eval", "perplexity", toy, "--text", tmp_path / "no.txt")
    assert (short.exit_code, str(tmp_path / "no.txt") in line(short)) == (1, True)
    again = call("quantize", toy, "-o", artifact, "--recipe", "fp8-tile")
    assert again.exit_code == 1
    assert str(artifact) in line(again)
    assert "--overwrite" in line(again)


@pytest.mark.parametrize("error", [errors.VQCompressError("it broke"), ZeroDivisionError("it broke")])
def test_a_traceback_only_with_debug(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr("vqcompress.cli.main.packaged", fail)
    result = call("recipes")
    assert result.exit_code == 1
    told = line(result)
    assert told.startswith("error: ")
    assert "it broke" in told
    assert ("--debug" in told) == (not isinstance(error, errors.VQCompressError))
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
    assert all(name in dry.stdout for name in ("model.layers.*.self_attn.q_proj", "lm_head.weight"))


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
    assert "report.json" in line(call("inspect", copy))


def test_verify(artifact: Path) -> None:
    result = call("verify", artifact)
    assert result.exit_code == 0, result.stderr
    assert str(artifact) in result.stdout
    assert json.loads(call("verify", artifact, "--json", "-").stdout)["targets"] == 14


def test_generate(artifact: Path, toy: Path) -> None:
    result = call("generate", artifact, "--prompt", "river stone", "--max-new-tokens", "9")
    assert result.exit_code == 0, result.stderr
    assert "tokens/s" in result.stderr
    assert result.stdout == call("generate", artifact, "--prompt", "river stone", "--max-new-tokens", "9").stdout
    drawn = [
        call("generate", toy, "--prompt", "river", "--max-new-tokens", "9", "--temperature", "2", "--seed", seed).stdout
        for seed in "112"
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    wrong = call("generate", toy, "--prompt", "")
    assert (wrong.exit_code, "--prompt" in line(wrong)) == (2, True)


def test_generate_writes_one_text_whatever_the_generation_config(toy: Path, tmp_path: Path) -> None:
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
    assert call("generate", toy, *words, "--temperature", "1e-7").stdout == expected


def test_a_prompt_as_long_as_the_context_is_too_long_by_itself(artifact: Path) -> None:
    result = call("generate", artifact, "--prompt", "river stone " * 400)
    assert result.exit_code == 2
    assert "--prompt" in line(result)


def test_eval(artifact: Path, toy: Path, text: Path) -> None:
    words = ["--text", text, "--seqlen", "32", "--windows", "4"]
    result = call("eval", "perplexity", artifact, *words, "--baseline", toy, "--json", "-")
    facts = json.loads(result.stdout)
    assert facts["baseline"]["perplexity"] > 1
    assert (facts["windows"], facts["seqlen"], facts["tokens"]) == (4, 32, 124)
    # The protocol is printed beside the figure.
    assert str(text) in result.stderr
    speed = call("eval", "speed", artifact, "--prompt-tokens", "8", "--new-tokens", "3")
    assert speed.exit_code == 0, speed.stderr
    words = ["--prompt-tokens", "8", "--new-tokens", "3", "--baseline", toy, "--cpu-weights", "packed"]
    speed = call("eval", "speed", artifact, *words, "--json", "-")
    facts = json.loads(speed.stdout)
    assert facts["decode_relative_to_baseline"] > 0
    assert facts["baseline"]["model"] == str(toy)


def test_export(artifact: Path, tmp_path: Path) -> None:
    out = tmp_path / "dense"
    result = call("export", artifact, "--format", "dense", "-o", out, "--json", "-")
    assert result.exit_code == 0, result.stderr
    assert str(out) in result.stderr.splitlines()[-1]
    assert json.loads(result.stdout)["format"] == "dense"
    assert call("generate", out, "--prompt", "river", "--max-new-tokens", "2").exit_code == 0


def test_doctor(toy: Path) -> None:
    result = call("doctor", toy)
    assert result.exit_code == 0, result.stderr
    assert "LlamaForCausalLM" in result.stdout


def test_doctor_fails(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {
        "architecture": "Odd", "ok": False, "checks": [{"name": "a check", "ok": False, "detail": "no"}],
        "targets": 0, "coverage": 0.0, "folds": [], "left_dense": {},
    }  # fmt: skip
    monkeypatch.setattr("vqcompress.evaluate.doctor.examine", lambda model: facts)
    result = call("doctor", toy)
    assert result.exit_code == 1
    assert "a check" in result.stdout


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
    assert seen[-1].startswith("interrupted")
    assert "model.layers.0" in json.loads((tmp_path / "out" / "journal.json").read_text())["blocks"]


def test_ctrl_c_during_imports_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("raise KeyboardInterrupt")
    path = os.pathsep.join([str(tmp_path), *sys.path])
    words = [sys.executable, "-m", "vqcompress", "recipes"]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_a_log_has_at_most_nine_lines_of_a_step(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a terminal progress is lines on stderr: the beginning and each eighth."""
    bar = StepBar("waiting")
    with bar.bars:
        for done in range(101):
            bar.count("counting", done, 100)
    told = capsys.readouterr()
    assert told.out == ""
    assert len(told.err.splitlines()) == 9
