"""Sample images scale by scale, recording each token's log-probability under the sampling policy.

Shapes: B images · L tokens of all scales · l tokens of one scale · V codebook size · D codebook width
· h w the full latent grid
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nextscale.base.errors import CheckpointError
from nextscale.models.protocol import Conditioning, NextScaleModel, Tokenizer
from nextscale.models.scales import ScaleSchedule
from nextscale.policy import (
    Ramp,
    SamplingConfig,
    all_branches_logits,
    draw_tokens,
    mean_codes,
    policy_log_probs,
    token_log_probs,
)


@dataclass(frozen=True)
class Samples:
    """Sampled tokens and what came with them.

    Attributes:
        tokens: (B, L) int64.
        log_probs: (B, L) float32, of each token under the policy.
        expected_codes: (B, L, D) the mean code of the distribution that each token was drawn from.
        inputs: (B, L - 1, D), the transformer's inputs, which teacher forcing needs again.
        latent: (B, D, h, w), ready for `Tokenizer.latent_to_images`.
    """

    tokens: Tensor
    log_probs: Tensor
    expected_codes: Tensor
    inputs: Tensor
    latent: Tensor


@dataclass(frozen=True)
class Branching:
    """Images that go on from common prefixes, each of which is sampled once.

    Attributes:
        num_scales: of a prefix; at least one, and fewer than all.
        prefix_of: for each of the B images the number of its prefix: 0, then the same or one more.
    """

    num_scales: int
    prefix_of: tuple[int, ...]

    def firsts(self) -> list[int]:
        """The first image of each prefix."""
        return [self.prefix_of.index(prefix) for prefix in range(self.prefix_of[-1] + 1)]


@dataclass(frozen=True)
class Branches:
    """How the images of a group share their first scales: as many as `size`, one after the other.

    Attributes:
        num_scales: that they share.
        size: K, which divides the number of images of a group.
    """

    num_scales: int
    size: int

    def shared(self, uniforms_BL: Tensor, schedule: ScaleSchedule) -> Tensor:
        """The random numbers of whole groups, those of shared tokens taken from the first of the K images."""
        firsts_B = torch.arange(len(uniforms_BL)) // self.size * self.size
        num_tokens = sum(schedule.lengths[: self.num_scales])
        return torch.cat([uniforms_BL[firsts_B, :num_tokens], uniforms_BL[:, num_tokens:]], 1)

    def of(self, images: range) -> Branching:
        """The branching of some images of all groups, counted from the first group's first."""
        first = images.start // self.size
        return Branching(self.num_scales, tuple(each // self.size - first for each in images))


OnScale = Callable[[int, Tensor], None]
"""Gets the number of a scale, from 0, and the (B, D, h, w) latent of all scales up to it."""


@torch.no_grad()
def sample(
    transformer: NextScaleModel,
    tokenizer: Tokenizer,
    conditioning: Conditioning,
    uniforms_BL: Tensor,
    config: SamplingConfig,
    branching: Branching | None = None,
    on_scale: OnScale | None = None,
) -> Samples:
    """Sample one image per condition, with one forward pass per scale.

    Args:
        transformer: in either mode, since it has no dropout.
        tokenizer: turns tokens into the next scale's inputs.
        conditioning: of the B images.
        uniforms_BL: one number in [0, 1) per token; they determine the images (see `group_uniforms`).
        config: the policy to sample from.
        branching: which images share their first scales; the numbers of the first of them count there.
        on_scale: called after every scale.

    Raises:
        CheckpointError: the model's logits are infinite or NaN.
    """
    schedule, cache = transformer.schedule, transformer.new_cache()
    of_images, uniforms_of_images_BL = conditioning, uniforms_BL
    if branching is not None:  # at first, one row for each prefix
        firsts = torch.tensor(branching.firsts(), device=uniforms_BL.device)
        conditioning, uniforms_BL = conditioning.select(firsts), uniforms_BL[firsts]
    of_scale = config  # how the scale at hand is run: where guidance stops, the null condition's half ends
    conditioning = all_branches(conditioning, of_scale)
    ramp = Ramp.of(config, schedule, uniforms_BL.device)
    latent_BDhw = tokenizer.empty_latent(len(uniforms_BL))
    tokens, log_probs, expected_codes, is_nan = [], [], [], []
    inputs = [
        latent_BDhw.new_zeros(len(uniforms_BL), 0, latent_BDhw.shape[1])
    ]  # the first scale sees no input
    for k, part in enumerate(schedule.slices):
        if branching is not None and k == branching.num_scales:  # what a prefix has goes on in each image
            num_prefixes = len(uniforms_BL)
            index_B = torch.tensor(branching.prefix_of, device=uniforms_BL.device)
            conditioning, uniforms_BL = all_branches(of_images, of_scale), uniforms_of_images_BL
            rows = torch.cat([index_B, index_B + num_prefixes]) if of_scale.is_guided else index_B
            cache, latent_BDhw = cache.select(rows), latent_BDhw[index_B]
            tokens, log_probs, expected_codes, inputs = (
                [each[index_B] for each in done] for done in (tokens, log_probs, expected_codes, inputs)
            )
        if of_scale.is_guided and k == config.guidance_stop:
            of_scale, num_images = config.replace(guidance_scale=0.0), len(uniforms_BL)
            conditioning = conditioning.select(slice(num_images))
            cache = cache.select(torch.arange(num_images, device=uniforms_BL.device))
        if k > 0:
            inputs.append(tokenizer.next_inputs(latent_BDhw, k))
        logits_BlV = guided_logits(transformer, conditioning, inputs[-1], ramp[part], of_scale, cache)
        log_probs_BlV = policy_log_probs(logits_BlV, config)
        tokens_Bl = draw_tokens(log_probs_BlV, uniforms_BL[:, part])
        log_probs.append(token_log_probs(log_probs_BlV, tokens_Bl))
        is_nan.append(logits_BlV.isnan().any() | log_probs[-1].isnan().any())  # infinite logits: the second
        expected_codes.append(mean_codes(log_probs_BlV, tokenizer.codebook))
        tokens.append(tokens_Bl)
        latent_BDhw = tokenizer.add_scale(latent_BDhw, tokens_Bl, k)
        if on_scale is not None:
            on_scale(k, latent_BDhw)
    is_nan_S = torch.stack(is_nan)
    if is_nan_S.any():  # looked at once, in the end: it waits for the device
        scale = is_nan_S.tolist().index(True) + 1
        raise CheckpointError(
            f"the model's logits are infinite or NaN at scale {scale}: its weights hold NaN or infinity, "
            f"training has diverged, or guidance_scale {config.guidance_scale:g} is too large or temperature "
            f"{config.temperature:g} too small; go back to an earlier checkpoint, lower the learning rate, "
            "or change that setting of sampling"
        )
    return Samples(
        tokens=torch.cat(tokens, 1),
        log_probs=torch.cat(log_probs, 1),
        expected_codes=torch.cat(expected_codes, 1),
        inputs=torch.cat(inputs, 1),
        latent=latent_BDhw,
    )


def all_branches(conditioning: Conditioning, config: SamplingConfig) -> Conditioning:
    """The conditioning; with guidance on, followed by as many null conditions."""
    return conditioning.with_null() if config.is_guided else conditioning


def inputs_of_branches(inputs_BlD: Tensor, config: SamplingConfig) -> Tensor:
    """The inputs of `all_branches`: with guidance on, both branches see the same."""
    return inputs_BlD.repeat(2, 1, 1) if config.is_guided else inputs_BlD


def guided_logits(
    transformer: nn.Module,
    conditioning: Conditioning,
    inputs_BlD: Tensor,
    ramp: Ramp,
    config: SamplingConfig,
    cache: Any | None,
) -> Tensor:
    """(B, l, V) policy logits before filtering; with guidance, both branches run as one batch of 2B.

    Args:
        transformer: the model, or its distributed wrapper.
        conditioning: from `all_branches`.
        ramp: of these tokens.
    """
    logits_BlV = transformer(conditioning, inputs_of_branches(inputs_BlD, config), cache)
    return all_branches_logits(logits_BlV, ramp, config)
