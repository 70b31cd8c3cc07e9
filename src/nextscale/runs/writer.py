"""A run folder as its run writes it."""

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from einops import rearrange
from filelock import FileLock, Timeout
from torch import Tensor

from nextscale.base.errors import ConfigError
from nextscale.base.files import replacing, write_text_aside
from nextscale.base.images import to_pil
from nextscale.base.numbers import without_nan
from nextscale.runs.paths import PictureKind, RunPaths, by_step

PATIENCE = 1.0  # seconds to wait for the lock: another process's `check` holds it for a moment


class RunFolder(RunPaths):
    """Where a run writes. From `open` to `close` it holds a lock, so that no two runs share a folder.

    The operating system releases the lock of a process that ends, however it ends.

    Args:
        path: the folder.
        is_main: whether this is the process that writes; in the others, the methods that write do nothing.
    """

    def __init__(self, path: Path, is_main: bool = True) -> None:
        super().__init__(path)
        self.is_main = is_main
        # Of the object, not of the thread: a run may be started in one thread and end in another.
        self._lock = FileLock(self.lock_file, timeout=PATIENCE, thread_local=False)

    def check(self, *, resume: bool, overwrite: bool, needed: Iterable[Path] = ()) -> None:
        """Whether `open` would succeed now. Changes nothing.

        Args:
            needed: files and folders that the run reads.

        Raises:
            ConfigError: the folder is a file, is in use, holds a run that is neither to be resumed nor
                overwritten, or what is no run's: a run would write over that, and overwriting empty it.
        """
        if resume and overwrite:
            raise ConfigError(
                "run.resume and run.overwrite exclude each other: keep the earlier run, or replace it"
            )
        if self.lock_file.exists() and not self._lock.is_locked:
            self.lock()
            self.close()
        self._check_content(resume, overwrite)
        if not resume or not by_step(self.checkpoints):  # else there is a run to go on with
            self._check_owner()
        for path in needed if overwrite and not resume else ():
            if path.resolve().is_relative_to(self.path.resolve()):
                raise ConfigError(
                    f"'{path}' is needed, and lies in '{self.path}', which run.overwrite would empty: move "
                    "it out, or choose another --run.output_dir"
                )

    def open(self, config_yaml: str, *, resume: bool, overwrite: bool) -> None:
        """Lock the folder, remove the run that is to be overwritten, and write `config.yaml`.

        Raises:
            ConfigError: as `check` does; the folder is then as it was.
        """
        self.lock()
        try:
            self._check_content(resume, overwrite)
            if self.is_main:
                # A run that ended before its first line has an environment.json, but no metrics.
                if overwrite and not resume and (self.metrics.exists() or self.environment.exists()):
                    self._clear()
                write_text_aside(self.config, config_yaml)
        except BaseException:
            self.close()
            raise

    def lock(self) -> None:
        """Reserve the folder for this run, and make it if need be. Does nothing if that is done already.

        Raises:
            ConfigError: another run uses the folder, or it is a file.
        """
        if not self.is_main or self._lock.is_locked:
            return
        self._check_is_folder()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        except Timeout:
            raise ConfigError(
                f"another run is using '{self.path}': wait until it has ended, or choose another "
                "--run.output_dir"
            ) from None

    def close(self) -> None:
        """Release the folder. Does nothing if it is not locked."""
        self._lock.release()

    def write_environment(self, content: dict[str, object]) -> None:
        """Write `environment.json`."""
        if self.is_main:
            write_text_aside(self.environment, json.dumps(content, indent=2) + "\n")

    def keep_sources(self, sources: Mapping[str, Path]) -> None:
        """Copy the Python file of each reward to `rewards/NAME.py`; a slash in a name becomes %2F."""
        for name, source in sources.items() if self.is_main else ():
            self.rewards.mkdir(exist_ok=True)
            with replacing(self.rewards / f"{name.replace('%', '%25').replace('/', '%2F')}.py") as aside:
                shutil.copyfile(source, aside)

    def owns(self, checkpoint: Path) -> bool:
        """Whether this is one of the folder's checkpoints."""
        return checkpoint.resolve().parent == self.checkpoints.resolve()

    def keep_steps(self, last: int | None) -> None:
        """Drop the metrics after step `last`, which a resumed run writes again, and a last line cut short; or
        all, where a run starts afresh.

        Raises:
            ConfigError: another line is damaged; the file stays as it was.
        """
        if not self.is_main or not self.metrics.exists():
            return
        kept, lines = [], self.metrics.read_bytes().split(b"\n")
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                step = json.loads(line)["step"]
                is_whole = isinstance(step, int)
            except (ValueError, TypeError, KeyError, RecursionError):
                is_whole, step = False, 0
            if not is_whole and number == len(lines):  # no newline ends it: its writer was interrupted
                break
            if not is_whole:
                raise ConfigError(
                    f"{self.metrics}, line {number}, is damaged: restore or delete it, and resume again"
                )
            if last is not None and step <= last:
                kept.append(line.decode() + "\n")
        write_text_aside(self.metrics, "".join(kept))

    def append_metrics(self, metrics: Mapping[str, float]) -> None:
        """Append a line to `metrics.jsonl`; a number that is not finite, which JSON has not, becomes null."""
        if self.is_main:
            line = without_nan(metrics)
            with self.metrics.open("a") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())  # before a checkpoint that counts on it

    def drop_best_after(self, step: int) -> bool:
        """Remove the best model if it was found after a later step than this one; returns whether it was."""
        try:
            is_later = json.loads(self.best_step.read_text())["step"] > step
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            return False  # there is none, or an earlier version wrote it
        if is_later and self.is_main:
            shutil.rmtree(self.best, ignore_errors=True)
        return is_later

    def save_grid(self, step: int, images: Tensor, row_names: list[str]) -> None:
        """Write the samples of an evaluation as one picture, and the names of its rows.

        Args:
            step: the number of steps done.
            images: (rows, columns, 3, H, W) in [0, 1].
        """
        if self.is_main:
            self._save_picture(self.grid(step), images)
            index = {"classes": row_names, "num_columns": images.shape[1]}
            write_text_aside(self.samples_index, json.dumps(index) + "\n")

    def save_pictures(self, kind: PictureKind, step: int, images: Tensor, index: Mapping[str, Any]) -> None:
        """Write what the report shows of the first and the last evaluation besides their grids; of those
        between, none is kept.

        Args:
            images: (rows, columns, 3, H, W) in [0, 1].
            index: what they are, for JSON beside them.
        """
        if not self.is_main:
            return
        path = self.pictures(kind, step)
        self._save_picture(path, images)
        write_text_aside(path.with_suffix(".json"), json.dumps(index) + "\n")
        # After a resume, those past the last one are of the attempt before.
        found = by_step(self.samples, ".png", f"{kind}-")
        for other in list(found)[1:]:
            if other != step:
                found[other].unlink()
                found[other].with_suffix(".json").unlink(missing_ok=True)

    def _save_picture(self, path: Path, images: Tensor) -> None:
        self.samples.mkdir(exist_ok=True)
        grid = rearrange(images, "rows columns c h w -> 1 c (rows h) (columns w)")
        with replacing(path) as aside:
            to_pil(grid)[0].save(aside, format="PNG")

    def _check_is_folder(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"'{self.path}' is not a folder: choose another --run.output_dir")
        for each in (self.path, *self.path.parents):
            if each.is_symlink() and not each.exists():
                raise ConfigError(
                    f"'{each}' is a link to '{os.readlink(each)}', which does not exist: make that folder, "
                    "or choose another --run.output_dir"
                )

    def _check_content(self, resume: bool, overwrite: bool) -> None:
        self._check_is_folder()
        if self.metrics.exists() and not resume and not overwrite:
            raise ConfigError(
                f"'{self.path}' already holds a run: continue it with --run.resume auto, replace it with "
                "--run.overwrite true, or choose another --run.output_dir"
            )

    def _check_owner(self) -> None:
        if any(each.exists() for each in (self.lock_file, self.metrics, self.environment)):
            return
        for each in (self.config, *self._folders):
            if each.exists():
                raise ConfigError(
                    f"'{each}' was written by no run, and a run would write there: choose another "
                    "--run.output_dir, or move it"
                )

    @property
    def _folders(self) -> tuple[Path, ...]:
        """What a run makes, and overwriting removes."""
        return self.checkpoints, self.final, self.best, self.rewards, self.samples, self.tensorboard

    def _clear(self) -> None:
        """Remove what a run has written; its metrics last, for they mark the folder as a run's."""
        for folder in self._folders:
            shutil.rmtree(folder, ignore_errors=True)
        for file in (self.report, self.environment, self.metrics):
            file.unlink(missing_ok=True)
