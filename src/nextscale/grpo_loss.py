"""The loss of GRPO for next-scale models, with everything that is measured on the way.

Shapes: B images of one backward pass · L tokens of all scales · V codebook size · D codebook width
"""

import torch
from torch import Tensor, nn

from nextscale.base.metrics import Means
from nextscale.grpo import GRPOConfig
from nextscale.losses import clipped_surrogate, grpo_loss, token_weights
from nextscale.models.var import VAR
from nextscale.multipliers import EntropyFloor
from nextscale.policy import (
    SamplingConfig,
    exact_entropy,
    exact_kl,
    kept_tokens,
    policy_log_probs,
    token_log_probs,
)
from nextscale.rescoring import teacher_forced_logits
from nextscale.rollout import Rollout


class GRPOLoss:
    """The loss of some of a rollout's images.

    Args:
        config: the algorithm.
        sampling: the policy that drew, and is trained.
        transformer: what is trained; read for its schedule and its null class.
        reference: the frozen model of the KL; None where it is neither used nor measured.
    """

    def __init__(
        self, config: GRPOConfig, sampling: SamplingConfig, transformer: VAR, reference: VAR | None
    ) -> None:
        self.config, self.sampling = config, sampling
        self.transformer, self.reference = transformer, reference
        weights_L = token_weights(transformer.schedule.lengths, config.scale_weighting)
        self.weights_L = weights_L.to(transformer.pos_start.device)
        self.entropy_floor: EntropyFloor | None = None
        if config.entropy_floor is not None:
            self.entropy_floor = EntropyFloor(
                config.entropy_floor, config.entropy_floor_rate, transformer.schedule.num_scales
            )

    def __call__(
        self, model: nn.Module, rollout: Rollout, advantages_B: Tensor, part: slice, means: Means
    ) -> Tensor:
        """The loss, a mean over the images of `part`; what was measured goes into `means`.

        Args:
            model: the transformer, or what wraps it for several processes.
            advantages_B: of all the rollout's images.
        """
        tokens_BL, labels_B, inputs_BLD = rollout.tokens[part], rollout.labels[part], rollout.inputs[part]
        logits_BLV = teacher_forced_logits(
            self.transformer, labels_B, inputs_BLD, self.sampling, wrapped=model
        )
        log_probs_BLV = policy_log_probs(logits_BLV, self.sampling, drawn_Bl=tokens_BL)
        log_probs_BL = token_log_probs(log_probs_BLV, tokens_BL)
        surrogate = clipped_surrogate(
            log_probs_BL,
            rollout.log_probs[part],
            advantages_B[part],
            self.config.epsilon,
            self.config.epsilon_high,
        )
        # KL and entropy are of the unfiltered distributions: the filtered ones may have other supports.
        full_BLV = logits_BLV.log_softmax(-1) if self.sampling.is_filtered else log_probs_BLV
        entropy_BL = exact_entropy(full_BLV)
        kl_BL = self._kl(full_BLV, labels_B, inputs_BLD)
        loss = grpo_loss(
            surrogate.objective_BL,
            kl_BL,
            entropy_BL,
            self.weights_L,
            self.config.beta,
            self._entropy_coef(),
        )
        means.add(loss=loss, entropy=entropy_BL)
        for k, entropy_Bl in enumerate(entropy_BL.split(self.transformer.schedule.lengths, 1), 1):
            means.put(f"entropy/scale_{k}", entropy_Bl)
        if kl_BL is not None:
            means.add(kl=kl_BL, kl_per_image=kl_BL.sum(1))
        is_low_BL, is_high_BL = surrogate.is_low_clipped_BL, surrogate.is_high_clipped_BL
        means.put("clip_ratio/low_mean", is_low_BL.float())
        means.put("clip_ratio/high_mean", is_high_BL.float())
        means.put("clip_ratio/region_mean", (is_low_BL | is_high_BL).float())
        difference_BL = (log_probs_BL.detach() - rollout.log_probs[part]).abs()
        for name in ("mean", "max"):
            means.put(f"sampling/sampling_logp_difference/{name}", difference_BL)
        for name in ("min", "mean", "max"):
            means.put(f"sampling/importance_sampling_ratio/{name}", surrogate.ratio_BL)
        if self.sampling.is_filtered:
            removed_BLV = ~kept_tokens(logits_BLV, self.sampling)
            means.put("sampling/filtered_mass", (full_BLV.detach().exp() * removed_BLV).sum(-1))
        return loss

    def finish_step(self, metrics: dict[str, float]) -> dict[str, float]:
        """Adapt what adapts to the metrics of a step, over all processes; returns what to log besides."""
        if self.entropy_floor is None:
            return {}
        scales = range(1, self.transformer.schedule.num_scales + 1)
        used = {f"entropy_floor/scale_{k}": self.entropy_floor.values[k - 1] for k in scales}
        self.entropy_floor.update([metrics[f"entropy/scale_{k}"] for k in scales])
        return used

    def _entropy_coef(self) -> float | Tensor:
        if self.entropy_floor is None:
            return self.config.entropy_coef
        pairs = zip(self.entropy_floor.values, self.transformer.schedule.lengths, strict=True)
        extra_L = torch.tensor([extra for extra, length in pairs for _ in range(length)])
        return (self.config.entropy_coef + extra_L).to(self.weights_L)

    def _kl(self, full_BLV: Tensor, labels_B: Tensor, inputs_BLD: Tensor) -> Tensor | None:
        if self.reference is None:
            return None
        with torch.no_grad():
            reference_BLV = teacher_forced_logits(self.reference, labels_B, inputs_BLD, self.sampling)
        return exact_kl(full_BLV, reference_BLV.log_softmax(-1))
