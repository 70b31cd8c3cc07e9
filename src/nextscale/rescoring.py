"""Re-score tokens: their log-probabilities under exactly the sampling policy, by teacher forcing.

Shapes: B images · L tokens of all scales · l tokens of the scales or the block at hand · V codebook size ·
D codebook width
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextscale.base.checks import check_kind, found
from nextscale.base.errors import ConfigError
from nextscale.models.protocol import Conditioning, Reader
from nextscale.models.scales import ScaleSchedule
from nextscale.policy import (
    Ramp,
    SamplingConfig,
    all_branches_logits,
    policy_log_probs,
    policy_logits,
    token_log_probs,
)
from nextscale.sampling import all_branches, guided_logits, inputs_of_branches

if TYPE_CHECKING:
    from nextscale.pipeline import VARPipeline


def read_policy(
    transformer: nn.Module,
    schedule: ScaleSchedule,
    conditioning: Conditioning,
    inputs_BlD: Tensor,
    config: SamplingConfig,
    read: Reader,
    *,
    null_has_gradient: bool = True,
) -> dict[str, Tensor]:
    """What `read` makes of the policy logits before filtering, for all tokens in one teacher-forced pass.

    Args:
        transformer: the model, or its distributed wrapper.
        schedule: the model's scales, which a wrapper does not expose.
        inputs_BlD: from `Tokenizer.tokens_to_inputs`: (B, L - 1, D), or those of the first scales alone.
        read: gets the (B, l, V) logits of one block of tokens after the other, both branches already put
            together.
        null_has_gradient: whether the gradient flows through the null branch too. Without, that branch runs
            apart, and nothing of it is kept for the backward pass but its features. Where guidance stops,
            that branch is run on the scales before alone.
    """
    ramp = Ramp.of(config, schedule, inputs_BlD.device)
    num_guided = guided_tokens(config, schedule, inputs_BlD)
    if config.is_guided and not null_has_gradient:
        num_images = len(inputs_BlD)
        model: Any = getattr(transformer, "module", transformer)  # of a wrapper that synchronises gradients
        null = conditioning.with_null().select(slice(num_images, 2 * num_images))
        with torch.no_grad():
            guided_BlD = inputs_BlD if num_guided is None else inputs_BlD[:, : num_guided - 1]
            null_BlC = model.features(null, guided_BlD)
            null_BlC = F.pad(null_BlC, (0, 0, 0, inputs_BlD.shape[1] - guided_BlD.shape[1]))
        # Before 2.11 torch reuses the casts made here, which have no gradient, in the pass below.
        torch.clear_autocast_cache()

        def read_beside(logits_BlV: Tensor, at: slice) -> dict[str, Tensor]:
            with torch.no_grad():
                null_BlV = model.logits(null_BlC[:, at])
            return dict(read(policy_logits(logits_BlV, null_BlV, ramp[at], config), at))

        return transformer(conditioning, inputs_BlD, read=read_beside)

    def read_block(logits_BlV: Tensor, at: slice) -> dict[str, Tensor]:
        return dict(read(all_branches_logits(logits_BlV, ramp[at], config), at))

    conditioning, inputs_BlD = teacher_forced(conditioning, inputs_BlD, config)
    return transformer(conditioning, inputs_BlD, read=read_block, num_guided=num_guided)


def guided_tokens(config: SamplingConfig, schedule: ScaleSchedule, inputs_BlD: Tensor) -> int | None:
    """How many of these tokens are of the scales before `guidance_stop`: those that the null condition is run
    on. None where that is all of them, or where nothing is guided."""
    if not config.is_guided or config.guidance_stop is None:
        return None
    num_guided = sum(schedule.lengths[: config.guidance_stop])
    return num_guided if num_guided < inputs_BlD.shape[1] + 1 else None


def teacher_forced(
    conditioning: Conditioning, inputs_BlD: Tensor, config: SamplingConfig
) -> tuple[Conditioning, Tensor]:
    """What the model runs on: with guidance a batch of 2B, the null conditions last."""
    return all_branches(conditioning, config), inputs_of_branches(inputs_BlD, config)


def teacher_forced_logits(
    transformer: nn.Module,
    schedule: ScaleSchedule,
    conditioning: Conditioning,
    inputs_BlD: Tensor,
    config: SamplingConfig,
) -> Tensor:
    """(B, l, V) policy logits before filtering, of all tokens: much memory, for a look at a few images.

    Args:
        transformer, schedule, inputs_BlD: as in `read_policy`.
    """
    ramp = Ramp.of(config, schedule, inputs_BlD.device)[: inputs_BlD.shape[1] + 1]
    conditioning = all_branches(conditioning, config)
    return guided_logits(transformer, conditioning, inputs_BlD, ramp, config, cache=None)


def log_probs(
    pipe: "VARPipeline",
    conditions: Tensor | Sequence[int | str] | Conditioning,
    tokens: Tensor,
    sampling: SamplingConfig | None = None,
) -> Tensor:
    """Log-probability of every token under the policy that `sampling` describes, with gradient.

    Equal to what the sampler recorded, for any guidance, temperature, top-k and top-p. With guidance on, the
    gradient flows through both branches. A token that the current logits would filter out still counts as
    kept (docs/policy.md).

    Args:
        conditions: of each of the B images, its class by number or name, or its prompt of a model that draws
            by prompts; or a conditioning of them from `encode_conditions`.
        tokens: (B, L) integers below V, as `pipe(...)` returns them.
        sampling: the policy; by default the pipeline's, `pipe.sampling`.

    Returns:
        (B, L) float32.

    Raises:
        ConfigError: these are no tokens of the model, there are not as many conditions, or `sampling` is of
            another kind.
    """
    if sampling is not None:
        check_kind("sampling", sampling, SamplingConfig, "SamplingConfig(...)")
    config, model = sampling or pipe.sampling, pipe.transformer
    tokens = _checked_tokens(tokens, model.schedule.num_tokens, model.config.codebook_size)
    if not isinstance(conditions, Conditioning):
        asked: Any = pipe.conditions if pipe.num_classes else pipe.prompted
        conditions = model.encode_conditions(asked(conditions))
    if len(conditions) != len(tokens):
        raise ConfigError(
            f"conditions: got {len(conditions)}, expected {len(tokens)}: give one for each row of tokens"
        )

    def read(logits_BlV: Tensor, at: slice) -> dict[str, Tensor]:
        drawn_Bl = tokens[:, at]
        return {
            "log_probs": token_log_probs(policy_log_probs(logits_BlV, config, drawn_Bl=drawn_Bl), drawn_Bl)
        }

    inputs_BLD = pipe.tokenizer.tokens_to_inputs(tokens)
    return read_policy(model, model.schedule, conditions, inputs_BLD, config, read)["log_probs"]


def _checked_tokens(tokens: Tensor, num_tokens: int, num_codes: int) -> Tensor:
    """The tokens as int64; looking at their values waits for the device, where a wrong one would end all."""
    expected = f"the (B, {num_tokens}) integers that pipe(...).tokens are, of 0 to {num_codes - 1}"
    is_whole = isinstance(tokens, Tensor) and not (tokens.is_floating_point() or tokens.is_complex())
    if not is_whole or tokens.dtype == torch.bool or tokens.shape[1:] != (num_tokens,):
        raise ConfigError(f"tokens: got {found(tokens)}, expected {expected}")
    if tokens.numel() and not 0 <= tokens.min() <= tokens.max() < num_codes:
        lowest, highest = tokens.min().item(), tokens.max().item()
        raise ConfigError(f"tokens: got numbers of {lowest} to {highest}, expected {expected}")
    return tokens.long()
