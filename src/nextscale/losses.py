"""The losses: a surrogate of the reward, less KL, plus entropy.

A loss is a pure function of a microbatch's quantities, and a line in `LOSSES`.

Shapes: B images of one microbatch · S scales · L tokens of all scales · V codebook size · D codebook width

Every mean says its denominator: tokens are weighted within an image by `token_weights` (they sum to 1),
images count alike.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nextscale.base.errors import ConfigError
from nextscale.base.records import did_you_mean
from nextscale.grpo import GRPOConfig, RatioLevel, ScaleWeighting


@dataclass(frozen=True)
class Quantities:
    """What a loss may use of a microbatch.

    Attributes:
        log_probs_BL: of the tokens under the present policy, with gradient.
        old_log_probs_BL: of the tokens under the policy before its first update on them.
        importance_BL: weights of the surrogate, (B, L) or (B, 1), for tokens that the sampler drew with
            another probability than that; None where they are not asked for.
        advantages_BL: (B, L), or (B, 1) where all tokens of an image have the same.
        kl_BL: KL to the reference in nats, as `kl_estimator` has it, with gradient where beta is positive;
            None without a reference.
        entropy_BL: exact entropy in nats, with gradient where the loss has a use for it.
        weights_L: weight of each token in the mean of the surrogate over an image; they sum to 1.
        kl_weights_L: the same for the KL.
        entropy_weights_L: the same for the entropy.
        beta: coefficient of the KL.
        entropy_coef: coefficient of the entropy, one for all tokens or (L,).
        lengths: tokens of each trained scale.
    """

    log_probs_BL: Tensor
    old_log_probs_BL: Tensor
    advantages_BL: Tensor
    kl_BL: Tensor | None
    entropy_BL: Tensor
    weights_L: Tensor
    kl_weights_L: Tensor
    entropy_weights_L: Tensor
    beta: float
    entropy_coef: float | Tensor
    lengths: tuple[int, ...]
    importance_BL: Tensor | None = None


@dataclass(frozen=True)
class LossOutput:
    """A loss and what was measured on the way.

    Attributes:
        loss: a mean over the images of the microbatch, to be minimised.
        metrics: name to detached values of any shape, averaged over a step; where a name ends in "/max" the
            largest counts, where it ends in "/min" the smallest.
        kept: fields of the microbatch that further iterations on it take from this one.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    kept: dict[str, Tensor] = field(default_factory=dict)


Loss = Callable[[Quantities, GRPOConfig], LossOutput]


def grpo_loss(q: Quantities, config: GRPOConfig) -> LossOutput:
    """The clipped surrogate of GRPO, less KL, plus entropy.

    GRPO, DAPO, BNPO and Dr. GRPO differ in what they divide the sum over tokens by: the length of each
    answer, the tokens of the batch, or a constant. All images have L tokens, so with `scale_weighting` token
    all four are this loss. (Dr. GRPO also leaves out the division by the group's deviation, which is
    `scale_rewards` none.)

    Source: GRPO (arXiv 2402.03300), equation 3, with the KL as an exact sum over the codebook; PPO (arXiv
    1707.06347), equation 7; DAPO (arXiv 2503.14476) for the upper bound of its own; GSPO (arXiv 2507.18071)
    for ratios of more than one token.
    """
    surrogate = clipped_surrogate(
        ratios_of(q, config), q.advantages_BL, config.epsilon, config.epsilon_high, config.delta
    )
    is_low_BL, is_high_BL = surrogate.is_low_clipped_BL, surrogate.is_high_clipped_BL
    metrics = {
        "clip_ratio/low_mean": is_low_BL.float(),
        "clip_ratio/high_mean": is_high_BL.float(),
        "clip_ratio/region_mean": (is_low_BL | is_high_BL).float(),
    }
    return LossOutput(regularised(surrogate.objective_BL, q), metrics)


def cispo_loss(q: Quantities, config: GRPOConfig) -> LossOutput:
    """REINFORCE with importance weights that are cut off at `epsilon_high` (by default 5) and carry no
    gradient: no token drops out of it, as those that PPO clips do.

    Source: MiniMax-M1 (arXiv 2506.13585), equations 4 and 5; ScaleRL (arXiv 2510.13786) for the bound.
    """
    bound = CISPO_BOUND if config.epsilon_high is None else config.epsilon_high
    ratio_BL = ratios_of(q, config).detach()
    is_cut_BL = (ratio_BL > bound) & (q.advantages_BL > 0)
    objective_BL = ratio_BL.clamp_max(bound) * q.advantages_BL * q.log_probs_BL
    return LossOutput(regularised(objective_BL, q), {"cispo_clip_ratio": is_cut_BL.float()})


