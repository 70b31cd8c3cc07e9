"""Constraints: the role of a reward whose mean is kept within a bound while others are raised."""

import sys
from dataclasses import dataclass
from typing import ClassVar, Literal

from nextscale.base.errors import ConfigError

BoundValue = float | Literal["base"]
"""In the reward's own units; "base" is its mean before training."""


def check_bound(bound: object) -> None:
    """Check that a bound is a finite number or "base".

    Raises:
        ConfigError: it is neither.
    """
    largest = sys.float_info.max  # an integer may be larger than any float
    if isinstance(bound, int | float) and not isinstance(bound, bool) and -largest <= bound <= largest:
        return
    if bound != "base":
        raise ConfigError(f"expected a number, or base for the reward's mean before training, got {bound!r}")


@dataclass(frozen=True)
class Constraint:
    """A bound on the mean of a reward: an `AtLeast` or an `AtMost`."""

    bound: BoundValue = "base"
    role: ClassVar[str]
    sign: ClassVar[int]

    def __post_init__(self) -> None:
        check_bound(self.bound)


class AtLeast(Constraint):
    """The mean of a reward stays at the bound or above."""

    role, sign = "at_least", 1


class AtMost(Constraint):
    """The mean of a reward stays at the bound or below."""

    role, sign = "at_most", -1
