"""The objective: the clipped surrogate over all tokens of all scales, minus KL to the reference.

Shapes: B images · S scales · L tokens of all scales

Every mean says its denominator: tokens are weighted within an image by `token_weights` (they sum to 1),
images count alike.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nextscale.base.errors import ConfigError

ScaleWeighting = Literal["token", "scale"]


def token_weights(lengths: tuple[int, ...], weighting: ScaleWeighting | tuple[float, ...]) -> Tensor:
    """(L,) float32 weight of each token in the mean over an image; they sum to 1.

    Args:
        lengths: tokens of each scale.
        weighting: "token" counts all tokens alike, so that the finest scale has most of the weight; "scale"
            gives every scale the same total; or the total weight of each scale, up to a factor.

    Raises:
        ConfigError: weights that are not one non-negative number a scale, with a positive sum.
    """
    if weighting == "token":
        totals = [float(length) for length in lengths]
    elif weighting == "scale":
        totals = [1.0] * len(lengths)
    else:
        totals = [float(total) for total in weighting]
    if len(totals) != len(lengths) or min(totals) < 0 or sum(totals) <= 0:
        raise ConfigError(
            f"scale_weighting needs {len(lengths)} non-negative weights, one a scale, got {weighting}"
        )
    each = [total / sum(totals) / length for total, length in zip(totals, lengths, strict=True)]
    return torch.cat([torch.full((length,), weight) for length, weight in zip(lengths, each, strict=True)])


@dataclass(frozen=True)
class Surrogate:
    """The clipped surrogate, and what was clipped.

    Attributes:
        objective_BL: to be maximised.
        ratio_BL: importance ratios, detached.
        is_low_clipped_BL: negative advantage and ratio below 1 - epsilon: no gradient.
        is_high_clipped_BL: positive advantage and ratio above 1 + epsilon_high: no gradient.
    """

    objective_BL: Tensor
    ratio_BL: Tensor
    is_low_clipped_BL: Tensor
    is_high_clipped_BL: Tensor


def clipped_surrogate(
    log_probs_BL: Tensor,
    old_log_probs_BL: Tensor,
    advantages_B: Tensor,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
) -> Surrogate:
    """min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A) for every token.

    Args:
        log_probs_BL: under the present policy, with gradient.
        old_log_probs_BL: recorded while sampling.
        advantages_B: one for each image, the same for all of its tokens.

    Source: PPO (arXiv 1707.06347), equation 7; DAPO (arXiv 2503.14476) for the upper bound of its own.
    """
    high = epsilon if epsilon_high is None else epsilon_high
    ratio_BL = (log_probs_BL - old_log_probs_BL).exp()
    advantages_B1 = advantages_B[:, None]
    clipped_BL = ratio_BL.clamp(1 - epsilon, 1 + high)
    with torch.no_grad():
        is_low = (ratio_BL < 1 - epsilon) & (advantages_B1 < 0)
        is_high = (ratio_BL > 1 + high) & (advantages_B1 > 0)
    objective_BL = torch.minimum(ratio_BL * advantages_B1, clipped_BL * advantages_B1)
    return Surrogate(objective_BL, ratio_BL.detach(), is_low, is_high)


def weighted_mean(values_BL: Tensor, weights_L: Tensor) -> Tensor:
    """Mean over images of the weighted mean over tokens."""
    return (values_BL * weights_L).sum(1).mean()


def grpo_loss(
    surrogate_BL: Tensor,
    kl_BL: Tensor | None,
    entropy_BL: Tensor | None,
    weights_L: Tensor,
    beta: float,
    entropy_coef: float | Tensor,
) -> Tensor:
    """-(surrogate - beta KL + entropy_coef entropy), each a weighted mean over tokens and a mean over images.

    Args:
        entropy_coef: a number, or one for each token, (L,).

    Source: GRPO (arXiv 2402.03300), equation 3, with the KL as an exact sum over the codebook.
    """
    objective_BL = surrogate_BL
    if kl_BL is not None and beta:
        objective_BL = objective_BL - beta * kl_BL
    if entropy_BL is not None and (isinstance(entropy_coef, Tensor) or entropy_coef):
        objective_BL = objective_BL + entropy_coef * entropy_BL
    return -weighted_mean(objective_BL, weights_L)
