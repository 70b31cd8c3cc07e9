"""Sets of rewards: their roles, their scores, and the weighted sum."""

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nextscale.base.conditions import Condition
from nextscale.base.errors import ConfigError, RewardError
from nextscale.base.roles import ROLES
from nextscale.rewards import Aesthetic, AtLeast, AtMost, JpegCompressibility, RewardSet
from nextscale.rewards.groups import GroupReward
from nextscale.rewards.protocol import require_scores
from nextscale.rewards.roles import Constraint

NAN = math.nan
CONDITIONS = [Condition(i, name) for i, name in enumerate(("star", "heart", "moon"))]
IMAGES = torch.zeros(3, 3, 8, 8)


def answering(answer: Any):
    return lambda images, conditions: answer


class Picky:
    """Scores what is on its list."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def __call__(self, images: Tensor, conditions: list[Condition]) -> Tensor:
        return torch.ones(len(images))

    def check_conditions(self, conditions: list[Condition]) -> None:
        for each in conditions:
            if each.text not in self.names:
                raise ConfigError(f"knows no {each.text}")


def test_rewards_are_asked_before_images_are_drawn_what_they_can_score():
    rewards = RewardSet({"any": answering([1.0] * 3), "some": Picky("star", "moon")})
    rewards.check_conditions(CONDITIONS[::2])
    with pytest.raises(RewardError, match=r"^reward 'some': knows no heart$"):
        rewards.check_conditions(CONDITIONS)


def test_the_sum_is_weighted():
    rewards = {"a": answering([1.0, 2.0, 3.0]), "b": answering([10.0, 0.0, -10.0])}
    assert RewardSet(rewards)(IMAGES, CONDITIONS).tolist() == [11.0, 2.0, -7.0]
    total = RewardSet(rewards, {"a": 2.0, "b": -0.5})
    assert total(IMAGES, CONDITIONS).tolist() == [-3.0, 4.0, 11.0]
    assert RewardSet(rewards, {"b": 0})(IMAGES, CONDITIONS).tolist() == [1.0, 2.0, 3.0]
    scores = total.scores(IMAGES, CONDITIONS)
    assert {name: each.tolist() for name, each in scores.items()} == {
        "a": [1.0, 2.0, 3.0],
        "b": [10.0, 0.0, -10.0],
    }


def test_an_image_that_one_reward_did_not_score_has_no_sum():
    rewards = {"a": answering([1.0, 2.0, NAN]), "b": answering([NAN, 1.0, 1.0])}
    for weights in ({}, {"a": 0.0, "b": 0.0}):
        total = RewardSet(rewards, weights)(IMAGES, CONDITIONS)
        assert total.isnan().tolist() == [True, False, True]


def test_each_reward_of_a_sum_is_checked_by_its_name():
    total = RewardSet({"a": answering([1.0, 2.0, 3.0]), "b": answering([1.0])})
    with pytest.raises(RewardError, match="reward 'b' returned shape"):
        total(IMAGES, CONDITIONS)


def test_a_sum_of_nothing_and_a_weight_of_nothing_are_told():
    with pytest.raises(ConfigError, match="no rewards given"):
        RewardSet({})
    with pytest.raises(ConfigError, match="weight for 'c', which is none of the rewards a, b"):
        RewardSet({"a": answering(0), "b": answering(0)}, {"c": 1.0})
    with pytest.raises(ConfigError, match="timeout for 'c', which is none of the rewards a, b"):
        RewardSet({"a": answering(0), "b": answering(0)}, timeouts={"c": 1.0})


def test_a_reward_cannot_spoil_what_others_see():
    """Neither the next one nor the caller, however it edits what it is given."""
    shown = torch.arange(3.0).view(3, 1, 1, 1).expand(3, 3, 8, 8).contiguous()
    images, conditions = shown.clone(), list(CONDITIONS)

    def in_place(images: Tensor, conditions: list) -> list[float]:
        images.zero_()
        conditions.sort(key=lambda each: each.text)
        return [0.0] * 3

    def in_numpy(images: Tensor, conditions: list) -> list[float]:
        images.numpy()[:] = 5
        conditions.pop()
        return [0.0] * 3

    async def awaited(images: Tensor, conditions: list) -> list[float]:
        return in_place(images, conditions)

    def honest(images: Tensor, conditions: list) -> Tensor:
        assert conditions == CONDITIONS
        return images.mean((1, 2, 3))

    rewards = {"a": awaited, "b": in_place, "c": in_numpy, "d": in_place, "last": honest}
    scores = RewardSet(rewards, timeouts={"d": 60}).scores(images, conditions)
    assert scores["last"].tolist() == [0.0, 1.0, 2.0]
    assert torch.equal(images, shown) and conditions == CONDITIONS


def test_what_a_user_gives_as_rewards():
    def mine(images: Tensor, conditions: list) -> list[float]:
        return [1.0] * 3

    alone = RewardSet.of(mine)
    assert list(alone.rewards) == ["mine"] and RewardSet.of(alone) is alone
    assert list(RewardSet.of(JpegCompressibility()).rewards) == ["JpegCompressibility"]
    assert RewardSet.of({"a": mine, "b": mine}).weights == {"a": 1.0, "b": 1.0}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([answering(0)], "rewards: got an object of type list, expected .* or a dict of them by name$"),
        (
            None,
            r"rewards: got None, expected a function, an object such as nextscale\.rewards\.Aesthetic\(\)",
        ),
        ("aesthetic", r"rewards: got 'aesthetic', .* such as nextscale\.rewards\.Aesthetic\(\)"),
        (3, "rewards: got an object of type int, expected"),
        (
            Aesthetic,
            r"reward 'Aesthetic': got the class Aesthetic, .* such as nextscale\.rewards\.Aesthetic\(\)$",
        ),
        (
            {"a": answering(0), "b": "aesthetic"},
            "reward 'b': got 'aesthetic', expected a function or an object",
        ),
        ({"a": None}, "reward 'a': got None, expected"),
        ({"a": Aesthetic}, "reward 'a': got the class Aesthetic, expected"),
        ({"a": [answering(0)]}, "reward 'a': got an object of type list, expected"),
        ({}, "no rewards given"),
        (
            {"reward": answering(0), "b": answering(1)},
            "a reward is called 'reward', as what all",
        ),
    ],
)
def test_what_is_no_reward_is_refused_before_anything_is_scored(given: Any, says: str):
    with pytest.raises(ConfigError, match=says):
        RewardSet.of(given)


def three_roles() -> RewardSet:
    rewards = {
        "style": answering([1.0, 2.0, 3.0]),
        "class": answering([NAN, 0.5, 0.9]),
        "other": answering([7.0, 7.0, NAN]),
        "bright": answering([0.1, 0.2, 0.3]),
    }
    constraints = {"class": AtLeast(), "bright": AtMost(0.5)}
    return RewardSet(rewards, {"style": 2.0}, constraints, held_out=["other"])


def test_the_sum_is_of_what_is_trained_on():
    total = three_roles()
    assert total(IMAGES, CONDITIONS).tolist() == [2.0, 4.0, 6.0]
    assert total.roles() == {
        "style": {"weight": 2.0},
        "class": {"at_least": "base"},
        "bright": {"at_most": 0.5},
        "other": {"held_out": True},
    }
    assert {role for each in total.roles().values() for role in each} == set(ROLES)


def test_training_asks_all_but_the_held_out_rewards():
    assert set(three_roles().scores(IMAGES, CONDITIONS)) == {"style", "class", "other", "bright"}
    training = three_roles().without_held_out()
    assert set(training.scores(IMAGES, CONDITIONS)) == {"style", "class", "bright"}
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
        RewardSet({"a": answering(0), "b": answering(0)}, **roles)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"weights": {"a": NAN}}, "weight of 'a': got nan, expected a finite number"),
        ({"weights": {"a": -math.inf}}, "weight of 'a': got -inf, expected a finite number"),
        ({"weights": {"a": "x"}}, "weight of 'a': got 'x', expected a finite number"),
        ({"weights": {"a": "1"}}, "weight of 'a': got '1', expected a finite number"),
        ({"weights": {"a": None}}, "weight of 'a': got None, expected a finite number"),
        ({"weights": {"a": True}}, "weight of 'a': got True, expected a finite number"),
        ({"weights": {"a": torch.ones(2)}}, r"weight of 'a': got tensor\(\[1\., 1\.\]\), expected a finite"),
        ({"weights": {"a": 10**400}}, r"weight of 'a': got 10+\.\.\.0+, expected a finite number"),
        ({"weights": ["a"]}, "weights: got an object of type list, expected a dict by the rewards' names"),
        (
            {"constraints": {"b": 0.5}},
            r"constraint of 'b': got 0\.5, expected AtLeast\(0\.5\) or AtMost\(0\.5\)",
        ),
        ({"constraints": {"b": AtMost}}, "constraint of 'b': got the class AtMost, expected AtLeast"),
        (
            {"constraints": {"b": Constraint(0.5)}},
            "constraint of 'b': got an object of type Constraint, expected",
        ),
        ({"timeouts": {"a": -1}}, "timeout of 'a': got -1, expected seconds, a finite number above 0"),
        ({"timeouts": {"a": 0}}, "timeout of 'a': got 0, expected seconds"),
        ({"timeouts": {"a": NAN}}, "timeout of 'a': got nan, expected seconds"),
        ({"timeouts": {"a": math.inf}}, "timeout of 'a': got inf, .* 0 .leave it out for no limit"),
        ({"timeouts": {"a": None}}, "timeout of 'a': got None, expected seconds"),
    ],
)
def test_values_of_roles_that_cannot_be(given: dict, says: str):
    with pytest.raises(ConfigError, match=f"^{says}"):
        RewardSet({"a": answering(0), "b": answering(0)}, **given)


def test_numbers_of_numpy_and_torch_are_numbers():
    weights = {"a": np.float32(2.0), "b": torch.tensor(0.5)}
    total = RewardSet({"a": answering(0), "b": answering(0)}, weights, timeouts={"a": np.int64(3)})
    assert total.weights == {"a": 2.0, "b": 0.5} and total.timeouts == {"a": 3.0}
    assert {type(each) for each in (*total.weights.values(), *total.timeouts.values())} == {float}


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (lambda features: [[0.0]], "gave groups the scores list, expected (2, 3)"),
        (lambda features: features[:, 0], "gave groups the scores (2, 1), expected (2, 3)"),
        (lambda features: features[..., 0] / 0, "returned an infinite score"),
        (lambda features: {}["x"], "raised KeyError: 'x' ("),
    ],
)
def test_a_reward_of_groups_that_answers_wrongly_is_told_by_its_name(answer: Any, says: str):
    class Odd(GroupReward):
        def features(self, images: torch.Tensor, conditions: Any) -> torch.Tensor:
            return images.mean((1, 2, 3))[:, None]

        def scores_of_groups(self, features_NGE: torch.Tensor) -> torch.Tensor:
            return answer(features_NGE)

    rewards = RewardSet({"odd": Odd()})
    with pytest.raises(RewardError, match=re.escape(f"reward 'odd' {says}")):
        rewards.of_groups({"odd": torch.ones(6, 1)}, 3)


def test_a_part_of_a_step_may_be_without_any_score():
    """Only who sees all of a step or an evaluation can say that nothing was scored."""
    rewards = RewardSet({"a": answering([1.0, 2.0, 3.0]), "b": answering([NAN] * 3)})
    scores = rewards.scores(IMAGES, CONDITIONS)
    assert scores["b"].isnan().all() and rewards(IMAGES, CONDITIONS).isnan().all()
    with pytest.raises(RewardError, match="reward 'b' returned NaN for all 3 images"):
        require_scores(scores)
    require_scores({"a": scores["a"], "b": torch.tensor([[NAN, NAN], [NAN, 0.0]])})


def test_what_a_reward_asks_for_is_told_where_it_is_text():
    class Mine:
        positive = torch.rand(3)
        prompts = ("a star", "a moon")
        question = ""

        def prompt(self, label: str) -> str:
            return label

        def __call__(self, images: Tensor, conditions: list) -> Tensor:
            return images.mean((1, 2, 3))

    described = RewardSet.of(Mine()).describe()["Mine"]
    assert described["prompts"] == ("a star", "a moon")
    assert not {"positive", "prompt", "question"} & set(described)
