"""The objective against numbers worked out by hand."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from nextscale.base.errors import ConfigError
from nextscale.grpo import GRPOConfig
from nextscale.losses import (
    LOSSES,
    LossOutput,
    Quantities,
    cispo_loss,
    clipped_surrogate,
    find_loss,
    grpo_loss,
    importance_ratio,
    loss_weights,
    regularised,
    token_weights,
    weighted_mean,
)
from nextscale.models.protocol import NextScaleModel
from nextscale.models.scales import ScaleSchedule
from nextscale.models.var import VAR, VARConfig
from nextscale.objective import Microbatch, Objective, mismatch_ratios, per_token
from nextscale.pipeline import VARPipeline
from nextscale.plan.counting import Count, count, without_data
from nextscale.policy import SamplingConfig
from nextscale.reference import Reference
from nextscale.rescoring import teacher_forced_logits

MakePipeline = Callable[..., VARPipeline]


def test_token_weights_by_hand() -> None:
    lengths = (1, 4)
    assert token_weights(lengths, "token").tolist() == pytest.approx([0.2] * 5)
    assert token_weights(lengths, "scale").tolist() == pytest.approx([0.5] + [0.125] * 4)
    assert token_weights(lengths, (3.0, 1.0)).tolist() == pytest.approx([0.75] + [0.0625] * 4)


def test_an_error_names_the_weights_that_do_not_fit() -> None:
    for option in ("scale_weighting", "kl_scale_weighting", "entropy_scale_weighting"):
        with pytest.raises(ConfigError, match=f"^{option} needs 2 non-negative weights"):
            loss_weights((1, 4), GRPOConfig(**{option: (1.0, 2.0, 3.0)}))


@pytest.mark.parametrize(
    "weighting", [(1.0,), (1.0, -1.0), (0.0, 0.0), (1.0, math.nan), math.nan, -math.inf, -600.0]
)
def test_impossible_weights_are_refused(weighting: float | tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="one a trained scale"):
        token_weights((1, 4), weighting)


def test_clipped_surrogate_by_hand() -> None:
    """Ratios 1.5 and 0.5 under advantages of both signs, clipped at 0.8 and 1.2."""
    log_probs = torch.tensor([[0.0, 0.0], [0.0, 0.0]], requires_grad=True)
    old = torch.tensor([[math.log(1 / 1.5), math.log(1 / 0.5)]]).repeat(2, 1)
    ratio = (log_probs - old).exp()
    surrogate = clipped_surrogate(ratio, torch.tensor([[2.0], [-2.0]]), epsilon=0.2)
    expected = [[1.2 * 2, 0.5 * 2], [1.5 * -2, 0.8 * -2]]
    assert surrogate.objective_BL.tolist() == [pytest.approx(row) for row in expected]
    assert surrogate.is_high_clipped_BL.tolist() == [[True, False], [False, False]]
    assert surrogate.is_low_clipped_BL.tolist() == [[False, False], [False, True]]
    surrogate.objective_BL.sum().backward()
    # d(r A) = r A where nothing is clipped; 0 where the clip is in force.
    assert log_probs.grad is not None
    assert log_probs.grad.tolist() == [pytest.approx([0.0, 1.0]), pytest.approx([-3.0, 0.0])]


def test_upper_bound_of_its_own() -> None:
    surrogate = clipped_surrogate(torch.tensor([[1.5]]), torch.ones(1, 1), epsilon=0.2, epsilon_high=0.4)
    assert surrogate.objective_BL.item() == pytest.approx(1.4)


WEIGHTS_L = torch.tensor([0.5, 0.25, 0.25])


def quantities(**changes: Any) -> Quantities:
    """Two images of three tokens."""
    values: dict[str, Any] = {
        "log_probs_BL": torch.zeros(2, 3),
        "old_log_probs_BL": torch.zeros(2, 3),
        "advantages_BL": torch.tensor([[1.0], [-3.0]]),
        "kl_BL": torch.tensor([[1.0, 1.0, 1.0], [3.0, 1.0, 1.0]]),
        "entropy_BL": torch.full((2, 3), 0.5),
        "weights_L": WEIGHTS_L,
        "kl_weights_L": WEIGHTS_L,
        "entropy_weights_L": WEIGHTS_L,
        "beta": 0.1,
        "entropy_coef": 0.0,
        "lengths": (1, 2),
    }
    return Quantities(**values | changes)


def test_a_loss_is_surrogate_less_kl_plus_entropy_by_hand() -> None:
    objective = torch.tensor([[1.0, 2.0, 4.0], [0.0, 0.0, 0.0]])
    # surrogate: (0.5 + 0.5 + 1) / 2 = 1; kl: (1 + 2) / 2 = 1.5; entropy: 0.5
    assert weighted_mean(objective, quantities().weights_L).item() == pytest.approx(1.0)
    loss = regularised(objective, quantities(entropy_coef=0.2))
    assert loss.item() == pytest.approx(-(1.0 - 0.15 + 0.1))
    # One coefficient a token: 0.5 (0.5 0.2 + 0.25 0.8 + 0.25 0) = 0.15
    by_token = quantities(entropy_coef=torch.tensor([0.2, 0.8, 0.0]))
    assert regularised(objective, by_token).item() == pytest.approx(-(1.0 - 0.15 + 0.15))
    assert regularised(objective, quantities(kl_BL=None)).item() == pytest.approx(-1.0)


def test_each_part_of_a_loss_has_its_own_weights_by_hand() -> None:
    objective = torch.tensor([[1.0, 2.0, 4.0], [0.0, 0.0, 0.0]])
    entropy = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 5.0]])
    parts = quantities(
        weights_L=torch.tensor([0.0, 1.0, 0.0]),
        kl_weights_L=torch.tensor([1.0, 0.0, 0.0]),
        entropy_BL=entropy,
        entropy_weights_L=torch.tensor([0.0, 0.0, 1.0]),
        entropy_coef=0.5,
    )
    # surrogate: (2 + 0) / 2; kl: (1 + 3) / 2; entropy: (3 + 5) / 2
    assert regularised(objective, parts).item() == pytest.approx(-(1.0 - 0.1 * 2 + 0.5 * 4))
    # Equal weights give the same, whether they are one tensor or several.
    several = quantities(
        kl_weights_L=WEIGHTS_L.clone(), entropy_weights_L=WEIGHTS_L.clone(), entropy_coef=0.2
    )
    one = quantities(entropy_coef=0.2)
    losses = [regularised(objective, each).item() for each in (one, several)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_a_scale_without_weight_keeps_its_kl_and_its_entropy(make_pipeline: MakePipeline) -> None:
    """Without advantages the loss is the regularisers': all scales alike, whatever scale_weighting says."""
    pipe, sampling = make_pipeline(), SamplingConfig(guidance_scale=1.5)
    schedule = pipe.transformer.schedule
    drawn = pipe.draw(pipe.conditions([0, 1]), [(0,), (1,)], 2, sampling)
    batch = Microbatch(drawn.conditioning, drawn.tokens, drawn.inputs, drawn.log_probs, torch.zeros(4))
    reference = Reference.copy_of(make_pipeline(seed=1).transformer)
    config = GRPOConfig(beta=0.3, entropy_coef=0.2, scale_weighting=(1.0, 1.0, 0.0, 0.0))
    output = Objective(config, sampling, schedule, reference)(pipe.transformer, batch)
    kl, entropy = (
        sum(each.mean().item() for each in output.metrics[name].split(schedule.lengths, 1)) / 4
        for name in ("kl", "entropy")
    )
    assert kl > 0.1
    by_scale = [output.metrics[f"kl/scale_{k}"].mean().item() for k in range(1, 5)]
    assert sum(by_scale) / 4 == pytest.approx(kl, rel=1e-5)
    assert output.loss.item() == pytest.approx(0.3 * kl - 0.2 * entropy, rel=1e-5)


