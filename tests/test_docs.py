"""Every command in README.md and docs/ is parsed, and run with `-m slow`; docs, recipes and options agree.

In the pages a fence without a language holds commands. One with `console` holds a session: lines after `$ ` are
commands, the others their output. Commands run in order, in a folder for the page, with toys in place of models.
"""

from __future__ import annotations

import argparse
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from conftest import ROOT
from pydantic import BaseModel
from torch.distributed.run import get_args_parser
from typer._click.exceptions import MissingParameter
from typer.main import get_command
from typer.testing import CliRunner

from vqcompress.cli.main import app
from vqcompress.methods import METHODS
from vqcompress.methods.smoothing import Smoothing
from vqcompress.methods.vq.trellis import Trellis
from vqcompress.storage import recipe
from vqcompress.storage.recipe import ExpertCalibration, KVCacheConfig, Tuning
from vqcompress.storage.recipe_files import AS_STORED, packaged

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT_OF = {page.name: page.read_text(encoding="utf-8") for page in PAGES}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
each_page = pytest.mark.parametrize("page", TEXT_OF)

# Models and texts of the reader, for which toys are taken.
MODELS = {"demo", "MODEL", "./my-model"}
TEXTS = {"FILE", "wikitext2-test.txt", "calibration.txt", "code-test.txt", "my-text.txt", "my-calibration.txt"}
TEXTS |= {f"vqcompress/demo/{name}.txt" for name in ("calibration", "evaluation")}
# Recipes of artifacts that a page uses without making them, by the format that they are exported to.
MADE = {"": "vq-small", "fp8": "fp8-tile", "compressed-tensors": "int8-plain", "aqlm": "vq-2bit-aqlm"}
# Options that make a run small.
SMALLER = {
    "quantize": {"--calibration": None, "--samples": "4", "--seqlen": "32"},
    "plan": {"--samples": "4", "--seqlen": "32"},
    "perplexity": {"--seqlen": "32", "--windows": "2"},
    "compare": {"--seqlen": "32", "--windows": "2"},
    "speed": {"--prompt-tokens": "4", "--new-tokens": "2"},
    "generate": {"--max-new-tokens": "2"},
}
# Commands that are only parsed or checked, and why.
NOT_RUN = {
    r"bash scripts/(quickstart|real|venv|test|bench_gpu)\.sh": "takes minutes, makes a venv, or needs a GPU",
    r"python scripts/\w+\.py": "takes minutes; its own parser must accept the options",
    r"torchrun |accelerate launch ": "several processes; tests/test_distributed.py runs some",
    r"vqcompress .*(ORG/NAME|--push-to-hub|--install-completion)": "needs the hub or GPUs, or changes the shell",
    r"python -c \"import vqcompress; from lm_eval": "run by tests/test_lm_eval.py",
    r"(git clone|cd|pip install|python3? -m venv|source) ": "installs; the extras named must exist",
    r"vllm serve ": "vLLM is not installed here; docs/serving.md says that it is untested",
    r"xdg-open ": "opens a browser",
}
# Pages whose programs and recipes run in test_add_a_method.py and test_lm_eval.py.
ELSEWHERE = {"add-a-method.md", "serving.md"}


def pieces(text: str) -> list[tuple[str, str]]:
    """(language, body) of the fences of a page. Each command is a piece without a language; its output is `output`."""
    found = []
    for language, body in FENCE.findall(text):
        if language == "console":
            for session in re.split(r"^\$ ", body, flags=re.MULTILINE)[1:]:
                command, _, output = session.partition("\n")
                found += [("", command), ("output", output)]
        elif not language:
            found += [("", line) for line in body.replace("\\\n", " ").splitlines() if line.strip()]
        else:
            found.append((language, body))
    return found


def labels(output: str) -> set[str]:
    """The words that lines begin with, which are the same for every model."""
    return set(re.findall(r"^([a-z][\w-]+)", output, re.MULTILINE))


def mentioned(text: str) -> list[str]:
    """Commands with arguments between backticks in running text."""
    prose = FENCE.sub("", text)
    return [
        " ".join(found.split())
        for found in re.findall(r"`((?:vqcompress|python scripts/|bash scripts/)[^`]* [^`]+)`", prose)
    ]


def words_of(line: str) -> list[str]:
    return [word for word in shlex.split(line, comments=True) if word not in ("…", "[ARTIFACT", "…]")]


def parse(words: list[str]) -> Any:
    """The context of the command that would run; typer's error for an unknown option or value."""
    command: Any = get_command(app)
    context = command.make_context("vqcompress", words)
    while hasattr(command, "commands"):
        _, command, words = command.resolve_command(context, [*context._protected_args, *context.args])
        for param in command.params:
            # The files and models that a page names are not here.
            param.callback = None
        context = command.make_context(command.name, words, parent=context)
    for option, more in (("recipe", ()), ("kv_cache", (AS_STORED,))):
        name = context.params.get(option)
        assert name is None or name in packaged() or "." in name or name in ("NAME", "RECIPE", *more), name
    return context


