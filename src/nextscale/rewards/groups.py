"""Rewards that compare the images of a group with one another.

Shapes: B images · N groups · G images of one group · E width of a feature
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from nextscale.base.conditions import Condition
from nextscale.base.errors import RewardError
from nextscale.rewards.asking.answers import ask


class GroupReward(ABC):
    """Scores an image by how it stands to the other images of its group.

    A group may be drawn in several batches, by several processes. So the reward first gives features of each
    batch, and scores whole groups once all of their features are together.
    """

    @abstractmethod
    def features(self, images: Tensor, conditions: Sequence[Condition]) -> Tensor:
        """(B, E) float32: all that scores depend on.

        Args:
            images, conditions: as a reward gets them.
        """

    @abstractmethod
    def scores_of_groups(self, features_NGE: Tensor) -> Tensor:
        """(N, G) one score for each image."""

    def __call__(self, images: Tensor, conditions: Sequence[Condition]) -> Tensor:
        """(B,) scores of these images alone, where those of one condition are a group."""
        return self.scores_by_condition(self.features(images, conditions), conditions)

    def scores_by_condition(self, features_BE: Tensor, conditions: Sequence[Condition]) -> Tensor:
        """(B,) scores where images of one condition are a group; NaN for an image that is alone."""
        scores_B = torch.full((len(conditions),), torch.nan)
        for key in dict.fromkeys(condition.key for condition in conditions):
            group = [i for i, condition in enumerate(conditions) if condition.key == key]
            if len(group) > 1:
                scores_B[group] = self.scores_of_groups(features_BE[None, group])[0].cpu().float()
        return scores_B


def ask_groups(name: str, reward: GroupReward, features_NGE: Tensor) -> Tensor:
    """(N, G) the scores of whole groups, as the reward gives them.

    Raises:
        RewardError: the reward raised, or gave anything but one number for each image.
    """
    answer = ask(name, lambda features_NGE, _: reward.scores_of_groups(features_NGE), features_NGE, (), None)
    if not isinstance(answer, Tensor) or answer.shape != features_NGE.shape[:2]:
        found = tuple(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
        raise RewardError(
            f"reward '{name}' gave groups the scores {found}, expected {tuple(features_NGE.shape[:2])}"
        )
    return answer


def check_features(name: str, features: object, num_images: int) -> Tensor:
    """Features as (B, E) float32 on the CPU.

    Raises:
        RewardError: they are not one row of finite numbers for each image.
    """
    if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != num_images:
        found = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise RewardError(f"reward '{name}' gave features {found}, expected ({num_images}, width)")
    if not features.isfinite().all():
        raise RewardError(f"reward '{name}' gave features that are infinite or NaN")
    return features.detach().float().cpu()
