"""From rewards to advantages: how much better an image scored than its group.

Shapes: N groups · G images of one group · B = N G images · S scales · K rewards, or images of one start · P
starts of one group
"""

import math
from collections.abc import Mapping, Sequence

import torch
from einops import rearrange
from torch import Tensor

from nextscale.base.statistics import centred, deviation
from nextscale.grpo import Aggregation, Baseline, GRPOConfig, ScaleRewards


def group_advantages(
    rewards_NG: Tensor,
    scale_rewards: ScaleRewards = "group",
    epsilon: float = 1e-4,
    baseline: Baseline = "mean",
) -> Tensor:
    """(N, G) advantages: reward minus the group's mean, divided by a standard deviation.

    Multiplying all rewards by a positive number changes nothing, except with "none". An image with reward NaN
    (not scored) gets advantage 0 and is left out of the mean and deviation. So is every image of a group with
    fewer than two scores, or whose scores differ by rounding alone.

    Args:
        rewards_NG: one reward per image of a whole step.
        scale_rewards: divide by the group's standard deviation, by the batch's, or not at all (Dr. GRPO).
        epsilon: added to the standard deviation, in units of the root mean square of the groups' deviations,
            so that a group that varies far less than the others counts less.
        baseline: what is subtracted: the group's mean, or the mean of its other scores. The latter is G /
            (G - 1) times the former.

    Source: GRPO (arXiv 2402.03300), equation 3; Dr. GRPO (arXiv 2503.20783) for "none"; RLOO (arXiv
    2402.14740), equation 8, for "leave_one_out".
    """
    is_lone_NG = (~rewards_NG.isnan()).sum(1, keepdim=True) < 2
    rewards_NG = rewards_NG.masked_fill(is_lone_NG, float("nan"))
    centred_NG = centred(rewards_NG).masked_fill(beyond_rounding(rewards_NG) == 0, 0.0)
    if baseline == "leave_one_out":
        num_N1 = (~rewards_NG.isnan()).sum(1, keepdim=True)
        centred_NG = centred_NG * num_N1 / (num_N1 - 1).clamp_min(1)
    if scale_rewards == "none":
        return centred_NG
    of_all = rewards_NG if scale_rewards == "group" else rewards_NG.flatten()
    divisor = beyond_rounding(of_all) + epsilon * spread_within_groups(rewards_NG)
    # All rewards equal, or none: 0. What overflows stays NaN: the trainer stops and says which it was.
    return torch.where(divisor == 0, 0.0, centred_NG / divisor)


def beyond_rounding(rewards: Tensor) -> Tensor:
    """The standard deviation along the last axis, shape (..., 1). A spread of a few roundings of the largest
    number there is none: divided by it, they would be noise of full size."""
    rounding = 8 * torch.finfo(rewards.dtype).eps * rewards.nan_to_num().abs().amax(-1, keepdim=True)
    found = deviation(rewards)
    return found.masked_fill(found <= rounding, 0.0)


def spread_within_groups(rewards_NG: Tensor) -> Tensor:
    """() How much rewards vary within groups: the root mean square of the deviations of all groups that have
    two scores; 0 where none has."""
    is_lone_N = (~rewards_NG.isnan()).sum(1) < 2
    squares_N = beyond_rounding(rewards_NG)[~is_lone_N, 0].square()
    return squares_N.mean().sqrt() if len(squares_N) else rewards_NG.new_zeros(())


def combined_advantages(
    rewards_KNG: Tensor,
    weights_K: Tensor,
    scale_rewards: ScaleRewards = "group",
    aggregation: Aggregation = "sum_then_normalize",
    epsilon: float = 1e-4,
    baseline: Baseline = "mean",
) -> Tensor:
    """(N, G) advantages of several weighted rewards.

    `sum_then_normalize` first adds up the weighted rewards, so a reward's influence depends on its spread;
    `normalize_then_sum` first normalises each within its groups, so that only its weight matters.

    Args:
        rewards_KNG: those of a whole step.
        epsilon, baseline: see `group_advantages`.
    """
    options: tuple[ScaleRewards, float, Baseline] = scale_rewards, epsilon, baseline
    weights_K11 = weights_K.to(rewards_KNG)[:, None, None]
    if aggregation == "sum_then_normalize":
        return group_advantages((weights_K11 * rewards_KNG).sum(0), *options)
    each_KNG = torch.stack([group_advantages(each_NG, *options) for each_NG in rewards_KNG])
    return (weights_K11 * each_KNG).sum(0)


