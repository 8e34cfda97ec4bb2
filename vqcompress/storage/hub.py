"""The Hugging Face hub: checkpoints by their ids, uploads, and what its client raises in one line. Imports no torch."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
from pathlib import Path
from typing import Any

from vqcompress.errors import UsageError, VQCompressError, first_line, nearest

# ID or OWNER/ID, then perhaps @ and a branch, a tag or a commit.
ID = re.compile(r"([\w-][\w.-]*(?:/[\w-][\w.-]*)?)(?:@([\w./-]+))?")
LIGHT = [
    "*.json",
    "*.jinja",
    "tokenizer*",
    "*.model",
    "*.txt",
    "*.py",
    "SHA256SUMS",
    "recipe.yaml",
    "LICENSE*",
    "NOTICE*",
    # All that SHA256SUMS of an artifact lists.
    "README.md",
    "report.html",
]

# The same weights once more, for other programs.
COPIES = ["*/*.safetensors", "consolidated*.safetensors"]


def find(model: str) -> Path | tuple[str, str | None]:
    """The directory that MODEL names, else the hub id and its revision; an error for what can be neither."""
    if model == "demo":
        return Path(__file__).parent.parent / "demo"
    # Unlike a Path's own, this leaves the ~ of a user that there is not as it is.
    path = Path(os.path.expanduser(model))
    if path.name == "config.json" and path.is_file():
        path = path.parent
    if path.is_dir():
        return path
    if path.exists():
        raise VQCompressError(f"{model} is a file; MODEL is a Hugging Face directory, a hub id, or 'demo'")
    local, at, revision = model.rpartition("@")
    if at and (local == "demo" or os.path.isdir(os.path.expanduser(local))):
        raise UsageError(f"{local} is a local directory; only a hub id has revisions, such as '{revision}'")
    named = ID.fullmatch(model)
    if not named:
        raise VQCompressError(f"no such directory: {model}{similar(model)}")
    return named[1], named[2]


def similar(model: str) -> str:
    """' (did you mean X?)' with the directory beside it whose name is most like a path's, if one is."""
    path = Path(os.path.expanduser(model))
    names = {"demo"} if path.parent == Path() else set()
    with contextlib.suppress(OSError):
        names |= {other.name for other in path.parent.iterdir() if other.is_dir()}
    near = nearest(path.name, sorted(names), 0.7)
    return f" (did you mean {path.with_name(near)}?)" if near else ""


def fetch(repo: str, revision: str | None = None, weights: bool = True, download: bool = True) -> Path:
    """The directory of a snapshot in the hub's cache, downloaded if it is not there; VQCompressError with the reason.

    weights: False fetches only the config and the tokenizer. download: False takes what is there, or fails.
    """
    from huggingface_hub import snapshot_download

    patterns = [*LIGHT, "*.safetensors"] if weights else LIGHT
    try:
        settings: Any = {"allow_patterns": patterns, "ignore_patterns": COPIES, "local_files_only": not download}
        path = Path(snapshot_download(repo, revision=revision, **settings))
    except Exception as error:  # the hub's client has a dozen error types, and what it runs on has more
        raise VQCompressError(explain(error, repo, revision)) from error
    if weights and not list(path.glob("*.safetensors")):
        raise VQCompressError(
            f"{repo} has no safetensors weights on the hub; load it with transformers, save_pretrained writes some"
        )
    return path


def explain(error: BaseException, repo: str, revision: str | None = None) -> str:
    """What an error of the hub's client means, in one line that says what to do."""
    from huggingface_hub import constants, errors

    chain: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in chain:
        chain.append(following)
        following = following.__cause__ or following.__context__

    def found(*kinds: type[BaseException]) -> bool:
        return any(isinstance(each, kinds) for each in chain)

    # What is gated is "not found" too, and what is not in the cache may be so for any of the other reasons.
    if found(errors.GatedRepoError):
        return f"{repo} is gated: accept its terms at {constants.ENDPOINT}/{repo}, then log in with `hf auth login`"
    if found(errors.RevisionNotFoundError):
        return f"{repo} has no revision '{revision or 'main'}' on the hub"
    if found(errors.RepositoryNotFoundError):
        return (
            f"the hub has no {repo}, or it is private: check the name, log in with `hf auth login` if you may read it"
        )
    if found(errors.OfflineModeIsEnabled) or (found(errors.LocalEntryNotFoundError) and constants.HF_HUB_OFFLINE):
        return f"{repo} is not in the cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE forbids asking the hub for it"
    if found(errors.LocalEntryNotFoundError, ConnectionError):
        return (
            f"the hub {constants.ENDPOINT} cannot be reached, and {repo} is not in the cache {constants.HF_HUB_CACHE}"
        )
    return first_line(error)


def check_text(source: str) -> None:
    """VQCompressError unless a text is there, or may be the id of a dataset."""
    no_id = "/" not in source or source.count("/") > 2 or source.startswith((".", "/", "~")) or Path(source).suffix
    if no_id and not Path(source).exists():
        raise VQCompressError(f"no such text file: {source}")


def check_upload(repo: str) -> None:
    """Before hours of work: UsageError for a name that no repository has, VQCompressError unless logged in."""
    from huggingface_hub import HfApi, errors
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except errors.HFValidationError as error:
        raise UsageError(f"--push-to-hub {repo}: {error}") from error
    try:
        HfApi().whoami()
    except Exception as error:  # see `fetch`
        hint = "log in with `hf auth login`, or leave it out and upload later with `hf upload`"
        raise VQCompressError(
            f"--push-to-hub {repo}: the hub does not know you ({first_line(error)}); {hint}"
        ) from error


def push(folder: Path, repo: str, private: bool = False) -> str:
    """Upload a finished directory; returns its address. VQCompressError with the command that tries it again.

    private: for a repository that is made now; otherwise it is as the hub's settings of its owner say.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        made = api.create_repo(repo, private=private or None, exist_ok=True)
        api.upload_folder(repo_id=made.repo_id, folder_path=folder, commit_message="Upload of vqcompress")
    except Exception as error:  # see `fetch`
        again = f"hf upload {shlex.quote(repo)} {shlex.quote(str(folder))}{' --private' if private else ''}"
        reason = explain(error, repo)
        raise VQCompressError(f"{folder} is finished, but not uploaded: {reason}; to try again: {again}") from error
    return str(made)
