"""The keys of a recipe: their types, defaults and texts, read without importing torch as the records do.

They stand in recipe.schema.json: `make schema` writes it from the records, and a test compares the two.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

FILE = Path(__file__).parent / "recipe.schema.json"
Schema = dict[str, Any]


@cache
def recipe_schema() -> Schema:
    """The JSON Schema of a recipe; editors that know YAML can check recipes with it, too."""
    return json.loads(FILE.read_text(encoding="utf-8"))


@cache
def recipe_sections() -> dict[str, tuple[str, dict[str, Schema]]]:
    """Text of each section of a recipe and its dotted keys, with "rewards.NAME.weight" for any reward's."""
    tops: dict[str, Schema] = {}
    sections = {"recipe": ("Any key can be overridden, with values in YAML and - or _ in names.", tops)}
    for name, schema in recipe_schema()["properties"].items():
        (kind,) = alternatives(schema)
        if isinstance(named := kind.get("additionalProperties"), dict):
            keys = {key: each for record in alternatives(named) for key, each in record["properties"].items()}
            text, name = f"For each of the {name}, by its NAME in the recipe.", f"{name}.NAME"
        else:
            text, keys = kind.get("description", ""), kind.get("properties", {})
        if keys:
            sections[name.split(".")[0]] = (text, {f"{name}.{key}": each for key, each in keys.items()})
        else:
            tops[name] = schema
    return sections


@cache
def recipe_keys() -> dict[str, Schema]:
    """Every key of a recipe, as `recipe_sections` has them."""
    return {key: schema for _, keys in recipe_sections().values() for key, schema in keys.items()}


@cache
def main_options() -> dict[str, str]:
    """Each kind of reward with the option that its short form `{clip_score: VALUE}` sets."""
    keys = {key.removeprefix("rewards.NAME."): schema for key, schema in recipe_keys().items()}
    return {key: schema["main_option"] for key, schema in keys.items() if "main_option" in schema}


def alternatives(schema: Schema) -> list[Schema]:
    """The types that a value may have, references resolved; null is left out."""
    if "$ref" in schema:
        return alternatives(recipe_schema()["$defs"][schema["$ref"].rpartition("/")[2]])
    if several := schema.get("anyOf") or schema.get("oneOf"):
        return [kind for each in several for kind in alternatives(each)]
    return [] if schema["type"] == "null" else [schema]


def type_name(schema: Schema) -> str:
    """A type as the help shows it: INT, TEXT, a|b, [INT,...]."""
    names = {"integer": "INT", "number": "NUMBER", "string": "TEXT", "boolean": "true|false"}
    shown = []
    for kind in alternatives(schema):
        if kind["type"] == "array":
            shown.append(f"[{type_name(kind.get('items') or kind['prefixItems'][0])},...]")
        else:
            shown.append("|".join(words_of(kind)) or names[kind["type"]])
    return "|".join(shown)


def words_of(schema: Schema) -> list[str]:
    """The words that a value may be, if it may be only some."""
    kinds = alternatives(schema)
    return [word for kind in kinds for word in kind.get("enum", [kind["const"]] if "const" in kind else [])]


def is_text(schema: Schema, value: str) -> bool:
    """Whether a value is taken as typed, not parsed: text, or one text where a list of several is allowed."""
    kinds = alternatives(schema)
    if any(kind.get("items") == {"type": "string"} for kind in kinds):
        return not value.lstrip().startswith("[")
    return all(kind["type"] == "string" for kind in kinds)
