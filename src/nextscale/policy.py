"""The policy: the distribution that tokens are sampled from, defined once for both sampler and trainer.

    logits  = (1 + t) cond - t uncond,   t = guidance_scale * k / (S - 1)      classifier-free guidance,
                                         t = 0 before guidance_start, and from guidance_stop on
    logits  = logits / temperature       from guidance_stop on also / unguided_temperature
    logits  = top-k, then top-p of the logits                                  all others get probability 0
    policy  = softmax(logits)

docs/policy.md explains what is trained when filtering removes tokens, and why.

Shapes: B images · l tokens (of one scale or of all) · V codebook size · D codebook width · n blocks of m
codes
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field, model_validator
from torch import Tensor

from nextscale.base.errors import ConfigError
from nextscale.base.records import Record

if TYPE_CHECKING:
    from nextscale.models.scales import ScaleSchedule

KLEstimator = Literal["reverse", "forward", "k1", "k2", "k3"]
"""As `kl_divergence` takes them."""
EXACT_KL: tuple[KLEstimator, ...] = ("reverse", "forward")
"""Those that are sums over the codebook; the others are estimates by the drawn token."""

CODES_PER_BLOCK = 64  # the square root of the official codebook's size


class SamplingConfig(Record):
    """How tokens are drawn: guidance, temperature and filtering."""

    guidance_scale: float = Field(default=0.0, ge=0)
    """Classifier-free guidance at the last scale; grows linearly from 0 at the first. 0 turns it off."""
    temperature: float = Field(default=1.0, gt=0)
    """Divides the guided logits."""
    top_k: int = Field(default=0, ge=0)
    """Sample from the k likeliest tokens and those tied with the k-th; 0 means all."""
    top_p: float = Field(default=1.0, ge=0, le=1)
    """Sample from the fewest likeliest tokens that hold at least this probability; 0 and 1 mean all."""
    guidance_start: int = Field(default=0, ge=0)
    """First scale, counted from 0, that is guided. The growth of the guidance still counts from 0."""
    guidance_stop: int | None = Field(default=None, ge=1)
    """Scale, counted from 0, from which on nothing is guided, at half the cost; by default none is."""
    unguided_temperature: float = Field(default=1.0, gt=0)
    """Divides the logits from `guidance_stop` on, besides `temperature`."""

    @model_validator(mode="after")
    def _check_scales(self) -> Self:
        if self.guidance_stop is None and self.unguided_temperature != 1:
            raise ValueError("unguided_temperature has no effect without guidance_stop: set it too")
        if self.guidance_stop is not None and self.guidance_start >= self.guidance_stop:
            raise ValueError(
                f"guidance_start ({self.guidance_start}) must be below guidance_stop ({self.guidance_stop})"
            )
        return self

    @property
    def is_guided(self) -> bool:
        """Whether the null condition has to be run as well."""
        return self.guidance_scale > 0

    @property
    def is_filtered(self) -> bool:
        """Whether some tokens may get probability 0."""
        return self.top_k > 0 or 0 < self.top_p < 1

    def told(self) -> dict[str, Any]:
        """The settings to tell a reader: those that every model has, and others where they are set."""
        changed = self.model_dump(exclude_defaults=True)
        return {name: value for name, value in self if name in COMMON or name in changed}


COMMON = ("guidance_scale", "temperature", "top_k", "top_p")

DEFAULT_SAMPLING = SamplingConfig(guidance_scale=1.5)
"""How a model is sampled that says nothing else."""


@dataclass(frozen=True)
class Ramp:
    """How guidance and temperature go from scale to scale, token by token.

    Attributes:
        shares: (l,) the share of the guidance scale that applies: 0 at the first scale, 1 at the last, and 0
            where nothing is guided.
        temperature: what divides the logits: one number, or (l,).
    """

    shares: Tensor
    temperature: float | Tensor

    @staticmethod
    def of(config: SamplingConfig, schedule: "ScaleSchedule", device: torch.device | str = "cpu") -> "Ramp":
        """That of all tokens, (L,).

        Raises:
            ConfigError: guidance that starts after the last scale, or stops there.
        """
        if config.is_guided and config.guidance_start >= schedule.num_scales:
            raise ConfigError(
                f"guidance_start {config.guidance_start} leaves no scale to guide, of "
                f"{schedule.num_scales}: set a lower one, or guidance_scale 0"
            )
        if config.guidance_stop is not None and config.guidance_stop >= schedule.num_scales:
            raise ConfigError(
                f"guidance_stop {config.guidance_stop} leaves no scale unguided, of {schedule.num_scales}: "
                "set a lower one, or remove it"
            )
        scale_L, temperature = schedule.scale_of_token(), config.temperature
        stop = schedule.num_scales if config.guidance_stop is None else config.guidance_stop
        is_guided_L = (scale_L >= config.guidance_start) & (scale_L < stop)
        if config.unguided_temperature != 1:
            unguided = temperature * config.unguided_temperature
            temperature = torch.where(scale_L < stop, temperature, unguided).to(device)
        return Ramp((schedule.guidance_ramp() * is_guided_L).to(device), temperature)

    def __getitem__(self, part: slice) -> "Ramp":
        temperature = self.temperature
        return Ramp(self.shares[part], temperature[part] if isinstance(temperature, Tensor) else temperature)


def all_branches_logits(logits_BlV: Tensor, ramp: Ramp, config: SamplingConfig) -> Tensor:
    """`policy_logits` of a batch as the model runs it: B conditions, then with guidance as many null ones."""
    cond_BlV, uncond_BlV = logits_BlV.chunk(2) if config.is_guided else (logits_BlV, None)
    return policy_logits(cond_BlV, uncond_BlV, ramp, config)


def policy_logits(cond_BlV: Tensor, uncond_BlV: Tensor | None, ramp: Ramp, config: SamplingConfig) -> Tensor:
    """Logits after guidance and temperature, before any filtering.

    Args:
        cond_BlV: logits given the conditions.
        uncond_BlV: logits given the null condition; None when guidance is off.
        ramp: of these tokens.

    Source: official VAR, `autoregressive_infer_cfg`; official Switti, `SwittiPipeline.__call__`.
    """
    logits_BlV = cond_BlV
    if config.is_guided:
        assert uncond_BlV is not None, "guidance needs the logits of the null class"
        strength_l1 = (config.guidance_scale * ramp.shares)[:, None].to(cond_BlV)
        logits_BlV = (1 + strength_l1) * cond_BlV - strength_l1 * uncond_BlV
    if isinstance(ramp.temperature, Tensor):
        return logits_BlV / ramp.temperature[:, None].to(logits_BlV)
    return logits_BlV if ramp.temperature == 1 else logits_BlV / ramp.temperature


@torch.no_grad()
def kept_tokens(logits_BlV: Tensor, config: SamplingConfig) -> Tensor:
    """(B, l, V) bool: which tokens top-k, then top-p, keep.

    Source: official VAR, `sample_with_top_k_top_p_`: ties with the k-th value stay; of what top-k left, in
    ascending order, tokens whose cumulative probability is at most 1 - top_p go, but never the largest.
    """
    kept_BlV = torch.ones_like(logits_BlV, dtype=torch.bool)
    if config.top_k > 0:
        k = min(config.top_k, logits_BlV.shape[-1])
        threshold = logits_BlV.topk(k, dim=-1).values[..., -1:]
        kept_BlV = logits_BlV >= threshold
    if 0 < config.top_p < 1:
        ascending, order = logits_BlV.masked_fill(~kept_BlV, float("-inf")).sort(dim=-1, stable=False)
        removed = ascending.softmax(-1).cumsum(-1) <= 1 - config.top_p
        removed[..., -1] = False
        kept_BlV = kept_BlV & ~removed.scatter(-1, order, removed)
    return kept_BlV


def policy_log_probs(
    logits_BlV: Tensor,
    config: SamplingConfig,
    drawn_Bl: Tensor | None = None,
    kept_BlV: Tensor | None = None,
) -> Tensor:
    """(B, l, V) log-probabilities under the policy; -inf for removed tokens.

    Args:
        logits_BlV: from `policy_logits`.
        drawn_Bl: tokens that were drawn; these are kept whatever the logits say now.
        kept_BlV: from `kept_tokens`, where it is known already: filtering sorts the codebook.
    """
    if config.is_filtered:
        kept_BlV = kept_tokens(logits_BlV, config) if kept_BlV is None else kept_BlV
        if drawn_Bl is not None:
            kept_BlV = kept_BlV.scatter(-1, drawn_Bl[..., None], True)
        logits_BlV = logits_BlV.masked_fill(~kept_BlV, float("-inf"))
    return logits_BlV.log_softmax(-1)


def draw_tokens(log_probs_BlV: Tensor, uniforms_Bl: Tensor) -> Tensor:
    """(B, l) tokens by inverse transform: the first whose cumulative probability exceeds the uniform number.

    One number decides one token, so the same numbers give the same image in any batch, on any device. The
    codebook is searched block by block, then within a block: so float64 is needed for V / 64 + 64 numbers a
    token, and rounding can never select a removed token (probability 0).
    """
    num_codes = log_probs_BlV.shape[-1]
    p_BlV = F.pad(log_probs_BlV.exp(), (0, -num_codes % CODES_PER_BLOCK))
    p_Blnm = rearrange(p_BlV, "B l (n m) -> B l n m", m=CODES_PER_BLOCK)
    upto_Bln = p_Blnm.sum(-1, dtype=torch.float64).cumsum(-1)
    threshold_Bl1 = uniforms_Bl.double()[..., None] * upto_Bln[..., -1:]
    block_Bl1 = _first_above(upto_Bln, threshold_Bl1)

    before_Bl1 = F.pad(upto_Bln, (1, 0)).gather(-1, block_Bl1)
    p_Blm = p_Blnm.gather(-2, block_Bl1[..., None].expand(-1, -1, 1, CODES_PER_BLOCK)).squeeze(-2)
    code_Bl1 = _first_above(p_Blm.double().cumsum(-1), threshold_Bl1 - before_Bl1)
    tokens_Bl1 = block_Bl1 * CODES_PER_BLOCK + code_Bl1
    return tokens_Bl1.clamp_max(num_codes - 1).squeeze(-1)  # of NaN, which the sampler refuses in the end


def _first_above(cumulative_Bln: Tensor, threshold_Bl1: Tensor) -> Tensor:
    """(B, l, 1): the first number above the threshold, or the first that is as large as the last."""
    # Such a number is larger than the one before it: what is found has a positive probability.
    below_last_Bl1 = torch.nextafter(cumulative_Bln[..., -1:], cumulative_Bln.new_zeros(()))
    threshold_Bl1 = torch.minimum(threshold_Bl1, below_last_Bl1)
    found_Bl1 = torch.searchsorted(cumulative_Bln, threshold_Bl1, right=True)
    return found_Bl1.clamp_max(cumulative_Bln.shape[-1] - 1)


def token_log_probs(log_probs_BlV: Tensor, tokens_Bl: Tensor) -> Tensor:
    """(B, l) log-probabilities of the given tokens."""
    return log_probs_BlV.gather(-1, tokens_Bl[..., None]).squeeze(-1)


def mean_codes(log_probs_BlV: Tensor, codebook_VD: Tensor) -> Tensor:
    """(B, l, D) float32: the mean of each token's code, over what may be drawn."""
    with torch.autocast(log_probs_BlV.device.type, enabled=False):
        return log_probs_BlV.float().exp() @ codebook_VD.float()


