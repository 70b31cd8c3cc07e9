"""Files of hub repositories, through huggingface_hub: its cache, its progress bars, its resumed downloads."""

import re
from collections.abc import Sequence
from pathlib import Path

from nextscale.base.errors import CheckpointError, first_sentence


def url(repository: str) -> str:
    """The page of a repository."""
    return f"https://huggingface.co/{repository}"


def is_repository(name: str) -> bool:
    """Whether a name has the form of a repository's, "owner/name"."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is not None


def find_cached(repository: str, names: Sequence[str]) -> Path | None:
    """The folder of the cache that holds all these files of a repository; None where one is not there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(repository, allow_patterns=list(names), local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    return folder if all((folder / name).is_file() for name in names) else None


def download(repository: str, names: Sequence[str]) -> Path:
    """The folder with the newest version of these files of a repository.

    What is cached is not downloaded again, and stands in where the hub cannot be reached.

    Raises:
        CheckpointError: they can neither be downloaded nor found in the cache.
    """
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(repository, allow_patterns=list(names)))
    except Exception as error:  # whatever its transport raises, besides its own
        raise CheckpointError(f"{url(repository)} cannot be had ({first_sentence(error)})") from None
    for name in names:
        if not (folder / name).is_file():  # not in the repository, or not in the cache that stood in for it
            raise CheckpointError(f"{url(repository)} gave no {name}")
    return folder


def upload(repository: str, folder: Path, private: bool = False) -> str:
    """Push a folder's files to a repository, which is made if need be; returns its page.

    Args:
        private: whether a new repository is for its owner only.

    Raises:
        CheckpointError: the hub does not take it.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload a nextscale model")
    except Exception as error:  # whatever its transport raises, besides its own
        raise CheckpointError(
            f"'{repository}' was not pushed to the hub ({first_sentence(error)}): check its name and the "
            "connection, and log in with 'hf auth login'"
        ) from None
    return url(repository)
