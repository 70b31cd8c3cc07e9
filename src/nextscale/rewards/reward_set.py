"""Several rewards, each in its role: trained on, kept within a bound, or only measured."""

from collections.abc import Collection, Mapping, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from nextscale.base.checks import check_kind, check_number, found
from nextscale.base.conditions import Condition
from nextscale.base.errors import ConfigError
from nextscale.rewards.asking.answers import ask, ask_conditions, check_answer
from nextscale.rewards.asking.waiting import begin, is_async, settings_kept
from nextscale.rewards.groups import GroupReward, ask_groups, check_features
from nextscale.rewards.protocol import ChecksConditions, Reward
from nextscale.rewards.roles import AtLeast, AtMost, Constraint

TOTAL = "reward"
"""What all rewards make together is called so, in metrics and tables."""
PROMPTS = ("prompt", "prompts", "positive", "negative", "question")
"""Attributes that hold what a reward asks for."""


class RewardSet:
    """Named rewards and the role of each; itself a reward, the weighted sum of those that are trained on.

    Args:
        rewards: name to reward.
        weights: name to weight; 1 by default for every reward that is neither a constraint nor held out.
        constraints: name to `AtLeast(...)` or `AtMost(...)`: kept within a bound while the sum is raised.
        held_out: names of rewards that are only measured in evaluations, never trained on.
        timeouts: name to the seconds after which a reward that has not answered is given up; no limit by
            default. The time of an async reward counts from when all others have answered, that of any other
            from when it is asked.

    Raises:
        ConfigError: `rewards` is not a mapping of callables, there is no reward to train on, a role names no
            reward, a reward has two roles, or a weight, constraint or timeout is none.
    """

    def __init__(
        self,
        rewards: Mapping[str, Reward],
        weights: Mapping[str, float] | None = None,
        constraints: Mapping[str, Constraint] | None = None,
        held_out: Collection[str] = (),
        *,
        timeouts: Mapping[str, float] | None = None,
    ) -> None:
        weights, constraints, timeouts = weights or {}, constraints or {}, timeouts or {}
        if not isinstance(rewards, Mapping):
            raise ConfigError(
                f"rewards: got {found(rewards)}, expected a function, an object such as "
                "nextscale.rewards.Aesthetic(), or a dict of them by name"
            )
        if not rewards:
            raise ConfigError("no rewards given: give at least one")
        if TOTAL in rewards and len(rewards) > 1:
            raise ConfigError(f"a reward is called '{TOTAL}', as what all make together is: rename it")
        for name, reward in rewards.items():
            if isinstance(reward, type) or not callable(reward):
                raise ConfigError(
                    f"reward '{name}': got {found(reward)}, expected a function or an object such as "
                    "nextscale.rewards.Aesthetic()"
                )
        named = {"weight": weights, "constraint": constraints, "held_out": held_out, "timeout": timeouts}
        roles: dict[str, str] = {}
        for key, names in named.items():
            if key != "held_out":
                check_kind(f"{key}s", names, Mapping, "a dict by the rewards' names")
            for name in names:
                if name not in rewards:
                    raise ConfigError(
                        f"{key} for '{name}', which is none of the rewards {', '.join(rewards)}"
                    )
                if key != "timeout" and roles.setdefault(name, key) != key:
                    raise ConfigError(
                        f"reward '{name}': '{roles[name]}' has no effect beside '{key}'; remove one of them"
                    )
        for name, bound in constraints.items():
            # The base class alone has no side on which its bound holds.
            check_kind(f"constraint of '{name}'", bound, (AtLeast, AtMost), "AtLeast(0.5) or AtMost(0.5)")
        seconds = "seconds, a finite number above 0 (leave it out for no limit)"
        self.rewards = dict(rewards)
        self.timeouts = {
            name: check_number(f"timeout of '{name}'", each, seconds, above=0)
            for name, each in timeouts.items()
        }
        self.constraints, self.held_out = dict(constraints), tuple(held_out)
        trained = [name for name in rewards if roles.get(name, "weight") == "weight"]
        if not trained:
            raise ConfigError("every reward is a constraint or held out: give one to train on")
        self.weights = {name: check_number(f"weight of '{name}'", weights.get(name, 1.0)) for name in trained}

    @classmethod
    def of(cls, rewards: Reward | Mapping[str, Reward]) -> "RewardSet":
        """What a user gives as rewards, as a set: one reward, several by name, or a set already.

        Raises:
            ConfigError: it is none of these.
        """
        if isinstance(rewards, RewardSet):
            return rewards
        if callable(rewards) and not isinstance(rewards, Mapping):
            rewards = {getattr(rewards, "__name__", type(rewards).__name__): rewards}
        return cls(rewards)

    def roles(self) -> dict[str, dict[str, object]]:
        """The role of each reward, as a recipe writes it: {"style": {"weight": 1.0}, ...}."""
        return {
            **{name: {"weight": weight} for name, weight in self.weights.items()},
            **{name: {each.role: each.bound} for name, each in self.constraints.items()},
            **{name: {"held_out": True} for name in self.held_out},
        }

    def describe(self) -> dict[str, dict[str, object]]:
        """What is known of each reward: its class or function, its prompts, and its role."""
        return {
            name: {"kind": getattr(reward, "__qualname__", type(reward).__name__)}
            | {key: value for key in PROMPTS if _is_text(value := getattr(reward, key, None))}
            | self.roles()[name]
            for name, reward in self.rewards.items()
        }

    def without_held_out(self) -> "RewardSet":
        """The rewards that training needs: those trained on, and the constraints."""
        needed = {name: reward for name, reward in self.rewards.items() if name not in self.held_out}
        timeouts = {name: seconds for name, seconds in self.timeouts.items() if name in needed}
        return RewardSet(needed, self.weights, self.constraints, timeouts=timeouts)

    def check_conditions(self, conditions: Sequence[Condition]) -> None:
        """Check that every reward can score images of these conditions, as far as it can tell.

        Raises:
            RewardError: names a reward, and what it says.
        """
        for name, reward in self.rewards.items():
            if isinstance(reward, ChecksConditions):
                ask_conditions(name, reward.check_conditions, conditions)

    @settings_kept()
    @torch.no_grad()
    def scores(self, images: Tensor, conditions: Sequence[Condition]) -> dict[str, Tensor]:
        """Each reward's own scores, (B,) float32 on the CPU, unweighted; of a `GroupReward` its features,
        (B, E), of which `of_groups` makes scores when groups are whole.

        The async rewards wait together, while the others are asked one after the other. That a reward scored
        none of the images is no error here: they may be a part of a step (see `require_scores`).

        Args:
            images: (B, 3, H, W) float32 in [0, 1].

        Raises:
            RewardError: a reward raised, timed out, or returned anything but one number for each image.
        """
        begun = {
            name: begin(reward, images, conditions)
            for name, reward in self.rewards.items()
            if is_async(reward)
        }
        scores: dict[str, Tensor] = {}
        try:
            for name in sorted(self.rewards, key=lambda name: name in begun):  # async ones last
                reward, timeout = self.rewards[name], self.timeouts.get(name)
                if isinstance(reward, GroupReward):
                    answer = ask(name, reward.features, images, conditions, timeout)
                    scores[name] = check_features(name, answer, len(images))
                else:
                    answer = ask(name, reward, images, conditions, timeout, begun.get(name))
                    scores[name] = check_answer(name, answer, images)
        finally:
            for future in begun.values():
                future.cancel()  # those still running, when one has failed
        return {name: scores[name] for name in self.rewards}

    def of_groups(
        self, scores: Mapping[str, Tensor], group_size: int, num_compared: int | None = None
    ) -> dict[str, Tensor]:
        """Each reward's scores by groups, (N, G).

        Args:
            scores: of whole groups one after the other, as `scores` gives them.
            group_size: G.
            num_compared: images that a `GroupReward` compares, by default G. A larger group is cut into parts
                of so many, and what is left over is not scored: the scores are then those of smaller groups.

        Raises:
            RewardError: a `GroupReward` did not give one finite number or NaN for each image.
        """
        by_group = {name: each.unflatten(0, (-1, group_size)) for name, each in scores.items()}
        for name, reward in self.rewards.items():
            if isinstance(reward, GroupReward):
                features_NGE, size = by_group[name], min(num_compared or group_size, group_size)
                num_scored = group_size // size * size
                parts = rearrange(features_NGE[:, :num_scored], "N (n G) E -> (N n) G E", G=size)
                answer = ask_groups(name, reward, parts).flatten()
                checked = check_answer(name, answer, parts.flatten(0, 1)).unflatten(0, (-1, num_scored))
                by_group[name] = F.pad(checked, (0, group_size - num_scored), value=torch.nan)
        return by_group

    def total(self, scores: Mapping[str, Tensor]) -> Tensor:
        """(B,) weighted sum; NaN where any reward that is trained on did not score the image."""
        return torch.stack([weight * scores[name] for name, weight in self.weights.items()]).sum(0)

    def __call__(self, images: Tensor, conditions: Sequence[Condition]) -> Tensor:
        scores = self.scores(images, conditions)
        for name, reward in self.rewards.items():
            if isinstance(reward, GroupReward):
                scores[name] = reward.scores_by_condition(scores[name], conditions)
        return self.total(scores)


def _is_text(value: object) -> bool:
    parts = value if isinstance(value, list | tuple) else [value]
    return bool(parts) and all(isinstance(each, str) and each for each in parts)
