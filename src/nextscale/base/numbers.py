"""Numbers formatted for people, and fit for JSON."""

import math
from collections.abc import Mapping, Sequence
from typing import Any


def count(num: int, noun: str) -> str:
    """A number and its noun: "1 step", "1,200 steps"."""
    return f"{num:,} {noun}" + ("" if num == 1 else "s")


def number(value: float) -> str:
    """A number with about three significant digits, in scientific notation only if very small or large."""
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        digits = 0 if value == 0 else max(0, 2 - math.floor(math.log10(abs(value))))
        return f"{value:,.{min(digits, 2 if abs(value) >= 0.1 else digits)}f}"
    return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")


def pair(before: float, after: float, arrow: str = " → ") -> str:
    """Two values, with enough decimals to tell them apart."""
    change = abs(after - before)
    if change == 0 or change < 1e-5:
        return f"{number(before)}{arrow}{number(after)}"
    largest = max(abs(before), abs(after))
    decimals = max(math.ceil(-math.log10(change / 2)), 2 if largest < 10 else 1 if largest < 100 else 0)
    return f"{before:,.{decimals}f}{arrow}{after:,.{decimals}f}"


def percent(share: float) -> str:
    """A fraction in [0, 1] as a whole percentage; with one decimal close to 0 or 1."""
    decimals = 1 if 0 < share < 0.01 or 0.99 < share < 1 else 0
    return f"{100 * share:.{decimals}f} %"


def duration(seconds: float) -> str:
    """A duration in seconds, in minutes and seconds, or in hours and minutes."""
    if seconds < 60:
        return f"{number(seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def without_nan(value: Any) -> Any:
    """Mappings, sequences and numbers, with None for what is not finite: JSON has no other word for it."""
    if isinstance(value, Mapping):
        return {name: without_nan(each) for name, each in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [without_nan(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
