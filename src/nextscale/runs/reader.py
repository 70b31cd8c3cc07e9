"""A run folder as it is read: configuration, environment, metrics step by step, grids of samples.

Reads files only: no model, no torch, and no lock but for a moment to see whether another process holds it,
so that a live run can be looked at.
"""

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import yaml
from filelock import FileLock, Timeout

from nextscale.base.errors import ConfigError
from nextscale.runs.paths import RunPaths

BASE_MODEL = "the base model"  # what `Run.kl_to` says where nothing else is asked for
MAX_ROWS = 16  # more row names beside a grid of samples would not be readable


def images_of(record: Mapping[str, Any]) -> int:
    """Images drawn in a training step; 0 in a record of an evaluation. The metrics hold their rate, so the
    count is rounded."""
    rate, seconds = record.get("images_per_second"), record.get("step_time")
    return round(rate * seconds) if is_number(rate) and is_number(seconds) else 0


@dataclass(frozen=True)
class Run:
    """What a run folder holds."""

    paths: RunPaths
    config: dict[str, Any]
    config_text: str
    """The configuration as written, with its comments."""
    environment: dict[str, Any]
    records: list[dict[str, Any]]
    """The metrics of each step, in the order of the steps."""
    notes: list[str]
    """Sentences about what is missing or left out."""

    @property
    def name(self) -> str:
        return self.paths.path.resolve().name

    @property
    def num_steps(self) -> int:
        return self.records[-1]["step"]

    @property
    def is_open(self) -> bool:
        """Whether the run is going on, as far as its files tell: a process holds its lock."""
        lock = FileLock(self.paths.lock_file)
        if not self.paths.lock_file.exists():
            return False
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return True
        except OSError:  # a folder that this user may only read
            return False
        lock.release()
        return False

    @property
    def kl_to(self) -> str:
        """What the `kl_per_image` of its metrics is to."""
        grpo = self.config.get("grpo")
        options: dict[str, Any] = grpo if isinstance(grpo, dict) else {}
        moves, scale = options.get("sync_ref_model"), options.get("reference_guidance_scale")
        name = "the reference, which moves" if moves else BASE_MODEL
        if scale is not None:
            name += f" at guidance {scale}"
        if (num_scales := options.get("train_scales")) is not None:
            name += f", in the first {num_scales} scales"
        return name

    @property
    def num_images(self) -> int:
        """Images drawn in training."""
        return sum(map(images_of, self.records))

    def series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of a metric, where it is a finite number: two arrays of equal length."""
        found = [(record["step"], record[key]) for record in self.records if is_number(record.get(key))]
        return np.array([step for step, _ in found]), np.array([value for _, value in found], dtype=float)

    def values(self, key: str) -> list[float]:
        return self.series(key)[1].tolist()

    def ends(self, key: str) -> tuple[float, float] | None:
        """The first and the last value of a metric, or None where it was measured less than twice."""
        values = self.values(key)
        return (values[0], values[-1]) if len(values) > 1 else None

    def names(self, pattern: str) -> list[str]:
        """What the group in `pattern` matches in the names of metrics, in the order of the metrics."""
        keys = dict.fromkeys(key for record in self.records for key in record)
        return [match[1] for key in keys if (match := re.fullmatch(pattern, key))]

    def row_names(self) -> list[str]:
        """The names of the rows of each grid of samples; empty where they are unknown or more than 16.

        Raises:
            ConfigError: the index of the samples is broken.
        """
        names = read_object(self.paths.samples_index).get("classes")
        return [str(name) for name in names] if isinstance(names, list) and len(names) <= MAX_ROWS else []


def find_run(source: str) -> tuple[Path | None, str]:
    """The run that trained a model, and the model, where `source` names a run's folder, whose model is the
    final one, or that or the best one itself.

    Returns:
        (None, source) where it names neither.
    """
    path = Path(source)
    for run in map(RunPaths, (path, path.parent)):
        model = run.final if path == run.path else path
        is_named = model in (run.final, run.best)
        if is_named and run.metrics.is_file() and (model / "config.json").is_file():
            return run.path, str(model)
    return None, source


def read_run(folder: Path) -> Run:
    """The run in a folder.

    Raises:
        ConfigError: the folder is not a run folder, or a file in it is broken.
    """
    paths, advice = RunPaths(folder), "give the folder that a training run wrote"
    if not folder.is_dir():
        raise ConfigError(f"the run folder {folder} does not exist; {advice}")
    if not any(folder.iterdir()):
        raise ConfigError(f"the run folder {folder} is empty; {advice}")
    for path in (paths.config, paths.metrics):
        if not path.is_file():
            raise ConfigError(f"{folder} is no run folder, for it has no {path.name}; {advice}")
    records, notes = _read_metrics(paths.metrics)
    text = paths.config.read_text(encoding="utf-8", errors="replace")
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else 1
        raise ConfigError(f"{paths.config}, line {line}, is not valid YAML; restore the file") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{paths.config} must be a mapping of sections such as grpo; restore the file")
    planned = config["run"].get("max_steps") if isinstance(config.get("run"), dict) else None
    if isinstance(planned, int) and (last := records[-1]["step"]) < planned:
        notes.append(f"The metrics end at step {last} of {planned}: still running, or stopped early.")
    return Run(paths, config, text, read_object(paths.environment), records, notes)


def _read_metrics(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """One record a step, and notes. Steps done again after a resume replace their first attempt."""
    records: list[dict[str, Any]] = []
    notes, num_redone = [], 0
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            if number == len(lines):  # no newline ends it: the writer was interrupted
                notes.append(f"The last line of {path.name} (line {number}) was cut short and is left out.")
                break
            raise ConfigError(
                f"{path}, line {number}, is not valid JSON; restore or delete that line"
            ) from None
        step = record.get("step") if isinstance(record, dict) else None
        if not isinstance(step, int):
            raise ConfigError(
                f"{path}, line {number}, has no whole number 'step'; restore or delete that line"
            )
        if records and step < records[-1]["step"]:
            kept = [known for known in records if known["step"] < step]
            num_redone, records = num_redone + len(records) - len(kept), kept
        if records and step == records[-1]["step"]:
            records[-1] |= record
        else:
            records.append(record)
    if not records:
        raise ConfigError(f"{path} is empty, so there is nothing to report; run at least one step")
    if num_redone:
        notes.append(f"The run was resumed: the first attempt at {num_redone} of its steps is left out.")
    return records, notes


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty where there is no file.

    Raises:
        ConfigError: the file holds something else.
    """
    try:
        found = json.loads(path.read_bytes()) if path.is_file() else {}
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ConfigError(f"{path} is no JSON object; restore or delete it")
    return found


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value is a finite number; a boolean is not."""
    # An integer of JSON may be too large for a float.
    is_kind = isinstance(value, int | float) and not isinstance(value, bool)
    return is_kind and abs(value) <= sys.float_info.max
