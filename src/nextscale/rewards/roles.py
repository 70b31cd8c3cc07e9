"""What a reward can be for besides being raised: a constraint, whose mean is kept within a bound."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from nextscale.base.errors import ConfigError

BoundValue = float | Literal["base"]
"""In the reward's own units; "base" is its mean before training."""


def check_bound(bound: object) -> None:
    """Raises ConfigError for what is neither a finite number nor "base"."""
    is_number = isinstance(bound, int | float) and not isinstance(bound, bool) and math.isfinite(bound)
    if not is_number and bound != "base":
        raise ConfigError(f"expected a number, or base for the reward's mean before training, got {bound!r}")


@dataclass(frozen=True)
class AtLeast:
    """The mean of a reward stays at the bound or above."""

    bound: BoundValue = "base"
    sign: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_bound(self.bound)


@dataclass(frozen=True)
class AtMost:
    """The mean of a reward stays at the bound or below."""

    bound: BoundValue = "base"
    sign: ClassVar[int] = -1

    def __post_init__(self) -> None:
        check_bound(self.bound)


Constraint = AtLeast | AtMost
