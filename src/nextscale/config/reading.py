"""The YAML of recipes: files in, plain values out, and back. Nothing here imports torch."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from nextscale.base.errors import ConfigError
from nextscale.base.records import did_you_mean

RECIPES = Path(__file__).parents[1] / "recipes"


class _Loader(yaml.SafeLoader):
    """Scalars as in YAML 1.2: `no` and `on` are words, 1e-4 is a number, 010 is ten."""


class _Dumper(yaml.SafeDumper):
    """Quotes whatever YAML 1.1 or 1.2 would not read back as text."""


_SCALARS = (
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
)
_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in _SCALARS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value))


def packaged_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The mapping in a recipe's file, or in the packaged recipe of this name, not yet validated.

    Raises:
        ConfigError: no such file, or one that holds no mapping.
    """
    found, name = Path(path), str(path)
    if not found.exists() and found.parent == Path() and found.stem in packaged_recipes():
        found = RECIPES / f"{found.stem}.yaml"
    if found.is_dir():
        hint = f"; did you mean '{found / 'config.yaml'}'?" if (found / "config.yaml").is_file() else ""
        raise ConfigError(f"recipe '{name}' is a folder, expected a YAML file{hint}")
    try:
        text = found.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(
            f"no recipe '{name}': it is neither a file nor a packaged recipe"
            f"{did_you_mean(found.stem, packaged_recipes())}"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe '{name}' cannot be read: {error}") from None
    mapping = parse_yaml(text, f"recipe '{name}'")
    if not isinstance(mapping, dict):
        found_kind = "nothing" if mapping is None else f"a {type(mapping).__name__}"
        raise ConfigError(f"recipe '{name}' holds {found_kind}, expected keys such as 'rewards:' with values")
    _find_python_files(mapping, found.parent)
    return mapping


def parse_yaml(text: str, what: str) -> Any:
    """The value of a YAML text.

    Raises:
        ConfigError: it is not valid YAML; the sentence begins with `what`.
    """
    try:
        return yaml.load(text, _Loader)  # a SafeLoader: plain values, no objects
    except yaml.YAMLError as error:
        mark = error.problem_mark if isinstance(error, yaml.MarkedYAMLError) else None
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        where = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{what}{where}, is not valid YAML: {problem}") from None
    except ValueError as error:  # such as the date 2024-99-99
        raise ConfigError(f"{what} is not valid YAML: {error}") from None


def dump_yaml(content: Mapping[str, Any]) -> str:
    """YAML that readers of version 1.1 and of 1.2 understand alike."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def _find_python_files(mapping: dict[str, Any], folder: Path) -> None:
    """Let rewards of kind `python` name the file beside the recipe, where there is one; in place."""
    rewards = mapping.get("rewards")
    for reward in rewards.values() if isinstance(rewards, dict) else ():
        reference = reward.get("python") if isinstance(reward, dict) else None
        if isinstance(reference, str) and (folder / reference.rpartition(":")[0]).is_file():
            reward["python"] = str(folder / reference)
