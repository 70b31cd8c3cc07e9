"""Overrides: dotted keys of a recipe, such as `grpo.beta`, set to values that are written as text."""

import types
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin

from nextscale.base.errors import ConfigError
from nextscale.base.records import did_you_mean
from nextscale.config.files import parse_yaml
from nextscale.rewards.kinds import REWARD_KINDS


def apply_overrides(
    mapping: Mapping[str, Any], overrides: Mapping[str, str], keys: Mapping[str, Any]
) -> dict[str, Any]:
    """A copy of a recipe's mapping with some keys set; a hyphen in a key equals an underscore.

    Args:
        overrides: dotted keys to values in YAML.
        keys: every dotted key with the type of its value; NAME stands for the name of a reward.

    Raises:
        ConfigError: names an unknown key and the valid one nearest to it.
    """
    result = _copy(mapping)
    rewards = result.get("rewards")
    known = list(rewards) if isinstance(rewards, dict) else []
    for key, text in overrides.items():
        path, annotation = _resolve(key, known, keys)
        inner = result
        for name in path[:-1]:
            inner = inner.setdefault(name, {})
            if not isinstance(inner, dict):
                raise ConfigError(
                    f"'{key}' cannot be set: '{name}' of the recipe is {inner!r}, expected keys"
                )
        name = path[-1]
        if path[0] == "rewards" and inner.get("kind") == name:  # in short, for what stands there in full
            name = REWARD_KINDS[name].main_option
        inner[name] = _parse_value(key, text, annotation)
    rewards = result.get("rewards")
    for name, reward in rewards.items() if isinstance(rewards, dict) else ():
        if name not in known and not {"kind", *REWARD_KINDS} & set(reward):
            raise ConfigError(f"the recipe has no reward '{name}'{did_you_mean(name, known)}")
    return result


def takes_text(annotation: Any) -> bool:
    """Whether a value of this type is taken as it is typed: a string, or one of several words."""
    if get_origin(annotation) in (Union, types.UnionType):
        return all(takes_text(each) for each in get_args(annotation) if each is not type(None))
    return annotation is str or get_origin(annotation) is Literal


def _resolve(key: str, rewards: Sequence[str], keys: Mapping[str, Any]) -> tuple[list[str], Any]:
    """The names along a dotted key, and the type of its value."""
    path = key.split(".")
    general = [name.replace("-", "_") for name in path]
    if general[0] == "rewards" and len(path) == 3:
        alike = [name for name in rewards if name.replace("-", "_") == general[1]]
        path = ["rewards", path[1] if path[1] in rewards else (alike or path[1:])[0], general[2]]
        general[1] = "NAME"
    else:
        path = general
    if (found := ".".join(general)) in keys:
        return path, keys[found]
    if general[0] in keys:
        raise ConfigError(f"unknown key '{key}': '{general[0]}' has no keys of its own")
    section = [each for each in keys if each.startswith(f"{general[0]}.")]
    if section and len(path) != section[0].count(".") + 1:
        raise ConfigError(f"unknown key '{key}': expected a key such as '{section[0]}'")
    if section:
        hint = did_you_mean(".".join(path), [each.replace("NAME", path[1]) for each in section])
    else:
        first = dict.fromkeys(each.split(".")[0] for each in keys)
        hint = did_you_mean(key, [*first, *keys], f"valid are {', '.join(first)}")
    raise ConfigError(f"unknown key '{key}'{hint}")


def _parse_value(key: str, text: str, annotation: Any) -> Any:
    is_one_of_several = tuple[str, ...] in get_args(annotation) and not text.lstrip().startswith("[")
    if takes_text(annotation) or is_one_of_several:
        is_optional = type(None) in get_args(annotation)
        return None if is_optional and text in ("null", "~") else text
    return parse_yaml(text, f"value '{text}' of '{key}'")


def _copy(value: Any) -> Any:
    return {key: _copy(each) for key, each in value.items()} if isinstance(value, Mapping) else value
