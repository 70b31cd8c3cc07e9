"""From a microbatch to its loss: the policy re-scored, a surrogate of the reward, KL and entropy.

A loss is a pure function of a microbatch's quantities, and a line in `LOSSES`.

Shapes: B images of one microbatch · S scales · L tokens of all scales · V codebook size · D codebook width

Every mean says its denominator: tokens are weighted within an image by `token_weights` (they sum to 1),
images count alike.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from accelerate import PartialState
from torch import Tensor, nn

from nextscale.base.errors import ConfigError
from nextscale.base.processes import microbatch_shares
from nextscale.base.records import did_you_mean
from nextscale.grpo import GRPOConfig, ScaleWeighting
from nextscale.models.protocol import Conditioning
from nextscale.models.scales import ScaleSchedule
from nextscale.pipeline import Drawn
from nextscale.policy import (
    SamplingConfig,
    exact_entropy,
    exact_kl,
    kept_tokens,
    policy_log_probs,
    token_log_probs,
)
from nextscale.reference import Reference
from nextscale.rescoring import teacher_forced_logits


@dataclass(frozen=True)
class Microbatch:
    """Images of one backward pass, as they were drawn.

    Attributes:
        conditioning: of the B images.
        tokens: (B, L) int64.
        inputs: (B, L - 1, D) teacher-forcing inputs of the tokens.
        log_probs: (B, L) float32, recorded while sampling.
        advantages: (B,), or (B, S), or (B, L): how much better than expected.
    """

    conditioning: Conditioning
    tokens: Tensor
    inputs: Tensor
    log_probs: Tensor
    advantages: Tensor


def microbatches(
    drawn: Drawn, advantages: Tensor, num_images: int, size: int
) -> Iterator[tuple[Microbatch, float, bool]]:
    """This process's images in parts of at most `size`, equally many in all processes: each with the weight
    of its mean, and whether it is the last.

    Processes average their gradients. With these weights, that is a mean over the images of all of them,
    which may have more or fewer. Where one has too few for a part, an image of weight 0 stands in.

    Args:
        advantages: of the images, their first axis as in `Microbatch`.
        num_images: of all processes.
    """
    num_processes = PartialState().num_processes
    for images, is_last in microbatch_shares(num_images, size):
        part = slice(images.start, images.stop) if images else slice(0, 1)
        batch = Microbatch(
            conditioning=drawn.conditioning.select(part),
            tokens=drawn.tokens[part],
            inputs=drawn.inputs[part],
            log_probs=drawn.log_probs[part],
            advantages=advantages[part],
        )
        yield batch, num_processes * len(images) / num_images, is_last


@dataclass(frozen=True)
class Quantities:
    """What a loss may use of a microbatch.

    Attributes:
        log_probs_BL: of the tokens under the present policy, with gradient.
        old_log_probs_BL: of the tokens under the policy that drew them.
        advantages_BL: (B, L), or (B, 1) where all tokens of an image have the same.
        kl_BL: exact KL to the reference in nats, with gradient; None without a reference.
        entropy_BL: exact entropy in nats, with gradient.
        weights_L: weight of each token in the mean of the surrogate over an image; they sum to 1.
        kl_weights_L: the same for the KL.
        entropy_weights_L: the same for the entropy.
        entropy_coef: coefficient of the entropy, one for all tokens or (L,).
    """

    log_probs_BL: Tensor
    old_log_probs_BL: Tensor
    advantages_BL: Tensor
    kl_BL: Tensor | None
    entropy_BL: Tensor
    weights_L: Tensor
    kl_weights_L: Tensor
    entropy_weights_L: Tensor
    entropy_coef: float | Tensor


@dataclass(frozen=True)
class LossOutput:
    """A loss and what was measured on the way.

    Attributes:
        loss: a mean over the images of the microbatch, to be minimised.
        metrics: name to detached values of any shape, averaged over a step; where a name ends in "/max" the
            largest counts, where it ends in "/min" the smallest.
    """

    loss: Tensor
    metrics: dict[str, Tensor]


Loss = Callable[[Quantities, GRPOConfig], LossOutput]


def grpo_loss(q: Quantities, config: GRPOConfig) -> LossOutput:
    """The clipped surrogate of GRPO, less KL, plus entropy.

    At fixed length, GRPO's, DAPO's, BNPO's and Dr. GRPO's means over tokens differ by a constant factor
    alone.

    Source: GRPO (arXiv 2402.03300), equation 3, with the KL as an exact sum over the codebook; PPO (arXiv
    1707.06347), equation 7; DAPO (arXiv 2503.14476) for the upper bound of its own.
    """
    surrogate = clipped_surrogate(
        q.log_probs_BL, q.old_log_probs_BL, q.advantages_BL, config.epsilon, config.epsilon_high
    )
    is_low_BL, is_high_BL = surrogate.is_low_clipped_BL, surrogate.is_high_clipped_BL
    metrics = {
        "clip_ratio/low_mean": is_low_BL.float(),
        "clip_ratio/high_mean": is_high_BL.float(),
        "clip_ratio/region_mean": (is_low_BL | is_high_BL).float(),
        **{
            f"sampling/importance_sampling_ratio/{each}": surrogate.ratio_BL
            for each in ("min", "mean", "max")
        },
    }
    return LossOutput(regularised(surrogate.objective_BL, q, config.beta), metrics)


LOSSES: dict[str, Loss] = {"grpo": grpo_loss}
"""Name, as `GRPOConfig.loss_type` has it, to loss."""


def find_loss(name: str) -> Loss:
    """The loss of this name.

    Raises:
        ConfigError: there is none; names the nearest.
    """
    if name not in LOSSES:
        raise ConfigError(f"unknown grpo.loss_type '{name}'{did_you_mean(name, LOSSES)}")
    return LOSSES[name]


class Objective:
    """Measures a microbatch under the present policy and gives its loss.

    Args:
        config: the algorithm.
        sampling: the policy that drew, and is trained.
        schedule: the model's scales.
        reference: the frozen model of the KL; None where it is neither used nor measured.
        device: where the microbatches are.

    Raises:
        ConfigError: an unknown loss, or weights that do not fit the scales.
    """

    def __init__(
        self,
        config: GRPOConfig,
        sampling: SamplingConfig,
        schedule: ScaleSchedule,
        reference: Reference | None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.config, self.sampling, self.schedule, self.reference = config, sampling, schedule, reference
        with torch.device(device):
            weights = loss_weights(schedule.lengths, config)
        self.weights_L, self.kl_weights_L, self.entropy_weights_L = weights
        self.loss = find_loss(config.loss_type)

    def __call__(
        self, model: nn.Module, batch: Microbatch, entropy_bonuses: Sequence[float] | None = None
    ) -> LossOutput:
        """The loss of a microbatch and its metrics.

        Args:
            model: the transformer, or what wraps it for several processes.
            entropy_bonuses: S weights, each of one scale's entropy, besides `entropy_coef`.
        """
        # One teacher-forced pass gives the distribution that every token was drawn from, with gradient.
        logits_BLV = teacher_forced_logits(
            model, self.schedule, batch.conditioning, batch.inputs, self.sampling
        )
        log_probs_BLV = policy_log_probs(logits_BLV, self.sampling, drawn_Bl=batch.tokens)
        # KL and entropy are of the unfiltered distributions: the filtered ones may have other supports.
        full_BLV = logits_BLV.log_softmax(-1) if self.sampling.is_filtered else log_probs_BLV
        quantities = Quantities(
            log_probs_BL=token_log_probs(log_probs_BLV, batch.tokens),
            old_log_probs_BL=batch.log_probs,
            advantages_BL=per_token(batch.advantages, self.schedule),
            entropy_BL=exact_entropy(full_BLV),
            kl_BL=self._kl(full_BLV, batch),
            weights_L=self.weights_L,
            kl_weights_L=self.kl_weights_L,
            entropy_weights_L=self.entropy_weights_L,
            entropy_coef=self._entropy_coef(entropy_bonuses),
        )
        output = self.loss(quantities, self.config)
        metrics = {"loss": output.loss, **self._metrics(quantities), **output.metrics}
        if self.sampling.is_filtered:
            removed_BLV = ~kept_tokens(logits_BLV, self.sampling)
            metrics["sampling/filtered_mass"] = (full_BLV.detach().exp() * removed_BLV).sum(-1)
        # One value for each image: a step's mean then weighs parts of unequal sizes by their images.
        values = {
            name: each.expand(len(batch.tokens)) if each.ndim == 0 else each for name, each in metrics.items()
        }
        return LossOutput(output.loss, {name: each.detach() for name, each in values.items()})

    def _kl(self, full_BLV: Tensor, batch: Microbatch) -> Tensor | None:
        if self.reference is None:
            return None
        return exact_kl(full_BLV, self.reference.log_probs(batch.conditioning, batch.inputs, self.sampling))

    def _entropy_coef(self, bonuses: Sequence[float] | None) -> float | Tensor:
        if bonuses is None:
            return self.config.entropy_coef
        # Concatenated, not repeated by counts: that shape would depend on data, which a plan has none of.
        pairs = zip(bonuses, self.schedule.lengths, strict=True)
        bonuses_L = torch.cat([torch.full((length,), bonus) for bonus, length in pairs])
        return (self.config.entropy_coef + bonuses_L).to(self.weights_L)

    def _metrics(self, q: Quantities) -> dict[str, Tensor]:
        """What is measured whatever the loss is."""
        difference_BL = (q.log_probs_BL.detach() - q.old_log_probs_BL).abs()
        metrics: dict[str, Tensor] = {} if q.kl_BL is None else {"kl_per_image": q.kl_BL.sum(1)}
        for name, values_BL in (("entropy", q.entropy_BL), ("kl", q.kl_BL)):
            if values_BL is not None:
                scales = enumerate(values_BL.split(self.schedule.lengths, 1), 1)
                metrics |= {name: values_BL, **{f"{name}/scale_{k}": each for k, each in scales}}
        return metrics | {
            f"sampling/sampling_logp_difference/{each}": difference_BL for each in ("mean", "max")
        }


# ---- the parts of a loss


def loss_weights(lengths: tuple[int, ...], config: GRPOConfig) -> tuple[Tensor, Tensor, Tensor]:
    """`token_weights` of the surrogate, of the KL and of the entropy; one tensor where the options are equal.

    Raises:
        ConfigError: as `token_weights` does.
    """
    made: dict[ScaleWeighting, Tensor] = {}

    def weights_L(option: str) -> Tensor:
        weighting = getattr(config, option)
        if weighting not in made:
            made[weighting] = token_weights(lengths, weighting, option)
        return made[weighting]

    return weights_L("scale_weighting"), weights_L("kl_scale_weighting"), weights_L("entropy_scale_weighting")


def token_weights(
    lengths: tuple[int, ...], weighting: ScaleWeighting, option: str = "scale_weighting"
) -> Tensor:
    """(L,) float32 weight of each token in the mean over an image; they sum to 1.

    Args:
        lengths: tokens of each scale.
        weighting: "token" counts all tokens alike, so that the finest scale has most of the weight; "scale"
            gives every scale the same total; or the total weight of each scale, up to a factor.
        option: its name, for the error.

    Raises:
        ConfigError: weights that are not one non-negative number a scale, with a positive sum.
    """
    if weighting == "token":
        totals = [float(length) for length in lengths]
    elif weighting == "scale":
        totals = [1.0] * len(lengths)
    else:
        totals = [float(total) for total in weighting]
    if len(totals) != len(lengths) or min(totals) < 0 or sum(totals) <= 0:
        raise ConfigError(f"{option} needs {len(lengths)} non-negative weights, one a scale, got {weighting}")
    each = [total / sum(totals) / length for total, length in zip(totals, lengths, strict=True)]
    return torch.cat([torch.full((length,), weight) for length, weight in zip(lengths, each, strict=True)])


def per_token(advantages: Tensor, schedule: ScaleSchedule) -> Tensor:
    """(B,), (B, S) or (B, L) advantages as something that broadcasts to (B, L)."""
    if advantages.ndim == 1:
        return advantages[:, None]
    if advantages.shape[1] == schedule.num_tokens:
        return advantages
    return advantages[:, schedule.scale_of_token().to(advantages.device)]


@dataclass(frozen=True)
class Surrogate:
    """The clipped surrogate, and what was clipped.

    Attributes:
        objective_BL: to be maximised.
        ratio_BL: importance ratios, detached.
        is_low_clipped_BL: negative advantage and ratio below 1 - epsilon: no gradient.
        is_high_clipped_BL: positive advantage and ratio above 1 + epsilon_high: no gradient.
    """

    objective_BL: Tensor
    ratio_BL: Tensor
    is_low_clipped_BL: Tensor
    is_high_clipped_BL: Tensor


def clipped_surrogate(
    log_probs_BL: Tensor,
    old_log_probs_BL: Tensor,
    advantages_BL: Tensor,
    epsilon: float,
    epsilon_high: float | None = None,
) -> Surrogate:
    """min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A) of each token, r its importance ratio.

    Args:
        log_probs_BL: under the present policy, with gradient.
        old_log_probs_BL: recorded while sampling.
        advantages_BL: (B, L) or (B, 1).
        epsilon_high: by default epsilon.

    Source: PPO (arXiv 1707.06347), equation 7; DAPO (arXiv 2503.14476) for the upper bound of its own.
    """
    high = epsilon if epsilon_high is None else epsilon_high
    ratio_BL = (log_probs_BL - old_log_probs_BL).exp()
    clipped_BL = ratio_BL.clamp(1 - epsilon, 1 + high)
    with torch.no_grad():
        is_low = (ratio_BL < 1 - epsilon) & (advantages_BL < 0)
        is_high = (ratio_BL > 1 + high) & (advantages_BL > 0)
    objective_BL = torch.minimum(ratio_BL * advantages_BL, clipped_BL * advantages_BL)
    return Surrogate(objective_BL, ratio_BL.detach(), is_low, is_high)


def regularised(objective_BL: Tensor, q: Quantities, beta: float) -> Tensor:
    """-(objective - beta KL + entropy_coef entropy), each a mean over images of a mean over tokens, with
    weights of its own."""
    parts: list[tuple[Tensor, Tensor]] = []
    if q.kl_BL is not None and beta:
        parts.append((-beta * q.kl_BL, q.kl_weights_L))
    if isinstance(q.entropy_coef, Tensor) or q.entropy_coef:
        parts.append((q.entropy_coef * q.entropy_BL, q.entropy_weights_L))
    apart = 0.0
    for values_BL, weights_L in parts:
        # What has the objective's weights is added to it before the mean, which then rounds once.
        if weights_L is q.weights_L:
            objective_BL = objective_BL + values_BL
        else:
            apart = apart + weighted_mean(values_BL, weights_L)
    return -(weighted_mean(objective_BL, q.weights_L) + apart)


def weighted_mean(values_BL: Tensor, weights_L: Tensor) -> Tensor:
    """Mean over images of the weighted mean over tokens."""
    return (values_BL * weights_L).sum(1).mean()
