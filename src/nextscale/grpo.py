"""The options of GRPO."""

from pydantic import Field

from nextscale.advantages import Aggregation, ScaleRewards
from nextscale.base.records import Record
from nextscale.losses import ScaleWeighting


class GRPOConfig(Record):
    """The algorithm. Names are TRL's wherever the same thing exists there."""

    num_generations: int = Field(default=8, ge=2)
    """G, images of one group."""
    num_groups: int = Field(default=8, ge=1)
    """Groups of a step, over all processes."""
    class_labels: tuple[int, ...] | None = Field(default=None, min_length=1)
    """Classes to train on; all of the model's by default."""
    num_iterations: int = Field(default=1, ge=1)
    """Updates on one batch of rollouts."""
    beta: float = Field(default=0.02, ge=0)
    """Weight of the exact KL to the frozen reference, in nats."""
    measure_kl: bool = True
    """Keep the reference for the log where beta is 0; costs a forward pass a step."""
    epsilon: float = Field(default=0.2, gt=0, lt=1)
    """The ratio is clipped below 1 - epsilon."""
    epsilon_high: float | None = Field(default=None, gt=0)
    """The ratio is clipped above 1 + epsilon_high; by default epsilon."""
    entropy_coef: float = Field(default=0.0, ge=0)
    """Weight of an entropy bonus, in nats."""
    entropy_floor: float | None = Field(default=None, gt=0, le=1)
    """Share of its first entropy that every scale keeps, by a bonus of its own that grows below it."""
    entropy_floor_rate: float = Field(default=0.1, gt=0)
    """Growth of that bonus a step, times the share that is missing."""
    constraint_rate: float = Field(default=0.5, gt=0)
    """Growth of a constraint's multiplier a step, for each deviation (one at most) beyond its bound."""
    constraint_start: float = Field(default=0.0, ge=0)
    """The constraints' multipliers before the first step."""
    scale_rewards: ScaleRewards = "group"
    """What rewards are divided by: their group's deviation, the batch's, or nothing."""
    multi_objective_aggregation: Aggregation = "sum_then_normalize"
    """Several rewards: weighted sum first, or each normalised in its group first."""
    scale_weighting: ScaleWeighting | tuple[float, ...] = "scale"
    """Weight in the loss: "token" all tokens alike, "scale" all scales alike, or one weight a scale."""
