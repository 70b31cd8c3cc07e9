"""An archive of images, as numpy and a zip reader find it."""

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from nextscale.base import archive
from nextscale.base.archive import ImageArchive


def images_of(num: int, size: int) -> tuple[torch.Tensor, np.ndarray]:
    """Images, and the pixels that are expected of them."""
    images = torch.rand(num, 3, size, size, generator=torch.Generator().manual_seed(0))
    return images, np.rint(images.permute(0, 2, 3, 1).numpy() * np.float32(255)).astype(np.uint8)


def test_it_is_filled_in_any_order_by_several_and_read_by_numpy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive, "CHUNK", 100)
    images, expected = images_of(7, 5)
    path, aside = tmp_path / "images.npz", tmp_path / ".aside"
    first, second = (ImageArchive(path, aside, 7, 5) for _ in range(2))
    first.open()
    first.write([6, 0, 2], images[[6, 0, 2]])
    second.open()  # goes on with what is there
    second.write([1, 5, 3, 4], images[[1, 5, 3, 4]])
    assert not path.exists()
    first.finish()
    assert not aside.exists()
    with np.load(path, allow_pickle=False) as found:
        assert found.files == ["arr_0"] and found["arr_0"].dtype == np.uint8
        assert np.array_equal(found["arr_0"], expected)
    with zipfile.ZipFile(path) as file:  # as ADM's evaluator streams it
        assert file.testzip() is None
        with file.open("arr_0.npy") as stream:
            assert np.lib.format.read_magic(stream) == (1, 0)
            assert np.lib.format.read_array_header_1_0(stream) == ((7, 5, 5, 3), False, np.uint8)
            assert stream.read() == expected.tobytes()
    np.savez(tmp_path / "numpy.npz", expected)
    assert path.stat().st_size - (tmp_path / "numpy.npz").stat().st_size < 100


def test_one_that_was_stopped_while_it_was_finished(tmp_path: Path) -> None:
    images, expected = images_of(3, 4)
    path = tmp_path / "images.npz"
    whole = ImageArchive(path, tmp_path / "aside", 3, 4)
    whole.open()
    whole.write(range(3), images)
    whole.finish()
    path.rename(tmp_path / "aside")  # all was written, and the name not yet given
    again = ImageArchive(path, tmp_path / "aside", 3, 4)
    again.open()
    again.finish()
    assert np.array_equal(np.load(path)["arr_0"], expected)


def test_more_than_four_gigabytes_stand_in_the_file_and_never_in_memory(tmp_path: Path) -> None:
    """Which a zip without its 64-bit extension could not hold. Of a file with holes the disk has little."""
    images, _ = images_of(1, 2048)
    num = 2**32 // images.numel() + 2
    big = ImageArchive(tmp_path / "big.npz", tmp_path / "aside", num, 2048)
    big.open()
    big.write([num - 1], images)
    assert (tmp_path / "aside").stat().st_size > 2**32
    assert (tmp_path / "aside").stat().st_blocks * 512 < 2**26
    with (tmp_path / "aside").open("r+b") as file:
        big._close(file)
    with zipfile.ZipFile(tmp_path / "aside") as found:
        (entry,) = found.infolist()
        assert entry.file_size == entry.compress_size > 2**32 and entry.header_offset == 0
        with found.open(entry) as stream:
            assert np.lib.format.read_magic(stream) == (1, 0)
            assert np.lib.format.read_array_header_1_0(stream)[0] == (num, 2048, 2048, 3)
