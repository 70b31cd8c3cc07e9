"""Rewards in general: what one may answer, and the weighted sum."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from nextscale.base.conditions import Condition
from nextscale.base.errors import ConfigError, RewardError
from nextscale.rewards import AtLeast, AtMost, WeightedSum, score
from nextscale.rewards.protocol import require_scores

NAN = math.nan
CONDITIONS = [Condition(i, name) for i, name in enumerate(("star", "heart", "moon"))]
IMAGES = torch.zeros(3, 3, 8, 8)


def answering(answer: Any):
    return lambda images, conditions: answer


def ask(answer: Any) -> torch.Tensor:
    return score("mine", answering(answer), IMAGES, CONDITIONS)


@pytest.mark.parametrize(
    "answer",
    [
        [0.5, 1, -2.0],
        (0.5, 1, -2.0),
        np.array([0.5, 1.0, -2.0]),
        np.array([0.5, 1.0, -2.0], dtype=np.float16),
        torch.tensor([0.5, 1.0, -2.0], dtype=torch.float64),
        torch.tensor([0.5, 1.0, -2.0], dtype=torch.bfloat16),
        torch.tensor([0.5, 1.0, -2.0], requires_grad=True),
        [torch.tensor(0.5), torch.tensor(1.0), torch.tensor(-2.0)],
    ],
)
def test_any_row_of_numbers_is_taken(answer: Any):
    scores = ask(answer)
    assert scores.dtype == torch.float32 and scores.device.type == "cpu" and not scores.requires_grad
    assert scores.tolist() == [0.5, 1.0, -2.0]


def test_the_reward_sees_images_and_conditions_without_gradient():
    seen = []

    def reward(images, conditions):
        seen.append((images, conditions, torch.is_grad_enabled()))
        return images.mean((1, 2, 3))

    images = torch.arange(3.0).view(3, 1, 1, 1).expand(3, 3, 8, 8)
    assert score("mine", reward, images, CONDITIONS).tolist() == [0.0, 1.0, 2.0]
    assert seen[0][0] is images and seen[0][1] is CONDITIONS and not seen[0][2]


def test_some_images_may_stay_without_a_score():
    for answer in ([1.0, NAN, 3.0], [1.0, None, 3.0], (1, None, 3), np.array([1.0, NAN, 3.0])):
        scores = ask(answer)
        assert scores.isnan().tolist() == [False, True, False]
        assert scores[[0, 2]].tolist() == [1.0, 3.0]


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (torch.zeros(2), r"shape \(2,\), expected \(3,\)"),
        (torch.zeros(3, 1), r"shape \(3, 1\), expected \(3,\)"),
        (1.0, r"shape \(\), expected \(3,\)"),
        ([1.0, math.inf, 0.0], "infinite"),
        ([1.0, -math.inf, NAN], "infinite"),
        ([NAN, NAN, NAN], "NaN for all 3 images"),
        ([None, None, None], "NaN for all 3 images"),
        (None, "NoneType, expected 3 numbers"),
        ("abc", "str, expected 3 numbers"),
        (["a", "b", "c"], "list, expected 3 numbers"),
        ([[1.0], [1.0, 2.0], [3.0]], "list, expected 3 numbers"),
        ({"score": 1.0}, "dict, expected 3 numbers"),
    ],
)
def test_anything_else_is_told(answer: Any, told: str):
    with pytest.raises(RewardError, match=f"reward 'mine' returned .*{told}"):
        ask(answer)


def test_a_reward_that_raises_is_told_by_name():
    def reward(images, conditions):
        raise KeyError("star")

    line = reward.__code__.co_firstlineno + 1
    told = rf"reward 'mine' raised KeyError: 'star' \(.*test_protocol\.py:{line}\)$"
    with pytest.raises(RewardError, match=told) as caught:
        score("mine", reward, IMAGES, CONDITIONS)
    assert isinstance(caught.value.__cause__, KeyError)


def test_the_line_that_is_told_is_the_users_own():
    """Not that of the library in which the error was raised."""

    def reward(images, conditions):
        return torch.stack([])

    line = reward.__code__.co_firstlineno + 1
    with pytest.raises(RewardError, match=rf"raised RuntimeError: .*test_protocol\.py:{line}\)$"):
        score("mine", reward, IMAGES, CONDITIONS)


def test_an_interrupt_is_no_fault_of_the_reward():
    def reward(images, conditions):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score("mine", reward, IMAGES, CONDITIONS)


def test_the_sum_is_weighted():
    rewards = {"a": answering([1.0, 2.0, 3.0]), "b": answering([10.0, 0.0, -10.0])}
    assert WeightedSum(rewards)(IMAGES, CONDITIONS).tolist() == [11.0, 2.0, -7.0]
    total = WeightedSum(rewards, {"a": 2.0, "b": -0.5})
    assert total(IMAGES, CONDITIONS).tolist() == [-3.0, 4.0, 11.0]
    assert WeightedSum(rewards, {"b": 0})(IMAGES, CONDITIONS).tolist() == [1.0, 2.0, 3.0]
    components = total.components(IMAGES, CONDITIONS)
    assert {name: each.tolist() for name, each in components.items()} == {
        "a": [1.0, 2.0, 3.0],
        "b": [10.0, 0.0, -10.0],
    }


def test_an_image_that_one_reward_did_not_score_has_no_sum():
    rewards = {"a": answering([1.0, 2.0, NAN]), "b": answering([NAN, 1.0, 1.0])}
    for weights in ({}, {"a": 0.0, "b": 0.0}):
        total = WeightedSum(rewards, weights)(IMAGES, CONDITIONS)
        assert total.isnan().tolist() == [True, False, True]


def test_each_reward_of_a_sum_is_checked_by_its_name():
    total = WeightedSum({"a": answering([1.0, 2.0, 3.0]), "b": answering([1.0])})
    with pytest.raises(RewardError, match="reward 'b' returned shape"):
        total(IMAGES, CONDITIONS)


def test_a_sum_of_nothing_and_a_weight_of_nothing_are_told():
    with pytest.raises(ConfigError, match="no rewards given"):
        WeightedSum({})
    with pytest.raises(ConfigError, match="weight for 'c', which is none of the rewards a, b"):
        WeightedSum({"a": answering(0), "b": answering(0)}, {"c": 1.0})
    with pytest.raises(ConfigError, match="timeout for 'c', which is none of the rewards a, b"):
        WeightedSum({"a": answering(0), "b": answering(0)}, timeouts={"c": 1.0})


def three_roles() -> WeightedSum:
    rewards = {
        "style": answering([1.0, 2.0, 3.0]),
        "class": answering([NAN, 0.5, 0.9]),
        "other": answering([7.0, 7.0, NAN]),
        "bright": answering([0.1, 0.2, 0.3]),
    }
    constraints = {"class": AtLeast(), "bright": AtMost(0.5)}
    return WeightedSum(rewards, {"style": 2.0}, constraints, held_out=["other"])


def test_the_sum_is_of_what_is_trained_on():
    total = three_roles()
    assert total(IMAGES, CONDITIONS).tolist() == [2.0, 4.0, 6.0]
    assert total.roles() == {
        "style": {"weight": 2.0},
        "class": {"at_least": "base"},
        "bright": {"at_most": 0.5},
        "other": {"held_out": True},
    }


def test_training_asks_all_but_the_held_out_rewards():
    assert set(three_roles().components(IMAGES, CONDITIONS)) == {"style", "class", "other", "bright"}
    training = three_roles().without_held_out()
    assert set(training.components(IMAGES, CONDITIONS)) == {"style", "class", "bright"}
    assert training(IMAGES, CONDITIONS).tolist() == [2.0, 4.0, 6.0]


@pytest.mark.parametrize(
    ("roles", "says"),
    [
        ({"constraints": {"c": AtLeast()}}, "constraint for 'c', which is none of the rewards a, b"),
        ({"held_out": ["c"]}, "held_out for 'c', which is none of the rewards a, b"),
        ({"held_out": ["a"], "weights": {"a": 1.0}}, "'a': 'weight' has no effect beside 'held_out'"),
        (
            {"constraints": {"a": AtMost(1)}, "weights": {"a": 1}},
            "'weight' has no effect beside 'constraint'",
        ),
        (
            {"constraints": {"a": AtLeast()}, "held_out": ["a"]},
            "'constraint' has no effect beside 'held_out'",
        ),
        ({"constraints": {"a": AtLeast()}, "held_out": ["b"]}, "give one to train on"),
    ],
)
def test_roles_that_cannot_be(roles: dict, says: str):
    with pytest.raises(ConfigError, match=says):
        WeightedSum({"a": answering(0), "b": answering(0)}, **roles)


def test_a_part_of_a_step_may_be_without_any_score():
    """Only who sees all of a step or an evaluation can say that nothing was scored."""
    rewards = WeightedSum({"a": answering([1.0, 2.0, 3.0]), "b": answering([NAN] * 3)})
    components = rewards.components(IMAGES, CONDITIONS)
    assert components["b"].isnan().all() and rewards(IMAGES, CONDITIONS).isnan().all()
    with pytest.raises(RewardError, match="reward 'b' returned NaN for all 3 images"):
        require_scores(components)
    require_scores({"a": components["a"], "b": torch.tensor([[NAN, NAN], [NAN, 0.0]])})
