"""Re-score what was drawn: log-probabilities under exactly the sampling policy, by teacher forcing.

Shapes: B images · L tokens of all scales · V codebook size
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from nextscale.models.var import VAR
from nextscale.policy import SamplingConfig, policy_log_probs, token_log_probs
from nextscale.sampling import guided_forward, with_null

if TYPE_CHECKING:
    from nextscale.pipeline import VARPipeline


def teacher_forced_logits(
    transformer: VAR,
    labels_B: Tensor,
    inputs_BLD: Tensor,
    config: SamplingConfig,
    wrapped: nn.Module | None = None,
) -> Tensor:
    """(B, L, V) policy logits before filtering, of all scales in one pass.

    Args:
        inputs_BLD: `tokenizer.tokens_to_inputs(tokens)`, (B, L - 1, D).
        wrapped: what to call in the transformer's place, such as its DistributedDataParallel.
    """
    ramp_L = transformer.schedule.guidance_ramp().to(labels_B.device)
    labels = with_null(labels_B, transformer, config)
    return guided_forward(wrapped or transformer, labels, inputs_BLD, ramp_L, config, cache=None)


def log_probs(
    pipe: "VARPipeline", labels: Tensor | list[int], tokens: Tensor, sampling: SamplingConfig | None = None
) -> Tensor:
    """Log-probability of every token under the policy that `sampling` describes, with gradient.

    Equal to what the sampler recorded, for any guidance, temperature, top-k and top-p; where guidance is on,
    the gradient flows through both branches. A token that the present logits would filter out is counted in
    the support it was drawn from (docs/policy.md).

    Args:
        labels: (B,) class indices.
        tokens: (B, L) int64, as `pipe(...)` returns them.
        sampling: the policy; by default the model's own conditional distribution.

    Returns:
        (B, L) float32.
    """
    config = sampling or SamplingConfig()
    labels_B = torch.as_tensor(labels, device=tokens.device)
    inputs_BLD = pipe.tokenizer.tokens_to_inputs(tokens)
    logits_BLV = teacher_forced_logits(pipe.transformer, labels_B, inputs_BLD, config)
    return token_log_probs(policy_log_probs(logits_BLV, config, drawn_Bl=tokens), tokens)
