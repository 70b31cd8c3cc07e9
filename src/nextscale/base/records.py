"""The base of all configuration records, and suggestions for misspelled names."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, Self

import pydantic
from pydantic_core import PydanticCustomError

from nextscale.base.errors import ConfigError

FREE_ON_RESUME: dict[str, Any] = {"free_on_resume": True}
"""Marks a field that a resumed run may change: `Field(default=..., json_schema_extra=FREE_ON_RESUME)`."""


class Record(pydantic.BaseModel):
    """A frozen, keyword-only, validated record that rejects unknown keys and suggests the nearest valid one.

    Raises:
        ConfigError: a key is unknown, or a value has the wrong type or is out of range.
    """

    # Where infinity means no bound, the field allows it.
    model_config = pydantic.ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        validate_default=True,
        allow_inf_nan=False,
    )

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except pydantic.ValidationError as error:
            raise ConfigError(describe_validation_error(type(self), error)) from None

    # Lets pydantic validate nested records itself, so that errors carry the whole path to the key.
    __init__.__pydantic_base_init__ = True  # pyright: ignore[reportFunctionMemberAccess]

    @pydantic.model_validator(mode="before")
    @classmethod
    def _knows_its_keys(cls, values: Any) -> Any:
        for key in values if isinstance(values, Mapping) else ():
            if key not in cls.model_fields:
                raise unknown_key(str(key), cls.model_fields)
        return values

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Self:
        """The record with these values; nested mappings become nested records.

        Raises:
            ConfigError: the values are not a mapping, or do not fit the record.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"{cls.__name__} needs keys with values, got {values!r}")
        try:
            return cls.model_validate(dict(values))
        except pydantic.ValidationError as error:
            raise ConfigError(describe_validation_error(cls, error)) from None

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, as peft asks of the configuration of a model."""
        return self.model_dump()

    def replace(self, **changes: Any) -> Self:
        """A validated copy with some fields changed."""
        return type(self)(**{name: getattr(self, name) for name in type(self).model_fields} | changes)


def free_on_resume(record: type[Record]) -> set[str]:
    """Names of the record's fields that are marked FREE_ON_RESUME."""
    return {name for name, field in record.model_fields.items() if field.json_schema_extra == FREE_ON_RESUME}


def fixed_values(value: Any, key: str = "") -> dict[str, Any]:
    """The values that a resumed run must keep, by dotted key: those of fields not marked FREE_ON_RESUME.

    Args:
        value: a record, or a mapping of records.
        key: where it stands.
    """
    if isinstance(value, Record):
        free = free_on_resume(type(value))
        value = {name: getattr(value, name) for name in type(value).model_fields if name not in free}
    if not isinstance(value, Mapping):
        return {} if value is None else {key: value}
    fixed: dict[str, Any] = {}
    for name, each in value.items():
        fixed |= fixed_values(each, f"{key}.{name}" if key else name)
    return fixed


def changed_value(earlier: Mapping[str, Any], present: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """The first key whose values differ, the earlier and the present one; None where all are equal."""
    for key in [*present, *(key for key in earlier if key not in present)]:
        was, now = earlier.get(key), present.get(key)
        if was != now:
            return key, was, now
    return None


def unknown_key(key: str, valid: Iterable[str]) -> PydanticCustomError:
    """The error for a validator to raise about an unknown key; `describe_validation_error` words it."""
    return PydanticCustomError("unknown_key", "{key}{hint}", {"key": key, "hint": did_you_mean(key, valid)})


def describe_validation_error(record: type[pydantic.BaseModel], error: pydantic.ValidationError) -> str:
    """One sentence about the first error."""
    first = error.errors()[0]
    # pydantic adds which member of a union it tried, such as str or literal['token','scale']: not in the key
    path = [
        str(part) for part in first["loc"] if "[" not in str(part) and part not in ("str", "int", "float")
    ]
    key = ".".join(path) or record.__name__
    if first["type"] == "unknown_key":
        context = first.get("ctx", {})
        return f"unknown key '{'.'.join([*path, context['key']])}'{context['hint']}"
    if first["type"] == "missing":
        return f"'{key}' is missing"
    reason = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error" and isinstance(first["input"], Mapping):
        return f"{key}: {reason}"  # of several keys at once, which the reason names
    return f"{key} = {first['input']!r} cannot be used: {reason[0].lower()}{reason[1:]}"


def suggest(name: str, valid: Iterable[str]) -> str | None:
    """The valid name closest to `name`, or None if none is close."""
    return next(iter(difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)), None)


def did_you_mean(name: str, valid: Iterable[str], otherwise: str | None = None) -> str:
    """The end of an error sentence about an unknown name: the closest valid name.

    Args:
        otherwise: what to say if no name is close; by default, all valid names.
    """
    valid = list(valid)
    if near := suggest(name, valid):
        return f"; did you mean '{near}'?"
    if otherwise is None and valid:
        otherwise = f"valid are {', '.join(valid)}"
    return f"; {otherwise}" if otherwise else ""