class Parsed(Exception):
    """Raised by a script after its parser, in place of its work."""


def parse_script(words: list[str], patch: pytest.MonkeyPatch) -> None:
    """Let a script parse its arguments and do nothing else."""
    whole = argparse.ArgumentParser.parse_args

    def stop(parser: argparse.ArgumentParser, *arguments: Any) -> None:
        whole(parser, *arguments)
        raise Parsed

    patch.setattr(argparse.ArgumentParser, "parse_args", stop)
    patch.setattr(sys, "argv", words)
    # Scripts import each other.
    patch.syspath_prepend(str(ROOT / "scripts"))
    with pytest.raises(Parsed):
        runpy.run_path(str(ROOT / words[0]), run_name="__main__")


def check(line: str, patch: pytest.MonkeyPatch) -> None:
    """Parse a command that is not run."""
    words = words_of(line)
    if words[0] == "vqcompress" and "--install-completion" not in words and "COMMAND" not in words:
        parse(words[1:])
    elif words[0] == "torchrun":
        known = get_args_parser().parse_args(words[1:])
        assert known.training_script == "vqcompress"
        parse(known.training_script_args)
    elif words[:2] == ["python", "-m"] and words[2] == "vqcompress":
        parse(words[3:])
    elif words[0] == "python" and words[1].startswith("scripts/"):
        parse_script(words[1:], patch)
    elif words[0] == "bash" and words[1] in ("scripts/quickstart.sh", "scripts/real.sh"):
        parse_script([words[1].replace(".sh", ".py"), *words[2:]], patch)
    elif words[0] == "bash":
        assert all((ROOT / word).is_file() for word in words[1:] if "/" in word), line
    elif words[0] == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        for named in re.findall(r"\.\[(\w+)\]", line):
            assert named in extras


class Desk:
    """A folder in which the commands of a page run. quantized: the fixture."""

    def __init__(self, folder: Path, toy: Path, text: Path, quantized: Callable[..., Path]):
        self.folder, self.toy, self.text, self.quantized = folder, toy, text, quantized

    def run(self, line: str) -> str:
        """The output of a command. Its exit code must be 0, and the files that it names must exist."""
        words = words_of(line)
        if words[0] != "vqcompress":
            done = subprocess.run(line, shell=True, cwd=self.folder, capture_output=True, text=True)
            assert done.returncode == 0, (line, done.stderr)
            return done.stdout
        parse(words[1:])
        command = words[2] if words[1] == "eval" else words[1]
        words = self._in_small(self._at_hand(words), command)
        result = CliRunner().invoke(app, words[1:], prog_name="vqcompress")
        assert result.exit_code == 0, (line, result.stderr, result.exception)
        for option in ("-o", "--html"):
            if option in words and "--dry-run" not in words:
                assert (self.folder / words[words.index(option) + 1]).exists()
        return result.stdout + result.stderr

    def python(self, code: str) -> str:
        """A program with toys in place of models."""
        for name in re.findall(r'"(OUT[-\w]*|demo-\w+)"', code):
            self._artifact(name, "")
        return re.sub(r'"(demo|MODEL)"', lambda found: repr(str(self.toy)), code)

    def _at_hand(self, words: list[str]) -> list[str]:
        """The words with toys in place of models and texts. Artifacts that they name are put into the folder."""
        form = words[words.index("--format") + 1] if "--format" in words else ""
        found = []
        for before, word in zip(["", *words], words, strict=False):
            if word in MODELS:
                word = str(self.toy)
            elif word in TEXTS:
                word = str(self.text)
            elif word.endswith(".yaml") and before == "--recipe" and not (self.folder / word).exists():
                (self.folder / word).write_text("rules:\n  - {match: '*', method: fp8}\n")
            elif re.fullmatch(r"OUT[-\w]*|ARTIFACT|demo-\w+", word) and before not in ("-o", "--html"):
                self._artifact(word, form)
            found.append(word)
        return found

    def _artifact(self, name: str, form: str) -> None:
        """Put an artifact of that name, which can be exported to the format, into the folder."""
        recipe, family = MADE[form if form in MADE else ""], "llama"
        if not (self.folder / name).exists():
            # Written into by --report.
            shutil.copytree(self.quantized(recipe, family, **TOY), self.folder / name)

    def _in_small(self, words: list[str], command: str) -> list[str]:
        for option, value in SMALLER.get(command, {}).items():
            if option not in words:
                words += [option, value or str(self.text)]
            elif value:
                words[words.index(option) + 1] = value
        return words


# As wide as FP8's tiles, so that exports have something to write.
TOY: dict[str, Any] = {"hidden": 128, "layers": 1}


