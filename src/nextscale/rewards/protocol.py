"""What a reward is, how one is asked for scores, and a weighted sum of several."""

import math
import os
import sysconfig
import traceback
from collections.abc import Awaitable, Collection, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from nextscale.base.conditions import Condition
from nextscale.base.errors import ConfigError, RewardError
from nextscale.rewards.asking.waiting import begin, is_async, wait_for
from nextscale.rewards.roles import Constraint

Scores = Tensor | np.ndarray | Sequence[float | None]
"""(B,) floats; NaN or None where an image is not scored."""

# The folders of code that the user did not write: this package, Python's library, installed packages.
LIBRARIES = (
    str(Path(__file__).parents[1]),
    *{sysconfig.get_path(each) for each in ("stdlib", "platstdlib", "purelib", "platlib")},
)


class Reward(Protocol):
    """Scores images: the higher, the better. It may be async."""

    def __call__(self, images: Tensor, conditions: Sequence[Condition]) -> Scores | Awaitable[Scores]:
        """One score for each image.

        Args:
            images: (B, 3, H, W) float32 in [0, 1].
            conditions: what each image was asked to show.

        Returns:
            (B,) floats; NaN or None where an image is not scored.
        """
        ...


@torch.no_grad()
def score(
    name: str,
    reward: Reward,
    images: Tensor,
    conditions: Sequence[Condition],
    timeout: float | None = None,
) -> Tensor:
    """Ask a reward for its scores and check them: (B,) float32 on the CPU.

    Args:
        timeout: seconds after which a reward that has not answered is given up.

    Raises:
        RewardError: the reward raised, hung, returned another number of scores, an infinite one, or NaN for
            all.
    """
    scores = _check(name, _ask(name, reward, images, conditions, timeout), images)
    require_scores({name: scores})
    return scores


def require_scores(components: Mapping[str, Tensor]) -> None:
    """Check that every reward scored some of the images.

    Raises:
        RewardError: names a reward whose scores (of any shape) are all NaN.
    """
    for name, scores in components.items():
        if scores.isnan().all():
            raise RewardError(
                f"reward '{name}' returned NaN for all {scores.numel()} images: there is nothing to learn"
            )


def where(error: BaseException) -> str:
    """The innermost line of the user's own code that an error passed through, as " (file.py:7)", or ""."""
    foreign = ("<", *(each + os.sep for each in LIBRARIES))
    lines = [
        f"{frame.filename}:{frame.lineno}"
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(foreign)
    ]
    return f" ({lines[-1]})" if lines else ""


def _ask(
    name: str,
    reward: Reward,
    images: Tensor,
    conditions: Sequence[Condition],
    timeout: float | None,
    begun: "Future[Any] | None" = None,
) -> Any:
    """What a reward answers, unchecked; `begun` is its answer to come, where it was asked before."""
    try:
        if begun is None and (timeout is not None or is_async(reward)):
            begun = begin(reward, images, conditions)
        return reward(images, conditions) if begun is None else wait_for(begun, timeout)
    except RewardError as error:
        raise RewardError(f"reward '{name}': {error}") from error
    except Exception as error:
        told = f"{type(error).__name__}: {error}".removesuffix(": ")
        raise RewardError(f"reward '{name}' raised {told}{where(error)}") from error


def _check(name: str, scores: Any, images: Tensor) -> Tensor:
    """An answer as (B,) float32 on the CPU."""
    try:
        if isinstance(scores, (list, tuple)):
            scores = [math.nan if each is None else each for each in scores]
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
    return scores


class WeightedSum:
    """Several named rewards and what each is for; itself a reward, the sum of those that are trained on.

    Args:
        rewards: name to reward.
        weights: name to weight; by default 1 for every reward that is neither constraint nor held out.
        constraints: name to `AtLeast(...)` or `AtMost(...)`: kept within a bound while the sum is raised.
        held_out: names of rewards that are measured in evaluations and never trained on.
        timeouts: name to seconds after which a reward that has not answered is given up; none by default.
            They count from when a reward is asked; an async reward's, from when the others have answered.

    Raises:
        ConfigError: nothing to train on, a name that is none of the rewards, or one with two roles.
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
        weights, constraints, self.timeouts = weights or {}, constraints or {}, dict(timeouts or {})
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
        for name in self.timeouts:
            if name not in rewards:
                raise ConfigError(f"timeout for '{name}', which is none of the rewards {', '.join(rewards)}")
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
        timeouts = {name: seconds for name, seconds in self.timeouts.items() if name in needed}
        return WeightedSum(needed, self.weights, self.constraints, timeouts=timeouts)

    @torch.no_grad()
    def components(self, images: Tensor, conditions: Sequence[Condition]) -> dict[str, Tensor]:
        """Each reward's own checked scores, (B,), unweighted; one may have scored none of the images.

        The async rewards wait together, while the others are asked one after the other.

        Raises:
            RewardError: a reward raised, hung, or returned something else than a number for each image.
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
                answer = _ask(name, reward, images, conditions, timeout, begun.get(name))
                scores[name] = _check(name, answer, images)
        finally:
            for future in begun.values():
                future.cancel()  # those still running, when one has failed
        return {name: scores[name] for name in self.rewards}

    def total(self, components: Mapping[str, Tensor]) -> Tensor:
        """(B,) weighted sum; NaN where any reward that is trained on did not score the image."""
        return torch.stack([weight * components[name] for name, weight in self.weights.items()]).sum(0)

    def __call__(self, images: Tensor, conditions: Sequence[Condition]) -> Tensor:
        return self.total(self.components(images, conditions))
