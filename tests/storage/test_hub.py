"""The hub as its client behaves without a network: ids with revisions, errors in one line, uploads, foreign code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx2
import huggingface_hub
import pytest
import torch
import transformers
from commands import call, line
from huggingface_hub import constants, errors
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file
from toys import toy_checkpoint

import vqcompress
from vqcompress.errors import VQCompressError
from vqcompress.storage import hub
from vqcompress.storage.checkpoint import Checkpoint, resolve
from vqcompress.storage.trust import trusted

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FP8 = ["--recipe", "fp8-tile", "--device", "cpu"]


@pytest.fixture
def cached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder of one repository, `org/toy`, in a hub's cache: `main` and the tag `v1` are its only commit."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--org--toy"
    toy_checkpoint(folder / "snapshots" / COMMIT, hidden=64)
    (folder / "refs").mkdir()
    for name in ("main", "v1"):
        (folder / "refs" / name).write_text(COMMIT)
    return folder


def failing(monkeypatch: pytest.MonkeyPatch, error: Exception) -> list[dict[str, Any]]:
    """Let a download fail; returns what it is called with."""
    calls: list[dict[str, Any]] = []

    def download(repo: str, **arguments: Any) -> str:
        calls.append({"repo": repo, **arguments})
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return calls


def http(kind: type[errors.HfHubHTTPError], status: int = 403) -> errors.HfHubHTTPError:
    """An error of the client as a response of that status makes it."""
    request = httpx2.Request("GET", "https://huggingface.co/api/models/org/toy")
    return kind(f"{status} Client Error.\n\nCannot access.", response=httpx2.Response(status, request=request))


def test_a_hub_id_is_found_in_the_cache_and_its_commit_recorded(cached: Path, tmp_path: Path) -> None:
    snapshot = cached / "snapshots" / COMMIT
    assert resolve("org/toy") == resolve("org/toy@v1") == resolve(f"org/toy@{COMMIT}") == snapshot
    assert Checkpoint(snapshot).revision == COMMIT
    out = tmp_path / "out"
    result = call("quantize", "org/toy", "--revision", "v1", "-o", out, *FP8)
    assert result.exit_code == 0, result.stderr
    report = json.loads((out / "report.json").read_text())
    assert (report["model"], report["revision"]) == ("org/toy@v1", COMMIT)
    card = (out / "README.md").read_text()
    assert "base_model: org/toy\n" in card
    for told in (result.stdout, card):
        assert "--baseline org/toy@v1" in told
    (snapshot / "model.safetensors").unlink()
    assert "org/toy" in line(call("quantize", "org/toy", "-o", cached / "out", *FP8))
    assert call("plan", "org/toy", *FP8).exit_code == 0


def test_every_command_that_takes_a_model_takes_a_revision(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = failing(monkeypatch, http(errors.RevisionNotFoundError, 404))
    (tmp_path / "text.txt").write_text("some text")
    for words in (
        ["quantize", *FP8, "-o", tmp_path / "out"],
        ["quantize", *FP8, "--dry-run"],
        ["plan", *FP8],
        ["doctor"],
        ["eval", "perplexity", "--text", tmp_path / "text.txt"],
        ["eval", "speed"],
        ["generate", "--prompt", "x"],
    ):
        result = call(*words, "org/toy", "--revision", "v9")
        assert (result.exit_code, "org/toy@v9" in line(result)) == (1, True), words
        assert (calls[-1]["repo"], calls[-1]["revision"]) == ("org/toy", "v9")
    for words in (["inspect"], ["verify"], ["export", "--format", "dense", "-o", tmp_path / "out"]):
        assert call(*words, "org/toy@v9").exit_code == 1
        assert (calls[-1]["repo"], calls[-1]["revision"]) == ("org/toy", "v9")


def test_only_the_weights_that_are_read_are_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = failing(monkeypatch, OSError("no"))
    read = ["config.json", "model-00001-of-00002.safetensors", "additional_chat_templates/tools.jinja", "SHA256SUMS"]
    read += ["tekken.json", "qwen.tiktoken", "images/picture.png", "1_Pooling/config.json"]
    others = ["consolidated.safetensors", "original/a.safetensors", "consolidated-00001-of-00002.safetensors", "a.bin"]
    others += ["model.gguf", "onnx/model.onnx", "flax_model.msgpack"]
    with pytest.raises(VQCompressError):
        hub.fetch("org/toy")
    assert list(filter_repo_objects(read + others, ignore_patterns=calls[0]["ignore_patterns"])) == read


def test_pickled_weights_are_fetched_where_there_are_no_others(cached: Path) -> None:
    folder = resolve("org/toy")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert Checkpoint(resolve("org/toy")).tensors
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(VQCompressError, match="org/toy"):
        resolve("org/toy")


@pytest.mark.parametrize(
    "error",
    [
        http(errors.GatedRepoError),
        http(errors.HfHubHTTPError, 503),
        errors.LocalEntryNotFoundError("nothing there"),
        OSError(28, "No space left on device"),
    ],
)
def test_the_clients_errors_are_one_line_that_names_the_model(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, error)
    result = call("doctor", "org/toy")
    assert result.exit_code == 1
    assert "org/toy" in line(result)
    assert str(error).split("\n")[-1].strip() in line(result)


class Api:
    """Stands for the client in an upload; `error` is raised by the call of that name."""

    calls: list[tuple[str, Any]]
    error: tuple[str, Exception] | None = None

    def __getattr__(self, name: str) -> Any:
        def called(*args: Any, **arguments: Any) -> Any:
            Api.calls.append((name, arguments | ({"repo": args[0]} if args else {})))
            if Api.error and Api.error[0] == name:
                raise Api.error[1]
            if name == "upload_folder":
                assert (Path(arguments["folder_path"]) / "config.json").is_file()
            return huggingface_hub.RepoUrl("https://huggingface.co/me/toy-fp8")

        return called


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> type[Api]:
    Api.calls, Api.error = [], None
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return Api


def test_a_finished_artifact_and_its_export_are_uploaded(api: type[Api], toy: Any, tmp_path: Path) -> None:
    out, dense = tmp_path / "out", tmp_path / "dense"
    result = call("quantize", toy(), "-o", out, *FP8, "--push-to-hub", "toy-fp8", "--private")
    assert result.exit_code == 0, result.stderr
    assert "https://huggingface.co/me/toy-fp8" in result.stdout
    assert [name for name, _ in api.calls] == ["whoami", "create_repo", "upload_folder"]
    assert api.calls[1][1] == {"repo": "toy-fp8", "private": True, "exist_ok": True}
    assert (api.calls[2][1]["repo_id"], api.calls[2][1]["folder_path"]) == ("me/toy-fp8", out)
    result = call("export", out, "--format", "dense", "-o", dense, "--push-to-hub", "toy-fp8", "--json", "-")
    assert json.loads(result.stdout)["format"] == "dense"
    assert api.calls[-2][1]["private"] is None
    assert api.calls[-1][1]["folder_path"] == dense


def test_a_failed_upload_keeps_the_artifact_and_says_how_to_go_on(api: type[Api], toy: Any, tmp_path: Path) -> None:
    out = tmp_path / "an artifact"
    api.error = ("upload_folder", http(errors.HfHubHTTPError, 500))
    result = call("quantize", toy(), "-o", out, *FP8, "--push-to-hub", "me/toy", "--json", tmp_path / "report.json")
    assert result.exit_code == 1
    assert f"hf upload me/toy '{out}'" in result.stderr
    assert (tmp_path / "report.json").is_file()
    assert call("verify", out).exit_code == 0


def test_an_upload_that_cannot_be_is_refused_before_the_work(api: type[Api], toy: Any, tmp_path: Path) -> None:
    job = ["quantize", toy(), "-o", tmp_path / "out", *FP8]
    api.error = ("whoami", errors.LocalTokenNotFoundError("Token is required"))
    for repo in ("me/toy", "me/to/y"):
        result = call(*job, "--push-to-hub", repo)
        assert (result.exit_code, repo in line(result)) == (1, True)
    result = call(*job, "--private")
    assert (result.exit_code, "--private" in line(result)) == (2, True)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a type that transformers does not know, with its code beside it."""
    folder = toy_checkpoint(tmp_path_factory.mktemp("foreign"), hidden=64)
    (folder / "configuration_odd.py").write_text(
        "from transformers import LlamaConfig\n\n\nclass OddConfig(LlamaConfig):\n    model_type = 'odd-lm'\n"
    )
    (folder / "modeling_odd.py").write_text(
        "from transformers import LlamaForCausalLM\n\nfrom .configuration_odd import OddConfig\n\n\n"
        "class OddForCausalLM(LlamaForCausalLM):\n    config_class = OddConfig\n"
    )
    config = json.loads((folder / "config.json").read_text())
    classes = {"AutoConfig": "configuration_odd.OddConfig", "AutoModelForCausalLM": "modeling_odd.OddForCausalLM"}
    config |= {"model_type": "odd-lm", "architectures": ["OddForCausalLM"], "auto_map": classes}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_foreign_code_runs_only_if_asked_for(foreign: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    jobs = [
        ["doctor", foreign],
        ["quantize", foreign, "-o", out, *FP8],
        ["generate", out, "--prompt", "river", "--max-new-tokens", "2"],
        ["verify", out],
    ]
    for job in jobs:
        refused = call(*job)
        assert (refused.exit_code, "--trust-remote-code" in line(refused)) == (1, True), job
        done = call(*job, "--trust-remote-code")
        assert done.exit_code == 0, (job, done.stderr)
        assert not trusted()
    # The artifact takes the code along.
    assert {"modeling_odd.py", "configuration_odd.py"} <= {path.name for path in out.iterdir()}
    ids = torch.arange(8)[None]
    ours = vqcompress.load(out, "cpu", trust_remote_code=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    assert type(ours).__name__ == type(theirs).__name__ == "OddForCausalLM"
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits.float())
    with pytest.raises(VQCompressError, match="--trust-remote-code"):
        vqcompress.load(out, "cpu")
