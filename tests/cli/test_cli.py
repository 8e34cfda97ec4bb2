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
from toys import toy_checkpoint
from typer.main import get_command
from typer.testing import CliRunner

import vqcompress
from vqcompress import errors
from vqcompress.cli.main import app
from vqcompress.cli.progress import StepBar

CONFIGS = Path(__file__).parent.parent.parent / "configs"
COMMON = {"--trust-remote-code", "--json", "--debug"}
RUN = {"--recipe", "--target-bits", "--calibration", "--samples", "--seqlen", "--seed", "--device", "--states"}
RUN |= COMMON | {"--kv-cache", "--revision", "--bos"}
UPLOAD = {"--push-to-hub", "--private", "--output", "-o", "--overwrite"}
WINDOWS = COMMON | {"--text", "--baseline", "--seqlen", "--stride", "--windows", "--device", "--bos"}
# Scripts of users rely on every one of these; one that goes away, or a new one, is a decision.
OPTIONS = {
    "": {"--version", "--install-completion", "--show-completion"},
    "quantize": RUN | UPLOAD | {"--dry-run"},
    "plan": RUN,
    "eval perplexity": WINDOWS | {"--kv-cache", "--report", "--revision"},
    "eval speed": COMMON
    | {"--prompt-tokens", "--new-tokens", "--batch", "--baseline", "--cpu-weights", "--device", "--kv-cache"}
    | {"--revision"},
    "compare": WINDOWS | {"--html"},
    "export": COMMON | UPLOAD | {"--format", "--verify"},
    "inspect": COMMON,
    "verify": COMMON | {"--quick"},
    "generate": {"--prompt", "--max-new-tokens", "--temperature", "--seed", "--cpu-weights", "--debug", "--kv-cache"}
    | {"--revision", "--trust-remote-code"},
    "doctor": COMMON | {"--revision"},
    "recipes": {"--debug"},
}
COMMANDS = [name for name in OPTIONS if name]


@pytest.fixture(scope="module")
def small(toy: Any) -> Path:
    """The checkpoint."""
    return Path(toy())


@pytest.fixture(scope="module")
def job(text: Path) -> list[str]:
    """The options of a small run."""
    return ["--recipe", "vq-4bit", "--calibration", str(text), "--samples", "4", "--seqlen", "32", "--device", "cpu"]


@pytest.fixture(scope="module")
def artifact(quantized: Any) -> Path:
    return Path(quantized("vq-small"))


def commands() -> dict[str, Any]:
    """Every command by its name; "" is the program."""
    found: dict[str, Any] = {}

    def walk(command: Any, name: str) -> None:
        inner = getattr(command, "commands", {})
        if not inner or not name:
            found[name] = command
        for child, its in inner.items():
            walk(its, f"{name} {child}".strip())

    walk(get_command(app), "")
    return found


def test_commands_and_options_are_frozen() -> None:
    options = {
        name: {
            o
            for param in command.params
            if param.param_type_name == "option"
            for o in param.opts + param.secondary_opts
        }
        for name, command in commands().items()
    }
    assert options == OPTIONS


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_an_example_that_can_be_typed(name: str) -> None:
    """Each word is a command, an option or an argument; nothing is run."""
    result = call(*name.split(), "--help")
    assert (result.exit_code, "<bool>" in result.stdout) == (0, False)
    (example,) = re.findall(r"^Example: (.+)$", commands()[name].help, re.MULTILINE)
    words = shlex.split(example)
    assert words[: 1 + len(name.split())] == ["vqcompress", *name.split()]
    assert {word for word in words if word.startswith("-")} <= OPTIONS[name]
    assert "--recipe" not in words or (CONFIGS / f"{words[words.index('--recipe') + 1]}.yaml").is_file()


