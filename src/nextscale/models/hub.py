"""Files of Hugging Face repositories, through huggingface_hub and its cache."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict, Unpack

from nextscale.base.errors import CheckpointError, first_sentence

TIMEOUT = 10  # seconds until a hub that does not answer counts as out of reach


class Access(TypedDict, total=False):
    """How a repository is read; huggingface_hub documents these keywords."""

    revision: str | None
    token: str | bool | None
    cache_dir: str | Path | None


def url(repository: str) -> str:
    """The web page of a repository."""
    return f"https://huggingface.co/{repository}"


def is_repository(name: str) -> bool:
    """Whether a name has the form of a repository's, "owner/name"."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is not None


def find_cached(repository: str, names: Sequence[str], **access: Unpack[Access]) -> Path | None:
    """The cache folder that holds all of these files of a repository, or None if any of them is missing."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        found = snapshot_download(repository, allow_patterns=list(names), local_files_only=True, **access)
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    folder = Path(found)
    return folder if all((folder / name).is_file() for name in names) else None


def check_in_reach(repository: str) -> None:
    """Ask once for a repository of which nothing is in the cache.

    Whoever downloads it would ask for one file after the other, and try each several times.

    Raises:
        ConnectionError: the hub does not answer, or knows no such repository.
    """
    from huggingface_hub import HfApi

    if find_cached(repository, []) is not None:
        return
    try:
        HfApi().model_info(repository, timeout=TIMEOUT)
    except Exception as error:  # the transport below huggingface_hub raises errors of its own
        raise ConnectionError(f"{url(repository)} cannot be read ({first_sentence(error)})") from None


def download(repository: str, names: Sequence[str], **access: Unpack[Access]) -> Path:
    """The folder with the newest version of these files of a repository.

    Cached files are not downloaded again, and are used as they are if the hub cannot be reached.

    Raises:
        CheckpointError: a file can neither be downloaded nor found in the cache.
    """
    from huggingface_hub import HfApi, snapshot_download

    try:
        # snapshot_download alone would wait for ever for a hub that accepts the connection and stays silent.
        HfApi(token=access.get("token")).model_info(
            repository, revision=access.get("revision"), timeout=TIMEOUT
        )
        folder = Path(snapshot_download(repository, allow_patterns=list(names), **access))
    except Exception as error:  # the transport below huggingface_hub raises errors of its own
        if cached := find_cached(repository, names, **access):
            return cached
        raise CheckpointError(f"{url(repository)} cannot be read ({first_sentence(error)})") from None
    for name in names:
        if not (folder / name).is_file():
            raise CheckpointError(f"{url(repository)} gave no {name}")
    return folder


def dataset_file(repository: str, name: str) -> Path:
    """One file of a dataset's repository: from the cache if the hub cannot be reached.

    Raises:
        CheckpointError: the file can neither be downloaded nor found in the cache.
    """
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, name, repo_type="dataset", etag_timeout=TIMEOUT))
    except Exception as error:  # the transport below huggingface_hub raises errors of its own
        raise CheckpointError(
            f"'{name}' of {url('datasets/' + repository)} cannot be read ({first_sentence(error)})"
        ) from None


def upload(
    repository: str,
    folder: Path,
    private: bool = False,
    *,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload a nextscale model",
) -> str:
    """Push the files of a folder to a repository, creating it if needed; returns the URL of its page.

    Args:
        private: whether a newly created repository is private.
        token: access token; by default the one that `hf auth login` stored.
        revision: branch to commit to, created if needed; by default the main branch.

    Raises:
        CheckpointError: the hub refuses the upload or cannot be reached.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi(token=token)
        api.create_repo(repository, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message=commit_message, revision=revision
        )
    except Exception as error:  # the transport below huggingface_hub raises errors of its own
        raise CheckpointError(
            f"'{repository}' was not pushed to the hub ({first_sentence(error)}): check its name and the "
            "connection, and log in with 'hf auth login'"
        ) from None
    return url(repository)
