"""What a reward is: a callable, and the record that describes one in a recipe."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Protocol, Self, runtime_checkable

import numpy as np
import torch
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor

from nextscale.base.conditions import Condition
from nextscale.base.errors import RewardError
from nextscale.base.records import FREE_ON_RESUME, Record, did_you_mean
from nextscale.base.roles import ROLES
from nextscale.rewards.asking.answers import ask, check_answer
from nextscale.rewards.roles import AtLeast, AtMost, BoundValue, Constraint, check_bound

Scores = Tensor | np.ndarray | Sequence[float | None]
"""(B,) floats; NaN or None where an image is not scored."""


class Reward(Protocol):
    """Scores images: the higher, the better. It may be async.

    An object that says `has_gradient = False` has scores that do not depend on the images in a way that torch
    could differentiate. Of others it is found out where the gradient is needed.
    """

    def __call__(self, images: Tensor, conditions: Sequence[Condition]) -> Scores | Awaitable[Scores]:
        """One score for each image.

        Args:
            images: (B, 3, H, W) float32 in [0, 1]; a copy of this reward's own, as is the list of conditions.
            conditions: what each image was asked to show.

        Returns:
            (B,) floats; NaN or None where an image is not scored.
        """
        ...


@runtime_checkable
class ChecksConditions(Protocol):
    """A reward that cannot score images of every condition. It is asked before anything is drawn, since the
    one that it cannot score may come after hours."""

    def check_conditions(self, conditions: Sequence[Condition]) -> None:
        """Check that it can score images of these conditions.

        Raises:
            NextscaleError: or any other; its text names one that it cannot.
        """
        ...


def _check_bound(value: Any) -> Any:
    if value is not None:
        check_bound(value)
    return value


# Checked before pydantic's own sentences about each member of the union.
Bound = Annotated[BoundValue | None, BeforeValidator(_check_bound)]


class RewardConfig(Record):
    """What every reward of a recipe has: exactly one role, by default the weight 1, and a timeout.

    Each kind of reward has a record of its own that adds `kind: Literal[...]`, the options of that kind,
    `main_option`, `make` and, where it runs a network, `backbone`.
    """

    main_option: ClassVar[str]
    """The option that a recipe's short form `{clip_score: VALUE}` sets."""
    reward: ClassVar[Callable[..., Reward]]
    """What is made with these options, unless `make` does otherwise."""

    weight: float | None = None
    """Weight in the sum of rewards that is trained on; 1 for a reward without another role."""
    at_least: Bound = None
    """Constraint: keep the mean at or above this number; "base" is the mean before training."""
    at_most: Bound = None
    """Constraint: keep the mean at or below this number; "base" is the mean before training."""
    held_out: bool = Field(default=False, strict=True)
    """Only measured in evaluations, never trained on; warns if it falls while the trained reward rises."""
    timeout: float | None = Field(default=None, gt=0, json_schema_extra=FREE_ON_RESUME)
    """Seconds after which the run stops if the reward has not answered; no limit by default."""

    def make(self) -> Reward:
        """The reward, with its networks loaded.

        Raises:
            NextscaleError: an option cannot be used, or weights cannot be loaded.
        """
        return self.reward(**self.options())

    @property
    def backbone(self) -> str | None:
        """The network that the reward runs: "toy", a folder or a hub repository; None if it has no name."""
        return None

    @property
    def networks(self) -> tuple[str | None, ...]:
        """All networks that it runs, named as `backbone` is, which is the first; None for one that is not
        known."""
        return (self.backbone,) if self.backbone else ()

    @property
    def constraint(self) -> Constraint | None:
        """The bound on its mean, for a constraint."""
        if self.at_least is not None:
            return AtLeast(self.at_least)
        return None if self.at_most is None else AtMost(self.at_most)

    @classmethod
    def own_options(cls) -> list[str]:
        """Names of the options of this kind, which are the arguments that the reward is made with."""
        return [name for name in cls.model_fields if name not in {"kind", *RewardConfig.model_fields}]

    def options(self) -> dict[str, Any]:
        """The options of this kind, by name."""
        return {name: getattr(self, name) for name in self.own_options()}

    @model_validator(mode="before")
    @classmethod
    def _is_weighed_unless_it_has_another_role(cls, values: Any) -> Any:
        return values if not isinstance(values, Mapping) or _roles(values) else {**values, "weight": 1.0}

    @model_validator(mode="before")
    @classmethod
    def _has_no_other_options(cls, values: Any) -> Any:
        for name in values if isinstance(values, Mapping) else ():
            if name not in cls.model_fields:
                kind = cls.model_fields["kind"].default
                hint = did_you_mean(str(name), cls.model_fields, "remove it")
                raise ValueError(f"'{name}' has no effect on a reward of kind '{kind}'{hint}")
        return values

    @model_validator(mode="after")
    def _has_one_role(self) -> Self:
        roles = _roles(dict(self))
        if len(roles) > 1:
            raise ValueError(
                f"'{roles[0]}' has no effect beside '{roles[1]}': a reward has one role; remove one of them"
            )
        return self


def _roles(reward: Mapping[str, Any]) -> list[str]:
    return [role for role in ROLES if reward.get(role) is not None and reward[role] is not False]


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
        RewardError: the reward raised, timed out, or returned anything but one finite number or NaN for each
            image, or NaN for all.
    """
    scores = check_answer(name, ask(name, reward, images, conditions, timeout), images)
    require_scores({name: scores})
    return scores


def require_scores(scores: Mapping[str, Tensor]) -> None:
    """Check that every reward scored at least one image.

    Args:
        scores: name of a reward to its scores, of any shape.

    Raises:
        RewardError: names a reward whose scores are all NaN.
    """
    for name, each in scores.items():
        if each.isnan().all():
            raise RewardError(
                f"reward '{name}' returned NaN for all {each.numel()} images: there is nothing to learn"
            )