def test_grpo_by_hand() -> None:
    """On policy the ratio is 1: the surrogate is the mean advantage, (1 - 3) / 2, whatever the weights."""
    output = grpo_loss(quantities(), GRPOConfig(beta=0.1))
    assert output.loss.item() == pytest.approx(1.0 + 0.15)
    assert output.metrics["clip_ratio/region_mean"].eq(0).all()
    # Ratio 2 and epsilon 0.2: the better image is clipped at 1.2, the worse is not: (1.2 - 6) / 2.
    twice = quantities(log_probs_BL=torch.full((2, 3), math.log(2)), beta=0.0)
    output = grpo_loss(twice, GRPOConfig())
    assert output.loss.item() == pytest.approx(2.4)
    assert output.metrics["clip_ratio/high_mean"].tolist() == [[1.0] * 3, [0.0] * 3]


def test_credit_may_be_given_by_image_by_scale_or_by_token() -> None:
    schedule = ScaleSchedule((1, 2))
    by_image, by_scale = torch.tensor([1.0, 2.0]), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    by_token = torch.arange(10.0).view(2, 5)
    assert per_token(by_image, schedule).expand(2, 5).tolist() == [[1.0] * 5, [2.0] * 5]
    assert per_token(by_scale, schedule).tolist() == [[1.0] + [2.0] * 4, [3.0] + [4.0] * 4]
    assert torch.equal(per_token(by_token, schedule), by_token)


