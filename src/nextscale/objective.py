"""From a microbatch to its loss: the policy re-scored by teacher forcing, and what the loss needs measured.

Shapes: B images of one microbatch · S scales · L tokens of all scales · l of one block · V codebook size ·
C width of the features · D codebook width
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from accelerate import PartialState
from torch import Tensor, nn

from nextscale.base.errors import ConfigError
from nextscale.base.processes import microbatch_shares
from nextscale.drawing import Drawn
from nextscale.grpo import GRPOConfig
from nextscale.losses import LossOutput, Quantities, find_loss, loss_weights, trained_lengths
from nextscale.models.protocol import Conditioning, Reader
from nextscale.models.scales import ScaleSchedule
from nextscale.policy import (
    Ramp,
    SamplingConfig,
    exact_entropy,
    exact_kl,
    kept_tokens,
    kl_divergence,
    policy_log_probs,
    token_log_probs,
)
from nextscale.reference import Reference
from nextscale.rescoring import read_policy


@dataclass(frozen=True)
class Microbatch:
    """Images of one backward pass, as they were drawn.

    Attributes:
        conditioning: of the B images.
        tokens: (B, L) int64.
        inputs: (B, L - 1, D) teacher-forcing inputs of the tokens.
        log_probs: (B, L) float32, recorded while sampling.
        advantages: (B,), or (B, S), or (B, L): how much better than expected.
        old_log_probs: (B, l) float32, of the trained tokens under the model before its first update on them;
            None until that is known, which is in the first iteration.
        reference_features: from `Reference.features`, on any device; None until they are known.
    """

    conditioning: Conditioning
    tokens: Tensor
    inputs: Tensor
    log_probs: Tensor
    advantages: Tensor
    old_log_probs: Tensor | None = None
    reference_features: Tensor | None = None


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
class Coefficients:
    """What controllers turn from step to step.

    Attributes:
        beta: of the KL.
        entropy_bonuses: of each trained scale's entropy, besides `entropy_coef`; None where there are none.
    """

    beta: float
    entropy_bonuses: Sequence[float] | None = None


class Objective:
    """Measures a microbatch under the present policy and gives its loss.

    Args:
        config: the algorithm.
        sampling: the policy that drew, and is trained.
        schedule: the model's scales.
        reference: the frozen model of the KL; None where it is neither used nor measured.
        device: where the microbatches are.

    Attributes:
        lengths: tokens of each scale that is trained.

    Raises:
        ConfigError: an unknown loss, more scales to train than there are, weights that do not fit them, or
            an option of guidance without effect.
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
        self.reference_sampling = sampling
        if config.reference_guidance_scale is not None:
            self.reference_sampling = sampling.replace(guidance_scale=config.reference_guidance_scale)
        check_guidance(config, sampling)
        self.lengths = trained_lengths(schedule.lengths, config)
        with torch.device(device):
            weights = loss_weights(schedule.lengths, config)
        self.weights_L, self.kl_weights_L, self.entropy_weights_L = weights
        self.loss = find_loss(config.loss_type)

    def __call__(
        self, model: nn.Module, batch: Microbatch, coefficients: Coefficients | None = None
    ) -> LossOutput:
        """The loss of a microbatch and its metrics.

        Args:
            model: the transformer, or what wraps it for several processes.
            coefficients: what controllers turn; by default as the options say.
        """
        # The reference runs first, while nothing is held for the backward pass, and once a rollout.
        num_tokens = sum(self.lengths)
        inputs_BLD = batch.inputs[:, : num_tokens - 1]
        features_BLC = None if self.reference is None else self.reference_features(batch)

        # One teacher-forced pass gives the distribution that every token was drawn from, with gradient.
        coefficients = coefficients or Coefficients(self.config.beta)
        entropy_coef = self._entropy_coef(coefficients.entropy_bonuses)
        has_entropy_loss = isinstance(entropy_coef, Tensor) or entropy_coef > 0
        read = self._reader(batch.tokens, features_BLC, has_entropy_loss)
        of_tokens = read_policy(
            model,
            self.schedule,
            batch.conditioning,
            inputs_BLD,
            self.sampling,
            read,
            null_has_gradient=self.config.trained_branches == "both",
        )

        # In a rollout's first iteration the policy is the one to improve on. Its own log-probs are taken, not
        # the sampler's, which differ in low precision: all ratios are then exactly 1.
        log_probs_BL, sampled_BL = of_tokens["log_probs"], batch.log_probs[:, :num_tokens]
        old_BL = log_probs_BL.detach() if batch.old_log_probs is None else batch.old_log_probs
        mismatch_BL = mismatch_ratios(old_BL, sampled_BL, self.config)
        quantities = Quantities(
            log_probs_BL=log_probs_BL,
            old_log_probs_BL=old_BL,
            importance_BL=mismatch_BL if self.config.importance_sampling_correction else None,
            advantages_BL=per_token(batch.advantages, self.schedule)[:, :num_tokens],
            entropy_BL=of_tokens["entropy"],
            kl_BL=of_tokens.get("kl_in_loss", of_tokens.get("kl")),
            weights_L=self.weights_L,
            kl_weights_L=self.kl_weights_L,
            entropy_weights_L=self.entropy_weights_L,
            beta=0.0 if self.config.kl_in_reward else coefficients.beta,
            entropy_coef=entropy_coef,
            lengths=self.lengths,
        )
        output = self.loss(quantities, self.config)

        metrics = {"loss": output.loss, **self._metrics(of_tokens), **output.metrics}
        difference_BL = (old_BL - sampled_BL).abs()
        for each in ("mean", "max"):
            metrics[f"sampling/sampling_logp_difference/{each}"] = difference_BL
        for each in ("min", "mean", "max"):
            metrics[f"sampling/importance_sampling_ratio/{each}"] = mismatch_BL
        if self.sampling.is_filtered:
            metrics["sampling/filtered_mass"] = of_tokens["filtered_mass"]
        # One value for each image: a step's mean then weighs parts of unequal sizes by their images.
        values = {
            name: each.expand(len(batch.tokens)) if each.ndim == 0 else each for name, each in metrics.items()
        }
        kept = {}
        if self.config.num_iterations > 1:
            kept = {"old_log_probs": old_BL}
            if features_BLC is not None:
                known = batch.reference_features
                kept["reference_features"] = features_BLC if known is None else known
        return LossOutput(output.loss, {name: each.detach() for name, each in values.items()}, kept)

    def reference_features(self, batch: Microbatch) -> Tensor:
        """What the reference makes of the trained tokens, unless it is known, where the microbatch is."""
        assert self.reference is not None, "it is asked where there is one"
        if batch.reference_features is not None:
            return batch.reference_features.to(batch.inputs.device)
        inputs_BlD = batch.inputs[:, : sum(self.lengths) - 1]
        return self.reference.features(batch.conditioning, inputs_BlD, self.reference_sampling)

    @torch.no_grad()
    def divergence(self, model: nn.Module, batch: Microbatch) -> tuple[Tensor, Tensor]:
        """(B, L) log policy - log reference of the drawn tokens, and its expectation, the exact KL, in nats;
        of the trained tokens. The policy is the one that draws, filtered or not, the reference unfiltered."""
        reference, inputs_BLD = self.reference, batch.inputs[:, : sum(self.lengths) - 1]
        assert reference is not None, "with beta there is a reference"
        features_BLC = self.reference_features(batch)
        ramp = Ramp.of(self.reference_sampling, self.schedule, inputs_BLD.device)

        def read(logits_BlV: Tensor, at: slice) -> dict[str, Tensor]:
            # Of the policy that draws, filtered or not: as an advantage, the log-ratio of what it drew then
            # has the gradient of this very KL. What may be drawn is possible in an unfiltered reference.
            drawn_Bl = batch.tokens[:, at]
            ours_BlV = policy_log_probs(logits_BlV, self.sampling, drawn_Bl)
            theirs_BlV = reference.log_probs(features_BLC[:, at], ramp[at], self.reference_sampling)
            log_ratios_Bl = token_log_probs(ours_BlV, drawn_Bl) - token_log_probs(theirs_BlV, drawn_Bl)
            finite_BlV = torch.where(ours_BlV.isinf(), theirs_BlV, ours_BlV)  # never drawn: costs nothing
            return {"log_ratios": log_ratios_Bl, "kl": exact_kl(finite_BlV, theirs_BlV, ours_BlV.exp())}

        found = read_policy(model, self.schedule, batch.conditioning, inputs_BLD, self.sampling, read)
        return found["log_ratios"], found["kl"]

    def _reader(self, tokens_BL: Tensor, features_BLC: Tensor | None, has_entropy_loss: bool) -> Reader:
        """What is read of the policy logits of a block of tokens: all that needs the whole codebook.

        Args:
            features_BLC: the reference's, of all trained tokens.
            has_entropy_loss: whether the entropy needs a gradient.
        """
        sampling, reference, estimator = self.sampling, self.reference, self.config.kl_estimator
        has_kl_loss = self.config.beta > 0 and not self.config.kl_in_reward
        ramp = Ramp.of(self.reference_sampling, self.schedule, tokens_BL.device)

        def read(logits_BlV: Tensor, at: slice) -> dict[str, Tensor]:
            drawn_Bl = tokens_BL[:, at]
            kept_BlV = kept_tokens(logits_BlV, sampling) if sampling.is_filtered else None
            policy_BlV = policy_log_probs(logits_BlV, sampling, drawn_Bl, kept_BlV)
            found = {"log_probs": token_log_probs(policy_BlV, drawn_Bl)}

            # KL and entropy are of the unfiltered distributions: the filtered ones may have other supports.
            # What is only logged needs no gradient.
            if not has_kl_loss and not has_entropy_loss:
                logits_BlV, policy_BlV = logits_BlV.detach(), policy_BlV.detach()
            full_BlV = policy_BlV if kept_BlV is None else logits_BlV.log_softmax(-1)
            probs_BlV = full_BlV.exp()
            if reference is not None:
                assert features_BLC is not None, "a reference has features"
                theirs_BlV = reference.log_probs(features_BLC[:, at], ramp[at], self.reference_sampling)
                is_exact = estimator == "reverse" or not has_kl_loss
                with torch.set_grad_enabled(torch.is_grad_enabled() and has_kl_loss and is_exact):
                    found["kl"] = exact_kl(full_BlV, theirs_BlV, probs_BlV)  # logged whatever the loss has
                if not is_exact:
                    found["kl_in_loss"] = kl_divergence(full_BlV, theirs_BlV, probs_BlV, drawn_Bl, estimator)
            with torch.set_grad_enabled(torch.is_grad_enabled() and has_entropy_loss):
                found["entropy"] = exact_entropy(full_BlV, probs_BlV)
            if kept_BlV is not None:
                found["filtered_mass"] = (probs_BlV.detach() * ~kept_BlV).sum(-1)
            return found

        return read

    def _entropy_coef(self, bonuses: Sequence[float] | None) -> float | Tensor:
        if bonuses is None:
            return self.config.entropy_coef
        # Concatenated, not repeated by counts: that shape would depend on data, which a plan has none of.
        pairs = zip(bonuses, self.lengths, strict=True)
        bonuses_L = torch.cat([torch.full((length,), bonus) for bonus, length in pairs])
        return (self.config.entropy_coef + bonuses_L).to(self.weights_L)

    def _metrics(self, of_tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What is measured of the distributions whatever the loss is."""
        metrics = {"kl_per_image": of_tokens["kl"].sum(1)} if "kl" in of_tokens else {}
        for name in ("entropy", "kl"):
            if name in of_tokens:
                values_BL = of_tokens[name]
                scales = enumerate(values_BL.split(self.lengths, 1), 1)
                metrics |= {name: values_BL, **{f"{name}/scale_{k}": each for k, each in scales}}
        return metrics


def check_guidance(config: GRPOConfig, sampling: SamplingConfig) -> None:
    """Check that options of guidance have an effect on a policy.

    Raises:
        ConfigError: one has none.
    """
    if config.trained_branches != "both" and not sampling.is_guided:
        raise ConfigError(
            f"grpo.trained_branches {config.trained_branches} has no effect without guidance: set "
            "sampling.guidance_scale, or remove it"
        )
    if config.reference_guidance_scale == sampling.guidance_scale:
        raise ConfigError(
            f"grpo.reference_guidance_scale {config.reference_guidance_scale} has no effect, since "
            "sampling.guidance_scale is the same: set another, or remove it"
        )


def per_token(advantages: Tensor, schedule: ScaleSchedule) -> Tensor:
    """(B,), (B, S) or (B, L) advantages as something that broadcasts to (B, L)."""
    if advantages.ndim == 1:
        return advantages[:, None]
    if advantages.shape[1] == schedule.num_tokens:
        return advantages
    return advantages[:, schedule.scale_of_token().to(advantages.device)]


def mismatch_ratios(old_log_probs_BL: Tensor, sampled_BL: Tensor, config: GRPOConfig) -> Tensor:
    """Probability of the tokens under the trainer's policy, by that with which the sampler drew them.

    The two are one policy, computed in two ways: rounding is all that differs, and it shows in low precision.

    Args:
        old_log_probs_BL: the trainer's, before its first update on these tokens.
        sampled_BL: the sampler's.

    Returns:
        (B, L) of each token. With `importance_sampling_correction` the weights that it uses: in the modes of
        a sequence (B, 1), of all its tokens; none above the bound, cut down to it or set to 0.

    Source: Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training"; TRL's
    `vllm_importance_sampling_mode`.
    """
    differences_BL = old_log_probs_BL - sampled_BL
    if not config.importance_sampling_correction:
        return differences_BL.exp()
    level, _, way = config.importance_sampling_mode.partition("_")
    if level == "sequence":
        differences_BL = differences_BL.sum(1, keepdim=True)
    ratios_BL, bound = differences_BL.exp(), config.importance_sampling_clip_max
    if way == "truncate":
        return ratios_BL.clamp_max(bound)
    return ratios_BL.masked_fill(ratios_BL > bound, 0.0)
