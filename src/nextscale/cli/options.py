"""Options of the command line: a parser that answers in one sentence, and the keys of a recipe."""

import argparse
import re
import types
from collections import deque
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

from nextscale.base.errors import ConfigError
from nextscale.base.records import Record, did_you_mean

TOP_KEYS = ("model", "vae", "description")
"""The keys of a recipe that are no section."""


class Parser(argparse.ArgumentParser):
    """Raises one sentence instead of printing the whole usage; knows no abbreviations."""

    def __init__(self, **settings: Any) -> None:
        settings.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see '{self.prog} --help'")

    def option(self, name: str, kind: type, text: str, default: Any = None, shown: str | None = None) -> None:
        """An option with a value.

        Args:
            shown: what the help calls the default, where it is not the value itself.
        """
        told = shown or (None if default is None else str(default))
        text = f"{text} (default: {told})" if told else text
        self.add_argument(name, type=kind, default=default, metavar=type_name(kind), help=text)

    def unknown(self, word: str) -> ConfigError:
        """The error for a word that is none of the arguments."""
        name = word.split("=")[0]
        kind = "option" if name.startswith("-") else "argument"
        hint = did_you_mean(name, self._option_string_actions, f"see '{self.prog} --help'")
        return ConfigError(f"unknown {kind} '{name}'{hint}")


def type_name(annotation: Any) -> str:
    """How a type is written in the help: INT, TEXT, a|b, [INT,...]."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return "|".join(type_name(each) for each in inner if each is not type(None))
    if origin is Literal:
        return "|".join(map(str, inner))
    if origin is tuple:
        return f"[{type_name(inner[0])},...]"
    names = {int: "INT", float: "NUMBER", str: "TEXT", bool: "true|false"}
    return names.get(annotation) or annotation.__name__.upper()


def list_recipe_options(parser: Parser) -> None:
    """Put every key of a recipe into the help, as the records tell it; `take_overrides` reads them."""
    from nextscale.config.files import packaged_recipes
    from nextscale.config.recipe import SECTIONS, Recipe
    from nextscale.rewards.kinds import RewardOptions

    parser.description = f"{parser.description} Packaged recipes: {', '.join(packaged_recipes())}."
    top = parser.add_argument_group(
        "recipe", "Any key can be overridden; values are YAML, and a hyphen in a key equals an underscore."
    )
    for name in TOP_KEYS:
        _list_option(top, name, name, Recipe)
    for section, record in SECTIONS.items():
        group = parser.add_argument_group(section, record.__doc__)
        for name in record.model_fields:
            _list_option(group, f"{section}.{name}", name, record)
    rewards = parser.add_argument_group("rewards", "For each reward, by its name in the recipe.")
    for name in RewardOptions.model_fields:
        _list_option(rewards, f"rewards.NAME.{name}", name, RewardOptions)


def _list_option(group: Any, key: str, name: str, record: type[Record]) -> None:
    field = record.model_fields[name]
    default = str(field.default).lower() if isinstance(field.default, bool) else field.default
    default = "" if default in (None, "") else f" (default: {default})"
    text = f"{' '.join((field.description or '').split())}{default}"
    group.add_argument(
        f"--{key}",
        metavar=type_name(field.annotation),
        nargs="?" if field.annotation is bool else None,
        help=text.replace("%", "%%"),
    )


def take_overrides(words: list[str]) -> tuple[list[str], dict[str, str]]:
    """The words without `--section.key value` and `--section.key=value`, and those, by dotted key.

    A boolean that stands alone is true. Which keys there are is checked where they are applied.

    Raises:
        ConfigError: a key without a value.
    """
    from nextscale.config.recipe import KEYS

    booleans = {key for key, annotation in KEYS.items() if annotation is bool}
    rest: list[str] = []
    overrides: dict[str, str] = {}
    queue = deque(words)
    while queue:
        word = queue.popleft()
        match = re.fullmatch(rf"--({'|'.join(TOP_KEYS)}|\w[\w-]*\..*?)(?:=(.*))?", word, re.DOTALL)
        if match is None:
            rest.append(word)
            continue
        key, value = match.groups()
        field = re.sub(r"^rewards\..+\.", "rewards.NAME.", key).replace("-", "_")
        if value is None and field in booleans:
            is_given = bool(queue) and queue[0].lower() in ("true", "false")
            value = queue.popleft() if is_given else "true"
        elif value is None:
            if not queue or queue[0].startswith("--"):
                raise ConfigError(f"option '--{key}' needs a value")
            value = queue.popleft()
        overrides[key] = value
    return rest, overrides
