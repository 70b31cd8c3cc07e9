"""Roles of rewards: the bounds of constraints."""

from typing import Any

import pytest

from nextscale.base.errors import ConfigError
from nextscale.rewards import AtLeast, AtMost


def test_a_constraint_is_told_by_its_direction_and_its_bound() -> None:
    assert AtLeast() == AtLeast("base") != AtMost("base") and AtLeast(0.5) != AtLeast(0.6)
    assert (AtLeast.role, AtLeast.sign, AtMost.role, AtMost.sign) == ("at_least", 1, "at_most", -1)


@pytest.mark.parametrize("bound", ["bass", float("nan"), True, None, 10**400])
def test_a_bound_is_a_number_or_base(bound: Any) -> None:
    for kind in (AtLeast, AtMost):
        with pytest.raises(ConfigError, match="expected a number, or base"):
            kind(bound)