def test_a_loss_is_found_by_name_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    def mine(q: Quantities, config: GRPOConfig) -> LossOutput:
        return LossOutput(regularised(q.log_probs_BL * q.advantages_BL, q), {})

    monkeypatch.setitem(LOSSES, "mine", mine)
    assert find_loss("mine") is mine
    assert {find_loss(name) for name in ("grpo", "dapo", "bnpo", "dr_grpo")} == {grpo_loss}
    with pytest.raises(ConfigError, match=r"unknown grpo\.loss_type 'reinforc'; did you mean 'reinforce'"):
        find_loss("reinforc")


def drawn_quantities(seed: int = 0) -> Quantities:
    """Two images of three tokens in two scales, off policy, with gradient."""
    generator = torch.Generator().manual_seed(seed)
    log_probs, old = (torch.randn(2, 3, generator=generator) for _ in range(2))
    return quantities(log_probs_BL=log_probs.requires_grad_(), old_log_probs_BL=old, beta=0.0)


def test_ratios_of_scales_and_images_are_geometric_means() -> None:
    q = drawn_quantities()
    d = (q.log_probs_BL - q.old_log_probs_BL).tolist()
    by_level = {
        level: importance_ratio(q.log_probs_BL, q.old_log_probs_BL, level, q.lengths, q.weights_L)
        for level in ("token", "scale", "image", "sequence")
    }
    for image in range(2):
        first, second, third = (math.exp(each) for each in d[image])
        middle = (second * third) ** 0.5
        assert by_level["token"][image].tolist() == pytest.approx([first, second, third])
        assert by_level["scale"][image].tolist() == pytest.approx([first, middle, middle])
        whole = first**0.5 * second**0.25 * third**0.25  # with the weights of the loss
        assert by_level["image"][image].tolist() == pytest.approx([whole] * 3)
    assert torch.equal(by_level["image"], by_level["sequence"])


@pytest.mark.parametrize("loss_type", ["grpo", "cispo", "reinforce"])
@pytest.mark.parametrize("level", ["token", "scale", "image"])
def test_on_policy_all_losses_have_one_gradient(loss_type: str, level: str) -> None:
    """That of A log p: a ratio of 1 changes as its logarithm does."""
    q = drawn_quantities()
    q = replace(q, old_log_probs_BL=q.log_probs_BL.detach())
    config = GRPOConfig.model_validate({"loss_type": loss_type, "importance_sampling_level": level})
    (found,) = torch.autograd.grad(find_loss(loss_type)(q, config).loss, q.log_probs_BL)
    torch.testing.assert_close(found, -(q.advantages_BL * q.weights_L) / 2)


@pytest.mark.parametrize("level", ["token", "scale", "image"])
@pytest.mark.parametrize("loss_type", ["grpo", "cispo"])
def test_at_every_level_a_token_has_the_gradient_of_its_own_advantage(loss_type: str, level: str) -> None:
    """As credit, branches and contributions give them."""
    q = drawn_quantities()
    advantages_BL = torch.tensor([[-0.6, 2.0, 0.0], [0.5, 0.0, -1.0]])
    q = replace(q, advantages_BL=advantages_BL, old_log_probs_BL=q.log_probs_BL.detach())
    config = GRPOConfig.model_validate({"loss_type": loss_type, "importance_sampling_level": level})
    (found,) = torch.autograd.grad(find_loss(loss_type)(q, config).loss, q.log_probs_BL)
    torch.testing.assert_close(found, -(advantages_BL * q.weights_L) / 2)


