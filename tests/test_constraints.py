"""Constraints: multipliers by hand-computed numbers."""

import json

import pytest

from nextscale.constraints import Constraints
from nextscale.rewards import AtLeast, AtMost


def batch(mean: float, std: float = 2.0, name: str = "a") -> dict[str, float]:
    return {f"rewards/{name}/mean": mean, f"rewards/{name}/std": std}


def test_a_multiplier_grows_by_the_violation_in_deviations_of_the_first_step() -> None:
    constraints = Constraints({"a": AtLeast(5.0)}, rate=0.5, start=0.1)
    assert constraints.coefficients == {"a": 0.1}
    assert constraints.update(batch(4.0)) == pytest.approx(
        {
            "constraints/a/multiplier": 0.1 + 0.5 * (5 - 4) / 2,
            "constraints/a/bound": 5.0,
            "constraints/a/violation": (5 - 4) / 2,
        }
    )
    logged = constraints.update(batch(5.5, std=99.0))  # a later deviation does not count
    assert logged["constraints/a/violation"] == pytest.approx((5 - 5.5) / 2)
    assert constraints.coefficients == pytest.approx({"a": 0.35 - 0.5 * 0.25})
    constraints.update(batch(6.8))
    assert constraints.coefficients == {"a": 0.0}


def test_at_most_is_the_mirror_of_at_least() -> None:
    least, most = (Constraints({"a": each}, rate=0.5) for each in (AtLeast(5.0), AtMost(-5.0)))
    for mean in (4.0, 4.5, 6.0):
        least.update(batch(mean))
        logged = most.update(batch(-mean))
        assert most.coefficients["a"] == -least.coefficients["a"]
        assert logged["constraints/a/multiplier"] == least.coefficients["a"]


def test_one_step_counts_one_deviation_at_most() -> None:
    constraints = Constraints({"a": AtLeast(1.0)}, rate=0.5)
    logged = constraints.update(batch(0.7, std=0.01))
    assert logged["constraints/a/violation"] == pytest.approx(30)
    assert logged["constraints/a/multiplier"] == 0.5
    constraints.update(batch(9.0, std=0.01))
    assert constraints.coefficients == {"a": 0.0}


def test_base_is_what_the_first_evaluation_found_or_else_the_first_step() -> None:
    measured, unmeasured = (Constraints({"a": AtLeast(), "b": AtMost(0.5)}, rate=1.0) for _ in range(2))
    measured.set_base(batch(3.0) | batch(0.2, name="b"))
    for each in (measured, unmeasured):
        logged = each.update(batch(2.0) | batch(0.7, std=1.0, name="b"))
        assert logged["constraints/b/bound"] == 0.5
        assert logged["constraints/b/violation"] == pytest.approx(0.7 - 0.5)
    assert measured.bounds["a"] == 3.0 and measured.coefficients["a"] == 0.5
    assert unmeasured.bounds["a"] == 2.0 and unmeasured.coefficients["a"] == 0.0


def test_scores_all_alike_in_the_first_step_count_in_their_own_units() -> None:
    constraints = Constraints({"a": AtLeast(1.0)}, rate=1.0)
    assert constraints.update(batch(0.75, std=0.0))["constraints/a/multiplier"] == 0.25


def test_the_state_goes_through_json_exactly() -> None:
    straight, resumed = (Constraints({"a": AtLeast(), "b": AtMost(0.1)}, rate=0.3) for _ in range(2))
    for mean in (1 / 3, 0.2):
        straight.update(batch(mean, std=1 / 7) | batch(mean, std=0.3, name="b"))
    resumed.load_state_dict(json.loads(json.dumps(straight.state_dict())))
    last = batch(0.1, std=5.0) | batch(0.4, std=5.0, name="b")
    assert resumed.update(last) == straight.update(last)
