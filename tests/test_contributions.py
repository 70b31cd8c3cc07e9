"""Contributions: what a token added to the rewards, against what was to be expected in its place."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nextscale import credit as credit_module
from nextscale.advantages import weights_in_advantage
from nextscale.base.errors import ConfigError, RewardError
from nextscale.credit import Scored, find_credit
from nextscale.drawing import draw_batches
from nextscale.pipeline import VARPipeline
from nextscale.policy import SamplingConfig, policy_log_probs
from nextscale.rescoring import teacher_forced_logits
from nextscale.rewards.diversity import Diversity
from nextscale.rewards.jpeg import JpegCompressibility
from nextscale.rewards.reward_set import RewardSet
from nextscale.rewards.roles import AtLeast
from nextscale.rollout import Rollout, collect
from nextscale.sampling import Branches
from test_trainer import brightness, make_trainer, redness

MakePipeline = Callable[..., VARPipeline]
GUIDED = SamplingConfig(guidance_scale=1.5)
CLASSES = [0, 1]


def rolled(pipe: VARPipeline, rewards: RewardSet, **options: Any) -> Rollout:
    seeds = [("contribution", each) for each in CLASSES]
    return collect(pipe, pipe.conditions(CLASSES), seeds, 4, GUIDED, rewards, **options)


def credit(
    pipe: VARPipeline, rewards: RewardSet, rollout: Rollout, name: str = "contribution", **options: Any
) -> Tensor:
    fields: dict[str, Any] = {
        "advantages": torch.full((8,), torch.nan),  # not used
        "rollout": rollout,
        "scores": rewards.of_groups(rollout.scores, 4),
        "tokenizer": pipe.tokenizer,
        "rewards": rewards,
        "coefficients": {},
        "aggregation": "sum_then_normalize",
        "scale_rewards": "group",
        "batch_size": 3,
    }
    return find_credit(name, rewards)(Scored(**(fields | options)))


@pytest.mark.parametrize(
    "sampling", [GUIDED, SamplingConfig(guidance_scale=2.0, top_k=9, temperature=0.7)], ids=["all", "top-k"]
)
@pytest.mark.parametrize("branches", [None, Branches(2, 2)], ids=["apart", "branched"])
def test_expected_codes_are_the_means_of_what_may_be_drawn(
    tiny_pipeline: VARPipeline, sampling: SamplingConfig, branches: Branches | None
) -> None:
    pipe = tiny_pipeline
    conditions = pipe.conditions(CLASSES)
    networks, seeds = (pipe.transformer, pipe.tokenizer), [("e", 0), ("e", 1)]
    (drawn,) = draw_batches(*networks, conditions, seeds, 4, sampling, branches=branches)
    given = pipe.transformer, pipe.transformer.schedule, drawn.conditioning, drawn.inputs, sampling
    probs = policy_log_probs(teacher_forced_logits(*given), sampling).exp()
    by_hand = torch.einsum("blv,vd->bld", probs, pipe.tokenizer.codebook)
    torch.testing.assert_close(drawn.expected_codes, by_hand, rtol=1e-4, atol=1e-5)


def test_the_latent_is_an_affine_function_of_the_codes(tiny_pipeline: VARPipeline) -> None:
    latent, codes = tiny_pipeline.tokenizer.codes_to_latent, torch.randn(2, 3, 30, 8)
    a, b, none = (latent(each) for each in (codes[0], codes[1], torch.zeros_like(codes[0])))
    torch.testing.assert_close(latent(codes[0] + 2 * codes[1]), a + 2 * (b - none))


def test_of_a_linear_reward_it_is_the_change_itself(
    tiny_pipeline: VARPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each code of the codebook put in a token's place, and all of them weighed as the policy does."""
    pipe, tokenizer = tiny_pipeline, tiny_pipeline.tokenizer
    slope = torch.randn(8, 4, 4)

    def as_it_is(self: Any, latent: Tensor) -> Tensor:
        return latent

    monkeypatch.setattr(type(tokenizer), "latent_to_images", as_it_is)

    def linear(images: Tensor, conditions: Any) -> Tensor:
        return 3.0 * (images * slope).sum((1, 2, 3))

    rewards = RewardSet({"linear": linear})
    rollout = rolled(pipe, rewards)
    found = credit(pipe, rewards, rollout)
    given = pipe.transformer, pipe.transformer.schedule, rollout.conditioning, rollout.inputs, GUIDED
    probs = policy_log_probs(teacher_forced_logits(*given), GUIDED).exp()
    expected = torch.zeros(8, 30)
    for at in range(30):
        others = rollout.tokens[:, None].repeat(1, 48, 1)
        others[:, :, at] = torch.arange(48)
        latents = tokenizer.codes_to_latent(tokenizer.codebook[others.flatten(0, 1)])
        rewards_BV = linear(latents, None).view(8, 48)
        drawn = rewards_BV.gather(1, rollout.tokens[:, at, None])[:, 0]
        expected[:, at] = drawn - (probs[:, at] * rewards_BV).sum(1)
    for part in pipe.transformer.schedule.slices:  # in every scale up to one factor, which makes its size 1
        by_hand = expected[:, part] / expected[:, part].square().mean().sqrt()
        torch.testing.assert_close(found[:, part], by_hand, rtol=1e-3, atol=1e-3)


