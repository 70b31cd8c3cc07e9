"""Draw images scale by scale, recording the log-probability of each token under the policy that drew it.

Shapes: B images · L tokens of all scales · l tokens of one scale · V codebook size · D codebook width
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nextscale.base.errors import CheckpointError
from nextscale.models.var import VAR, KVCache
from nextscale.models.vqvae import VQVAE
from nextscale.policy import SamplingConfig, draw_tokens, policy_log_probs, policy_logits, token_log_probs


@dataclass(frozen=True)
class Samples:
    """What was drawn.

    Attributes:
        tokens: (B, L) int64.
        log_probs: (B, L) float32, each token's under the policy.
        latent: (B, D, h, w), ready for `VQVAE.latent_to_images`.
    """

    tokens: Tensor
    log_probs: Tensor
    latent: Tensor


@torch.no_grad()
def sample(
    transformer: VAR, tokenizer: VQVAE, labels_B: Tensor, uniforms_BL: Tensor, config: SamplingConfig
) -> Samples:
    """One image for each label, in as many forward steps as there are scales.

    Args:
        transformer: in eval mode or not; it holds no dropout.
        tokenizer: its quantizer turns tokens into the next scale's inputs.
        labels_B: class indices.
        uniforms_BL: one number in [0, 1) a token; they decide the images (see `seeding.group_uniforms`).
        config: the policy to draw from.

    Raises:
        CheckpointError: the model's logits are not numbers.
    """
    schedule, quantizer = transformer.schedule, tokenizer.quantize
    labels_B = with_null(labels_B, transformer, config)
    ramp_L = schedule.guidance_ramp().to(uniforms_BL.device)
    cache, latent_BDhw = KVCache(), quantizer.empty_latent(len(uniforms_BL))
    tokens, log_probs = [], []
    for k, part in enumerate(schedule.slices):
        if k == 0:
            inputs_BlD = latent_BDhw.new_zeros(len(uniforms_BL), 0, latent_BDhw.shape[1])
        else:
            inputs_BlD = quantizer.next_inputs(latent_BDhw, k)
        logits_BlV = guided_forward(transformer, labels_B, inputs_BlD, ramp_L[part], config, cache)
        if logits_BlV.isnan().any():  # one wait for the device a scale
            raise CheckpointError(
                f"the model's logits are NaN at scale {k + 1}: its weights hold NaN or infinity, or training "
                "has diverged; go back to an earlier checkpoint, or lower the learning rate"
            )
        log_probs_BlV = policy_log_probs(logits_BlV, config)
        tokens_Bl = draw_tokens(log_probs_BlV, uniforms_BL[:, part])
        log_probs.append(token_log_probs(log_probs_BlV, tokens_Bl))
        tokens.append(tokens_Bl)
        latent_BDhw = quantizer.add_scale(latent_BDhw, tokens_Bl, k)
    return Samples(torch.cat(tokens, 1), torch.cat(log_probs, 1), latent_BDhw)


def with_null(labels_B: Tensor, transformer: VAR, config: SamplingConfig) -> Tensor:
    """The labels, followed by as many null labels where guidance needs the null class as well."""
    if not config.is_guided:
        return labels_B
    return torch.cat([labels_B, torch.full_like(labels_B, transformer.config.num_classes)])


def guided_forward(
    transformer: nn.Module,
    labels: Tensor,
    inputs_BlD: Tensor,
    ramp_l: Tensor,
    config: SamplingConfig,
    cache: KVCache | None,
) -> Tensor:
    """(B, l, V) policy logits; with guidance both branches run as one batch of 2B.

    Args:
        labels: (B,), or (2B,) with the null class in the second half where guidance is on.
    """
    if not config.is_guided:
        return policy_logits(transformer(labels, inputs_BlD, cache), None, ramp_l, config)
    cond_BlV, uncond_BlV = transformer(labels, inputs_BlD.repeat(2, 1, 1), cache).chunk(2)
    return policy_logits(cond_BlV, uncond_BlV, ramp_l, config)