@pytest.mark.parametrize("level", ["scale", "image"])
def test_the_gradient_of_a_mean_is_shared_by_its_tokens(level: str) -> None:
    """Off policy, with one advantage an image: that of the geometric mean itself."""
    q = drawn_quantities()
    wide = {"importance_sampling_level": level, "epsilon": 0.99, "epsilon_high": 99.0}  # nothing is clipped
    loss = find_loss("grpo")(q, GRPOConfig.model_validate(wide)).loss
    (found,) = torch.autograd.grad(loss, q.log_probs_BL, retain_graph=True)
    difference_BL = q.log_probs_BL - q.old_log_probs_BL
    if level == "scale":
        means = [difference_BL[:, :1], difference_BL[:, 1:].mean(1, keepdim=True).expand(-1, 2)]
        ratio = torch.cat(means, 1).exp()
    else:
        ratio = (difference_BL * q.weights_L).sum(1, keepdim=True).exp()
    objective = (ratio * q.advantages_BL * q.weights_L).sum(1).mean()
    (expected,) = torch.autograd.grad(-objective, q.log_probs_BL)
    torch.testing.assert_close(found, expected)


def test_delta_bounds_the_ratio_where_the_advantage_is_negative() -> None:
    ratio = torch.tensor([[9.0, 3.0, 0.5]])
    surrogate = clipped_surrogate(ratio, -torch.ones(1, 1), epsilon=0.2, delta=4.0)
    assert surrogate.objective_BL.tolist() == [pytest.approx([-4.0, -3.0, -0.8])]


def test_cispo_by_hand() -> None:
    """Weights cut off at the bound, without gradient: no token drops out."""
    q = drawn_quantities()
    output = cispo_loss(q, GRPOConfig(epsilon_high=1.1))
    (found,) = torch.autograd.grad(output.loss, q.log_probs_BL)
    cut = (q.log_probs_BL - q.old_log_probs_BL).exp().detach().clamp_max(1.1)
    assert (cut == 1.1).any() and (cut < 1.1).any()
    torch.testing.assert_close(found, -(cut * q.advantages_BL * q.weights_L) / 2)
    is_cut = (cut == 1.1) & (q.advantages_BL > 0)
    assert torch.equal(output.metrics["cispo_clip_ratio"], is_cut.float())


def test_a_power_law_lies_between_equal_tokens_and_equal_scales() -> None:
    lengths = (1, 4, 9)
    torch.testing.assert_close(token_weights(lengths, 0.0), token_weights(lengths, "token"))
    torch.testing.assert_close(token_weights(lengths, 1.0), token_weights(lengths, "scale"))
    expected = torch.tensor([n**-0.7 for n in lengths for _ in range(n)])  # (h w)^-alpha, arXiv 2601.02256
    torch.testing.assert_close(token_weights(lengths, 0.7), expected / expected.sum())


# The whole objective, in blocks of tokens


def microbatch(pipe: VARPipeline, sampling: SamplingConfig, advantages: Tensor | None = None) -> Microbatch:
    """Four images of two classes, as they were drawn."""
    drawn = pipe.draw(pipe.conditions([0, 1]), [(0,), (1,)], 2, sampling)
    given = torch.tensor([1.0, -0.5, 2.0, -1.5]) if advantages is None else advantages
    return Microbatch(drawn.conditioning, drawn.tokens, drawn.inputs, drawn.log_probs, given)


def dense_loss(
    model: NextScaleModel,
    base: NextScaleModel | None,
    batch: Microbatch,
    config: GRPOConfig,
    sampling: SamplingConfig,
) -> Tensor:
    """The loss of the logits of all tokens at once, as the formulas have it; equal scales alone."""
    schedule = model.schedule
    given = schedule, batch.conditioning, batch.inputs, sampling
    logits = teacher_forced_logits(model, *given)
    kept = torch.ones_like(logits, dtype=torch.bool)
    if sampling.top_k:
        kept = logits >= logits.topk(sampling.top_k, dim=-1).values[..., -1:]
    if 0 < sampling.top_p < 1:
        probs, order = logits.masked_fill(~kept, -torch.inf).softmax(-1).sort(-1, descending=True)
        in_nucleus = probs.cumsum(-1) - probs < sampling.top_p
        kept = kept & torch.zeros_like(kept).scatter(-1, order, in_nucleus)
    kept = kept.scatter(-1, batch.tokens[..., None], True)
    policy = logits.masked_fill(~kept, -torch.inf).log_softmax(-1)
    log_probs = policy.gather(-1, batch.tokens[..., None])[..., 0]
    old = log_probs.detach() if batch.old_log_probs is None else batch.old_log_probs
    ratio, advantages = (log_probs - old).exp(), batch.advantages[:, None]
    low, high = 1 - config.epsilon, 1 + (config.epsilon_high or config.epsilon)
    value = torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
    full = logits.log_softmax(-1)
    if base is not None:
        with torch.no_grad():
            theirs = teacher_forced_logits(base, *given).log_softmax(-1)
        d = (full - theirs).gather(-1, batch.tokens[..., None])[..., 0]
        value = (
            value
            - config.beta
            * {
                "reverse": (full.exp() * (full - theirs)).sum(-1),
                "forward": (theirs.exp() * (theirs - full)).sum(-1),
                "k1": d,
                "k2": d**2 / 2,
                "k3": (-d).exp() - 1 + d,
            }[config.kl_estimator]
        )
    value = value - config.entropy_coef * (full.exp() * full).sum(-1)
    by_scale = [part.mean(1) for part in value.split(schedule.lengths, 1)]
    return -torch.stack(by_scale, 1).mean()