def exact_entropy(log_probs_BlV: Tensor, probs_BlV: Tensor | None = None) -> Tensor:
    """(B, l) entropy in nats, summed over the codebook; tokens of probability 0 contribute nothing.

    Args:
        probs_BlV: the exponential of the log-probabilities, where it is at hand.
    """
    probs_BlV = log_probs_BlV.exp() if probs_BlV is None else probs_BlV
    # Not `special.entr`: its slope is infinite at 0, and 0 times that makes the gradient NaN.
    finite_BlV = log_probs_BlV.masked_fill(log_probs_BlV == float("-inf"), 0.0)
    return -(probs_BlV * finite_BlV).sum(-1)


def exact_kl(
    log_probs_BlV: Tensor, reference_log_probs_BlV: Tensor, probs_BlV: Tensor | None = None
) -> Tensor:
    """(B, l) KL(policy || reference) in nats, summed over the codebook. Both must be unfiltered.

    Args:
        probs_BlV: the exponential of the policy's log-probabilities, where it is at hand.
    """
    probs_BlV = log_probs_BlV.exp() if probs_BlV is None else probs_BlV
    return (probs_BlV * (log_probs_BlV - reference_log_probs_BlV)).sum(-1)


def kl_divergence(
    log_probs_BlV: Tensor,
    reference_log_probs_BlV: Tensor,
    probs_BlV: Tensor,
    drawn_Bl: Tensor,
    estimator: KLEstimator = "reverse",
) -> Tensor:
    """(B, l) KL between policy and reference in nats. Both must be unfiltered.

    "reverse" is `exact_kl`, "forward" the exact KL(reference || policy). The others see the drawn token
    alone: with d = log policy - log reference of it, k1 is d, k2 is d^2 / 2, k3 is exp(-d) - 1 + d. In
    expectation k1 and k3 are the reverse KL, but the gradient of k1 is 0 in expectation, and that of k3 the
    forward KL's; the gradient of k2 is the reverse KL's.

    Args:
        probs_BlV: the exponential of the policy's log-probabilities.
        drawn_Bl: tokens that the policy drew, unfiltered too for k1, k2 and k3.

    Source: Schulman 2020, "Approximating KL divergence".
    """
    if estimator == "reverse":
        return exact_kl(log_probs_BlV, reference_log_probs_BlV, probs_BlV)
    if estimator == "forward":
        return exact_kl(reference_log_probs_BlV, log_probs_BlV)
    d_Bl = token_log_probs(log_probs_BlV, drawn_Bl) - token_log_probs(reference_log_probs_BlV, drawn_Bl)
    return {"k1": d_Bl, "k2": d_Bl.square() / 2, "k3": torch.expm1(-d_Bl) + d_Bl}[estimator]
