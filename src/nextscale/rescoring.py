"""Re-score tokens: their log-probabilities under exactly the sampling policy, by teacher forcing.

Shapes: B images · L tokens of all scales · V codebook size · D codebook width
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from nextscale.models.protocol import Conditioning
from nextscale.models.scales import ScaleSchedule
from nextscale.policy import SamplingConfig, policy_log_probs, token_log_probs
from nextscale.sampling import all_branches, guided_logits

if TYPE_CHECKING:
    from nextscale.pipeline import VARPipeline


def teacher_forced_logits(
    transformer: nn.Module,
    schedule: ScaleSchedule,
    conditioning: Conditioning,
    inputs_BLD: Tensor,
    config: SamplingConfig,
) -> Tensor:
    """(B, L, V) policy logits before filtering, for all scales in one pass.

    Args:
        transformer: the model, or its distributed wrapper.
        schedule: the model's scales, which a wrapper does not expose.
        inputs_BLD: (B, L - 1, D), from `Tokenizer.tokens_to_inputs`.
    """
    ramp_L = schedule.guidance_ramp().to(inputs_BLD.device)
    return guided_logits(
        transformer, all_branches(conditioning, config), inputs_BLD, ramp_L, config, cache=None
    )


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
        conditions: B classes by number or name, or a conditioning of B images from `encode_conditions`.
        tokens: (B, L) int64, as `pipe(...)` returns them.
        sampling: the policy; by default the pipeline's, `pipe.sampling`.

    Returns:
        (B, L) float32.
    """
    config = sampling or pipe.sampling
    if not isinstance(conditions, Conditioning):
        conditions = pipe.transformer.encode_conditions(pipe.conditions(conditions))
    inputs_BLD = pipe.tokenizer.tokens_to_inputs(tokens)
    logits_BLV = teacher_forced_logits(
        pipe.transformer, pipe.transformer.schedule, conditions, inputs_BLD, config
    )
    return token_log_probs(policy_log_probs(logits_BLV, config, drawn_Bl=tokens), tokens)