def add_constraints(
    advantages_NG: Tensor,
    rewards: Mapping[str, Tensor],
    coefficients: Mapping[str, float],
    epsilon: float = 1e-4,
    baseline: Baseline = "mean",
) -> Tensor:
    """(N, G) advantages of the Lagrangian: those of the objectives plus those of the constrained rewards.

    A constrained reward is always divided by its group's standard deviation, so that its multiplier does not
    depend on its units.

    Args:
        advantages_NG: of the objectives.
        rewards: name to scores (N, G); includes all constrained rewards.
        coefficients: name of a constrained reward to its multiplier, negative for an upper bound.
        epsilon, baseline: see `group_advantages`.
    """
    for name, coefficient in coefficients.items():
        each_NG = group_advantages(rewards[name], epsilon=epsilon, baseline=baseline)
        advantages_NG = advantages_NG + coefficient * each_NG
    return advantages_NG


def weights_in_advantage(
    scores: Mapping[str, Tensor],
    weights: Mapping[str, float],
    coefficients: Mapping[str, float],
    aggregation: Aggregation,
    scale_rewards: ScaleRewards = "group",
) -> dict[str, float]:
    """What a unit of each reward adds to an image's advantage in `step_advantages`, if all groups vary alike;
    0 for a reward that does not vary.

    Args:
        scores, weights, coefficients: as there.
        scale_rewards: what the advantages of the rewards that are trained on are divided by.
    """

    def inverse(rewards_NG: Tensor, divided_by: ScaleRewards) -> float:
        spread = float(spread_within_groups(rewards_NG))
        if spread > 0 and divided_by == "batch":
            spread = float(beyond_rounding(rewards_NG.flatten()))
        return 0.0 if spread == 0 else 1.0 if divided_by == "none" else 1 / spread

    units = {name: inverse(scores[name], "group") for name in coefficients}
    if aggregation == "sum_then_normalize":
        total_NG = torch.stack([weight * scores[name] for name, weight in weights.items()]).sum(0)
        units |= dict.fromkeys(weights, inverse(total_NG, scale_rewards))
    else:
        units |= {name: inverse(scores[name], scale_rewards) for name in weights}
    return {name: each * units[name] for name, each in {**weights, **coefficients}.items()}


