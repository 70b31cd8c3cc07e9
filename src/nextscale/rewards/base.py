"""What a reward is, how one is asked for scores, and a weighted sum of several."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

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
    """Several named rewards and their weights; itself a reward.

    Args:
        rewards: name to reward.
        weights: name to weight; 1 for every reward by default.

    Raises:
        ConfigError: no rewards, or a weight for a reward that is not there.
    """

    def __init__(self, rewards: Mapping[str, Reward], weights: Mapping[str, float] | None = None) -> None:
        weights = weights or {}
        if not rewards:
            raise ConfigError("no rewards given: give at least one")
        for name in weights:
            if name not in rewards:
                raise ConfigError(f"weight for '{name}', which is none of the rewards {', '.join(rewards)}")
        self.rewards = dict(rewards)
        self.weights = {name: float(weights.get(name, 1.0)) for name in self.rewards}

    def components(self, images: Tensor, conditions: Sequence[Condition]) -> dict[str, Tensor]:
        """Each reward's own checked scores, (B,), unweighted."""
        return {name: score(name, reward, images, conditions) for name, reward in self.rewards.items()}

    def total(self, components: Mapping[str, Tensor]) -> Tensor:
        """(B,) weighted sum; NaN where any reward did not score the image."""
        return torch.stack([self.weights[name] * scores for name, scores in components.items()]).sum(0)

    def __call__(self, images: Tensor, conditions: Sequence[Condition]) -> Tensor:
        return self.total(self.components(images, conditions))