POLICIES = [
    {},
    {"guidance_scale": 1.5, "temperature": 0.8},
    {"guidance_scale": 1.5, "top_k": 20, "top_p": 0.9},
]
LOSS_OPTIONS: list[dict[str, Any]] = [
    {"beta": 0.3, "kl_estimator": "forward"},
    {"beta": 0.3, "kl_estimator": "k1"},
    {"beta": 0.3, "kl_estimator": "k2"},
    {"beta": 0.3, "kl_estimator": "k3"},
    {"beta": 0.0, "measure_kl": False},
    {"beta": 0.0},
    {"beta": 0.3},
    {"beta": 0.3, "entropy_coef": 0.2},
]


def gradients(model: torch.nn.Module, loss: Tensor) -> Tensor:
    parameters = list(model.parameters())
    given = torch.autograd.grad(loss, parameters, allow_unused=True)
    pairs = zip(given, parameters, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten().double() for g, p in pairs])


@pytest.mark.parametrize("options", LOSS_OPTIONS, ids=str)
@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("iteration", [1, 2])
def test_the_gradient_is_that_of_the_dense_formula(
    make_pipeline: MakePipeline, policy: dict[str, Any], options: dict[str, Any], iteration: int
) -> None:
    pipe, sampling = make_pipeline(codebook_size=200), SamplingConfig(**policy)
    config, model = GRPOConfig(num_iterations=2, epsilon_high=0.3, **options), pipe.transformer
    batch = microbatch(pipe, sampling)
    if iteration == 2:  # the policy has moved since, and many ratios are clipped
        shift = torch.randn(batch.log_probs.shape, generator=torch.Generator().manual_seed(0))
        batch = replace(batch, old_log_probs=batch.log_probs + 0.2 * shift)
    base = make_pipeline(seed=1, codebook_size=200).transformer if config.needs_reference else None
    objective = Objective(config, sampling, model.schedule, None if base is None else Reference.copy_of(base))
    output = objective(model, batch)
    expected = dense_loss(model, base, batch, config, sampling)
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)
    ours, theirs = gradients(model, output.loss), gradients(model, expected)
    assert theirs.norm() > 0.01
    assert (ours - theirs).norm() <= 1e-6 * theirs.norm()


BENCH = VARConfig(
    depth=1,
    width=64,
    num_heads=2,
    num_classes=4,
    codebook_size=4096,
    codebook_width=8,
    scale_sizes=(1, 4, 8, 12),
)


def counted(
    policy: dict[str, Any], options: dict[str, Any], is_dense: bool, codebook_size: int = 4096
) -> Count:
    sampling, config = SamplingConfig(**policy), GRPOConfig(**options)
    with without_data():
        sizes = BENCH.replace(codebook_size=codebook_size)
        model, base = VAR(sizes), VAR(sizes) if config.needs_reference else None
        for each in model.parameters():
            each.grad = torch.zeros_like(each)
        num_tokens = model.schedule.num_tokens
        tokens = torch.zeros(2, num_tokens, dtype=torch.long)
        conditioning = model.conditioning_from_labels(torch.zeros(2, dtype=torch.long))
        inputs = torch.zeros(2, num_tokens - 1, 8)
        batch = Microbatch(conditioning, tokens, inputs, torch.zeros(tokens.shape), torch.zeros(2))
        reference = None if base is None else Reference(base)
        objective = Objective(config, sampling, model.schedule, reference)
        if is_dense:
            return count(lambda: dense_loss(model, base, batch, config, sampling))
        return count(lambda: objective(model, batch).loss)


