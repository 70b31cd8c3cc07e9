"""What an evaluation has come to: kept until its command ends, and known again by all that it depends on."""

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

import nextscale
from nextscale.base.archive import ImageArchive
from nextscale.base.conditions import Condition
from nextscale.base.files import cache_folder, with_files
from nextscale.base.parts import Parts
from nextscale.base.processes import from_owners
from nextscale.base.seeding import mixed_order
from nextscale.base.tensors import fingerprint
from nextscale.evaluation import KeepImages
from nextscale.pipeline import VARPipeline

DAYS = 30  # for which what was given up is kept


def weights_of(pipe: VARPipeline) -> str:
    """What tells a model's weights from any others."""
    networks = {"transformer": pipe.transformer, "tokenizer": pipe.tokenizer}
    return fingerprint(
        {f"{name}.{key}": each for name in networks for key, each in networks[name].state_dict().items()}
    )


class Kept:
    """The parts of one model's evaluation, and the file of its images.

    Args:
        what: all that its images and their scores depend on, but for how many processes there are.
        npz: where its images are to be written, if anywhere.
        image_size: their width and height.
    """

    def __init__(self, what: Mapping[str, Any], npz: Path | None, image_size: int) -> None:
        processes = PartialState()
        what = {
            **what,
            "npz": str(npz.resolve()) if npz else None,
            "processes": processes.num_processes,
            "versions": [nextscale.__version__, torch.__version__],
        }
        key = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]
        self.npz, self.image_size = npz, image_size
        self.aside = npz.with_name(f".writing-{key}-{npz.name}") if npz else None
        self.goes_on = False
        self._archive: ImageArchive | None = None
        parts, is_mine = Parts(cache_folder("evaluations") / key), False
        if processes.is_main_process:
            is_mine = self._claim(parts, what)
        self.parts = parts if from_owners(is_mine, [0])[0] else None

    def _claim(self, parts: Parts, what: Mapping[str, Any]) -> bool:
        try:
            is_mine = parts.claim(what)
            if is_mine:
                parts.discard_abandoned(DAYS)
            reason = "another process makes the same one"
        except OSError as error:
            is_mine, reason = False, f"'{error.filename}': {error.strerror}"
        if not is_mine:
            print(f"This evaluation could not go on if it were stopped: {reason}.", file=sys.stderr)
        elif self.aside is not None and not self.aside.exists():
            parts.forget()  # their images are gone
        elif parts.is_begun:
            self.goes_on = True
            print(f"Goes on with what is kept in {parts.folder}.", file=sys.stderr)
        return is_mine

    @property
    def keep_images(self) -> KeepImages | None:
        """Where the images go, if anywhere."""
        return None if self.npz is None else self._write

    def _write(self, images: range, total: int, drawn: torch.Tensor) -> None:
        self._open(total).write(mixed_order(total).argsort()[images.start : images.stop].tolist(), drawn)

    def _open(self, total: int) -> ImageArchive:
        if self._archive is None:
            assert self.npz is not None and self.aside is not None
            self._archive = ImageArchive(self.npz, self.aside, total, self.image_size)
            self._archive.open()
        return self._archive

    def finish(self, total: int) -> None:
        """Put the file of images in its place; by one process, when all have drawn."""
        if self.npz is not None:
            self._open(total).finish()

    @property
    def told(self) -> str:
        """What somebody who stops it may want to know."""
        if self.parts is None or not self.parts.is_begun:
            return "stopped"
        return f"stopped; what was drawn is kept in {self.parts.folder}: the same command goes on from there"

    def discard(self) -> None:
        """Remove what was kept: the command has come to its end."""
        if self.parts is not None:
            self.parts.discard()

    def release(self) -> None:
        """Let another process have what is kept."""
        if self.parts is not None:
            self.parts.release()


def told_conditions(conditions: Sequence[Condition] | None) -> Any:
    """Conditions as what is kept is known by."""
    return None if conditions is None else [[each.key, with_files(each.data)] for each in conditions]
