"""What a reward is, how one is asked for scores, and a weighted sum of several."""

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from nextscale.constraints import Constraint
from nextscale.errors import ConfigError, RewardError
from nextscale.records import Condition


class Reward(Protocol):
    """Scores images: the higher, the better."""

    def __call__(self, images: Tensor, conditions: Sequence[Condition]) -> Tensor:
        """One score for each image.

        Args:
            images: (B, 3, H, W) float32 in [0, 1].
            conditions: what each image was asked to show.

        Returns:
            (B,) floats; NaN where an image is not scored.
        """
        ...


@torch.no_grad()
def score(name: str, reward: Reward, images: Tensor, conditions: Sequence[Condition]) -> Tensor:
    """Ask a reward for its scores and check them: (B,) float32 on the CPU.

    Raises:
        RewardError: the reward raised, returned another number of scores, an infinite one, or NaN for all.
    """
    try:
        scores = reward(images, conditions)
    except Exception as error:
        raise RewardError(f"reward '{name}' raised {type(error).__name__}: {error}") from error
    try:
        scores = torch.as_tensor(scores, dtype=torch.float32).detach().cpu()
    except (TypeError, ValueError, RuntimeError):
        found = type(scores).__name__
        raise RewardError(f"reward '{name}' returned {found}, expected {len(images)} numbers") from None
    if scores.shape != (len(images),):
        found = tuple(scores.shape)
        raise RewardError(
            f"reward '{name}' returned shape {found}, expected ({len(images)},), one for each image"
        )
    if scores.isinf().any():
        raise RewardError(
            f"reward '{name}' returned an infinite score; return NaN for an image it cannot score"
        )
    if scores.isnan().all():
        raise RewardError(
            f"reward '{name}' returned NaN for all {len(images)} images: there is nothing to learn"
        )
    return scores


class WeightedSum:
    """Several named rewards and what each is for; itself a reward, the sum of those that are trained on.

    Args:
        rewards: name to reward.
        weights: name to weight; by default 1 for every reward that is neither constraint nor held out.
        constraints: name to `AtLeast(...)` or `AtMost(...)`: kept within a bound while the sum is raised.
        held_out: names of rewards that are measured in evaluations and never trained on.

    Raises:
        ConfigError: nothing to train on, a name that is none of the rewards, or one with two roles.
    """

    def __init__(
        self,
        rewards: Mapping[str, Reward],
        weights: Mapping[str, float] | None = None,
        constraints: Mapping[str, Constraint] | None = None,
        held_out: Collection[str] = (),
    ) -> None:
        weights, constraints = weights or {}, constraints or {}
        if not rewards:
            raise ConfigError("no rewards given: give at least one")
        roles: dict[str, str] = {}
        for role, names in (("weight", weights), ("constraint", constraints), ("held_out", held_out)):
            for name in names:
                if name not in rewards:
                    raise ConfigError(
                        f"{role} for '{name}', which is none of the rewards {', '.join(rewards)}"
                    )
                if name in roles:
                    raise ConfigError(
                        f"reward '{name}': '{roles[name]}' has no effect beside '{role}'; remove one of them"
                    )
                roles[name] = role
        self.rewards = dict(rewards)
        self.constraints, self.held_out = dict(constraints), tuple(held_out)
        trained = [name for name in rewards if roles.get(name, "weight") == "weight"]
        if not trained:
            raise ConfigError("every reward is a constraint or held out: give one to train on")
        self.weights = {name: float(weights.get(name, 1.0)) for name in trained}

    def roles(self) -> dict[str, dict[str, object]]:
        """What each reward is for, as a recipe says it: {"style": {"weight": 1.0}, ...}."""
        key = {1: "at_least", -1: "at_most"}
        return {
            **{name: {"weight": weight} for name, weight in self.weights.items()},
            **{name: {key[each.sign]: each.bound} for name, each in self.constraints.items()},
            **{name: {"held_out": True} for name in self.held_out},
        }

    def without_held_out(self) -> "WeightedSum":
        """The rewards that training needs: those trained on, and the constraints."""
        needed = {name: reward for name, reward in self.rewards.items() if name not in self.held_out}
        return WeightedSum(needed, self.weights, self.constraints)

    def components(self, images: Tensor, conditions: Sequence[Condition]) -> dict[str, Tensor]:
        """Each reward's own checked scores, (B,), unweighted."""
        return {name: score(name, reward, images, conditions) for name, reward in self.rewards.items()}

    def total(self, components: Mapping[str, Tensor]) -> Tensor:
        """(B,) weighted sum; NaN where any reward that is trained on did not score the image."""
        return torch.stack([weight * components[name] for name, weight in self.weights.items()]).sum(0)

    def __call__(self, images: Tensor, conditions: Sequence[Condition]) -> Tensor:
        return self.total(self.components(images, conditions))