@pytest.mark.parametrize("options", LOSS_OPTIONS, ids=str)
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_the_loss_needs_a_fraction_of_the_dense_formulas_memory(
    policy: dict[str, Any], options: dict[str, Any]
) -> None:
    """Of a transformer so small that nearly all is the loss's."""
    ours, dense = (counted(policy, options, is_dense) for is_dense in (False, True))
    logits = 4 * 2 * 225 * 4096  # bytes of (B, L, V)
    assert dense.peak > 3 * logits
    assert ours.peak < 0.4 * dense.peak
    assert ours.saved == counted(policy, options, False, codebook_size=512).saved  # nothing of size V is kept


# The first scales alone


@pytest.mark.parametrize("weighting", ["token", "scale", (1.0, 3.0)])
@pytest.mark.parametrize("credit", ["image", "scale", "token"])
def test_training_the_first_scales_is_training_all_with_weights_of_zero(
    make_pipeline: MakePipeline, weighting: Any, credit: str
) -> None:
    pipe, sampling = make_pipeline(), SamplingConfig(guidance_scale=1.5, top_k=30)
    model, generator = pipe.transformer, torch.Generator().manual_seed(0)
    shape = {"image": (4,), "scale": (4, 4), "token": (4, 30)}[credit]
    batch = microbatch(pipe, sampling, torch.randn(shape, generator=generator))
    reference = Reference.copy_of(make_pipeline(seed=1).transformer)
    totals: Any = {"token": (1.0, 4.0, 0.0, 0.0), "scale": (1.0, 1.0, 0.0, 0.0)}.get(
        weighting, (1.0, 3.0, 0.0, 0.0)
    )
    names = ("scale_weighting", "kl_scale_weighting", "entropy_scale_weighting")
    options = {"beta": 0.3, "entropy_coef": 0.2}
    few = GRPOConfig(train_scales=2, **options, **dict.fromkeys(names, weighting))
    whole = GRPOConfig(**options, **dict.fromkeys(names, totals))
    ours, theirs = (
        Objective(config, sampling, model.schedule, reference)(model, batch) for config in (few, whole)
    )
    assert ours.loss.item() == pytest.approx(theirs.loss.item(), rel=1e-5)
    ours_gradient, expected = gradients(model, ours.loss), gradients(model, theirs.loss)
    assert (ours_gradient - expected).norm() <= 1e-5 * expected.norm()
    assert ours.metrics["kl"].shape == (4, 5) and "entropy/scale_2" in ours.metrics
    assert "entropy/scale_3" not in ours.metrics
    for name in ("kl/scale_1", "entropy/scale_2", "sampling/sampling_logp_difference/max"):
        there = theirs.metrics[name][:, : ours.metrics[name].shape[1]]
        torch.testing.assert_close(ours.metrics[name], there, rtol=1e-4, atol=1e-5)


def test_no_more_scales_can_be_trained_than_there_are(tiny_pipeline: VARPipeline) -> None:
    schedule = tiny_pipeline.transformer.schedule
    assert Objective(GRPOConfig(train_scales=4), SamplingConfig(), schedule, None).lengths == (1, 4, 9, 16)
    with pytest.raises(ConfigError, match=r"^grpo\.train_scales 5 is out of range: this model has 4 scales$"):
        Objective(GRPOConfig(train_scales=5), SamplingConfig(), schedule, None)
    with pytest.raises(ConfigError, match=r"^scale_weighting needs 2 .* one a trained scale"):
        config = GRPOConfig(train_scales=2, scale_weighting=(1.0, 1.0, 0.0, 0.0))
        Objective(config, SamplingConfig(), schedule, None)


# Sampler and trainer