def test_help_and_typos_load_no_torch(tmp_path: Path) -> None:
    job = ["quantize", "demo", "-o", "out"]
    calls = [["--help"], ["recipes"], ["--version"], ["quantize", "--help"], job, [*job, "--target-bits", "9"]]
    calls += [[*job, "--recipe", "vq-2bt"], ["quantize", "demo", "-o", "demo", "--recipe", "vq-2bit"]]
    calls += [["plan", "demo", "--recipe", "fp8-tile", "--calibration", "no.txt"], ["inspect", "./nowhere"]]
    calls += [
        ["generate", "demo", "--prompt", "x", "--kv-cache", "kv"],
        ["export", "demo", "--format", "gguf", "-o", "x"],
    ]
    calls += [["compare", "demo", "--text", "no.txt"], [*job, "--recipe", "fp8-tile", "--private"]]
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


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("quantize demo --recipe vq-2", ["vq-2bit", "vq-2bit-aqlm", "vq-2bit-tuned"]),
        ("generate out --kv-cache kv-f", ["kv-fp8"]),
        ("generate out --kv-cache vq", []),
        ("quan", ["quantize"]),
    ],
)
def test_values_complete(words: str, expected: list[str]) -> None:
    """By the protocol that the scripts of --install-completion speak."""
    typed = f"vqcompress {words}"
    bash = {"COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split()) - 1), "_VQCOMPRESS_COMPLETE": "complete_bash"}
    assert sorted(CliRunner().invoke(app, [], env=bash, prog_name="vqcompress").stdout.split()) == expected


def test_version_and_recipes() -> None:
    assert call("--version").stdout == f"vqcompress {vqcompress.__version__}\n"
    lines = call("recipes").stdout.splitlines()
    expected = {path.stem: yaml.safe_load(path.read_text())["description"] for path in CONFIGS.glob("*.yaml")}
    assert {text.split()[0]: text.split(maxsplit=1)[1] for text in lines} == expected


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("plan demo --recipe vq-2bt", "'vq-2bit'"),
        ("plan demo --recipe vq-2bit --sample 3", "--samples"),
        ("plan demo --recipe vq-2bit --device tpu", "--device"),
        ("plan demo --recipe vq-2bit --seed -1", "--seed"),
        ("plan demo --target-bits 9", "--target-bits"),
        ("plan demo", "--recipe"),
        ("plan demo --recipe vq-2bit --json .", "--json"),
        ("plan demo --recipe vq-2bit --json no/x", "--json no/x"),
        ("compare demo --text README.md --html no/x", "--html no/x"),
        ("quantize demo --recipe vq-2bit", "-o OUT"),
        ("quantize demo --recipe vq-2bit -o demo", "demo"),
        ("quantise", "quantize"),
        ("export demo --format dens -o x", "dense"),
    ],
)
def test_wrong_usage_exits_2(words: str, named: str) -> None:
    result = call(*words.split())
    assert result.exit_code == 2
    assert named in result.stderr


def test_failures_exit_1_with_one_line(small: Path, artifact: Path, tmp_path: Path) -> None:
    for words in (["inspect"], ["verify"], ["doctor"], ["plan", "--recipe", "vq-2bit"], ["eval", "speed"]):
        result = call(*words, tmp_path / "nowhere")
        assert (result.exit_code, str(tmp_path / "nowhere") in line(result)) == (1, True)
    for words in (["inspect", small], ["quantize", small, "-o", artifact, "--recipe", "fp8-tile"]):
        result = call(*words)
        assert (result.exit_code, str(words[2 if len(words) > 2 else 1]) in line(result)) == (1, True)
    for words in (["eval", "perplexity", small, "--text"], ["quantize", small, "-o", tmp_path / "out", "--recipe"]):
        missing = call(*words, tmp_path / "no.txt")
        assert (missing.exit_code, str(tmp_path / "no.txt") in line(missing)) == (1, True)


