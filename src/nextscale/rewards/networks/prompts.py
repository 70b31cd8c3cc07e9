"""Prompts: templates of text that an image should match.

"{label}" or "{text}" stands for the condition's text: the class name, or the prompt; and "{data[colour]}" for
what the prompts' file has in the column "colour".
"""

import re
from collections.abc import Sequence
from string import Formatter

from nextscale.base.conditions import Condition
from nextscale.base.errors import ConfigError

FIELDS = {"label", "text"}  # the class name and the prompt: both are the condition's text
COLUMN = re.compile(r"data\[([^\[\]\d][^\[\]]*)\]")

DEFAULT_PROMPT = "a photo of a {label}"


def check_prompts(prompts: str | Sequence[str], *, columns: bool = True) -> tuple[str, ...]:
    """One template or several as a tuple, checked.

    Args:
        columns: whether a field may stand for a column.

    Raises:
        ConfigError: there is no template, or one is empty, malformed, or has a field other than these.
    """
    prompts = (prompts,) if isinstance(prompts, str) else tuple(prompts)
    if not prompts:
        raise ConfigError('no prompt given: give at least one, such as "a photo of a {label}"')
    for prompt in prompts:
        try:
            named = columns_of(prompt) if columns else []
            unknown = _fields(prompt) - FIELDS - {f"data[{each}]" for each in named}
            if not unknown:  # finds a format such as {label:d} here, not while training
                prompt.format(label="", text="", data=dict.fromkeys(named, ""))
        except (ValueError, LookupError) as error:
            raise ConfigError(f"prompt '{prompt}' is not a template: {error}") from None
        if not prompt or unknown:
            column = ", {data[NAME]} for a column of the prompts' file" if columns else ""
            raise ConfigError(
                f"prompt '{prompt}' may hold the field {{label}} or {{text}}{column} and no other, and must "
                "not be empty"
            )
    return prompts


def columns_of(prompt: str) -> list[str]:
    """Names of the columns that a template has fields for."""
    return [found[1] for each in sorted(_fields(prompt)) if (found := COLUMN.fullmatch(each))]


def fill(prompt: str, conditions: Sequence[Condition]) -> list[str]:
    """The template filled in for each condition.

    Raises:
        ConfigError: a condition has nothing in one of its columns.
    """
    columns = columns_of(prompt)
    for condition in conditions:
        for column in columns:
            if not isinstance(value := condition.data.get(column), str | int | float) or value == "":
                found = f"{value!r} there" if column in condition.data else "no such column"
                raise ConfigError(
                    f"prompt '{prompt}' needs the column '{column}', and the prompt '{condition.text}' has "
                    f"{found}: add a text or a number to the prompts' file"
                )
    return [prompt.format(label=each.text, text=each.text, data=each.data) for each in conditions]


def _fields(prompt: str) -> set[str]:
    return {field for _, field, _, _ in Formatter().parse(prompt) if field is not None}
