"""Overriding a recipe's keys from the command line, as in `--grpo.beta 0.02`. Nothing here imports torch."""

import re
from collections import deque
from collections.abc import Collection, Mapping
from typing import Any

from nextscale.base.errors import ConfigError
from nextscale.base.records import did_you_mean
from nextscale.config.files import parse_yaml
from nextscale.config.schema import Schema, is_text, main_options, recipe_keys


def take_overrides(words: list[str]) -> tuple[list[str], dict[str, str]]:
    """Split `--key value` and `--key=value`, for keys of a recipe, from the other words of a command.

    A boolean without a value is true. Whether a key exists is checked by `apply_overrides`.

    Returns:
        the other words, and the values by dotted key.

    Raises:
        ConfigError: a key without a value.
    """
    tops = "|".join(key for key in recipe_keys() if "." not in key)
    rest: list[str] = []
    overrides: dict[str, str] = {}
    queue = deque(words)
    while queue:
        word = queue.popleft()
        match = re.fullmatch(rf"--({tops}|\w[\w-]*\..*?)(?:=(.*))?", word, re.DOTALL)
        if match is None:
            rest.append(word)
            continue
        key, value = match.groups()
        if value is None and recipe_keys().get(_general(key), {}).get("type") == "boolean":
            is_given = bool(queue) and queue[0].lower() in ("true", "false")
            value = queue.popleft() if is_given else "true"
        elif value is None:
            if not queue or queue[0].startswith("--"):
                raise ConfigError(f"option '--{key}' needs a value")
            value = queue.popleft()
        overrides[key] = value
    return rest, overrides


def apply_overrides(mapping: Mapping[str, Any], overrides: Mapping[str, str]) -> dict[str, Any]:
    """The recipe's mapping with dotted keys set to values in YAML; a hyphen in a key equals an underscore.

    Raises:
        ConfigError: names an unknown key and the valid one nearest to it.
    """
    result = _copy(mapping)
    rewards = result.get("rewards")
    known = list(rewards) if isinstance(rewards, dict) else []
    for key, text in overrides.items():
        path, schema = _resolve(key, known)
        inner = result
        for name in path[:-1]:
            inner = inner.setdefault(name, {})
            if not isinstance(inner, dict):
                raise ConfigError(
                    f"'{key}' cannot be set: '{name}' of the recipe is {inner!r}, expected keys"
                )
        name = path[-1]
        if path[0] == "rewards" and inner.get("kind") == name:  # in short, for what stands there in full
            name = main_options()[name]
        inner[name] = _parse_value(key, text, schema)
    rewards = result.get("rewards")
    for name, reward in rewards.items() if isinstance(rewards, dict) else ():
        if name not in known and not {"kind", *main_options()} & set(reward):
            raise ConfigError(f"the recipe has no reward '{name}'{did_you_mean(name, known)}")
    return result


def _general(key: str) -> str:
    """A key as `recipe_keys` would have it: with underscores, and NAME for that of a reward."""
    first, *rest = key.replace("-", "_").split(".")
    return ".".join([first, "NAME", *rest[1:]] if first == "rewards" and rest else [first, *rest])


def _resolve(key: str, rewards: Collection[str]) -> tuple[list[str], Schema]:
    """The names along a dotted key, and the type of its value."""
    general, keys = _general(key), recipe_keys()
    if general not in keys:
        raise ConfigError(f"unknown key '{key}'{_hint(key, general)}")
    path = general.split(".")
    if path[0] == "rewards":
        name = key.split(".")[1]
        alike = [each for each in rewards if each.replace("-", "_") == name.replace("-", "_")]
        path[1] = name if name in rewards or not alike else alike[0]
    return path, keys[general]


def _hint(key: str, general: str) -> str:
    """The tail of the sentence about an unknown key."""
    keys = recipe_keys()
    tops = {each.split(".")[0]: each for each in reversed(keys)}  # with the first key of each
    if (first := general.split(".")[0]) in keys:
        return f": '{first}' has no keys of its own"
    if first in tops and tops[first].count(".") != key.count("."):
        return f": expected a key such as '{tops[first]}'"
    reward = ".".join(key.split(".")[1:-1])
    return did_you_mean(
        key, [each.replace("NAME", reward) for each in keys], f"valid are {', '.join(reversed(tops))}"
    )


def _parse_value(key: str, text: str, schema: Schema) -> Any:
    if is_text(schema, text):
        is_optional = {"type": "null"} in schema.get("anyOf", ())
        return None if is_optional and text in ("null", "~") else text
    return parse_yaml(text, f"value '{text}' of '{key}'")


def _copy(value: Any) -> Any:
    return {key: _copy(each) for key, each in value.items()} if isinstance(value, Mapping) else value
