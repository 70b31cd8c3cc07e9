"""A file is replaced whole or not at all."""

import os
from pathlib import Path

import pytest

from nextscale.base.files import replacing, write_text_aside


def test_a_file_is_written_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    for text in ("first", "zweite Größe"):
        write_text_aside(path, text)
        assert path.read_text(encoding="utf-8") == text
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_while_writing_leaves_the_earlier_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("earlier")
    with pytest.raises(KeyboardInterrupt), replacing(path) as aside:
        aside.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "earlier" and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_the_earlier_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: int) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "a.txt"
    path.write_text("earlier")
    monkeypatch.setattr(os, "fsync", fail)  # where a file system may say so first
    with pytest.raises(OSError, match="No space left"):
        write_text_aside(path, "later")
    assert path.read_text() == "earlier" and list(tmp_path.iterdir()) == [path]