def reinforce_loss(q: Quantities, config: GRPOConfig) -> LossOutput:
    """Advantage times log-probability. It takes the images to be the present policy's: one update each.

    Source: Williams 1992, "Simple statistical gradient-following algorithms for connectionist reinforcement
    learning".
    """
    return LossOutput(regularised(q.advantages_BL * q.log_probs_BL, q), {})


CISPO_BOUND = 5.0

LOSSES: dict[str, Loss] = {
    "grpo": grpo_loss,
    **dict.fromkeys(("dapo", "bnpo", "dr_grpo"), grpo_loss),  # at fixed length the same
    "cispo": cispo_loss,
    "reinforce": reinforce_loss,
}
"""Name, as `GRPOConfig.loss_type` has it, to loss."""


def find_loss(name: str) -> Loss:
    """The loss of this name.

    Raises:
        ConfigError: there is none; names the nearest.
    """
    if name not in LOSSES:
        raise ConfigError(f"unknown grpo.loss_type '{name}'{did_you_mean(name, LOSSES)}")
    return LOSSES[name]


# ---- the parts of a loss


def trained_lengths(lengths: tuple[int, ...], config: GRPOConfig) -> tuple[int, ...]:
    """Tokens of each scale that is trained.

    Args:
        lengths: of all scales.

    Raises:
        ConfigError: there are fewer.
    """
    if config.train_scales is not None and config.train_scales > len(lengths):
        raise ConfigError(
            f"grpo.train_scales {config.train_scales} is out of range: this model has {len(lengths)} scales"
        )
    return lengths[: config.train_scales]


def loss_weights(lengths: tuple[int, ...], config: GRPOConfig) -> tuple[Tensor, Tensor, Tensor]:
    """`token_weights` of the surrogate, of the KL and of the entropy, over the tokens that are trained; one
    tensor where the options are equal.

    Args:
        lengths: tokens of each scale of the model.

    Raises:
        ConfigError: as `trained_lengths` and `token_weights` do.
    """
    lengths = trained_lengths(lengths, config)
    made: dict[ScaleWeighting, Tensor] = {}

    def weights_L(option: str) -> Tensor:
        weighting = getattr(config, option)
        if weighting not in made:
            made[weighting] = token_weights(lengths, weighting, option)
        return made[weighting]

    return weights_L("scale_weighting"), weights_L("kl_scale_weighting"), weights_L("entropy_scale_weighting")


def token_weights(
    lengths: tuple[int, ...], weighting: ScaleWeighting, option: str = "scale_weighting"
) -> Tensor:
    """(L,) float32 weight of each token in the mean over an image; they sum to 1.

    Args:
        lengths: tokens of each scale that is trained.
        weighting: "token" counts all tokens alike, so that the finest scale has most of the weight; "scale"
            gives every scale the same total; a number is the alpha of (h w)^-alpha, the weight of a token
            in a grid of h times w: "token" is 0, "scale" is 1; or the total weight of each scale, up to a
            factor.
        option: its name, for the error.

    Raises:
        ConfigError: weights that are not one non-negative number a scale, with a positive sum.

    Source: the power law is PANW of arXiv 2601.02256, which found 0.6 to 0.8 best.
    """
    alpha = {"token": 0.0, "scale": 1.0}.get(weighting) if isinstance(weighting, str) else weighting
    if isinstance(alpha, int | float):
        try:
            totals = [length ** (1.0 - alpha) for length in lengths]
        except OverflowError:
            totals = [math.inf]
    else:
        assert isinstance(weighting, tuple)
        totals = [float(total) for total in weighting]
    is_each_possible = all(0 <= total < math.inf for total in totals)
    if len(totals) != len(lengths) or not is_each_possible or sum(totals) <= 0:
        raise ConfigError(
            f"{option} needs {len(lengths)} non-negative weights, one a trained scale, got {weighting}"
        )
    each = [total / sum(totals) / length for total, length in zip(totals, lengths, strict=True)]
    return torch.cat([torch.full((length,), weight) for length, weight in zip(lengths, each, strict=True)])


