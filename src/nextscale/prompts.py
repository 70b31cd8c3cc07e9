"""Prompts of text-conditional models: read from a file, with all that the file says besides.

A text file has a prompt a line. A JSONL or CSV file has a column `prompt` (or `text`, or `caption`) and any
others, which rewards find in `Condition.data`. A file in a dataset on the hub is written as
hf://datasets/OWNER/NAME/FILE.
"""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nextscale.base.conditions import Condition, check_unicode
from nextscale.base.errors import CheckpointError, ConfigError, first_sentence
from nextscale.models import hub

HUB = "hf://datasets/"
COLUMNS = ("prompt", "text", "caption")
"""Names of the column of prompts; the first that there is."""
KINDS = (".txt", ".jsonl", ".csv")


def read_prompts(source: str | Path) -> list[Condition]:
    """The prompts of a file, in its order.

    Args:
        source: path of a .txt, .jsonl or .csv file, or hf://datasets/OWNER/NAME/FILE.

    Raises:
        ConfigError: there is no such file, it cannot be read, or a prompt is missing, empty or comes twice.
    """
    path = _fetched(str(source)) if str(source).startswith(HUB) else Path(source)
    if path.suffix not in KINDS:
        raise ConfigError(f"'{source}' is no file of prompts: expected one of {', '.join(KINDS)}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"no file '{source}': give the path of a file of prompts") from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"'{source}' cannot be read as UTF-8, from byte {error.start + 1} on: save it in that encoding"
        ) from None
    except OSError as error:
        raise ConfigError(f"'{source}' cannot be read: {first_sentence(error)}") from None
    read = {".txt": _from_text, ".jsonl": _from_jsonl, ".csv": _from_csv}[path.suffix]
    found, lines = [], {}
    for line, prompt, data in read(text, str(source)):
        if not isinstance(prompt, str) or not prompt.strip():
            raise ConfigError(f"'{source}', line {line}: expected a prompt, got {prompt!r}")
        check_unicode(prompt, f"'{source}', line {line}: the prompt")
        prompt = " ".join(prompt.split())
        if prompt in lines:
            raise ConfigError(
                f"'{source}', line {line}: the prompt '{prompt}' stands in line {lines[prompt]} already; "
                "remove one of them"
            )
        lines[prompt] = line
        found.append(Condition(None, prompt, data))
    if not found:
        raise ConfigError(f"'{source}' has no prompts: give at least one")
    return found


def check_apart(trained: Sequence[Condition], held_out: Sequence[Condition]) -> None:
    """Check that no prompt is both trained on and measured as held out.

    Raises:
        ConfigError: one is.
    """
    # Text encoders tell no capital letters apart.
    texts = {each.text.casefold() for each in trained}
    if both := [each.text for each in held_out if each.text.casefold() in texts]:
        raise ConfigError(
            f"{len(both)} held-out prompts are trained on as well, such as '{min(both)}': take them out of "
            "one of the files"
        )


Rows = list[tuple[int, Any, dict[str, Any]]]
"""Number of the line, prompt and further columns."""


def _from_text(text: str, source: str) -> Rows:
    return [(i, line, {}) for i, line in enumerate(text.split("\n"), 1) if line.strip()]


def _from_jsonl(text: str, source: str) -> Rows:
    rows: Rows = []
    for i, line in enumerate(text.split("\n"), 1):  # and not at U+2028, which JSON may have in a string
        if not line.strip():
            continue
        try:
            row = json.loads(line, parse_constant=_refused)
        except (ValueError, RecursionError):
            raise ConfigError(f"'{source}', line {i}: not JSON; expected one object a line") from None
        if not isinstance(row, dict):
            raise ConfigError(f"'{source}', line {i}: expected an object, got {type(row).__name__}")
        rows.append((i, *_split(row, source, i)))
    return rows


def _refused(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")  # as RFC 8259 has it


def _from_csv(text: str, source: str) -> Rows:
    rows: Rows = []
    read = 0  # lines
    # Strict, or a quote that is never closed would make one prompt of all the rows after it.
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        if reader.fieldnames:  # which reads the first line
            read = reader.line_num
        for row in reader:
            read = reader.line_num
            rows.append((read, *_split(dict(row), source, read)))
    except csv.Error as error:
        raise ConfigError(
            f"'{source}', from line {read + 1} on: not CSV ({error}); close each quote, and write one within "
            "a text twice"
        ) from None
    return rows


def _split(row: dict[Any, Any], source: str, line: int) -> tuple[Any, dict[str, Any]]:
    """The prompt, and the other columns."""
    if None in row:
        raise ConfigError(
            f"'{source}', line {line}: more values than columns; put a text with commas in quotes"
        )
    column = next((each for each in COLUMNS if each in row), None)
    if column is None:
        raise ConfigError(
            f"'{source}', line {line}: no column of prompts; expected one called {' or '.join(COLUMNS)}, got "
            f"{', '.join(map(str, row)) or 'none'}"
        )
    return row.pop(column), row


def _fetched(source: str) -> Path:
    owner, _, rest = source.removeprefix(HUB).partition("/")
    name, _, file = rest.partition("/")
    if not (owner and name and file):
        raise ConfigError(f"'{source}' is no file of a dataset: expected {HUB}OWNER/NAME/FILE")
    try:
        return hub.dataset_file(f"{owner}/{name}", file)
    except CheckpointError as error:
        raise ConfigError(f"{error}: give the path of a copy") from None
