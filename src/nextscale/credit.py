"""Credit: which tokens of an image its advantage is given to.

By a mask of where in the image the rewards look, or each token by its own contribution to the rewards.

Shapes: B images · N groups · G images of one group · S scales · L tokens of all scales · D codebook width · h
w the full latent grid
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from torch import Tensor

from nextscale.advantages import spread_within_groups, weights_in_advantage
from nextscale.base.conditions import Condition
from nextscale.base.errors import ConfigError, RewardError, in_words
from nextscale.base.processes import fail_together, my_share
from nextscale.base.records import did_you_mean
from nextscale.base.statistics import centred
from nextscale.contributions import Groups, code_slopes, of_equal_size
from nextscale.drawing import Drawn
from nextscale.grpo import Aggregation, GRPOConfig, ScaleRewards
from nextscale.models.protocol import Tokenizer
from nextscale.models.scales import ScaleSchedule
from nextscale.objective import per_token
from nextscale.rewards.asking.answers import ask, user_line
from nextscale.rewards.asking.waiting import is_async, settings_kept
from nextscale.rewards.diversity import Diversity
from nextscale.rewards.groups import GroupReward
from nextscale.rewards.protocol import Reward
from nextscale.rewards.python import load_function
from nextscale.rewards.reward_set import RewardSet
from nextscale.rollout import Rollout


@dataclass(frozen=True)
class Scored:
    """What a way to give credit may use.

    Attributes:
        advantages: of the B images: (B,), (B, S) or (B, L).
        rollout: this process's images.
        scores: of the images of all processes, (N, G).
        tokenizer: of their tokens.
        rewards: what they were scored by.
        coefficients: the multipliers of the constrained rewards.
        aggregation: of several rewards.
        batch_size: images to compute at once.
    """

    advantages: Tensor
    rollout: Rollout
    scores: Mapping[str, Tensor]
    tokenizer: Tokenizer
    rewards: RewardSet
    coefficients: Mapping[str, float]
    aggregation: Aggregation
    scale_rewards: ScaleRewards
    batch_size: int

    def parts(self) -> Iterator[slice]:
        """The images to compute at once, part by part."""
        num = len(self.rollout.images)
        for start in range(0, num, self.batch_size):
            yield slice(start, min(start + self.batch_size, num))


Credit = Callable[[Scored], Tensor]
"""Returns advantages of images (B,), scales (B, S) or tokens (B, L). All processes call it."""


def to_all_alike(scored: Scored) -> Tensor:
    """The advantages as they are."""
    return scored.advantages


def by_gradient(scored: Scored) -> Tensor:
    """(B, L) advantages times a mask of where the rewards that are trained on would change most, each as much
    as it counts in an advantage."""
    trained = {name: scored.rewards.rewards[name] for name in scored.rewards.weights}
    weights = weights_in_advantage(
        scored.scores, scored.rewards.weights, {}, scored.aggregation, scored.scale_rewards
    )

    def saliency(drawn: Drawn, part: slice) -> Tensor:
        codes_BLD = scored.tokenizer.codebook[drawn.tokens[part]]
        latent_BDhw = scored.tokenizer.codes_to_latent(codes_BLD)
        given = scored.tokenizer, latent_BDhw, drawn.conditions[part], trained, weights
        return gradient_saliency(*given)

    return masked_advantages(scored, saliency)


def by_contribution(scored: Scored) -> Tensor:
    """(B, L) advantages of tokens: what each contributed to the rewards, in place of its image's advantage.
    A reward without a gradient counts by how far its image is from its group's mean, in units of the
    spread within all groups.

    Raises:
        RewardError: no reward has a gradient.
    """
    rollout, tokenizer, scores = scored.rollout, scored.tokenizer, scored.scores
    in_advantage = weights_in_advantage(
        scores, scored.rewards.weights, scored.coefficients, scored.aggregation, scored.scale_rewards
    )
    # Some say nothing in a step: constraints that are kept, rewards that are the same for all images.
    weights = {name: each for name, each in in_advantage.items() if each != 0}
    may_count = {name for name in in_advantage if may_have_gradient(scored.rewards.rewards[name])}
    num_groups, group_size = next(iter(scores.values())).shape
    share = my_share(num_groups * group_size)
    groups = Groups.of(rollout, scored.rewards, group_size, share)

    asked = {name: scored.rewards.rewards[name] for name in weights if name in may_count}
    has_slope, parts = set[str](), []
    with fail_together():
        for part in scored.parts():
            codes_BLD = tokenizer.codebook[rollout.tokens[part]]
            given = codes_BLD, rollout.conditions[part], asked, weights, groups, part
            slopes_BLD, names = code_slopes(tokenizer, *given)
            has_slope |= names
            surprise_BLD = codes_BLD.float() - rollout.expected_codes[part]
            parts.append((slopes_BLD * surprise_BLD).sum(-1))
    # One that has a slope in some image has one in all, if 0: all processes count it alike.
    found = set(gather_object(sorted(has_slope)))
    if asked and not found and may_count == asked.keys():
        raise RewardError(_none_with_gradient(asked))

    # As large as the advantages of the same rewards would be, next to those of the others.
    def sum_of(names: Collection[str]) -> Tensor:  # always in the same order, for sums round
        each = (weights[name] * scores[name] for name in weights if name in names)
        return sum(each, torch.zeros(num_groups, group_size))

    mine = slice(share.start, share.stop)
    is_scored_B1 = ~sum_of(weights).flatten()[mine, None].isnan()
    size = float(spread_within_groups(sum_of(found)))
    values_BL = torch.cat(parts)
    values_BL = of_equal_size(values_BL * is_scored_B1.to(values_BL), tokenizer.schedule, size)
    rest_B1 = centred(sum_of(weights.keys() - found)).flatten()[mine, None]
    return values_BL + (rest_B1 * is_scored_B1).to(values_BL)


def by_function(reference: str) -> Credit:
    """(B, L) advantages times a mask by a function of a user's own.

    Args:
        reference: path/to/file.py:function, (images (B, 3, H, W), conditions) -> (B, height, width) numbers
            that are at least 0.

    Raises:
        ConfigError: there is no such function.
    """
    function = load_function(reference, "grpo.credit")

    def saliency(drawn: Drawn, part: slice) -> Tensor:
        images, conditions = drawn.images[part], drawn.conditions[part]
        try:
            found = torch.as_tensor(function(images.clone(), list(conditions))).float().cpu()
        except Exception as error:
            told = f"{in_words(error)}{user_line(error)}"
            raise RewardError(f"grpo.credit '{reference}' raised {told}") from error
        if found.ndim != 3 or len(found) != len(images) or not bool(((found >= 0) & found.isfinite()).all()):
            raise RewardError(
                f"grpo.credit '{reference}' returned shape {tuple(found.shape)}, numbers below 0 or infinite "
                f"ones, expected ({len(images)}, height, width) of numbers that are at least 0"
            )
        return found

    return lambda scored: masked_advantages(scored, saliency)


CREDITS: dict[str, Credit] = {
    "none": to_all_alike,
    "gradient": by_gradient,
    "contribution": by_contribution,
}
"""Name, as `GRPOConfig.credit` has it, to a way to give credit."""

WITH_SLOPES = ("gradient", "contribution")
"""Those that go back from the rewards, through the decoder."""


def check_compared(grpo: GRPOConfig, rewards: RewardSet) -> None:
    """Check that a trained or constrained diversity says more of one image than of the other.

    Raises:
        ConfigError: it cannot, in groups of two.
    """
    if grpo.num_generations > 2:
        return
    is_summed = grpo.multi_objective_aggregation == "sum_then_normalize" and len(rewards.weights) > 1
    for name in (*rewards.weights, *rewards.constraints):
        # Contributions ask each image's slope, in units of what the sum varies by.
        has_slope = grpo.credit == "contribution" and is_summed and name in rewards.weights
        if isinstance(rewards.rewards[name], Diversity) and not has_slope:
            raise ConfigError(
                f"reward '{name}' has no effect with grpo.num_generations 2, as both images of a group are "
                "equally far from each other: set 3 or more, or remove the reward"
            )


def find_credit(name: str, rewards: RewardSet) -> Credit:
    """The way to give credit of this name, or by the function that path/to/file.py:function names.

    Raises:
        ConfigError: there is none, or a reward has no gradient where it is needed.
    """
    if name not in CREDITS:
        if ":" not in name:
            hint = did_you_mean(name, CREDITS, "expected path/to/file.py:function")
            raise ConfigError(f"unknown grpo.credit '{name}'{hint}")
        return by_function(name)
    if name == "gradient":
        single = [each for each in rewards.weights if not isinstance(rewards.rewards[each], GroupReward)]
        if not single:
            raise ConfigError("grpo.credit gradient needs a reward of single images: give one, or remove it")
        for each in single:
            reward = rewards.rewards[each]
            if not may_have_gradient(reward):
                raise ConfigError(_without_gradient(each))
    if name == "contribution":
        trained = {each: rewards.rewards[each] for each in (*rewards.weights, *rewards.constraints)}
        if not any(may_have_gradient(each) for each in trained.values()):
            raise ConfigError(_none_with_gradient(trained))
    return CREDITS[name]


def may_have_gradient(reward: Reward) -> bool:
    """Whether a reward may have a gradient with respect to the image: of a function, the answer tells."""
    return not is_async(reward) and bool(getattr(reward, "has_gradient", True))


def credit_source(name: str) -> dict[str, Path]:
    """The file of a function of a user's own, for the run to keep a copy of; empty for what is built in."""
    path, colon, _ = name.rpartition(":")
    return {"grpo.credit": Path(path)} if colon else {}


