"""Parts of a long computation, kept on the disk so that it can go on after it was stopped."""

import json
import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from nextscale.base.files import replacing, write_text_aside
from nextscale.base.tensors import save_tensors

WHAT = "computation.json"


class Parts:
    """The parts that a computation has come to.

    Args:
        folder: of this computation and no other.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = FileLock(folder.with_suffix(".lock"))

    def claim(self, what: Mapping[str, Any]) -> bool:
        """Take the folder for this process; False where another one holds it.

        Args:
            what: the computation, for whoever looks into the folder.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            return False
        write_text_aside(self.folder / WHAT, json.dumps(what, indent=2) + "\n")
        return True

    def keep(self, number: int, part: Mapping[str, Tensor]) -> None:
        """Write a part; it is there whole, or not at all."""
        tensors = {
            f"{i:04d} {name}": each.contiguous().clone() for i, (name, each) in enumerate(part.items())
        }
        with replacing(self._file(number)) as aside:
            save_tensors(tensors, aside)

    def read(self, numbers: Iterable[int]) -> list[dict[str, Tensor]]:
        """The parts with these numbers, up to the first that is missing."""
        found = []
        for number in numbers:
            try:
                stored = load_file(self._file(number))
            except (OSError, SafetensorError):
                break
            found.append({name.partition(" ")[2]: stored[name] for name in sorted(stored)})
        return found

    @property
    def is_begun(self) -> bool:
        """Whether there is any part."""
        return any(self.folder.glob("*.safetensors"))

    def forget(self) -> None:
        """Remove all parts."""
        for file in self.folder.glob("*.safetensors"):
            file.unlink(missing_ok=True)  # several processes may do this

    def discard(self) -> None:
        """Remove the folder: the computation has come to its end."""
        shutil.rmtree(self.folder, ignore_errors=True)
        Path(self._lock.lock_file).unlink(missing_ok=True)

    def release(self) -> None:
        """Let another process have the folder."""
        self._lock.release()

    def discard_abandoned(self, days: float) -> None:
        """Remove what other computations left beside this folder and have not touched for so long."""
        for folder in self.folder.parent.iterdir():
            other = Parts(folder)
            try:
                touched = max(each.stat().st_mtime for each in (folder, *folder.iterdir()))
                if folder == self.folder or time.time() - touched < days * 86400:
                    continue
                other._lock.acquire(timeout=0)
            except OSError:  # a lock, gone meanwhile, or in use: filelock's Timeout is one, too
                continue
            other.discard()
            other.release()

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:08d}.safetensors"
