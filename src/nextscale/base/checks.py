"""Checks of what is given from Python where no record makes them, and words for what was found."""

import math
import reprlib
from collections.abc import Iterable
from numbers import Integral
from typing import Any

from torch import Tensor

from nextscale.base.errors import ConfigError


def shown(value: object) -> str:
    """A value as Python writes it, cut to a few words on one line."""
    return " ".join(reprlib.repr(value).split())


def found(given: object) -> str:
    """What was given in place of an object of some kind, for a sentence about it."""
    if isinstance(given, type):
        return f"the class {given.__name__}"
    if isinstance(given, Tensor):
        return f"a tensor of shape {tuple(given.shape)} and {given.dtype}"
    if given is None or isinstance(given, str | float):
        return shown(given)
    return f"an object of type {type(given).__name__}"


def as_list(given: Any) -> list[Any]:
    """One or several, as a list. A text is one, and so is a tensor without axes."""
    return list(given) if _is_several(given) else [given]


def _is_several(given: Any) -> bool:
    return isinstance(given, Iterable) and not isinstance(given, str) and getattr(given, "ndim", 1) > 0


def check_kind(name: str, given: object, kind: type | tuple[type, ...], expected: str) -> None:
    """Check that what was given is of a kind.

    Raises:
        ConfigError: it is not.
    """
    if not isinstance(given, kind):
        raise ConfigError(f"{name}: got {found(given)}, expected {expected}")


def check_list(name: str, given: Any, kind: type, expected: str, *, may_be_empty: bool = False) -> list[Any]:
    """The list of what was given, checked to hold objects of a kind alone.

    Raises:
        ConfigError: it is no list, holds something else, or is empty and may not be.
    """
    if not _is_several(given):
        raise ConfigError(f"{name}: got {found(given)}, expected {expected}")
    several = list(given)
    others = [f"a list with {found(each)}" for each in several if not isinstance(each, kind)]
    if not several and not may_be_empty:
        others = ["an empty list"]
    if others:
        raise ConfigError(f"{name}: got {others[0]}, expected {expected}")
    return several


def check_whole(name: str, given: object, hint: str) -> int:
    """The whole number that was given, as a plain one; numpy has others.

    Args:
        hint: what to give.

    Raises:
        ConfigError: it is none.
    """
    if not isinstance(given, Integral) or isinstance(given, bool):
        raise ConfigError(f"{name} must be a whole number, got {shown(given)}: {hint}")
    return int(given)


def check_count(name: str, given: object) -> int:
    """The number of things that was given, as a plain one.

    Raises:
        ConfigError: it is no whole number, or is below 1.
    """
    given = check_whole(name, given, "give 1 or more")
    if given < 1:
        raise ConfigError(f"{name} must be at least 1, got {given}")
    return given


def check_number(name: str, given: Any, expected: str = "a finite number", above: float = -math.inf) -> float:
    """The number that was given, as a plain one; an array's or a tensor's counts too.

    Raises:
        ConfigError: it is no finite number, or not above the bound.
    """
    try:
        value = math.nan if isinstance(given, str | bool) else float(given)
    except (TypeError, ValueError, RuntimeError, OverflowError):  # torch raises the third for several numbers
        value = math.nan
    if not (math.isfinite(value) and value > above):
        raise ConfigError(f"{name}: got {shown(given)}, expected {expected}")
    return value


def as_number(name: str, given: Any) -> float:
    """A number of any kind as Python's own; NaN and infinity are numbers, too.

    Raises:
        ConfigError: it is none.
    """
    try:
        return float(given)
    except (TypeError, ValueError, RuntimeError):
        raise ConfigError(f"{name} is {found(given)}, expected a number") from None