@pytest.fixture(scope="session")
def quick_recipes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The packaged recipes with fewer states, one round of k-means and two candidates: hundredths of the time."""
    folder = tmp_path_factory.mktemp("configs")
    for name, path in packaged().items():
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
        for rule in (*data.get("rules", ()), *data.get("candidates", ())):
            rule |= {"state_bits": 8} if rule.get("codebook") == "trellis" else {}
            rule |= {"iterations": 1, "codebook_updates": 0} if rule.get("codebook") == "learned" else {}
        if "candidates" in data:
            data["candidates"] = data["candidates"][1:3]
        if data.get("cache", {}).get("codebook", "") != "fp8" and "cache" in data:
            data["cache"]["rounds"] = 1
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(data))
    return {name: folder / f"{name}.yaml" for name in packaged()}


@pytest.fixture
def desk(
    toy: Callable[..., Path],
    text: Path,
    quantized: Callable[..., Path],
    quick_recipes: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Desk:
    monkeypatch.setattr(recipe, "packaged", lambda: quick_recipes)
    monkeypatch.chdir(tmp_path)
    model = Path(shutil.copytree(toy("llama", **TOY), tmp_path / "toy"))
    # As the packaged model has one, which artifacts leave out.
    (model / "README.md").write_text("A toy.")
    return Desk(tmp_path, model, text, quantized)


@pytest.mark.slow
@each_page
def test_commands_and_programs_of_a_page_run(page: str, desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    printed = ""
    for language, body in pieces(TEXT_OF[page]):
        if language and page in ELSEWHERE:
            continue
        if language == "python":
            exec(compile(desk.python(body), page, "exec"), {"__name__": page})
        elif language == "yaml":
            # Examples of other keys leave the rules out.
            rules = (
                ""
                if re.search("^(rules|candidates|cache):", body, re.MULTILINE)
                else "rules: [{match: '*', method: vq, codebook: trellis}]"
            )
            Path("page.yaml").write_text(body + rules)
            recipe.load("page.yaml")
        elif not language and any(re.match(pattern, body) for pattern in NOT_RUN):
            with monkeypatch.context() as patch:
                check(body, patch)
        elif not language:
            printed = desk.run(body)
        elif language == "output":
            assert labels(body) <= labels(printed)


@each_page
def test_commands_of_a_page_can_be_typed(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command of a fence parses."""
    for language, body in pieces(TEXT_OF[page]):
        if not language:
            with monkeypatch.context() as patch:
                check(body, patch)


@each_page
def test_commands_in_running_text_can_be_typed(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for line in mentioned(TEXT_OF[page]):
        # A mention may leave arguments out.
        with monkeypatch.context() as patch, suppress(MissingParameter, typer.Exit):
            check(line, patch)


# Heading of docs/recipes.md → the model whose options the table below it lists.
OPTIONS: dict[str, type[BaseModel]] = {
    **{f"`{name}`": method for name, method in METHODS.items() if name != "keep"},
    "`smoothing`": Smoothing,
    "`tuning`": Tuning,
    "`experts`": ExpertCalibration,
    "`cache`": KVCacheConfig,
}


def table_of_options(heading: str) -> dict[str, str]:
    """Option → its default, from the table below a heading."""
    section = re.search(rf"^## {heading}.*?(?=^## |\Z)", TEXT_OF["recipes.md"], re.DOTALL | re.MULTILINE)
    assert section, heading
    rows = re.search(r"^\| option .*?\n\n", section[0] + "\n\n", re.DOTALL | re.MULTILINE)
    assert rows, heading
    found = {}
    for row in rows[0].splitlines()[2:]:
        if row:
            _, names, default, *_ = [cell.strip() for cell in row.split("|")]
            given = default.split(", ") if ", " in names else [default]
            found |= dict(zip(re.findall(r"`(\w+)`", names), given, strict=True))
    return found


@pytest.mark.parametrize("heading", OPTIONS)
def test_every_option_is_in_the_docs_with_its_default(heading: str) -> None:
    fields, said = dict(OPTIONS[heading].model_fields), table_of_options(heading)
    fields |= Trellis.model_fields | fields if heading == "`vq`" else {}
    assert said.keys() == fields.keys()
    for name, field in fields.items():
        default, cell = field.default, said[name].strip("`")
        if isinstance(default, bool):
            assert cell in (str(default).lower(), "by codebook"), name
        elif isinstance(default, (int, float, str)) and cell != "by codebook":
            assert (cell if isinstance(default, str) else float(cell)) == default, name


@pytest.mark.parametrize("page", ["README.md", "recipes.md"])
def test_every_recipe_is_in_the_docs(page: str) -> None:
    named = set(re.findall(r"`([\w-]+)`", TEXT_OF[page]))
    assert packaged().keys() <= named
    # And every name that looks like a recipe is one.
    assert {name for name in named if re.fullmatch(r"(vq|kv|mixed|fp8|smoothquant)-[\w-]+", name)} <= packaged().keys()


@each_page
def test_links_lead_somewhere(page: str) -> None:
    folder = ROOT if page == "README.md" else ROOT / "docs"
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", TEXT_OF[page]):
        assert "://" in link or (folder / link).is_file(), link


def test_every_page_is_linked_from_the_readme() -> None:
    for page in PAGES[1:]:
        assert f"](docs/{page.name})" in TEXT_OF["README.md"], page.name
