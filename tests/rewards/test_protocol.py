"""Rewards in general: what one may answer."""

import math
import sys
from typing import Any

import numpy as np
import pytest
import torch

from nextscale.base.conditions import Condition
from nextscale.base.errors import RewardError
from nextscale.rewards import score

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
    assert torch.equal(seen[0][0], images) and seen[0][1] == CONDITIONS and not seen[0][2]


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


@pytest.mark.parametrize("timeout", [None, 60])
@pytest.mark.parametrize("code", [0, 1])
def test_a_reward_that_exits_has_failed(timeout: float | None, code: int):
    def reward(images, conditions):
        sys.exit(code)

    with pytest.raises(
        RewardError, match=rf"^reward 'mine' raised SystemExit: {code} \(.*test_protocol\.py:"
    ):
        score("mine", reward, IMAGES, CONDITIONS, timeout)


def test_an_interrupt_is_no_fault_of_the_reward():
    def reward(images, conditions):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score("mine", reward, IMAGES, CONDITIONS)
