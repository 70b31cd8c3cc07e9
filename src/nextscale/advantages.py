"""From rewards to advantages: how much better an image scored than its group.

Shapes: N groups · G images of one group · K rewards
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from nextscale.base.statistics import centred, deviation
from nextscale.grpo import Aggregation, ScaleRewards


def group_advantages(
    rewards_NG: Tensor, scale_rewards: ScaleRewards = "group", epsilon: float = 1e-4
) -> Tensor:
    """(N, G) advantages: reward minus the group's mean, divided by a standard deviation.

    Multiplying all rewards by a positive number changes nothing, except with "none". An image with reward NaN
    (not scored) gets advantage 0 and is left out of the mean and deviation. So is every image of a group with
    fewer than two scores.

    Args:
        rewards_NG: one reward per image of a whole step.
        scale_rewards: divide by the group's standard deviation, by the batch's, or not at all (Dr. GRPO).
        epsilon: added to the standard deviation, in units of the root mean square of the groups'
        deviations, so
            that a group that varies far less than the others counts less.

    Source: GRPO (arXiv 2402.03300), equation 3; Dr. GRPO (arXiv 2503.20783) for "none".
    """
    is_lone_NG = (~rewards_NG.isnan()).sum(1, keepdim=True) < 2
    rewards_NG = rewards_NG.masked_fill(is_lone_NG, float("nan"))
    centred_NG = centred(rewards_NG)
    if scale_rewards == "none":
        return centred_NG
    deviation_N1 = deviation(rewards_NG)
    # A spread of a few roundings is none: divided by it, they would be noise of full size.
    rounding = 8 * torch.finfo(rewards_NG.dtype).eps * rewards_NG.nan_to_num().abs().max()
    deviation_N1 = deviation_N1.masked_fill(deviation_N1 <= rounding, 0.0)
    spreads = deviation_N1[~is_lone_NG]
    spread = spreads.square().mean().sqrt() if len(spreads) else 0.0
    batch_1 = deviation(rewards_NG.flatten())
    batch_1 = batch_1.masked_fill(batch_1 <= rounding, 0.0)
    divisor = (deviation_N1 if scale_rewards == "group" else batch_1) + epsilon * spread
    # All rewards equal, or none: 0. What overflows stays NaN: the trainer stops and says which it was.
    return torch.where(divisor == 0, 0.0, centred_NG / divisor)


def combined_advantages(
    rewards_KNG: Tensor,
    weights_K: Tensor,
    scale_rewards: ScaleRewards = "group",
    aggregation: Aggregation = "sum_then_normalize",
    epsilon: float = 1e-4,
) -> Tensor:
    """(N, G) advantages of several weighted rewards.

    `sum_then_normalize` first adds up the weighted rewards, so a reward's influence depends on its spread;
    `normalize_then_sum` first normalises each within its groups, so that only its weight matters.

    Args:
        rewards_KNG: those of a whole step.
        epsilon: see `group_advantages`.
    """
    weights_K11 = weights_K.to(rewards_KNG)[:, None, None]
    if aggregation == "sum_then_normalize":
        return group_advantages((weights_K11 * rewards_KNG).sum(0), scale_rewards, epsilon)
    each_KNG = torch.stack([group_advantages(each_NG, scale_rewards, epsilon) for each_NG in rewards_KNG])
    return (weights_K11 * each_KNG).sum(0)


def add_constraints(
    advantages_NG: Tensor,
    rewards: Mapping[str, Tensor],
    coefficients: Mapping[str, float],
    epsilon: float = 1e-4,
) -> Tensor:
    """(N, G) advantages of the Lagrangian: those of the objectives plus those of the constrained rewards.

    A constrained reward is always divided by its group's standard deviation, so that its multiplier does not
    depend on its units.

    Args:
        advantages_NG: of the objectives.
        rewards: name to scores (N, G); includes all constrained rewards.
        coefficients: name of a constrained reward to its multiplier, negative for an upper bound.
        epsilon: see `group_advantages`.
    """
    for name, coefficient in coefficients.items():
        advantages_NG = advantages_NG + coefficient * group_advantages(rewards[name], epsilon=epsilon)
    return advantages_NG
