"""Recipes as files: YAML 1.2 in and out, and the recipes that come with the package."""

import re
from pathlib import Path
from typing import Any

import yaml

from nextscale.base.errors import ConfigError, in_words
from nextscale.base.files import read_text
from nextscale.base.records import did_you_mean

RECIPES = Path(__file__).parents[1] / "recipes"


class _Loader(yaml.SafeLoader):
    """Scalars as in YAML 1.2: `no` and `on` are words, 1e-4 is a number, 010 is ten."""


class _Dumper(yaml.SafeDumper):
    """Quotes whatever YAML 1.1 or 1.2 would not read back as text."""


MAX_BYTES = 1_000_000  # of a recipe; real ones have some thousand
MAX_VALUES = 20_000  # of a recipe, aliases written out; real ones have some hundred

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
        text = read_text(find_recipe(name), MAX_BYTES)
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
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
        loader = _Loader(text)  # a SafeLoader: plain values, no objects
        root = loader.get_single_node()
        _check_size(root, what)
        return None if root is None else loader.construct_document(root)
    except yaml.YAMLError as error:
        mark = error.problem_mark if isinstance(error, yaml.MarkedYAMLError) else None
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        where = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{what}{where}, is not valid YAML: {problem}") from None
    except RecursionError:
        raise ConfigError(f"{what} is nested too deeply: write it with fewer levels") from None
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        # Such as the date 2024-99-99, or a tag on what it cannot be a tag of.
        raise ConfigError(f"{what} is not valid YAML: {in_words(error)[:200]}") from None


def _check_size(root: yaml.Node | None, what: str) -> None:
    """Check that the values, with every alias written out, are not too many: a few lines can stand for
    billions.

    Raises:
        ConfigError: they are, or an alias stands within what it stands for.
    """
    sizes: dict[int, int] = {}
    being_counted: set[int] = set()

    def size_of(node: yaml.Node) -> int:
        if id(node) in being_counted:
            raise ConfigError(f"{what} has an alias within what it stands for: write the values out")
        if id(node) not in sizes:
            being_counted.add(id(node))
            inner: list[yaml.Node] = []
            if isinstance(node, yaml.ScalarNode):
                _check_text(node.value, what)
            elif isinstance(node, yaml.SequenceNode):
                inner = node.value
            elif isinstance(node, yaml.MappingNode):
                inner = [each for pair in node.value for each in pair]
            sizes[id(node)] = 1 + sum(map(size_of, inner))
            being_counted.remove(id(node))
        return sizes[id(node)]

    if root is not None and (size := size_of(root)) > MAX_VALUES:
        raise ConfigError(
            f"{what} stands for {size:,} values, more than the {MAX_VALUES:,} that one may have"
        )


def _check_text(text: str, what: str) -> None:
    """Check that a value can be written again.

    Raises:
        ConfigError: it has half a character, which an escape such as \\ud83c stands for.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        shown = text.encode("ascii", "backslashreplace").decode()
        raise ConfigError(f"{what} has half a character in '{shown}': write the whole one") from None


def dump_yaml(mapping: dict[str, Any]) -> str:
    """YAML that any reader of YAML 1.1 or 1.2 reads back as the same values."""
    return yaml.dump(mapping, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
