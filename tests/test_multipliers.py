import json

import pytest

from nextscale.multipliers import EntropyFloor, Multipliers


def test_a_multiplier_grows_while_broken_and_stays_at_zero_while_held() -> None:
    multipliers = Multipliers(2, rate=0.5)
    multipliers.update([1.0, -1.0])
    multipliers.update([0.4, 0.2])
    assert multipliers.values == pytest.approx([0.7, 0.1])
    multipliers.update([-9.0, -0.1])
    assert multipliers.values == pytest.approx([0.0, 0.05])


def test_the_floor_is_a_share_of_each_scales_first_entropy() -> None:
    floor = EntropyFloor(share=0.75, rate=2.0, num_scales=2)
    floor.update([4.0, 1.0])
    assert floor.values == [0.0, 0.0]
    floor.update([2.0, 0.9])  # half of the first is left, and nine tenths of the second
    assert floor.values == pytest.approx([2.0 * 0.25, 0.0])


def test_a_floors_state_goes_through_json_exactly() -> None:
    straight, resumed = (EntropyFloor(share=0.9, rate=0.1, num_scales=3) for _ in range(2))
    for entropies in ([3.0, 2.0, 1.0], [1.0 / 3, 2.0, 0.7]):
        straight.update(entropies)
    resumed.load_state_dict(json.loads(json.dumps(straight.state_dict())))
    for each in (straight, resumed):
        each.update([0.1, 0.2, 0.3])
    assert resumed.values == straight.values


def test_a_scale_without_entropy_does_not_divide_by_zero() -> None:
    floor = EntropyFloor(share=0.5, rate=1.0, num_scales=1)
    floor.update([0.0])
    floor.update([0.0])
    assert floor.values == [1.0]
