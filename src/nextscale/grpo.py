"""The options of GRPO."""

from collections.abc import Collection, Mapping
from typing import Literal

from pydantic import Field

from nextscale.base.errors import ConfigError
from nextscale.base.records import Record
from nextscale.policy import EXACT_KL, KLEstimator, SamplingConfig

ScaleRewards = Literal["group", "batch", "none"]
Aggregation = Literal["sum_then_normalize", "normalize_then_sum"]
ScaleWeighting = Literal["token", "scale"] | float | tuple[float, ...]
RatioLevel = Literal["token", "scale", "image", "sequence"]
TrainedBranches = Literal["both", "conditional"]
BranchSchedule = Literal["together", "in_turn"]
Baseline = Literal["mean", "leave_one_out"]
ReferenceDtype = Literal["float32", "bfloat16"]
ImportanceMode = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]


class GRPOConfig(Record):
    """The algorithm. Names are TRL's wherever the same thing exists there."""

    num_generations: int = Field(default=8, ge=2)
    """Images per group, G."""
    num_groups: int = Field(default=8, ge=1)
    """Groups per step, over all processes."""
    class_labels: tuple[int | str, ...] | None = Field(default=None, min_length=1)
    """Classes to train on, by number or name; by default all classes of the model."""
    temperature: float | None = Field(default=None, gt=0)
    """Of the policy that draws in training and is trained; by default sampling.temperature, which the tuned
    model is measured and kept with. Above that, training tries more, and results are sharper than what it
    saw."""
    max_resamplings: int = Field(default=0, ge=0)
    """Draw groups anew in which all advantages are 0, with any of the conditions, up to so many times a step:
    dynamic sampling. What is logged of rewards stays that of the first draw."""
    branch_scale: int | None = Field(default=None, ge=1)
    """Images share their first so many scales with others of their group, and go on from there; the shared
    scales are credited with what came of them, the others with what each made of the same start."""
    branches: int = Field(default=2, ge=2)
    """Images that go on from each start; num_generations is a multiple of it."""
    branch_temperature: float = Field(default=1.0, gt=0)
    """Of the value of a start, T log mean exp(r / T) over its images, in standard deviations of the reward:
    near 0 it is the best image's reward, for large numbers the mean."""
    branch_schedule: BranchSchedule = "together"
    """Train start and rest together, or in turn: three steps the starts, one the rest."""
    num_iterations: int = Field(default=1, ge=1)
    """Optimizer steps per batch of rollouts."""
    train_scales: int | None = Field(default=None, ge=1)
    """Train the first so many scales alone, and draw the finer ones as ever; by default all. Weights that are
    given by scale are then those of the trained ones."""
    loss_type: str = "grpo"
    """The loss: grpo (dapo, bnpo and dr_grpo are the same at fixed length), cispo, reinforce, or another name
    in nextscale.losses.LOSSES."""
    beta: float = Field(default=0.02, ge=0)
    """Weight of the KL to the frozen reference, in nats; with target_kl, in the first step."""
    target_kl: float | None = Field(default=None, gt=0)
    """KL in nats an image to keep the model at: beta grows while it is above, else it shrinks."""
    target_kl_rate: float = Field(default=0.5, gt=0)
    """Growth of beta per step, times the relative distance from target_kl, which counts up to 0.2."""
    kl_estimator: KLEstimator = "reverse"
    """What is summed in the loss: KL(policy || reference), exact over the codebook; "forward", the exact
    KL(reference || policy); or the estimators k1, k2 and k3 from the drawn token alone, for comparison."""
    kl_in_reward: bool = False
    """Take the KL from the reward, not from the loss: a token then answers for what its image's later scales
    cost, too. Costs a forward pass of the policy per step, and one of the reference."""
    measure_kl: bool = True
    """With beta 0, keep the reference all the same and log the KL; costs a forward pass per step."""
    reference_dtype: ReferenceDtype | None = None
    """Of those of the reference's linear layers that autocast rounds; by default bfloat16 where
    run.mixed_precision is bf16, which gives the same numbers in two thirds of the memory, else float32, as
    with sync_ref_model."""
    reference_guidance_scale: float | None = Field(default=None, ge=0)
    """Guidance of the reference; by default the policy's. An unguided policy that is held to its guided self
    learns to need no guidance, which halves the cost of sampling."""
    sync_ref_model: bool = False
    """Move the reference towards the trained model, every ref_model_sync_steps steps."""
    ref_model_mixup_alpha: float = Field(default=0.6, gt=0, le=1)
    """Share of the trained model in what the reference then becomes; 1 makes it the same."""
    ref_model_sync_steps: int = Field(default=64, ge=1)
    """Steps between two such moves."""
    offload_reference: bool = False
    """Keep the reference's weights in main memory, and bring them to the GPU for its pass over a microbatch
    alone."""
    epsilon: float = Field(default=0.2, gt=0, lt=1)
    """Lower clipping bound: ratios are clipped at 1 - epsilon."""
    epsilon_high: float | None = Field(default=None, gt=0, allow_inf_nan=True)
    """Upper clipping bound: ratios are clipped at 1 + epsilon_high; by default the same as epsilon. For cispo
    it is the largest weight itself, by default 5."""
    delta: float | None = Field(default=None, gt=1, allow_inf_nan=True)
    """Largest ratio where the advantage is negative; by default unbounded. Below 1 + epsilon_high it bounds
    all, as in TRL."""
    importance_sampling_level: RatioLevel = "token"
    """What a ratio is of: a token, a scale or an image ("sequence" is the same), as geometric means."""
    importance_sampling_correction: bool = False
    """Weigh the surrogate by the trainer's probability of a token, divided by the sampler's: the two differ
    by rounding."""
    importance_sampling_mode: ImportanceMode = "token_truncate"
    """Weights of each token, or of all tokens of an image at once; above the bound they are cut down to it,
    or set to 0."""
    importance_sampling_clip_max: float = Field(default=3.0, gt=0, allow_inf_nan=True)
    """The bound."""
    trained_branches: TrainedBranches = "both"
    """Of a guided policy's two branches, those that the gradient flows through: "conditional" spares the null
    branch's backward pass."""
    entropy_coef: float = Field(default=0.0, ge=0)
    """Weight of an entropy bonus, in nats."""
    entropy_floor: float | None = Field(default=None, gt=0, le=1)
    """Share of its initial entropy that each scale keeps, by a bonus of its own that grows while it has
    less."""
    entropy_floor_rate: float = Field(default=0.1, gt=0)
    """Growth of that bonus per step, times the share that is missing."""
    constraint_rate: float = Field(default=0.5, gt=0)
    """Growth of a constraint's multiplier per step, for each standard deviation (at most one) beyond its
    bound."""
    constraint_start: float = Field(default=0.0, ge=0)
    """The constraints' multipliers before the first step."""
    scale_rewards: ScaleRewards = "group"
    """What rewards are divided by: the standard deviation of their group, that of the batch, or nothing."""
    credit: str = "none"
    """Which tokens an image's advantage goes to: "none" for all alike; "gradient" for those at places where
    the rewards would change most, by their gradient; or path/to/file.py:function, which maps images and
    conditions to (B, height, width) weights of places. With "contribution" each token's advantage is its own:
    how much it raised the rewards, by their slope in its code, against what was to be expected in its place.
    Rewards need a gradient with respect to the image; others count by how far their image is from its group's
    mean, in units of the spread within all groups."""
    advantage_baseline: Baseline = "mean"
    """What an image's reward is compared with: its group's mean, or the mean of the others in its group
    (leave_one_out). The latter makes advantages G / (G - 1) times as large."""
    advantage_epsilon: float = Field(default=1e-4, ge=0)
    """Added to that deviation, in units of the rewards' own spread within groups: damps groups that hardly
    vary."""
    multi_objective_aggregation: Aggregation = "sum_then_normalize"
    """With several rewards: normalize their weighted sum, or normalize each in its group and then sum."""
    scale_weighting: ScaleWeighting = "scale"
    """Weights in the surrogate of the reward: "token" for equal tokens, "scale" for equal scales, a number
    alpha for tokens of weight (h w)^-alpha in between, or one weight per scale."""
    kl_scale_weighting: ScaleWeighting = "scale"
    """Weights in the KL, likewise."""
    entropy_scale_weighting: ScaleWeighting = "scale"
    """Weights in the entropy bonus, that of the floor included, likewise."""

    @property
    def num_images(self) -> int:
        """Images per step, over all processes."""
        return self.num_groups * self.num_generations

    @property
    def needs_reference(self) -> bool:
        """Whether a frozen copy of the model is kept."""
        return self.beta > 0 or self.measure_kl

    def explored(self, sampling: SamplingConfig) -> SamplingConfig:
        """The policy that draws in training and is trained, of a model that is sampled like this.

        Raises:
            ConfigError: a temperature that is the same; or a KL by drawn tokens, where filtering draws them
                from another distribution than the KL is of.
        """
        if self.kl_estimator not in EXACT_KL and sampling.is_filtered:
            raise ConfigError(
                f"grpo.kl_estimator {self.kl_estimator} is wrong with sampling.top_k or top_p: the KL is of "
                "all tokens, and the drawn ones are of some; use reverse or forward, or no filtering"
            )
        if self.temperature is None:
            return sampling
        if self.temperature == sampling.temperature:
            raise ConfigError(
                f"grpo.temperature {self.temperature} has no effect, since sampling.temperature is the same: "
                "set another, or remove it"
            )
        return sampling.replace(temperature=self.temperature)

    def check_processes(self, num_processes: int) -> None:
        """Check that so many processes can share the images of a step.

        Raises:
            ConfigError: they cannot.
        """
        if not 1 <= num_processes <= self.num_images:
            raise ConfigError(
                f"{num_processes} processes cannot share the {self.num_images} images of a step: start at "
                "most that many, or raise grpo.num_groups or grpo.num_generations"
            )


