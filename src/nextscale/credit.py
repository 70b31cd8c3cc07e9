"""Credit masks: which tokens of an image its advantage is given to, by where in the image the reward looks.

Shapes: B images · S scales · L tokens of all scales · D codebook width · h w the full latent grid
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from nextscale.base.conditions import Condition
from nextscale.base.errors import RewardError
from nextscale.models.protocol import Tokenizer
from nextscale.models.scales import ScaleSchedule
from nextscale.objective import per_token
from nextscale.pipeline import Drawn
from nextscale.rewards.groups import GroupReward
from nextscale.rewards.protocol import Reward
from nextscale.rewards.python import load_function
from nextscale.rewards.reward_set import RewardSet


def masked_advantages(
    credit: str,
    advantages: Tensor,
    drawn: Drawn,
    tokenizer: Tokenizer,
    rewards: RewardSet,
    batch_size: int,
) -> Tensor:
    """(B, L) advantages of tokens: each image's times a mask whose mean within every scale is 1.

    Args:
        credit: "gradient" for `gradient_saliency`, or path/to/file.py:function for a function of your own
            (images (B, 3, H, W), conditions) -> (B, height, width) that are at least 0.
        advantages: (B,), (B, S) or (B, L).
        drawn: the B images.
        batch_size: images at once.

    Raises:
        RewardError: a reward has no gradient, or the function answers something else.
    """
    parts = []
    trained = {name: rewards.rewards[name] for name in rewards.weights}
    for start in range(0, len(drawn.images), batch_size):
        part = slice(start, start + batch_size)
        images, conditions = drawn.images[part], drawn.conditions[part]
        if credit == "gradient":
            latent_BDhw = latent_of(tokenizer, drawn.tokens[part])
            parts.append(gradient_saliency(tokenizer, latent_BDhw, conditions, trained, rewards.weights))
        else:
            parts.append(_asked(credit, images, conditions))
    mask_BL = token_mask(torch.cat(parts), tokenizer.schedule).to(advantages)
    return per_token(advantages, tokenizer.schedule) * mask_BL


def latent_of(tokenizer: Tokenizer, tokens_BL: Tensor) -> Tensor:
    """(B, D, h, w) the latent that the tokens of all scales add up to."""
    latent_BDhw = tokenizer.empty_latent(len(tokens_BL)).to(tokens_BL.device)
    for k, part in enumerate(tokenizer.schedule.slices):
        latent_BDhw = tokenizer.add_scale(latent_BDhw, tokens_BL[:, part], k)
    return latent_BDhw


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
        RewardError: no reward has a gradient, or one has none.
    """
    latent_BDhw = latent_BDhw.detach().requires_grad_()
    with torch.enable_grad():
        images = tokenizer.latent_to_images(latent_BDhw)
        total = images.new_zeros(())
        for name, reward in rewards.items():
            if isinstance(reward, GroupReward):
                continue
            scores = reward(images, conditions)
            if not isinstance(scores, Tensor) or not scores.requires_grad:
                raise RewardError(
                    f"reward '{name}' has no gradient with respect to the image, which grpo.credit gradient "
                    "needs: give a function for grpo.credit, or remove it"
                )
            total = total + weights[name] * scores.nan_to_num().sum()
        if not total.requires_grad:
            raise RewardError("grpo.credit gradient needs a reward of single images: give one, or remove it")
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


def _asked(reference: str, images: Tensor, conditions: Sequence[Condition]) -> Tensor:
    found = torch.as_tensor(load_function(reference)(images.clone(), list(conditions))).float().cpu()
    if found.ndim != 3 or len(found) != len(images) or not bool((found >= 0).all()):
        raise RewardError(
            f"grpo.credit '{reference}' returned shape {tuple(found.shape)} or numbers below 0, expected "
            f"({len(images)}, height, width) of numbers that are at least 0"
        )
    return found