def test_the_first_iteration_is_exactly_on_policy_whatever_the_sampler_recorded(
    tiny_pipeline: VARPipeline,
) -> None:
    sampling, model = SamplingConfig(guidance_scale=1.5, top_k=30), tiny_pipeline.transformer
    config = GRPOConfig(beta=0.0, measure_kl=False, num_iterations=2, epsilon=1e-6)
    objective = Objective(config, sampling, model.schedule, None)
    batch = microbatch(tiny_pipeline, sampling)
    noise = 0.1 * torch.randn(batch.log_probs.shape, generator=torch.Generator().manual_seed(0))
    drifted = replace(batch, log_probs=batch.log_probs + noise)
    exact, output = objective(model, batch), objective(model, drifted)
    assert torch.equal(gradients(model, output.loss), gradients(model, exact.loss))
    assert output.loss.item() == pytest.approx(-batch.advantages.mean().item(), abs=1e-6)
    assert output.metrics["clip_ratio/region_mean"].max() == 0
    difference = output.metrics["sampling/sampling_logp_difference/mean"]
    torch.testing.assert_close(difference, noise.abs(), rtol=0, atol=1e-4)
    ratio = output.metrics["sampling/importance_sampling_ratio/max"]
    torch.testing.assert_close(ratio, (-noise).exp(), rtol=1e-4, atol=0)
    # The next iteration takes what the first found out: the old log-probs, and the difference as it was.
    assert torch.equal(output.kept["old_log_probs"], exact.kept["old_log_probs"])
    with torch.no_grad():
        model.head.weight.mul_(1.5)
    later = objective(model, replace(drifted, **output.kept))
    assert torch.equal(later.metrics["sampling/sampling_logp_difference/mean"], difference)
    assert later.metrics["clip_ratio/region_mean"].mean() > 0.1
    assert torch.equal(later.kept["old_log_probs"], output.kept["old_log_probs"])


def test_importance_weights_by_hand() -> None:
    old, sampled = torch.tensor([[2.0, 1.0, 0.5]]).log(), torch.tensor([[0.5, 1.0, 1.0]]).log()  # 4, 1, 1/2

    def weights(mode: str | None) -> list[list[float]]:
        options = (
            {} if mode is None else {"importance_sampling_correction": True, "importance_sampling_mode": mode}
        )
        config = GRPOConfig(importance_sampling_clip_max=1.5, **options)
        return mismatch_ratios(old, sampled, config).tolist()

    assert weights(None) == [pytest.approx([4.0, 1.0, 0.5])]
    assert weights("token_truncate") == [pytest.approx([1.5, 1.0, 0.5])]
    assert weights("token_mask") == [pytest.approx([0.0, 1.0, 0.5])]
    assert weights("sequence_truncate") == [pytest.approx([1.5])]  # 4 x 1 x 1/2 = 2
    assert weights("sequence_mask") == [[0.0]]


def test_importance_weights_are_of_the_surrogate_alone() -> None:
    objective = torch.tensor([[1.0, 2.0, 4.0], [0.0, 0.0, 0.0]])
    by_token = quantities(importance_BL=torch.tensor([[2.0, 1.0, 0.5]]).expand(2, 3), entropy_coef=0.2)
    # surrogate: (1 + 0.5 + 0.5) / 2 = 1; kl 1.5 and entropy 0.5 as without
    assert regularised(objective, by_token).item() == pytest.approx(-(1.0 - 0.15 + 0.1))
    by_image = quantities(importance_BL=torch.tensor([[0.5], [9.0]]))
    assert regularised(objective, by_image).item() == pytest.approx(-(0.5 - 0.15))


def test_the_correction_multiplies_what_the_sampler_drew_too_often(tiny_pipeline: VARPipeline) -> None:
    """Logged are the weights as used; an image whose tokens are all left out has no gradient."""
    sampling, model = SamplingConfig(guidance_scale=1.5), tiny_pipeline.transformer
    batch = microbatch(tiny_pipeline, sampling)
    drifted = replace(batch, log_probs=batch.log_probs - torch.tensor([[2.0], [1.0], [2.0], [2.0]]).log())
    options = {"importance_sampling_correction": True, "importance_sampling_clip_max": 1.5, "beta": 0.0}
    config = GRPOConfig(measure_kl=False, importance_sampling_mode="token_mask", **options)
    output = Objective(config, sampling, model.schedule, None)(model, drifted)
    ratio = output.metrics["sampling/importance_sampling_ratio/mean"]
    torch.testing.assert_close(
        ratio, torch.tensor([[0.0], [1.0], [0.0], [0.0]]).expand(4, 30), rtol=0, atol=1e-4
    )
    plain = Objective(GRPOConfig(measure_kl=False, beta=0.0), sampling, model.schedule, None)
    alone = replace(batch, advantages=torch.tensor([0.0, -0.5, 0.0, 0.0]))
    ours, theirs = gradients(model, output.loss), gradients(model, plain(model, alone).loss)
    assert (ours - theirs).norm() <= 1e-4 * theirs.norm()


