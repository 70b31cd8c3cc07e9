"""Files of hub repositories, through huggingface_hub: its cache, its progress bars, its resumed downloads."""

import re
from collections.abc import Sequence
from pathlib import Path

from nextscale.errors import CheckpointError


def url(repository: str) -> str:
    """The page of a repository."""
    return f"https://huggingface.co/{repository}"


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
        reason = re.split(r"\.\s|\n", str(error).strip())[0] or type(error).__name__
        raise CheckpointError(f"{url(repository)} cannot be had ({reason})") from None
    for name in names:
        if not (folder / name).is_file():  # not in the repository, or not in the cache that stood in for it
            raise CheckpointError(f"{url(repository)} gave no {name}")
    return folder
