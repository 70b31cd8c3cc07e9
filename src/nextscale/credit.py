"""Credit masks: which tokens of an image its advantage is given to, by where in the image the reward looks.

Shapes: B images · S scales · L tokens of all scales · D codebook width · h w the full latent grid
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from nextscale.base.conditions import Condition
from nextscale.base.errors import ConfigError, RewardError, in_words
from nextscale.base.records import did_you_mean
from nextscale.models.protocol import Tokenizer
from nextscale.models.scales import ScaleSchedule
from nextscale.objective import per_token
from nextscale.pipeline import Drawn
from nextscale.rewards.asking.answers import ask, user_line
from nextscale.rewards.asking.waiting import is_async
from nextscale.rewards.groups import GroupReward
from nextscale.rewards.protocol import Reward
from nextscale.rewards.python import load_function
from nextscale.rewards.reward_set import RewardSet


@dataclass(frozen=True)
class Scored:
    """What a way to give credit may use.

    Attributes:
        advantages: of the B images: (B,), (B, S) or (B, L).
        drawn: the images.
        tokenizer: of their tokens.
        rewards: what they were scored by.
        batch_size: images to compute at once.
    """

    advantages: Tensor
    drawn: Drawn
    tokenizer: Tokenizer
    rewards: RewardSet
    batch_size: int


Credit = Callable[[Scored], Tensor]
"""Returns advantages of images (B,), scales (B, S) or tokens (B, L)."""


def to_all_alike(scored: Scored) -> Tensor:
    """The advantages as they are."""
    return scored.advantages


def by_gradient(scored: Scored) -> Tensor:
    """(B, L) advantages times a mask of where the rewards would change most."""
    trained = {name: scored.rewards.rewards[name] for name in scored.rewards.weights}

    def saliency(drawn: Drawn, part: slice) -> Tensor:
        latent_BDhw = latent_of(scored.tokenizer, drawn.tokens[part])
        given = scored.tokenizer, latent_BDhw, drawn.conditions[part], trained, scored.rewards.weights
        return gradient_saliency(*given)

    return masked_advantages(scored, saliency)


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
        if found.ndim != 3 or len(found) != len(images) or not bool((found >= 0).all()):
            raise RewardError(
                f"grpo.credit '{reference}' returned shape {tuple(found.shape)} or numbers below 0, expected "
                f"({len(images)}, height, width) of numbers that are at least 0"
            )
        return found

    return lambda scored: masked_advantages(scored, saliency)


CREDITS: dict[str, Credit] = {"none": to_all_alike, "gradient": by_gradient}
"""Name, as `GRPOConfig.credit` has it, to a way to give credit."""


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
            if is_async(reward) or not getattr(reward, "has_gradient", True):
                raise ConfigError(_without_gradient(each))
    return CREDITS[name]


def credit_source(name: str) -> dict[str, Path]:
    """The file of a function of a user's own, for the run to keep a copy of; empty for what is built in."""
    path, colon, _ = name.rpartition(":")
    return {"grpo.credit": Path(path)} if colon else {}


def masked_advantages(scored: Scored, saliency: Callable[[Drawn, slice], Tensor]) -> Tensor:
    """(B, L) advantages of tokens: each image's times a mask whose mean within every scale is 1.

    Args:
        saliency: some of the images to (b, height, width), where their credit is due.
    """
    num = len(scored.drawn.images)
    parts = [
        saliency(scored.drawn, slice(start, start + scored.batch_size))
        for start in range(0, num, scored.batch_size)
    ]
    schedule = scored.tokenizer.schedule
    mask_BL = token_mask(torch.cat(parts), schedule).to(scored.advantages)
    return per_token(scored.advantages, schedule) * mask_BL


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
