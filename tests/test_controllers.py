"""Controllers: multipliers by hand-computed numbers."""

import json

import pytest

from nextscale.controllers import AdaptiveKL, Constraints, EntropyFloor, ascend
from nextscale.rewards.roles import AtLeast, AtMost


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


def test_a_multiplier_grows_while_violated_and_stays_at_zero_while_held() -> None:
    multipliers = ascend([0.0, 0.0], [1.0, -1.0], rate=0.5)
    multipliers = ascend(multipliers, [0.4, 0.2], rate=0.5)
    assert multipliers == pytest.approx([0.7, 0.1])
    assert ascend(multipliers, [-9.0, -0.1], rate=0.5) == pytest.approx([0.0, 0.05])


def entropies(*values: float) -> dict[str, float]:
    return {f"entropy/scale_{k}": value for k, value in enumerate(values, 1)}


def test_the_floor_is_a_share_of_each_scales_first_entropy() -> None:
    floor = EntropyFloor(share=0.75, rate=2.0, num_scales=2)
    assert floor.update(entropies(4.0, 1.0)) == {"entropy_floor/scale_1": 0.0, "entropy_floor/scale_2": 0.0}
    assert floor.bonuses == [0.0, 0.0]
    floor.update(entropies(2.0, 0.9))  # half of the first is left, and nine tenths of the second
    assert floor.bonuses == pytest.approx([2.0 * 0.25, 0.0])
    # What is logged was in force in the step that ended.
    assert floor.update(entropies(4.0, 1.0))["entropy_floor/scale_1"] == pytest.approx(0.5)


def test_a_floors_state_goes_through_json_exactly() -> None:
    straight, resumed = (EntropyFloor(share=0.9, rate=0.1, num_scales=3) for _ in range(2))
    for values in ((3.0, 2.0, 1.0), (1.0 / 3, 2.0, 0.7)):
        straight.update(entropies(*values))
    resumed.load_state_dict(json.loads(json.dumps(straight.state_dict())))
    for each in (straight, resumed):
        each.update(entropies(0.1, 0.2, 0.3))
    assert resumed.bonuses == straight.bonuses


def test_a_scale_without_entropy_does_not_divide_by_zero() -> None:
    floor = EntropyFloor(share=0.5, rate=1.0, num_scales=1)
    floor.update(entropies(0.0))
    floor.update(entropies(0.0))
    assert floor.bonuses == [1.0]


def test_beta_follows_the_distance_from_its_target() -> None:
    adaptive = AdaptiveKL(beta=0.1, target=50.0, rate=0.5)
    assert adaptive.update({"kl_per_image": 55.0}) == {"beta": 0.1}  # what was in force
    assert adaptive.beta == pytest.approx(0.1 * (1 + 0.5 * 0.1))
    adaptive.update({"kl_per_image": 500.0})  # a distance beyond 20 % counts as that
    assert adaptive.beta == pytest.approx(0.105 * 1.1)
    adaptive.update({"kl_per_image": 0.0})
    assert adaptive.beta == pytest.approx(0.105 * 1.1 * 0.9)
    again = AdaptiveKL(beta=0.1, target=50.0, rate=0.5)
    again.load_state_dict(json.loads(json.dumps(adaptive.state_dict())))
    assert again.beta == adaptive.beta
