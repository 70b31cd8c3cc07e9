"""Overriding a recipe's keys from the command line, as in `--grpo.beta 0.02`. Nothing here imports torch."""

import re
from collections import deque
from collections.abc import Collection, Mapping
from typing import Any

from nextscale.base.errors import ConfigError
from nextscale.base.records import did_you_mean
from nextscale.config.reading import parse_yaml
from nextscale.config.schema import REWARD, Schema, alternatives, is_text, recipe_groups, reward_kinds


def take_overrides(words: list[str]) -> tuple[list[str], dict[str, str]]:
    """Split `--key value` and `--key=value`, for keys of a recipe, from the other words of a command.

    A boolean without a value is true. Whether a key exists is checked by `apply_overrides`.

    Returns:
        the other words, and the values by dotted key.

    Raises:
        ConfigError: a key without a value.
    """
    alone = "|".join(recipe_groups()[""][1])
    rest: list[str] = []
    overrides: dict[str, str] = {}
    queue = deque(words)
    while queue:
        word = queue.popleft()
        match = re.fullmatch(rf"--({alone}|\w[\w-]*\..*?)(?:=(.*))?", word, re.DOTALL)
        if match is None:
            rest.append(word)
            continue
        key, value = match.groups()
        if value is None and _is_boolean(key):
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
        inner[path[-1]] = _parse_value(key, text, schema)
    for name in {key.split(".")[1]: None for key in overrides if key.startswith("rewards.")}:
        reward = result["rewards"].get(name)  # none, where the name was matched by its hyphens
        if name not in known and reward and not set(reward) & reward_kinds():
            raise ConfigError(f"the recipe has no reward '{name}'{did_you_mean(name, known)}")
    return result


def _find(path: list[str]) -> tuple[str, str]:
    """The group of a key's path, and the key's name in it; there may be no such group or name."""
    *parents, name = [part.replace("-", "_") for part in path]
    is_reward = len(parents) == 2 and parents[0] == "rewards"
    return REWARD if is_reward else ".".join(parents), name


def _is_boolean(key: str) -> bool:
    group, name = _find(key.split("."))
    schema = recipe_groups().get(group, ("", {}))[1].get(name)
    return schema is not None and [kind["type"] for kind in alternatives(schema)] == ["boolean"]


def _resolve(key: str, rewards: Collection[str]) -> tuple[list[str], Schema]:
    """The names along a dotted key, and the type of its value."""
    path = key.split(".")
    group, name = _find(path)
    _, keys = recipe_groups().get(group, ("", {}))
    if name not in keys:
        raise ConfigError(f"unknown key '{key}'{_hint(path, group)}")
    if group != REWARD:
        return [*filter(None, [group]), name], keys[name]
    alike = [each for each in rewards if each.replace("-", "_") == path[1].replace("-", "_")]
    return ["rewards", path[1] if path[1] in rewards or not alike else alike[0], name], keys[name]


def _hint(path: list[str], group: str) -> str:
    """The tail of the sentence about an unknown key."""
    groups = recipe_groups()
    first, prefix = path[0].replace("-", "_"), ".".join(path[:-1])
    if prefix and group in groups:
        return did_you_mean(".".join(path), [f"{prefix}.{name}" for name in groups[group][1]])
    if first in groups[""][1]:
        return f": '{first}' has no keys of its own"
    if first == "rewards":
        return f": expected a key such as '{REWARD}.weight'"
    if first in groups:
        return f": expected a key such as '{first}.{next(iter(groups[first][1]))}'"
    valid = [".".join(filter(None, [each, name])) for each, (_, keys) in groups.items() for name in keys]
    tops = dict.fromkeys(key.split(".")[0] for key in valid)
    return did_you_mean(".".join(path), valid, f"valid are {', '.join(tops)}")


def _parse_value(key: str, text: str, schema: Schema) -> Any:
    if is_text(schema, text):
        is_optional = {"type": "null"} in schema.get("anyOf", ())
        return None if is_optional and text in ("null", "~") else text
    return parse_yaml(text, f"value '{text}' of '{key}'")


def _copy(value: Any) -> Any:
    return {key: _copy(each) for key, each in value.items()} if isinstance(value, Mapping) else value
