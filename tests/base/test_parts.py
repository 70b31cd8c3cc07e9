"""Parts of a computation: there whole or not at all, and of one process at a time."""

import os
import time
from pathlib import Path

import pytest
import torch

from nextscale.base.parts import Parts


def test_parts_come_back_to_the_bit_and_in_their_order(tmp_path: Path) -> None:
    parts = Parts(tmp_path / "new" / "key")
    assert parts.claim({"model": "toy"}) and not parts.is_begun
    assert '"model": "toy"' in (tmp_path / "new" / "key" / "computation.json").read_text()
    shared = torch.rand(4, 3)
    first = {
        "z": shared.T,  # not contiguous, and memory that the next one shares
        "a": shared[1],
        "score/a b": torch.tensor([float("nan"), 1e-45]),
        "none": torch.zeros(0, 3),
        "yes": torch.tensor([True, False]),
    }
    parts.keep(3, first)
    parts.keep(5, {"z": torch.ones(1)})
    assert parts.is_begun
    (found,) = parts.read([3, 4, 5])  # up to the first that is missing
    assert list(found) == list(first)
    for name, each in first.items():
        assert found[name].dtype == each.dtype and found[name].shape == each.shape
        assert found[name].numpy().tobytes() == each.contiguous().numpy().tobytes()
    assert [each["z"].tolist() for each in parts.read([5])] == [[1.0]]


def test_a_broken_part_counts_as_missing(tmp_path: Path) -> None:
    parts = Parts(tmp_path / "key")
    parts.claim({})
    for number in range(3):
        parts.keep(number, {"a": torch.zeros(9)})
    (tmp_path / "key" / "00000001.safetensors").write_bytes(b"half")
    assert len(parts.read(range(3))) == 1


def test_one_process_has_them_at_a_time(tmp_path: Path) -> None:
    first, second = (Parts(tmp_path / "key") for _ in range(2))
    assert first.claim({}) and not second.claim({})
    first.keep(0, {"a": torch.zeros(1)})
    first.release()
    assert second.claim({}) and second.is_begun
    second.forget()
    assert not second.is_begun and second.folder.is_dir()
    second.discard()
    second.release()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        Parts(tmp_path / "file" / "key").claim({})


def test_what_was_given_up_long_ago_is_removed(tmp_path: Path) -> None:
    old, used, new, own = (Parts(tmp_path / name) for name in ("old", "used", "new", "own"))
    for parts in (old, used, new, own):
        assert parts.claim({})
        parts.keep(0, {"a": torch.zeros(1)})
    old.release()
    new.release()
    long_ago = time.time() - 31 * 86400
    for parts in (old, used, own):
        for path in (*parts.folder.iterdir(), parts.folder):
            os.utime(path, (long_ago, long_ago))
    own.discard_abandoned(days=30)
    assert sorted(each.name for each in tmp_path.iterdir() if each.is_dir()) == ["new", "own", "used"]
    assert not (tmp_path / "old.lock").exists()