def test_a_null_branch_without_gradient_is_the_dense_formula_with_it_detached(
    make_pipeline: MakePipeline,
) -> None:
    pipe, sampling = make_pipeline(codebook_size=200), SamplingConfig(guidance_scale=1.5, top_k=50)
    model, batch = pipe.transformer, microbatch(pipe, sampling)
    base = make_pipeline(seed=1, codebook_size=200).transformer
    options = {"beta": 0.3, "entropy_coef": 0.1}
    both = Objective(GRPOConfig(**options), sampling, model.schedule, Reference.copy_of(base))
    one_config = GRPOConfig(trained_branches="conditional", **options)
    one = Objective(one_config, sampling, model.schedule, Reference.copy_of(base))
    expected, output = both(model, batch), one(model, batch)
    torch.testing.assert_close(output.loss, expected.loss)
    assert output.metrics["sampling/sampling_logp_difference/max"].max() < 1e-4  # still the guided policy

    # By hand: the loss of guided logits whose null part carries no gradient.
    def dense(logits_null: Tensor) -> Tensor:
        ramp = model.schedule.guidance_ramp()[:, None] * sampling.guidance_scale
        logits = (1 + ramp) * model(batch.conditioning, batch.inputs) - ramp * logits_null
        full = logits.log_softmax(-1)
        with torch.no_grad():
            given = model.schedule, batch.conditioning, batch.inputs, sampling
            theirs = teacher_forced_logits(base, *given).log_softmax(-1)
        kept = logits >= logits.topk(50, dim=-1).values[..., -1:]
        kept = kept.scatter(-1, batch.tokens[..., None], True)
        policy = logits.masked_fill(~kept, -torch.inf).log_softmax(-1)
        drawn = policy.gather(-1, batch.tokens[..., None])[..., 0]
        value = (drawn - drawn.detach()).exp() * batch.advantages[:, None]
        value = value - 0.3 * (full.exp() * (full - theirs)).sum(-1) - 0.1 * (full.exp() * full).sum(-1)
        return -torch.stack([part.mean(1) for part in value.split(model.schedule.lengths, 1)], 1).mean()

    null = batch.conditioning.with_null().select(slice(len(batch.tokens), 2 * len(batch.tokens)))
    with torch.no_grad():
        logits_null = model(null, batch.inputs)
    found, hand = gradients(model, output.loss), gradients(model, dense(logits_null))
    assert (found - hand).norm() < 1e-5 * hand.norm()
    assert (found - gradients(model, expected.loss)).norm() > 1e-2 * hand.norm()


def test_a_choice_of_branches_needs_guidance(tiny_pipeline: VARPipeline) -> None:
    schedule = tiny_pipeline.transformer.schedule
    with pytest.raises(ConfigError, match="trained_branches conditional has no effect without guidance"):
        Objective(GRPOConfig(trained_branches="conditional"), SamplingConfig(), schedule, None)
    with pytest.raises(
        ConfigError, match=r"reference_guidance_scale 1\.5 has no effect, since .* is the same"
    ):
        guided = SamplingConfig(guidance_scale=1.5)
        Objective(GRPOConfig(reference_guidance_scale=1.5), guided, schedule, None)


def test_the_reference_may_be_guided_where_the_policy_is_not(make_pipeline: MakePipeline) -> None:
    """The KL of an unguided model to its guided self: what distils guidance away."""
    pipe, unguided = make_pipeline(), SamplingConfig(temperature=0.9)
    model, batch = pipe.transformer, microbatch(pipe, unguided)
    config = GRPOConfig(beta=1.0, reference_guidance_scale=2.0, kl_scale_weighting="token")
    output = Objective(config, unguided, model.schedule, Reference.copy_of(model))(model, batch)
    given = model.schedule, batch.conditioning, batch.inputs
    with torch.no_grad():
        ours = teacher_forced_logits(model, *given, unguided).log_softmax(-1)
        theirs = teacher_forced_logits(model, *given, unguided.replace(guidance_scale=2.0)).log_softmax(-1)
    expected = (ours.exp() * (ours - theirs)).sum(-1)
    torch.testing.assert_close(output.metrics["kl"], expected, rtol=1e-4, atol=1e-5)
    first, last = (expected[:, part].mean() for part in (slice(0, 1), slice(14, 30)))
    assert first < 1e-6 < last  # the ramp of guidance begins at 0