@dataclass(frozen=True)
class Surrogate:
    """The clipped surrogate, and what was clipped.

    Attributes:
        objective_BL: to be maximised.
        is_low_clipped_BL: negative advantage and ratio below 1 - epsilon: no gradient.
        is_high_clipped_BL: positive advantage and ratio above 1 + epsilon_high: no gradient.
    """

    objective_BL: Tensor
    is_low_clipped_BL: Tensor
    is_high_clipped_BL: Tensor


def ratios_of(q: Quantities, config: GRPOConfig) -> Tensor:
    """`importance_ratio` of a microbatch at the level that is asked for."""
    level = config.importance_sampling_level
    return importance_ratio(q.log_probs_BL, q.old_log_probs_BL, level, q.lengths, q.weights_L)


def importance_ratio(
    log_probs_BL: Tensor,
    old_log_probs_BL: Tensor,
    level: RatioLevel,
    lengths: Sequence[int],
    weights_L: Tensor,
) -> Tensor:
    """Probability under the present policy by that before its first update, of tokens, scales or images.

    That of a scale or an image is a geometric mean over its tokens, so that it does not grow with their
    number; over an image each token counts as much as in the loss. Its gradient is that of each token itself,
    so that tokens can have advantages of their own; where all have one, it is that of the mean. On policy,
    all levels have one gradient.

    Args:
        lengths: tokens of each scale.
        weights_L: weight of each token in an image; they sum to 1.

    Returns:
        (B, L).

    Source: GSPO (arXiv 2507.18071), equation 7, and 13 for the gradient (GSPO-token).
    """
    difference_BL = log_probs_BL - old_log_probs_BL
    if level == "token":
        return difference_BL.exp()
    if level == "scale":
        means = [each.mean(1, keepdim=True).expand_as(each) for each in difference_BL.split(list(lengths), 1)]
        mean_BL = torch.cat(means, 1)
    else:
        mean_BL = (difference_BL * weights_L).sum(1, keepdim=True).expand_as(difference_BL)
    return (mean_BL.detach() + log_probs_BL - log_probs_BL.detach()).exp()


def clipped_surrogate(
    ratio_BL: Tensor,
    advantages_BL: Tensor,
    epsilon: float,
    epsilon_high: float | None = None,
    delta: float | None = None,
) -> Surrogate:
    """min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A) of each token, r its importance ratio.

    Args:
        ratio_BL: from `importance_ratio`, with gradient.
        advantages_BL: (B, L) or (B, 1).
        epsilon_high: by default epsilon.
        delta: largest r of the first term: bounds what a negative advantage does to a token that has become
            far likelier; by default there is none.

    Source: PPO (arXiv 1707.06347), equation 7; DAPO (arXiv 2503.14476) for the upper bound of its own;
    INTELLECT-2 (arXiv 2505.07291) for delta.
    """
    high = epsilon if epsilon_high is None else epsilon_high
    clipped_BL = ratio_BL.clamp(1 - epsilon, 1 + high)
    with torch.no_grad():
        is_low = (ratio_BL < 1 - epsilon) & (advantages_BL < 0)
        is_high = (ratio_BL > 1 + high) & (advantages_BL > 0)
    bounded_BL = ratio_BL if delta is None else ratio_BL.clamp_max(delta)
    objective_BL = torch.minimum(bounded_BL * advantages_BL, clipped_BL * advantages_BL)
    return Surrogate(objective_BL, is_low, is_high)


def regularised(objective_BL: Tensor, q: Quantities) -> Tensor:
    """-(importance objective - beta KL + entropy_coef entropy), each a mean over images of a mean over
    tokens, with weights of its own."""
    if q.importance_BL is not None:
        objective_BL = q.importance_BL * objective_BL
    parts: list[tuple[Tensor, Tensor]] = []
    if q.kl_BL is not None and q.beta:
        parts.append((-q.beta * q.kl_BL, q.kl_weights_L))
    if isinstance(q.entropy_coef, Tensor) or q.entropy_coef:
        parts.append((q.entropy_coef * q.entropy_BL, q.entropy_weights_L))
    apart = 0.0
    for values_BL, weights_L in parts:
        # What has the objective's weights is added to it before the mean, which then rounds once.
        if weights_L is q.weights_L:
            objective_BL = objective_BL + values_BL
        else:
            apart = apart + weighted_mean(values_BL, weights_L)
    return -(weighted_mean(objective_BL, q.weights_L) + apart)


def weighted_mean(values_BL: Tensor, weights_L: Tensor) -> Tensor:
    """Mean over images of the weighted mean over tokens."""
    return (values_BL * weights_L).sum(1).mean()
