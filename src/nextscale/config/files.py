"""Recipes as files: YAML 1.2 in and out, and the recipes that come with the package."""

import re
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


def find_recipe(name: str | Path) -> Path:
    """The file of a recipe, given by its path or by the name of a packaged one.

    Raises:
        ConfigError: there is no such file.
    """
    path = Path(name)
    if not path.exists() and path.parent == Path() and path.stem in packaged_recipes():
        path = RECIPES / f"{path.stem}.yaml"
    if path.is_dir():
        hint = f"; did you mean '{path / 'config.yaml'}'?" if (path / "config.yaml").is_file() else ""
        raise ConfigError(f"recipe '{name}' is a folder, expected a YAML file{hint}")
    if not path.exists():
        raise ConfigError(
            f"no recipe '{name}': it is neither a file nor a packaged recipe"
            f"{did_you_mean(path.stem, packaged_recipes())}"
        )
    return path


def read_mapping(name: str | Path) -> dict[str, Any]:
    """The keys and values in the file of a recipe, as they are.

    Raises:
        ConfigError: there is no such file, or it holds anything but keys with values.
    """
    try:
        text = find_recipe(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe '{name}' cannot be read: {error}") from None
    mapping = parse_yaml(text, f"recipe '{name}'")
    if not isinstance(mapping, dict):
        found = "nothing" if mapping is None else f"a {type(mapping).__name__}"
        raise ConfigError(f"recipe '{name}' holds {found}, expected keys such as 'rewards:' with values")
    return mapping


def parse_yaml(text: str, what: str) -> Any:
    """Plain values from YAML.

    Args:
        what: what the text is, for the error.

    Raises:
        ConfigError: the text is not valid YAML, or asks for objects.
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


def dump_yaml(mapping: dict[str, Any]) -> str:
    """YAML that any reader of YAML 1.1 or 1.2 reads back as the same values."""
    return yaml.dump(mapping, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
