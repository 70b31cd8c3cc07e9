"""Atomic replacement of files and folders; where the cache is; what tells a file that was changed."""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MOST = 2**24
"""Bytes of a file of JSON or YAML: what they become in memory is many times as much."""
REPLACED = ".replaced-"
"""What stands before the name of a folder that is being replaced, until the new one is there."""


def cache_folder(name: str) -> Path:
    """Where what can be made again is kept: in NEXTSCALE_CACHE, or by default in ~/.cache/nextscale."""
    return Path(os.environ.get("NEXTSCALE_CACHE") or Path.home() / ".cache" / "nextscale") / name


def with_files(value: Any) -> Any:
    """Options with the size and time of each file that they name: one that was changed is another."""
    if isinstance(value, Mapping):
        return {str(key): with_files(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [with_files(each) for each in value]
    text = str(value)
    path = next((each for each in (text, text.rpartition(":")[0]) if os.path.exists(each)), None)
    if path is None:
        return value if isinstance(value, int | float | None) else text
    files = (
        [Path(path)]
        if os.path.isfile(path)
        else sorted(each for each in Path(path).iterdir() if each.is_file())
    )
    return [text, *([each.name, each.stat().st_size, each.stat().st_mtime_ns] for each in files)]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`; the file written there replaces `path` when the block succeeds.

    After an error, a kill or with a full disk, `path` keeps its old content whole. Memory mappings of the old
    file stay valid.
    """
    aside = path.with_name(f".writing-{path.name}")
    try:
        yield aside
        sync_file(aside)  # or the new name may reach the disk before the content
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """A new folder beside `path`, which it replaces when the block succeeds."""
    aside = path.with_name(f".writing-{path.name}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        put_in_place(aside, path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def put_in_place(folder: Path, path: Path) -> None:
    """Rename a whole folder to `path`, and remove what was there before.

    A folder cannot be replaced in one go. Killed in between, the former one is whole under a name that begins
    with `REPLACED`.
    """
    former = path.with_name(f"{REPLACED}{path.name}")
    sync_folder(folder)
    if path.exists():
        shutil.rmtree(former, ignore_errors=True)  # of an earlier kill, after which `path` was written anew
        path.rename(former)
    folder.rename(path)
    sync_folder(path.parent)  # or a power cut could lose the new name
    shutil.rmtree(former, ignore_errors=True)


def discard_folder(path: Path) -> None:
    """Remove a folder, which a kill in between does not leave there as if it were whole."""
    doomed = path.with_name(f".writing-{path.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed)


def sync_folder(folder: Path) -> None:
    """Have the names in a folder written to the disk."""
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Have a file's content written to the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def read_text(path: Path, most: int = MOST) -> str:
    """A text file that is to be parsed as a whole.

    Raises:
        OSError: it cannot be read.
        ValueError: it is larger, or no UTF-8.
    """
    with path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"it has more than {most:,} bytes")
    return content.decode("utf-8")


def write_text_aside(path: Path, text: str) -> None:
    """Write a text file atomically. Half a character, which no file can hold, becomes a question mark."""
    with replacing(path) as aside:
        aside.write_text(text, encoding="utf-8", errors="replace")