def step_advantages(
    scores: Mapping[str, Tensor],
    weights: Mapping[str, float],
    coefficients: Mapping[str, float],
    grpo: GRPOConfig,
    num_scales: int,
    step: int = 1,
) -> Tensor:
    """Advantages of all images of a step, as the options say: (B,), or where rollouts branch (B, S).

    Args:
        scores: name to the scores (N, G) of each reward.
        weights: of the rewards that are trained on.
        coefficients: of the constraints.
        num_scales: S.
        step: the number of the step, from 1.
    """

    def within_groups(scores: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
        advantages_NG = combined_advantages(
            torch.stack([scores[name] for name in weights]),
            torch.tensor(list(weights.values())),
            grpo.scale_rewards,
            grpo.multi_objective_aggregation,
            grpo.advantage_epsilon,
            grpo.advantage_baseline,
        )
        constrained = scores, coefficients, grpo.advantage_epsilon, grpo.advantage_baseline
        return add_constraints(advantages_NG, *constrained)

    if grpo.branch_scale is None:
        return within_groups(scores, weights).flatten()

    # A start competes with the other starts of its group by what it is worth, and each image with those that
    # go on from the same start. What is only summed is worth something as a sum; what is kept low is worth
    # most where it is lowest.
    if grpo.multi_objective_aggregation == "sum_then_normalize":
        total_NG = torch.stack([weight * scores[name] for name, weight in weights.items()]).sum(0)
        scores, weights = {**scores, "": total_NG}, {"": 1.0}
    signs = {name: math.copysign(1, each) for name, each in {**weights, **coefficients}.items()}
    by_start = {name: rearrange(scores[name], "N (P K) -> N P K", K=grpo.branches) for name in signs}
    values = {
        name: sign * start_values(sign * by_start[name], grpo.branch_temperature)
        for name, sign in signs.items()
    }
    starts_NG = within_groups(values, weights).repeat_interleave(grpo.branches, 1)
    rests_NG = within_groups({name: each.flatten(0, 1) for name, each in by_start.items()}, weights)
    starts_B1, rests_B1 = starts_NG.reshape(-1, 1), rests_NG.reshape(-1, 1)
    if grpo.branch_schedule == "in_turn":
        is_rests_turn = step % STEPS_OF_A_TURN == 0
        starts_B1, rests_B1 = starts_B1 * (not is_rests_turn), rests_B1 * is_rests_turn
    num_rest = num_scales - grpo.branch_scale
    return torch.cat([starts_B1.expand(-1, grpo.branch_scale), rests_B1.expand(-1, num_rest)], 1)


def later_kl(kl_BL: Tensor, lengths: Sequence[int]) -> Tensor:
    """(B, S) KL of all scales after each, in nats.

    Args:
        kl_BL: of each token's distribution.
        lengths: tokens of each scale.
    """
    of_scales_BS = torch.stack([each.sum(1) for each in kl_BL.split(list(lengths), 1)], 1)
    return of_scales_BS.flip(1).cumsum(1).flip(1) - of_scales_BS


def expected_later_kl(later_NGS: Tensor, branch_scale: int | None = None, branches: int = 1) -> Tensor:
    """(N, G, S) what `later_kl` was to be expected of each image: the mean of those in its group that do not
    depend on its token, which are the other images, or where images share their first scales, those of other
    starts. A mean with its own among them would take a part of the KL away.

    Args:
        branch_scale: number of the first scales that are shared, if some are.
        branches: images that share a start.
    """
    of_others_NGS = later_NGS.sum(1, keepdim=True) - later_NGS
    expected_NGS = of_others_NGS / (later_NGS.shape[1] - 1)
    if branch_scale is None:
        return expected_NGS
    of_starts_NPS = later_NGS.unflatten(1, (-1, branches)).mean(2)
    of_others_NPS = of_starts_NPS.sum(1, keepdim=True) - of_starts_NPS
    starts_NGS = (of_others_NPS / (of_starts_NPS.shape[1] - 1)).repeat_interleave(branches, 1)
    return torch.cat([starts_NGS[..., :branch_scale], expected_NGS[..., branch_scale:]], -1)


def kl_costs(
    log_ratios_BL: Tensor, kl_BL: Tensor, later_BS: Tensor, expected_BS: Tensor, lengths: Sequence[int]
) -> Tensor:
    """(B, L) what each token cost in KL, in nats, more than was to be expected of it: that of its own, and
    what its image's later scales had.

    As an advantage, less this is the policy gradient of the image's KL, all paths of it included. Tokens of
    one scale are drawn apart from each other, so none answers for another of its scale.

    Args:
        log_ratios_BL: log policy - log reference of the drawn tokens, whose expectation is the exact KL.
        later_BS: from `later_kl`.
        expected_BS: what of that was to be expected, from `expected_later_kl`.
    """
    counts = torch.tensor(list(lengths), device=later_BS.device)
    later_BL = (later_BS - expected_BS).repeat_interleave(counts, 1)
    return log_ratios_BL - kl_BL + later_BL


STEPS_OF_A_TURN = 4  # three of the starts, one of the rests, as arXiv 2601.02256 has it


def start_values(rewards_NPK: Tensor, temperature: float) -> Tensor:
    """(N, P) what each start is worth: T log mean exp(r / T) over the K images that go on from it.

    Between the mean, for a large T, and the best, for a small one. Images without a score are left out.

    Args:
        temperature: in standard deviations of the reward over the images of one start, so that it does not
            depend on the reward's units.

    Source: the middle return of "VAR RL Done Right" (arXiv 2601.02256).
    """
    unit = temperature * spread_within_groups(rewards_NPK.flatten(0, 1)).double()
    if unit == 0:  # all images of a start score alike
        return rewards_NPK.nanmean(-1)
    # From the best one down, exact at both ends: log1p and expm1 lose nothing where r / T hardly varies.
    best_NP1 = rewards_NPK.nan_to_num(float("-inf")).amax(-1, keepdim=True).double()
    below_NPK = (rewards_NPK.double() - best_NP1) / unit
    return (best_NP1[..., 0] + unit * below_NPK.expm1().nanmean(-1).log1p()).to(rewards_NPK)
