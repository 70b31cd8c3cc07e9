"""What a run folder says: its configuration, its metrics step by step, its environment. Reads files only."""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from nextscale.base.errors import ConfigError


@dataclass(frozen=True)
class Run:
    """What a run folder says. `records` holds one mapping a step, in the order of the steps."""

    folder: Path
    config: dict[str, Any]
    config_text: str
    environment: dict[str, Any]
    records: list[dict[str, Any]]
    notes: list[str]

    def series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of a metric, where it is a finite number."""
        found = [(record["step"], record[key]) for record in self.records if is_number(record.get(key))]
        return np.array([step for step, _ in found]), np.array([value for _, value in found], dtype=float)

    def values(self, key: str) -> list[float]:
        return self.series(key)[1].tolist()

    def ends(self, key: str) -> tuple[float, float] | None:
        """The first and the last value of a metric, or None where it was measured less than twice."""
        values = self.values(key)
        return (values[0], values[-1]) if len(values) > 1 else None

    def names(self, pattern: str) -> list[str]:
        """What the group in `pattern` stands for, over all metrics, in their own order."""
        keys = dict.fromkeys(key for record in self.records for key in record)
        return [match[1] for key in keys if (match := re.fullmatch(pattern, key))]

    @property
    def num_steps(self) -> int:
        return self.records[-1]["step"]


def read_run(folder: Path) -> Run:
    """The run in a folder; raises as write_report does."""
    advice = "give the folder that a training run wrote"
    if not folder.is_dir():
        raise ConfigError(f"the run folder {folder} does not exist; {advice}")
    if not any(folder.iterdir()):
        raise ConfigError(f"the run folder {folder} is empty; {advice}")
    for name in ("config.yaml", "metrics.jsonl"):
        if not (folder / name).is_file():
            raise ConfigError(f"{folder} is no run folder, for it has no {name}; {advice}")
    records, notes = _read_metrics(folder / "metrics.jsonl")
    text = (folder / "config.yaml").read_text(encoding="utf-8", errors="replace")
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError as error:
        line = (
            error.problem_mark.line + 1
            if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark
            else 1
        )
        raise ConfigError(
            f"{folder / 'config.yaml'}, line {line}, is not valid YAML; restore the file"
        ) from None
    if not isinstance(config, dict):
        raise ConfigError(
            f"{folder / 'config.yaml'} must be a mapping of sections such as grpo; restore the file"
        )
    planned = config["run"].get("max_steps") if isinstance(config.get("run"), dict) else None
    if isinstance(planned, int) and records[-1]["step"] < planned:
        notes.append(
            f"The metrics end at step {records[-1]['step']} of {planned}: still running, or stopped early."
        )
    environment = read_object(folder / "environment.json")
    return Run(folder, config, text, environment, records, notes)


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
        except ValueError:
            if number == len(lines):  # no newline ends it: the writer was interrupted
                notes.append(f"The last line of metrics.jsonl (line {number}) was cut short and is left out.")
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
    """The JSON object in a file that may be missing."""
    try:
        found = json.loads(path.read_bytes()) if path.is_file() else {}
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ConfigError(f"{path} is no JSON object; restore or delete it")
    return found


def is_number(value: Any) -> bool:
    """Whether it is a finite number, and no boolean."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
