"""Files that are replaced whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; the file written there replaces `path` when the block succeeds.

    An error, a kill or a full disk leaves what `path` held before, never a part of either. A file that is
    mapped into memory stays as it is for those who mapped it.
    """
    aside = path.with_name(f".writing-{path.name}")
    try:
        yield aside
        with aside.open("rb+") as file:
            os.fsync(file.fileno())  # else the new name may reach the disk before the content does
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def write_text_aside(path: Path, text: str) -> None:
    """Replace the text of a file, whole or not at all."""
    with replacing(path) as aside:
        aside.write_text(text, encoding="utf-8")