def test_an_occupied_directory_is_refused_before_torch_is_imported(tmp_path: Path) -> None:
    names = {"mine": "notes.txt", "done": "SHA256SUMS", "exported": "config.json"}
    for folder, name in names.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text("x")
    jobs = [["quantize", "demo", "--recipe", "vq-2bit"], ["export", "demo", "--format", "dense"]]
    words = [
        [*job, "-o", str(tmp_path / name)]
        for job, names in zip(jobs, ("mine done", "mine exported"), strict=True)
        for name in names.split()
    ]
    code = (
        "import sys\nfrom vqcompress.cli.main import app\nfrom typer.testing import CliRunner\n"
        f"for words in {words!r}:\n    result = CliRunner().invoke(app, words)\n"
        "    assert result.exit_code == 1 and words[-1] in result.stderr\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("error", [errors.VQCompressError("it broke"), ZeroDivisionError("it broke")])
def test_a_traceback_only_with_debug(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr("vqcompress.cli.main.packaged", fail)
    result = call("recipes")
    assert result.exit_code == 1
    assert "it broke" in line(result)
    assert ("--debug" in line(result)) == (not isinstance(error, errors.VQCompressError))
    assert "Traceback" in call("recipes", "--debug").stderr


def test_from_a_checkpoint_to_text_and_back(small: Path, job: list[str], text: Path, tmp_path: Path) -> None:
    out, file = tmp_path / "out", tmp_path / "report.json"
    plan = call("quantize", small, "-o", out, *job, "--dry-run", "--json", "-")
    assert len(json.loads(plan.stdout)["targets"]) == 14
    assert all(name in plan.stderr for name in ("model.layers.*.mlp.down_proj", "lm_head.weight"))
    assert not out.exists()
    assert "--push-to-hub" in line(
        call("quantize", small, "--recipe", "fp8-tile", "--dry-run", "--push-to-hub", "me/x")
    )

    result = call("quantize", small, "-o", out, *job, "--json", file)
    assert result.exit_code == 0, result.stderr
    assert all(f"block {n + 1}/2 model.layers.{n}" in result.stderr for n in range(2))
    assert f"vqcompress eval perplexity {out} --text FILE --baseline {small}" in result.stdout
    report = json.loads((out / "report.json").read_text())
    assert json.loads(file.read_text()) == report

    facts = json.loads(call("inspect", out, "--json", "-").stdout)
    for key in ("bits_per_weight", "weights_quantized", "artifact_bytes", "source_bytes"):
        assert facts[key] == pytest.approx(report[key]), key
    for row, expected in zip(facts["targets"], report["targets"], strict=True):
        for key in ("name", "shape", "bits_per_weight", "relative_error", "proxy_error", "tokens"):
            assert row[key] == (pytest.approx(expected[key]) if isinstance(expected[key], float) else expected[key])
    assert str(out) in call("verify", out).stdout

    windows = ["--text", text, "--seqlen", "32", "--windows", "4"]
    facts = json.loads(call("eval", "perplexity", out, *windows, "--baseline", small, "--json", "-").stdout)
    assert facts["baseline"]["perplexity"] > 1
    assert (facts["windows"], facts["seqlen"], facts["tokens"]) == (4, 32, 124)

    words = ["--prompt-tokens", "8", "--new-tokens", "3", "--baseline", small, "--cpu-weights", "packed"]
    speed = call("eval", "speed", out, *words, "--json", "-")
    assert json.loads(speed.stdout)["decode_relative_to_baseline"] > 0
    assert str(small) in speed.stderr

    dense = tmp_path / "dense"
    result = call("export", out, "--format", "dense", "-o", dense, "--json", "-")
    assert (json.loads(result.stdout)["format"], str(dense) in result.stderr) == ("dense", True)
    assert "tokens/s" in call("generate", dense, "--prompt", "river", "--max-new-tokens", "2").stderr


def test_a_plan_needs_only_a_config(small: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((small / "config.json").read_bytes())
    result = call("plan", tmp_path, "--recipe", "vq-4bit")
    assert result.exit_code == 0, result.stderr


def test_inspect_without_a_report(artifact: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(artifact, tmp_path / "copy", ignore=shutil.ignore_patterns("report.json"))
    facts = json.loads(call("inspect", copy, "--json", "-").stdout)
    assert facts["targets"][0]["relative_error"] is None
    (copy / "report.json").write_text("[]")
    assert "report.json" in line(call("inspect", copy))


def test_generate(small: Path) -> None:
    words = ["generate", small, "--max-new-tokens", "9", "--prompt"]
    drawn = [call(*words, "river", "--temperature", "2", "--seed", seed).stdout for seed in "112"]
    assert drawn[0] == drawn[1] != drawn[2]
    for prompt in ("", "river stone " * 400):
        wrong = call(*words, prompt)
        assert (wrong.exit_code, "--prompt" in line(wrong)) == (2, True)


def test_generate_writes_one_text_whatever_the_generation_config(small: Path, tmp_path: Path) -> None:
    words, copy = ["--prompt", "river", "--max-new-tokens", "4"], shutil.copytree(small, tmp_path / "copy")
    expected = call("generate", small, *words).stdout
    for settings in ({"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}):
        (copy / "generation_config.json").write_text(json.dumps(settings))
        assert call("generate", copy, *words).stdout == expected
    (copy / "generation_config.json").write_text(json.dumps({"stop_strings": [expected.strip()[:1]]}))
    assert expected.startswith(stopped := call("generate", copy, *words).stdout.strip("\n"))
    assert stopped != expected.strip("\n")


def test_doctor(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = call("doctor", small)
    assert (result.exit_code, "LlamaForCausalLM" in result.stdout) == (0, True)
    facts = {
        "architecture": "Odd", "ok": False, "checks": [{"name": "a check", "ok": False, "detail": "no"}],
        "targets": 0, "coverage": 0.0, "folds": [], "left_dense": {},
    }  # fmt: skip
    monkeypatch.setattr("vqcompress.evaluate.doctor.examine", lambda model: facts)
    result = call("doctor", small)
    assert (result.exit_code, "a check" in result.stdout) == (1, True)


def test_ctrl_c_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def press() -> None:
        raise KeyboardInterrupt("finished blocks are kept")

    monkeypatch.setattr("vqcompress.cli.main.packaged", press)
    result = call("recipes")
    assert (result.exit_code, line(result)) == (130, "interrupted: finished blocks are kept")


@pytest.mark.slow
def test_an_interrupted_run_says_how_to_go_on(text: Path, tmp_path: Path) -> None:
    # Layers enough that the run is not over before the signal arrives.
    toy = toy_checkpoint(tmp_path / "toy", layers=6, hidden=64)
    job = ["--recipe", "vq-2bit", "--calibration", str(text), "--samples", "2", "--seqlen", "16", "--device", "cpu"]
    # Python leaves Ctrl-C ignored if its parent does, as a job in the background of a shell is.
    process = subprocess.Popen(
        [sys.executable, "-m", "vqcompress", "quantize", str(toy), "-o", str(tmp_path / "out"), *job],
        stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert process.stderr is not None
    seen = []
    for output in process.stderr:
        seen.append(output)
        if output.startswith("block 1/6"):
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
    with StepBar("counting") as bar:
        for done in range(101):
            bar.count(done, 100)
    written = capsys.readouterr()
    assert (written.out, len(written.err.splitlines())) == ("", 9)