def test_a_group_reward_has_the_slope_of_each_image_among_the_others(
    tiny_pipeline: VARPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By finite differences of one code, the other images staying as they are."""
    pipe, tokenizer = tiny_pipeline, tiny_pipeline.tokenizer

    def smooth(self: Any, latent: Tensor) -> Tensor:
        return latent[:, :3].sigmoid()

    monkeypatch.setattr(type(tokenizer), "latent_to_images", smooth)
    rewards = RewardSet({"various": Diversity("pixels"), "red": redness}, {"various": 2.0, "red": -1.0})
    rollout = rolled(pipe, rewards)
    weights = weights_in_advantage(
        rewards.of_groups(rollout.scores, 4), rewards.weights, {}, "normalize_then_sum"
    )

    def total(codes: Tensor, image: int) -> float:
        images = tokenizer.latent_to_images(tokenizer.codes_to_latent(codes))
        scores = rewards.of_groups(rewards.scores(images, rollout.conditions), 4)
        return sum(weights[name] * scores[name].flatten()[image].item() for name in weights)

    codes = tokenizer.codebook[rollout.tokens].detach()
    found = credit(pipe, rewards, rollout, aggregation="normalize_then_sum")
    size = sum(weights[name] * rewards.of_groups(rollout.scores, 4)[name] for name in weights)
    for part in pipe.transformer.schedule.slices[:2]:
        by_hand = torch.zeros(8, part.stop - part.start)
        for image in range(8):
            for at in range(part.start, part.stop):
                surprise = codes[image, at] - rollout.expected_codes[image, at]
                ends = []
                for step in (1e-2, -1e-2):
                    moved = codes.clone()
                    moved[image, at] += step * surprise
                    ends.append(total(moved, image))
                by_hand[image, at - part.start] = (ends[0] - ends[1]) / 2e-2
        by_hand *= size.std(1).square().mean().sqrt() / by_hand.square().mean().sqrt()
        torch.testing.assert_close(found[:, part], by_hand, rtol=0.01, atol=0.01)


def test_without_a_gradient_a_reward_counts_by_its_image(tiny_pipeline: VARPipeline) -> None:
    def bits(images: Tensor, conditions: Any) -> list[float]:
        return [each.item() for each in brightness(images, conditions)]

    pipe = tiny_pipeline
    alone, both = RewardSet({"red": redness}), RewardSet({"red": redness, "bits": bits})
    rollout = rolled(pipe, both)
    scores = both.of_groups(rollout.scores, 4)
    found = credit(pipe, both, rollout)
    total = (scores["red"] + scores["bits"]).std(1).square().mean().sqrt()
    own = credit(pipe, alone, rolled(pipe, alone)) * scores["red"].std(1).square().mean().sqrt() / total
    by_image = (scores["bits"] - scores["bits"].mean(1, keepdim=True)).flatten() / total
    torch.testing.assert_close(found, own + by_image[:, None], rtol=1e-4, atol=1e-5)


def test_a_slope_in_some_images_is_one_in_all(tiny_pipeline: VARPipeline) -> None:
    """Else a reward would count twice, or differently from process to process."""

    def of_some(images: Tensor, conditions: Any) -> Tensor:
        is_last = all(each.label == 1 for each in conditions)  # of the batches of 3 the last alone
        scores = redness(images, conditions)
        return scores.detach() if is_last else scores

    pipe, rewards = tiny_pipeline, RewardSet({"some": of_some})
    found = credit(pipe, rewards, rolled(pipe, rewards))
    assert found[:6].all() and not found[6:].any()


def test_sums_of_rewards_do_not_depend_on_the_order_of_a_set(
    tiny_pipeline: VARPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which differs from process to process: by the hashes of the names."""

    def tinted(share: float) -> Any:
        return lambda images, conditions: share * images[:, 0].mean((1, 2)) + images[:, 2].mean((1, 2)) ** 2

    def untinted(share: float) -> Any:
        return lambda images, conditions: tinted(share)(images.detach(), conditions)

    of = {f"a{i}": tinted(1 / (3 + i)) for i in range(5)} | {f"b{i}": untinted(1 / (3 + i)) for i in range(5)}
    rewards = RewardSet(of, dict(zip(of, [0.1, 0.7, 1.3, 2.9, 0.3] * 2, strict=True)))
    rollout = rolled(tiny_pipeline, rewards)
    expected = credit(tiny_pipeline, rewards, rollout)

    class Backwards(set):
        def __iter__(self) -> Any:
            return iter(sorted(super().__iter__(), reverse=True))

    monkeypatch.setattr(credit_module, "set", Backwards, raising=False)
    assert torch.equal(credit(tiny_pipeline, rewards, rollout), expected)


def test_rewards_without_a_slope_count_while_those_with_one_say_nothing(tiny_pipeline: VARPipeline) -> None:
    """Such as a constraint that is kept: its multiplier is 0."""
    pipe = tiny_pipeline

    def coarse(images: Tensor, conditions: Any) -> list[float]:
        return redness(images, conditions).tolist()

    rewards = RewardSet({"coarse": coarse, "bright": brightness}, constraints={"bright": AtLeast(0.1)})
    rollout = rolled(pipe, rewards)
    found = credit(pipe, rewards, rollout, coefficients={"bright": 0.0})
    scores = rewards.of_groups(rollout.scores, 4)["coarse"]
    expected = weights_in_advantage({"coarse": scores}, {"coarse": 1.0}, {}, "sum_then_normalize")["coarse"]
    by_hand = (scores - scores.mean(1, keepdim=True)).flatten() * expected
    torch.testing.assert_close(found, by_hand[:, None].expand_as(found), rtol=1e-4, atol=1e-5)


def test_a_constraint_counts_by_its_multiplier(tiny_pipeline: VARPipeline) -> None:
    pipe = tiny_pipeline
    rewards = RewardSet({"red": redness, "bright": brightness}, constraints={"bright": AtLeast(0.9)})
    rollout = rolled(pipe, rewards)
    alone, bounded = (credit(pipe, rewards, rollout, coefficients={"bright": each}) for each in (0.0, 2.0))
    as_sum = RewardSet({"red": redness, "bright": brightness}, {"red": 1.0, "bright": 2.0})
    red = RewardSet({"red": redness})
    torch.testing.assert_close(alone, credit(pipe, red, rolled(pipe, red)))
    by_weight = credit(pipe, as_sum, rollout, aggregation="normalize_then_sum")
    torch.testing.assert_close(bounded, by_weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["contribution", "gradient"])
def test_a_reward_changes_no_setting_while_it_is_asked_for_its_slope(
    tiny_pipeline: VARPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def rude(images: Tensor, conditions: Any) -> Tensor:
        torch.set_default_dtype(torch.float64)
        os.chdir(tmp_path)
        return redness(images, conditions)

    monkeypatch.chdir(Path.cwd())
    rewards, before = RewardSet({"rude": rude}), Path.cwd()
    rollout = rolled(tiny_pipeline, rewards)
    given = {"advantages": torch.ones(8), "name": name}
    try:
        credit(tiny_pipeline, rewards, rollout, **given)
        assert torch.get_default_dtype() == torch.float32 and Path.cwd() == before
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_spread_of_roundings_gives_a_reward_no_weight() -> None:
    rounded = torch.tensor([[1.0, 1.0 + 2e-7], [1.0, 1.0]])
    found = weights_in_advantage(
        {"a": rounded, "b": torch.rand(2, 2)}, {"a": 1.0, "b": 1.0}, {}, "normalize_then_sum"
    )
    assert found["a"] == 0 and found["b"] > 0


def test_an_image_without_a_score_teaches_nothing(tiny_pipeline: VARPipeline) -> None:
    def some(images: Tensor, conditions: Any) -> Tensor:
        is_known = images.new_tensor([each.label == 1 for each in conditions])
        return torch.where(is_known > 0, redness(images, conditions), torch.nan)

    rewards = RewardSet({"some": some})
    found = credit(tiny_pipeline, rewards, rolled(tiny_pipeline, rewards))
    assert not found[:4].any() and found[4:].all() and found.isfinite().all()


def test_rewards_that_have_no_gradient_are_named(tiny_pipeline: VARPipeline, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none of the rewards size has a gradient .* contribution needs"):
        find_credit("contribution", RewardSet({"size": JpegCompressibility()}))

    def counted(images: Tensor, conditions: Any) -> list[float]:
        return [float(i) for i in range(len(images))]

    rewards = RewardSet({"counted": counted})
    with pytest.raises(RewardError, match=r"none of the rewards counted has a gradient"):
        credit(tiny_pipeline, rewards, rolled(tiny_pipeline, rewards))
    for option, value in (("scale_rewards", "batch"), ("branch_scale", 2), ("advantage_epsilon", 0.5)):
        with pytest.raises(ConfigError, match=rf"{option} .* no effect with grpo.credit contribution"):
            make_trainer(tiny_pipeline, tmp_path / "a", credit="contribution", **{option: value})


def test_weights_are_those_of_the_advantages() -> None:
    scores = {"a": torch.tensor([[0.0, 2.0], [0.0, 2.0]]), "b": torch.tensor([[1.0, 0.0], [1.0, 0.0]])}
    half = 0.5**0.5
    given = scores, {"a": 1.0, "b": 3.0}
    each = weights_in_advantage(*given, {}, "normalize_then_sum")
    assert each == pytest.approx({"a": half, "b": 3 * 2 * half})
    total = weights_in_advantage(*given, {}, "sum_then_normalize")  # 3, 2: a spread of sqrt(1 / 2)
    assert total == pytest.approx({"a": 2 * half, "b": 3 * 2 * half})
    bounded = weights_in_advantage(scores, {"b": 1.0}, {"a": -0.5}, "sum_then_normalize")
    assert bounded == pytest.approx({"b": 2 * half, "a": -0.5 * half})
    assert weights_in_advantage({"a": torch.ones(2, 2)}, {"a": 1.0}, {}, "sum_then_normalize") == {"a": 0.0}
    as_they_are = weights_in_advantage(scores, {"b": 3.0}, {"a": -0.5}, "normalize_then_sum", "none")
    assert as_they_are == pytest.approx({"b": 3.0, "a": -0.5 * half})
    scores = {"a": torch.tensor([[0.0, 2.0], [4.0, 6.0]])}
    of_batch = weights_in_advantage(scores, {"a": 1.0}, {}, "sum_then_normalize", "batch")
    assert of_batch == pytest.approx({"a": 1 / (20 / 3) ** 0.5})


def test_training_by_contributions_raises_a_reward_faster(
    make_pipeline: MakePipeline, tmp_path: Path
) -> None:
    def last(name: str, credit: str) -> float:
        options: dict[str, Any] = {"credit": credit, "max_steps": 6, "learning_rate": 1e-2, "beta": 0.0}
        trainer = make_trainer(make_pipeline(), tmp_path / name, brightness, **options)
        return trainer.train().metrics["rewards/brightness/mean"]

    assert last("b", "contribution") > last("a", "none") + 0.01
