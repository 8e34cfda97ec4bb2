"""The Hugging Face hub: checkpoints by their ids, and uploads. Errors of its client become one line. No torch."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from typing import Any

from vqcompress.errors import VQCompressError, one_line
from vqcompress.storage.companions import WEIGHTS

# ID or OWNER/ID, then perhaps @ and a branch, a tag or a commit.
ID = re.compile(r"([\w-][\w.-]*(?:/[\w-][\w.-]*)?)(?:@([\w./-]+))?")
# The same weights once more, for other programs.
COPIES = ["*/*.safetensors", "consolidated*.safetensors"]
# What is read where there are no safetensors.
PICKLED = "pytorch_model*.bin"


def find(model: str) -> Path | tuple[str, str | None]:
    """The directory that MODEL names, else the hub id and its revision; an error for what can be neither."""
    if model == "demo":
        return Path(__file__).parent.parent / "demo"
    # Unlike Path.expanduser, this leaves the ~ of an unknown user as it is.
    path = Path(os.path.expanduser(model))
    if path.is_dir():
        return path
    named = ID.fullmatch(model)
    if not named or path.exists():
        raise VQCompressError(f"no such directory: {model}")
    return named[1], named[2]


def fetch(repo: str, revision: str | None = None, weights: bool = True, download: bool = True) -> Path:
    """The directory of a snapshot in the hub's cache, downloaded if it is not there; VQCompressError with the reason.

    weights: False fetches only the config and the tokenizer. download: False takes what is there, or fails.
    """
    from huggingface_hub import snapshot_download

    # Everything but weights that are not read, so that an artifact comes with all that its SHA256SUMS lists.
    unread = [f"*{end}" for end in WEIGHTS if not (weights and end == ".safetensors")] + COPIES
    wanted: Any = {"revision": revision, "local_files_only": not download}
    try:
        path = Path(snapshot_download(repo, ignore_patterns=unread, **wanted))
        if weights and not any(path.glob("*.safetensors")):
            snapshot_download(repo, allow_patterns=PICKLED, **wanted)
    except Exception as error:  # the hub's client has a dozen error types, and what it runs on has more
        at = f"@{revision}" if revision else ""
        raise VQCompressError(f"no directory {repo}{at}, and the hub's client says: {one_line(error)}") from error
    if weights and not [*path.glob("*.safetensors"), *path.glob(PICKLED)]:
        raise VQCompressError(f"{repo} has no weights for transformers on the hub; save it with transformers first")
    return path


def check_upload(repo: str) -> None:
    """VQCompressError, before hours of work, for a name that no repository can have, or without a login."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
        HfApi().whoami()
    except Exception as error:  # see `fetch`
        raise VQCompressError(f"--push-to-hub {repo}: {one_line(error)} (`hf auth login` logs in)") from error


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
        raise VQCompressError(
            f"{folder} is finished, but not uploaded: {one_line(error)}; to try again: {again}"
        ) from error
    return str(made)
