"""Contributions: what each token added to the rewards, to first order.

The latent that an image is decoded from is a sum over the scales: it is an affine function of the codes of
all tokens, whatever the scale. So one backward pass from the rewards, through the decoder, gives the slope
g_l of the reward in the code of every token, and

    contribution_l = g_l . (e(x_l) - E_policy[e])

is how much the drawn token raised the reward, against what was to be expected in its place. An image's one
number says nothing of which of its tokens earned it; this says it of each.

It is a first-order estimate: of far-apart codes the slope says little, and what later scales make of a token
is left out. Subtracting the mean code is an action-dependent baseline of expectation 0 for given slopes, as
in MuProp (arXiv 1511.05176, equation 4).

Shapes: B images · N groups · G images of one group · S scales · L tokens of all scales · D codebook width ·
E width of a feature
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nextscale.base.conditions import Condition
from nextscale.base.processes import gathered
from nextscale.models.protocol import Tokenizer
from nextscale.models.scales import ScaleSchedule
from nextscale.rewards.asking.answers import ask
from nextscale.rewards.asking.waiting import settings_kept
from nextscale.rewards.groups import GroupReward, ask_groups
from nextscale.rewards.protocol import Reward
from nextscale.rewards.reward_set import RewardSet
from nextscale.rollout import Rollout


@dataclass(frozen=True)
class Groups:
    """The features of whole groups, of all processes, that a process's images are compared in.

    Attributes:
        features: name of each `GroupReward` to its features, (N, G, E).
        share: this process's images, counted from the first group's first.
    """

    features: Mapping[str, Tensor]
    share: range

    @staticmethod
    def of(rollout: Rollout, rewards: RewardSet, group_size: int, share: range) -> "Groups":
        """Those of a step. All processes call it."""
        mine = {
            name: each
            for name, each in rollout.scores.items()
            if isinstance(rewards.rewards[name], GroupReward)
        }
        whole = {name: each.unflatten(0, (-1, group_size)) for name, each in gathered(mine).items()}
        return Groups(whole, share)

    def scores(self, name: str, reward: GroupReward, features_BE: Tensor, part: slice) -> Tensor:
        """(B,) each image's score among its group, as a function of its own features alone.

        Args:
            features_BE: of these images, with gradient.
            part: which of this process's images they are.
        """
        features_NGE = self.features[name]
        at_B = torch.tensor(self.share)[part]
        group_B, place_B = at_B // features_NGE.shape[1], at_B % features_NGE.shape[1]
        is_own_BG1 = (torch.arange(features_NGE.shape[1]) == place_B[:, None])[..., None]
        own_BGE = torch.where(is_own_BG1, features_BE.float().cpu()[:, None], features_NGE[group_B])
        return ask_groups(name, reward, own_BGE).gather(1, place_B[:, None])[:, 0]


@settings_kept()
def code_slopes(
    tokenizer: Tokenizer,
    codes_BLD: Tensor,
    conditions: Sequence[Condition],
    rewards: Mapping[str, Reward],
    weights: Mapping[str, float],
    groups: Groups,
    part: slice,
) -> tuple[Tensor, set[str]]:
    """(B, L, D) the slope of the weighted sum of the rewards in the code of every token, and the names of
    those that have one.

    Args:
        codes_BLD: of the drawn tokens.
        rewards: those to ask.
        groups, part: the groups that the images are part of, and which of this process's images they are.
    """
    codes_BLD = codes_BLD.detach().requires_grad_()
    with torch.enable_grad():
        images = tokenizer.latent_to_images(tokenizer.codes_to_latent(codes_BLD))
        total, found = images.new_zeros(()), set()
        for name, reward in rewards.items():
            if isinstance(reward, GroupReward):
                scores = ask(name, reward.features, images, conditions, None)
                if isinstance(scores, Tensor) and scores.requires_grad:
                    scores = groups.scores(name, reward, scores, part)
            else:
                scores = ask(name, reward, images, conditions, None)
            if isinstance(scores, Tensor) and scores.requires_grad:
                found.add(name)
                total = total + weights[name] * scores.nan_to_num().sum().to(total)
        if not found:
            return torch.zeros_like(codes_BLD), found
        (slopes_BLD,) = torch.autograd.grad(total, codes_BLD)
    return slopes_BLD.float(), found


def of_equal_size(values_BL: Tensor, schedule: ScaleSchedule, size: float) -> Tensor:
    """(B, L) the values, multiplied so that in every scale their root mean square over the images of all
    processes is `size`: what a scale counts is `scale_weighting`'s to say. All processes call it."""
    squares_BS = torch.stack([each.square().mean(1) for each in values_BL.split(schedule.lengths, 1)], 1)
    mean_S = gathered({"squares": squares_BS})["squares"].mean(0)
    factor_S = torch.where(mean_S > 0, size / mean_S.sqrt(), 0.0)
    return values_BL * factor_S[schedule.scale_of_token()].to(values_BL)
