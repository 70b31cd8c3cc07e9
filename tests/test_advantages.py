import math
import statistics

import pytest
import torch

from nextscale.advantages import (
    add_constraints,
    combined_advantages,
    expected_later_kl,
    group_advantages,
    kl_costs,
    later_kl,
    start_values,
    step_advantages,
)
from nextscale.grpo import GRPOConfig

NAN = math.nan


def by_hand(group, *others, epsilon=1e-4):
    """The advantages of one group of plain numbers, among others, in float64."""
    mean = sum(group) / len(group)
    spread = math.sqrt(statistics.mean(statistics.variance(each) for each in (group, *others)))
    return [(value - mean) / (statistics.stdev(group) + epsilon * spread) for value in group]


def rewards_of(*groups):
    return torch.tensor(groups)


def random_rewards(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# One reward


def test_the_group_advantage_by_hand():
    torch.testing.assert_close(
        group_advantages(rewards_of([1.0, 2.0, 3.0]), epsilon=0.0), torch.tensor([[-1.0, 0.0, 1.0]])
    )
    groups = [[0.3, 0.9, -1.0, 2.0], [10.0, 10.5, 9.0, 11.0]]
    expected = torch.tensor([by_hand(*groups), by_hand(*reversed(groups))])
    torch.testing.assert_close(group_advantages(rewards_of(*groups)), expected)


def test_without_scaling_it_is_the_distance_to_the_groups_mean():
    advantages = group_advantages(rewards_of([1.0, 2.0, 6.0], [0.0, 0.0, 3.0]), "none")
    torch.testing.assert_close(advantages, torch.tensor([[-2.0, -1.0, 3.0], [-1.0, -1.0, 2.0]]))


def test_the_batchs_deviation_is_that_of_all_rewards():
    rewards = rewards_of([1.0, 2.0, 6.0], [0.0, 0.0, 3.0])
    deviation = torch.tensor([1.0, 2.0, 6.0, 0.0, 0.0, 3.0]).std()
    spread = math.sqrt((7 + 3) / 2)
    expected = torch.tensor([[-2.0, -1.0, 3.0], [-1.0, -1.0, 2.0]]) / (deviation + 1e-4 * spread)
    torch.testing.assert_close(group_advantages(rewards, "batch"), expected)


@pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
def test_equal_rewards_give_exactly_zero(scale_rewards):
    for size in range(2, 17):
        for value in (0.0, 0.1, 1 / 3, 0.3, 5.7, -2.3, 1000.1, 1e-3, 21.37):
            rewards = torch.full((3, size), value)
            for epsilon in (1e-4, 0.0):
                advantages = group_advantages(rewards, scale_rewards, epsilon)
                assert torch.equal(advantages, torch.zeros(3, size)), (size, value)


@pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
def test_equal_rewards_of_one_group_among_others_give_exactly_zero(scale_rewards):
    rewards = rewards_of([0.3] * 6, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [NAN, 1.1, 1.1, 1.1, NAN, 1.1])
    advantages = group_advantages(rewards, scale_rewards)
    assert torch.equal(advantages[[0, 2]], torch.zeros(2, 6))
    assert (advantages[1] != 0).all()


@pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
def test_the_advantages_of_a_group_sum_to_zero(scale_rewards):
    advantages = group_advantages(random_rewards(5, 8), scale_rewards)
    torch.testing.assert_close(advantages.sum(1), torch.zeros(5), rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale_rewards", ["group", "none"])
def test_a_shift_of_a_groups_rewards_changes_nothing(scale_rewards):
    rewards = random_rewards(4, 6)
    shifts = torch.tensor([[3.0], [-7.0], [0.5], [100.0]])
    shifted, plain = (group_advantages(each, scale_rewards) for each in (rewards + shifts, rewards))
    torch.testing.assert_close(shifted, plain, rtol=0, atol=1e-4)


def test_a_shift_of_all_rewards_changes_nothing_when_the_batch_scales():
    rewards = random_rewards(4, 6)
    torch.testing.assert_close(
        group_advantages(rewards + 5.0, "batch"), group_advantages(rewards, "batch"), rtol=0, atol=1e-5
    )


def test_a_scale_of_a_groups_rewards_changes_nothing():
    rewards, scales = random_rewards(3, 6), torch.tensor([[10.0], [1.0], [0.1]])
    scaled = group_advantages(rewards * scales, epsilon=0.0)
    torch.testing.assert_close(scaled, group_advantages(rewards, epsilon=0.0))
    first, second, third = (rewards * scales).tolist()  # epsilon damps the third, a hundredth of the first
    expected = [by_hand(first, second, third), by_hand(second, third, first), by_hand(third, first, second)]
    torch.testing.assert_close(group_advantages(rewards * scales), torch.tensor(expected))
    assert not torch.allclose(group_advantages(rewards * scales, "none"), group_advantages(rewards, "none"))


@pytest.mark.parametrize("scale_rewards", ["group", "batch"])
@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
@pytest.mark.parametrize("factor", [1e-4, 1e4, 1e-30])
def test_the_unit_of_all_rewards_changes_nothing(scale_rewards, aggregation, factor):
    rewards, weights = random_rewards(2, 4, 8), torch.tensor([1.0, 0.5])
    advantages, scaled = (
        add_constraints(
            combined_advantages(each, weights, scale_rewards, aggregation), {"bound": each[1]}, {"bound": 2.0}
        )
        for each in (rewards, factor * rewards)
    )
    if factor == 1e-30:  # its squares are 0 in float32: as good as equal
        assert torch.equal(scaled, torch.zeros(4, 8))
    else:
        torch.testing.assert_close(scaled, advantages, rtol=1e-6, atol=1e-6)


def test_small_differences_of_large_rewards_survive():
    rewards = torch.tensor([[1000.0, 1000.25, 1000.5, 1000.75]])
    expected = torch.tensor([by_hand([0.0, 0.25, 0.5, 0.75])])
    torch.testing.assert_close(group_advantages(rewards), expected)


# Images that were not scored


@pytest.mark.parametrize("scale_rewards", ["group", "none"])
def test_an_unscored_image_gets_zero_and_does_not_count(scale_rewards):
    first, second = [1.0, 2.0, 6.0], [0.0, 1.0, 2.0, 3.0]
    advantages = group_advantages(rewards_of([1.0, NAN, 2.0, 6.0], second), scale_rewards)
    assert advantages[0, 1] == 0
    if scale_rewards == "group":
        expected = by_hand(first, second), by_hand(second, first)
    else:
        expected = [-2.0, -1.0, 3.0], [-1.5, -0.5, 0.5, 1.5]
    torch.testing.assert_close(advantages[0, [0, 2, 3]], torch.tensor(expected[0]))
    torch.testing.assert_close(advantages[1], torch.tensor(expected[1]))


def test_an_unscored_image_does_not_count_in_the_batchs_deviation():
    advantages = group_advantages(rewards_of([1.0, NAN, 2.0], [0.0, 1.0, 5.0]), "batch")
    deviation = torch.tensor([1.0, 2.0, 0.0, 1.0, 5.0]).std() + 1e-4 * math.sqrt((0.5 + 7) / 2)
    torch.testing.assert_close(advantages, torch.tensor([[-0.5, 0.0, 0.5], [-2.0, -1.0, 3.0]]) / deviation)


@pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
def test_a_group_with_fewer_than_two_scores_gets_zero(scale_rewards):
    rewards = rewards_of([NAN, 5.0, NAN], [NAN, NAN, NAN], [1.0, 2.0, 3.0])
    advantages = group_advantages(rewards, scale_rewards)
    assert torch.equal(advantages[:2], torch.zeros(2, 3))
    torch.testing.assert_close(advantages[2:], group_advantages(rewards[2:], scale_rewards))


@pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
def test_no_score_at_all_gives_zero(scale_rewards):
    assert torch.equal(group_advantages(torch.full((2, 3), NAN), scale_rewards), torch.zeros(2, 3))
    assert torch.equal(group_advantages(torch.ones(2, 1), scale_rewards), torch.zeros(2, 1))


def test_the_rewards_are_left_as_they_were():
    rewards = rewards_of([1.0, NAN, 3.0])
    group_advantages(rewards, "batch")
    assert rewards[0, 0] == 1.0 and rewards[0, 1].isnan() and rewards[0, 2] == 3.0


# Several rewards

TWO = torch.tensor([[[0.0, 2.0, 4.0]], [[30.0, 10.0, 20.0]]])  # one group; deviations 2 and 10


def test_sum_then_normalize_by_hand():
    advantages = combined_advantages(TWO, torch.tensor([1.0, 0.5]))
    torch.testing.assert_close(advantages, torch.tensor([by_hand([15.0, 7.0, 14.0])]))


def test_normalize_then_sum_by_hand():
    advantages = combined_advantages(TWO, torch.tensor([1.0, 0.5]), aggregation="normalize_then_sum")
    # (-1, 0, 1) and half of (1, -1, 0)
    expected = torch.tensor([[-0.5, -0.5, 1.0]]) / (1 + 1e-4)  # epsilon is relative to each one's deviation
    torch.testing.assert_close(advantages, expected, rtol=0, atol=1e-6)


def test_a_rewards_unit_counts_only_when_summed_first():
    weights, rescaled = torch.tensor([1.0, 1.0]), TWO * torch.tensor([1.0, 100.0])[:, None, None]
    separately = [
        combined_advantages(each, weights, aggregation="normalize_then_sum") for each in (TWO, rescaled)
    ]
    torch.testing.assert_close(*separately, rtol=0, atol=1e-4)
    summed = [combined_advantages(each, weights) for each in (TWO, rescaled)]
    assert not torch.allclose(*summed, atol=0.05)


@pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
def test_one_reward_of_weight_1_is_the_group_advantage(scale_rewards):
    rewards, one = random_rewards(3, 5), torch.ones(1)
    for aggregation in ("sum_then_normalize", "normalize_then_sum"):
        combined = combined_advantages(rewards[None], one, scale_rewards, aggregation)
        torch.testing.assert_close(combined, group_advantages(rewards, scale_rewards))


def test_epsilon_reaches_both_aggregations_and_the_constraints():
    """With the epsilon 1, every single group's divisor is twice its deviation."""
    weights = torch.tensor([1.0, 0.5])
    for aggregation in ("sum_then_normalize", "normalize_then_sum"):
        full, half = (combined_advantages(TWO, weights, "group", aggregation, each) for each in (0.0, 1.0))
        torch.testing.assert_close(half, full / 2)
    full, half = (
        add_constraints(torch.zeros(1, 3), {"a": TWO[0]}, {"a": 3.0}, epsilon) for epsilon in (0.0, 1.0)
    )
    torch.testing.assert_close(half, full / 2)


def test_the_scaling_reaches_both_aggregations():
    weights = torch.tensor([1.0, 0.5])
    torch.testing.assert_close(
        combined_advantages(TWO, weights, "none", "normalize_then_sum"),
        torch.tensor([[-2.0, 0.0, 2.0]]) + 0.5 * torch.tensor([[10.0, -10.0, 0.0]]),
    )
    torch.testing.assert_close(combined_advantages(TWO, weights, "none"), torch.tensor([[3.0, -5.0, 2.0]]))


def test_an_image_that_one_reward_did_not_score():
    rewards = torch.tensor([[[1.0, NAN, 3.0]], [[0.0, 5.0, 4.0]]])
    summed = combined_advantages(rewards, torch.ones(2))  # the sum is not known: not scored
    assert summed[0, 1] == 0
    torch.testing.assert_close(summed[0, [0, 2]], group_advantages(rewards_of([1.0, 7.0]))[0])
    separate = combined_advantages(rewards, torch.ones(2), aggregation="normalize_then_sum")
    second = by_hand([0.0, 5.0, 4.0])
    first = by_hand([1.0, 3.0])
    expected = torch.tensor([[first[0] + second[0], second[1], first[1] + second[2]]])
    torch.testing.assert_close(separate, expected)


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_equal_rewards_of_several_kinds_give_exactly_zero(aggregation):
    rewards, weights = (
        torch.tensor([0.3, 5.7, -1.1])[:, None, None].expand(3, 2, 6),
        torch.tensor([0.7, 0.2, 1.0]),
    )
    assert torch.equal(combined_advantages(rewards, weights, aggregation=aggregation), torch.zeros(2, 6))


# Constraints


def test_constraints_add_their_own_normalised_advantages():
    objective = rewards_of([-1.0, 0.0, 1.0], [0.5, 0.5, -1.0])
    kept, low = [[30.0, 10.0, 20.0], [1.0, 1.0, 1.0]], [[0.3, 0.1, 0.2], [0.1, 0.4, 0.7]]

    def each(groups):
        return by_hand(*groups), by_hand(*reversed(groups))

    rewards = {"kept": torch.tensor(kept), "low": torch.tensor(low), "trained": random_rewards(2, 3)}
    expected = torch.tensor(
        [
            [a + 2.0 * k - 0.5 * b for a, k, b in zip(row, keep, below, strict=True)]
            for row, keep, below in zip(objective.tolist(), each(kept), each(low), strict=True)
        ]
    )
    found = add_constraints(objective, rewards, {"kept": 2.0, "low": -0.5})
    torch.testing.assert_close(found, expected)
    assert torch.equal(add_constraints(objective, rewards, {"kept": 0.0}), objective)


def test_an_image_that_a_constraint_did_not_score_keeps_its_advantage():
    objective = rewards_of([-1.0, 0.0, 1.0])
    found = add_constraints(objective, {"kept": rewards_of([NAN, 2.0, 1.0])}, {"kept": 10.0})
    assert found[0, 0] == -1.0 and found[0, 1] > 5 and found[0, 2] < -5


@pytest.mark.parametrize("scale_rewards", ["group", "batch"])
def test_rewards_that_differ_by_rounding_alone_are_equal(scale_rewards) -> None:
    rounded = 0.3 + 3e-8 * torch.randint(0, 2, (4, 8), generator=torch.Generator().manual_seed(0))
    assert rounded.std() > 0
    advantages = group_advantages(rounded, scale_rewards)
    assert advantages.abs().max() == 0
    varied = rounded.clone()
    varied[0] += torch.linspace(0, 0.1, 8)  # beside a group that varies, the others count as little
    found = group_advantages(varied, scale_rewards)
    assert found[1:].abs().max() == 0 and found[0].abs().min() > 0


def test_what_is_rounding_is_measured_by_the_group_itself() -> None:
    rewards = torch.tensor([[1e6, 1e6 + 10, 1e6 - 10, 1e6 + 5], [0.0, 0.5, 1.0, 0.25]])
    found = group_advantages(rewards, epsilon=0.0)
    assert found[1].tolist() == pytest.approx(by_hand(rewards[1].tolist(), epsilon=0.0))
    by_rounding = torch.tensor([[100.0, 100.00003, 100.0, 100.0], [100.1, 100.0, 99.9, 100.05]])
    for scale_rewards in ("group", "batch", "none"):
        found = group_advantages(by_rounding, scale_rewards)
        assert found[0].abs().max() == 0 and found[1].abs().max() > 0.05, scale_rewards


def test_leave_one_out_compares_with_the_others_alone() -> None:
    rewards = torch.tensor([[1.0, 2.0, 6.0], [3.0, float("nan"), 5.0]])
    found = group_advantages(rewards, "none", baseline="leave_one_out")
    assert found[0].tolist() == pytest.approx([1 - 4, 2 - 3.5, 6 - 1.5])
    assert found[1].tolist() == pytest.approx([3 - 5, 0, 5 - 3])
    mean = group_advantages(rewards, "none")
    torch.testing.assert_close(found[0], mean[0] * 3 / 2)


def test_a_start_is_worth_between_the_mean_and_the_best_of_its_images() -> None:
    rewards = torch.tensor([[[1.0, 3.0], [2.0, 2.5]]])
    spread = ((2.0 + 0.125) / 2) ** 0.5  # of two images: half the squared difference
    for temperature in (0.3, 1.0, 4.0):
        unit = temperature * spread
        expected = [
            unit * math.log((math.exp(a / unit) + math.exp(b / unit)) / 2) for a, b in ((1, 3), (2, 2.5))
        ]
        assert start_values(rewards, temperature)[0].tolist() == pytest.approx(expected, rel=1e-5)
    assert start_values(rewards, 1e-3)[0].tolist() == pytest.approx([3.0, 2.5], abs=2e-3)
    assert start_values(rewards, 1e4)[0].tolist() == pytest.approx([2.0, 2.25], abs=1e-3)
    assert start_values(torch.full((1, 2, 2), 0.7), 1.0)[0].tolist() == pytest.approx([0.7, 0.7])
    for huge in (1e8, 1e30):  # the mean of more than rounding
        assert start_values(rewards, huge)[0].tolist() == pytest.approx([2.0, 2.25], abs=1e-6)
    assert start_values(rewards, 1e-38)[0].tolist() == pytest.approx([3.0, 2.5])
    unscored = torch.tensor([[[1.0, float("nan")], [float("nan")] * 2]])
    values = start_values(unscored, 1.0)[0]
    assert values[0].item() == pytest.approx(1.0) and values[1].isnan()
    # The unit is the spread of those starts that have one.
    lone = torch.tensor([[[0.0, 2.0], [1.0, float("nan")]]])
    assert torch.equal(start_values(lone, 1.0)[0, 0], start_values(lone[:, :1], 1.0)[0, 0])


BRANCHING = GRPOConfig(
    num_groups=1, num_generations=4, branch_scale=2, branches=2, branch_temperature=1e4, scale_rewards="none"
)


def test_starts_compete_in_their_group_and_images_with_those_of_the_same_start() -> None:
    scores = {"a": torch.tensor([[1.0, 3.0, 5.0, 9.0]])}  # two starts, worth 2 and 7
    found = step_advantages(scores, {"a": 1.0}, {}, BRANCHING, num_scales=5)
    starts, rests = [-2.5, -2.5, 2.5, 2.5], [-1.0, 1.0, -2.0, 2.0]
    expected = torch.tensor([[start] * 2 + [rest] * 3 for start, rest in zip(starts, rests, strict=True)])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_starts_and_rests_may_take_turns() -> None:
    scores = {"a": torch.tensor([[1.0, 3.0, 5.0, 9.0]])}
    grpo = BRANCHING.replace(branch_schedule="in_turn")
    for step in range(1, 9):
        found = step_advantages(scores, {"a": 1.0}, {}, grpo, num_scales=5, step=step)
        starts, rests = found[:, :2].abs().sum() > 0, found[:, 2:].abs().sum() > 0
        assert (bool(starts), bool(rests)) == (step % 4 != 0, step % 4 == 0)


def test_branches_and_constraints_go_together() -> None:
    scores = {"a": torch.tensor([[1.0, 3.0, 5.0, 9.0]]), "b": torch.tensor([[0.0, 1.0, 0.0, 1.0]])}
    plain = step_advantages(scores, {"a": 1.0}, {}, BRANCHING, num_scales=5)
    bound = step_advantages(scores, {"a": 1.0}, {"b": 2.0}, BRANCHING, num_scales=5)
    assert torch.allclose(plain[:, :2], bound[:, :2])  # both starts keep the constraint equally well
    assert (bound[1, 4] > plain[1, 4]) and (bound[0, 4] < plain[0, 4])


BEST = GRPOConfig(
    num_groups=1,
    num_generations=4,
    branch_scale=1,
    branches=2,
    branch_temperature=1e-3,
    scale_rewards="none",
)


def test_a_start_is_worth_the_sum_of_rewards_where_these_are_summed() -> None:
    """The best of a sum is not the sum of the bests: the second start has one image that is good at both."""
    scores = {"a": torch.tensor([[9.0, 0.0, 8.0, 0.0]]), "b": torch.tensor([[0.0, 9.0, 8.0, 0.0]])}
    weights = {"a": 1.0, "b": 0.5}
    summed = step_advantages(scores, weights, {}, BEST, num_scales=2)
    assert summed[:, 0].tolist() == pytest.approx([-1.5, -1.5, 1.5, 1.5], abs=0.05)  # worth 9 and 12
    apart = BEST.replace(multi_objective_aggregation="normalize_then_sum")
    each = step_advantages(scores, weights, {}, apart, num_scales=2)
    assert each[:, 0].tolist() == pytest.approx([0.75, 0.75, -0.75, -0.75], abs=0.05)  # 9 and 8, both ways


def test_what_is_kept_low_is_worth_most_where_it_is_lowest() -> None:
    scores = {"a": torch.tensor([[1.0, 9.0, 4.0, 5.0]]), "same": torch.zeros(1, 4)}
    expected = [1.5, 1.5, -1.5, -1.5]  # -1 is above -4
    for aggregation in ("sum_then_normalize", "normalize_then_sum"):
        grpo = BEST.replace(multi_objective_aggregation=aggregation)
        found = step_advantages(scores, {"a": -1.0}, {}, grpo, num_scales=2)
        assert found[:, 0].tolist() == pytest.approx(expected, abs=0.05), aggregation
        # An upper bound has a negative coefficient; its advantages are divided by their deviation.
        bound = step_advantages(scores, {"same": 1.0}, {"a": -2.0}, grpo, num_scales=2)
        assert bound[:, 0].tolist() == pytest.approx([2**0.5, 2**0.5, -(2**0.5), -(2**0.5)], abs=0.05)


# The KL as a part of the reward


def test_later_kl_is_of_the_scales_after():
    kl = torch.tensor([[1.0, 2.0, 3.0, 10.0, 20.0]])
    assert torch.equal(later_kl(kl, (1, 2, 2)), torch.tensor([[35.0, 30.0, 0.0]]))
    assert torch.equal(later_kl(kl[:, :3], (1, 2)), torch.tensor([[5.0, 0.0]]))


def test_what_later_scales_cost_is_expected_of_others_alone():
    later = torch.tensor([[[1.0, 0.0], [2.0, 10.0], [6.0, 20.0], [9.0, 40.0]]])
    of_others = [[17 / 3, 70 / 3], [16 / 3, 20.0], [4.0, 50 / 3], [3.0, 10.0]]
    torch.testing.assert_close(expected_later_kl(later)[0], torch.tensor(of_others))
    of_starts = [[7.5, 70 / 3], [7.5, 20.0], [1.5, 50 / 3], [1.5, 10.0]]  # the first scale is shared by two
    found = expected_later_kl(later, branch_scale=1, branches=2)[0]
    torch.testing.assert_close(found, torch.tensor(of_starts))


def groups_of_images(kind: str, is_same_start: torch.Tensor, probs: torch.Tensor, starts: torch.Tensor):
    """All groups that can be drawn of images, (n, G), and the probability of each."""
    everything = torch.arange(len(probs))
    if kind != "branches":
        groups = torch.cartesian_prod(*[everything] * int(kind))
        return groups, probs[groups].prod(1)
    pairs = is_same_start.nonzero()  # two images of one start
    of_start = torch.stack([probs[starts == each].sum() for each in range(3)])[starts]
    of_pairs = probs[pairs].prod(1) / of_start[pairs[:, 0]]
    at = torch.cartesian_prod(*[torch.arange(len(pairs))] * 2)
    return pairs[at].flatten(1), of_pairs[at].prod(1)


@pytest.mark.parametrize("kind", ["2", "3", "branches"])
def test_less_its_costs_a_policy_gradient_is_that_of_the_kl_of_all_paths(kind):
    """A policy of two scales, one token and two, three codes each: all groups of its 27 images are counted
    out, and the gradient of the images' exact KL is taken by autograd."""
    generator = torch.Generator().manual_seed(0)
    first, theirs_first = (torch.randn(3, generator=generator, dtype=torch.float64) for _ in range(2))
    second, theirs_second = (torch.randn(3, 2, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    first.requires_grad_(), second.requires_grad_()
    images = torch.cartesian_prod(*[torch.arange(3)] * 3)
    starts, rests = images[:, 0], images[:, 1:]

    def distributions(of_first, of_second):
        """(27, 3, 3) log-probs of each token given the image's start."""
        shared = of_first.log_softmax(0).expand(27, 1, 3)
        return torch.cat([shared, of_second.log_softmax(-1)[starts]], 1)

    ours, theirs = distributions(first, second), distributions(theirs_first, theirs_second)
    picked = torch.cat([starts[:, None], rests], 1)[..., None]
    log_probs, their_log_probs = (each.gather(-1, picked)[..., 0] for each in (ours, theirs))
    probs = log_probs.sum(1).exp()
    torch.testing.assert_close(probs.sum().item(), 1.0)
    kl_of_images = (probs * (log_probs - their_log_probs).sum(1)).sum()
    expected = torch.autograd.grad(kl_of_images, (first, second), retain_graph=True)

    lengths = (1, 2)
    groups, of_groups = groups_of_images(kind, starts[:, None] == starts, probs.detach(), starts)
    torch.testing.assert_close(of_groups.sum().item(), 1.0)
    shared = (1, 2) if kind == "branches" else (None, 1)
    with torch.no_grad():
        kl = (ours.exp() * (ours - theirs)).sum(-1)
        later = later_kl(kl, lengths)
        expected_later = expected_later_kl(later[groups], *shared).flatten(0, 1)
        drawn = groups.flatten()
        log_ratios = (log_probs - their_log_probs)[drawn]
        costs = kl_costs(log_ratios, kl[drawn], later[drawn], expected_later, lengths)
        costs = costs.unflatten(0, groups.shape)
    as_advantages = (of_groups[:, None] * (costs * log_probs[groups]).sum(-1)).mean(1).sum()
    found = torch.autograd.grad(as_advantages, (first, second))
    for ours_, theirs_ in zip(found, expected, strict=True):
        torch.testing.assert_close(ours_, theirs_)
