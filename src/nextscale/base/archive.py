"""Images as the `.npz` file that ADM's evaluator reads, and with it the authors of VAR."""

import io
import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO
from zipfile import ZipFile, ZipInfo

import numpy as np
from torch import Tensor

from nextscale.base.files import sync_file
from nextscale.base.images import to_bytes

CHUNK = 2**22  # bytes read at once


class ImageArchive:
    """A file of one array, `arr_0`, (N, H, W, 3) uint8: filled in any order, by one process or several, with
    no more of it in memory than is given at once.

    Args:
        path: where it is put once it is whole.
        aside: where it is until then.
        num, size: of the images, and their width and height.
    """

    def __init__(self, path: Path, aside: Path, num: int, size: int) -> None:
        self.path, self.aside, self.shape = path, aside, (num, size, size, 3)
        described = io.BytesIO()
        header = {"descr": "|u1", "fortran_order": False, "shape": self.shape}
        np.lib.format.write_array_header_1_0(described, header)
        self._described = described.getvalue()
        self._entry = ZipInfo(
            "arr_0.npy"
        )  # not compressed, and of a fixed date: the same images, the same file
        self._entry.external_attr = 0o600 << 16
        self._entry.header_offset = self._entry.CRC = 0
        num_bytes = len(self._described) + math.prod(self.shape)
        self._entry.file_size = self._entry.compress_size = num_bytes
        self._begin = len(self._entry.FileHeader(zip64=True))

    def open(self) -> None:
        """Begin to write, or go on with what is there. Whoever of several processes does it first."""
        self.aside.open("ab").close()
        with self.aside.open("r+b") as file:
            file.seek(self._begin)
            file.write(self._described)
            file.truncate(self._begin + self._entry.file_size)

    def write(self, rows: Sequence[int], images: Tensor) -> None:
        """Put images (B, 3, H, W) in [0, 1] into these rows."""
        pixels = to_bytes(images).permute(0, 2, 3, 1).cpu().numpy()
        with self.aside.open("r+b") as file:  # not mapped: a full disk would kill, where this raises
            for row, each in zip(rows, pixels, strict=True):
                file.seek(self._begin + len(self._described) + row * each.size)
                file.write(each.tobytes())

    def finish(self) -> None:
        """Put the file in its place, with what a zip has at its beginning and end."""
        with self.aside.open("r+b") as file:
            file.seek(self._begin)
            while chunk := file.read(CHUNK):
                self._entry.CRC = zlib.crc32(chunk, self._entry.CRC)
            self._close(file)
        sync_file(self.aside)
        self.aside.replace(self.path)

    def _close(self, file: BinaryIO) -> None:
        """Write what a zip has before its only entry, and after it."""
        file.seek(0)
        file.write(self._entry.FileHeader(zip64=True))
        file.seek(0, io.SEEK_END)
        with ZipFile(file, "w") as archive:  # which does not know yet that the entry is there
            archive.infolist().append(self._entry)