def check_grpo(
    grpo: GRPOConfig,
    weights: Mapping[str, float],
    constraints: Collection[str],
    *,
    has_adapter: bool = False,
) -> None:
    """Check that every option that differs from its default has an effect on a run with these rewards.

    Args:
        weights: name to weight of the rewards that are trained on.
        constraints: names of the constrained rewards.
        has_adapter: whether an adapter is trained, whose base is the reference.

    Raises:
        ConfigError: an option has none, and what it needs; a scale's entropy has a floor, but no weight; or a
            loss without ratios is to make several updates.
    """
    no_kl = grpo.beta == 0, "with grpo.beta 0: set grpo.beta"
    has_entropy = grpo.entropy_coef > 0 or grpo.entropy_floor is not None
    no_entropy = not has_entropy, "without an entropy bonus: set grpo.entropy_coef or grpo.entropy_floor"
    no_floor = grpo.entropy_floor is None, "without grpo.entropy_floor: set that too"
    unbound = not constraints, "without a constraint: give a reward at_least or at_most"
    not_in_loss = "with grpo.kl_in_reward, which leaves the loss none: remove that"
    no_kl_loss = no_kl if no_kl[0] else (grpo.kl_in_reward, not_in_loss)
    kl_in_loss = grpo.beta > 0, f"with grpo.beta {grpo.beta}, which needs the KL: set grpo.beta to 0"
    unscaled = (
        grpo.scale_rewards == "none" and not constraints,
        "with grpo.scale_rewards none: set that to group or batch",
    )
    by_token = (
        grpo.credit == "contribution",
        "with grpo.credit contribution, where no image is compared with its group: remove that",
    )
    unnormalized = (
        grpo.scale_rewards == "none" and grpo.branch_scale is None,
        "with grpo.scale_rewards none, which normalizes nothing: set that to group or batch",
    )
    lone = list(weights.values()) == [1.0], "on a single reward of weight 1: give a second reward"
    no_reference = "without a reference: set grpo.beta or grpo.measure_kl"
    no_copy = not grpo.needs_reference, no_reference
    if has_adapter:
        no_copy = True, "with tuning.use_peft, where the reference is the model itself: remove that"
    uncorrected = (
        not grpo.importance_sampling_correction,
        "without grpo.importance_sampling_correction: set that too",
    )
    is_ratio_loss = grpo.loss_type in ("grpo", "dapo", "bnpo", "dr_grpo")
    is_ours = is_ratio_loss or grpo.loss_type in ("cispo", "reinforce")  # of others nothing is known
    on_policy = (
        grpo.num_iterations == 1 and is_ours,
        "with grpo.num_iterations 1, where all ratios are 1: set grpo.num_iterations to 2 or more",
    )
    unclipped = is_ours and not is_ratio_loss, f"with grpo.loss_type {grpo.loss_type}: use grpo"
    no_ratio = grpo.loss_type == "reinforce", "with grpo.loss_type reinforce: use grpo or cispo"
    cuts_all = grpo.loss_type == "cispo" and (grpo.epsilon_high or 1) < 1  # ratios of 1 as well
    unmoved = not grpo.sync_ref_model, "without grpo.sync_ref_model: set that too"
    no_branch = grpo.branch_scale is None, "without grpo.branch_scale: set that too"
    no_target = grpo.target_kl is None, "without grpo.target_kl: set that too"
    for name, (is_idle, reason) in {
        "entropy_floor_rate": no_floor,
        "constraint_rate": unbound,
        "constraint_start": unbound,
        "measure_kl": kl_in_loss,
        "scale_rewards": by_token,
        "advantage_baseline": by_token,
        "advantage_epsilon": by_token if by_token[0] else unscaled,
        "branch_scale": by_token,
        "multi_objective_aggregation": lone if lone[0] else unnormalized,
        "reference_dtype": no_copy,
        "reference_guidance_scale": (not grpo.needs_reference, no_reference),
        "branches": no_branch,
        "branch_temperature": no_branch,
        "branch_schedule": no_branch,
        "offload_reference": no_copy,
        "sync_ref_model": no_copy,
        "ref_model_mixup_alpha": unmoved,
        "ref_model_sync_steps": unmoved,
        "importance_sampling_mode": uncorrected,
        "importance_sampling_clip_max": uncorrected,
        "epsilon": unclipped if unclipped[0] else on_policy,
        "epsilon_high": no_ratio if no_ratio[0] else (on_policy[0] and not cuts_all, on_policy[1]),
        "delta": unclipped if unclipped[0] else on_policy,
        "importance_sampling_level": no_ratio if no_ratio[0] else on_policy,
        "kl_estimator": no_kl_loss,
        "kl_in_reward": no_kl,
        "target_kl": no_kl,
        "target_kl_rate": no_target,
        "kl_scale_weighting": no_kl_loss,
        "entropy_scale_weighting": no_entropy,
    }.items():
        value = getattr(grpo, name)
        if is_idle and value != GRPOConfig.model_fields[name].default:
            raise ConfigError(f"grpo.{name} {value} has no effect {reason}, or remove grpo.{name}")
    if grpo.loss_type == "reinforce" and grpo.num_iterations > 1:
        raise ConfigError(
            f"grpo.num_iterations {grpo.num_iterations} needs ratios, and grpo.loss_type reinforce has none: "
            "set grpo.num_iterations to 1, or use grpo or cispo"
        )
    if grpo.branch_scale is not None and (
        grpo.num_generations % grpo.branches or grpo.num_generations < 2 * grpo.branches
    ):
        raise ConfigError(
            f"grpo.num_generations {grpo.num_generations} cannot be shared by starts of grpo.branches "
            f"{grpo.branches} images each: it has to be a multiple of that, and at least twice it"
        )
    if (
        grpo.branch_scale is not None
        and grpo.train_scales is not None
        and grpo.train_scales <= grpo.branch_scale
        and grpo.branch_schedule == "in_turn"
    ):
        raise ConfigError(
            f"grpo.branch_schedule in_turn leaves nothing to train when it is the rest's turn, since "
            f"grpo.train_scales {grpo.train_scales} is not above grpo.branch_scale {grpo.branch_scale}: use "
            "together, or train more scales"
        )
    weighting = grpo.entropy_scale_weighting
    if grpo.entropy_floor is not None and isinstance(weighting, tuple) and 0 in weighting:
        raise ConfigError(
            "grpo.entropy_floor cannot hold a scale whose weight in grpo.entropy_scale_weighting is 0: give "
            "every scale a weight, or remove the floor"
        )