def masked_advantages(scored: Scored, saliency: Callable[[Drawn, slice], Tensor]) -> Tensor:
    """(B, L) advantages of tokens: each image's times a mask whose mean within every scale is 1.

    Args:
        saliency: some of the images to (b, height, width), where their credit is due.
    """
    with fail_together():
        parts = [saliency(scored.rollout, part) for part in scored.parts()]
    schedule = scored.tokenizer.schedule
    mask_BL = token_mask(torch.cat(parts), schedule).to(scored.advantages)
    return per_token(scored.advantages, schedule) * mask_BL


@settings_kept()
def gradient_saliency(
    tokenizer: Tokenizer,
    latent_BDhw: Tensor,
    conditions: Sequence[Condition],
    rewards: Mapping[str, Reward],
    weights: Mapping[str, float],
) -> Tensor:
    """(B, h, w) how much the weighted sum of the rewards changes with the latent at each place: the sum over
    channels of the absolute gradient. Rewards of groups are left out.

    Raises:
        RewardError: a reward has no gradient.
    """
    latent_BDhw = latent_BDhw.detach().requires_grad_()
    with torch.enable_grad():
        images = tokenizer.latent_to_images(latent_BDhw)
        total = images.new_zeros(())
        for name, reward in rewards.items():
            if isinstance(reward, GroupReward):
                continue
            scores = ask(name, reward, images, conditions, None)
            if not isinstance(scores, Tensor) or not scores.requires_grad:
                raise RewardError(_without_gradient(name))
            total = total + weights[name] * scores.nan_to_num().sum()
        (gradient_BDhw,) = torch.autograd.grad(total, latent_BDhw)
    return gradient_BDhw.abs().sum(1).float()


def token_mask(saliency_Bhw: Tensor, schedule: ScaleSchedule) -> Tensor:
    """(B, L) the saliency at the place of each token, averaged over the area that the token covers, and
    divided by its mean in the scale; 1 where there is none at all."""
    masks = []
    for size in schedule.sizes:
        area_Bhw = F.adaptive_avg_pool2d(saliency_Bhw[:, None], size)
        mask_Bl = area_Bhw.flatten(1)
        mean_B1 = mask_Bl.mean(1, keepdim=True)
        masks.append(torch.where(mean_B1 > 0, mask_Bl / mean_B1.clamp_min(1e-30), 1.0))
    return torch.cat(masks, 1)


def _without_gradient(name: str) -> str:
    return (
        f"reward '{name}' has no gradient with respect to the image, which grpo.credit gradient needs: give "
        "a function for grpo.credit, or remove it"
    )


def _none_with_gradient(names: Iterable[str]) -> str:
    return (
        f"none of the rewards {', '.join(names)} has a gradient with respect to the image, which grpo.credit "
        "contribution needs: remove it"
    )
