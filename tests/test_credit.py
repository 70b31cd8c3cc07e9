"""Credit masks: where a reward looks is where its advantage goes, at every scale."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nextscale.base.conditions import Condition
from nextscale.base.errors import ConfigError, RewardError
from nextscale.credit import CREDITS, Scored, find_credit, gradient_saliency, token_mask
from nextscale.drawing import Drawn
from nextscale.models.scales import ScaleSchedule
from nextscale.pipeline import VARPipeline
from nextscale.policy import SamplingConfig
from nextscale.rewards.aesthetic import Aesthetic
from nextscale.rewards.clip_score import ClipScore
from nextscale.rewards.diversity import Diversity
from nextscale.rewards.jpeg import JpegCompressibility
from nextscale.rewards.reward_set import RewardSet
from test_trainer import gradient, make_trainer

MakePipeline = Callable[..., VARPipeline]


QUIET = torch.tensor([[0.1, 0.3], [0.5, 0.2]])
SCORES = {"a": QUIET, "loud": 64 * QUIET, "both": QUIET + 64 * QUIET}


def corner(images: Tensor, conditions: Any) -> Tensor:
    """Brightness of the upper left eighth of the sides."""
    size = images.shape[-1] // 8
    return images[:, :, :size, :size].mean((1, 2, 3))


def credited(
    name: str,
    advantages: Tensor,
    drawn: Drawn,
    pipe: VARPipeline,
    rewards: Any,
    size: int,
    aggregation: Any = "sum_then_normalize",
) -> Tensor:
    rewards = RewardSet.of(rewards)
    found = Scored(
        advantages=advantages,
        rollout=drawn,
        scores=SCORES | {each: SCORES["a"] for each in rewards.rewards if each not in SCORES},
        tokenizer=pipe.tokenizer,
        rewards=rewards,
        coefficients={},
        aggregation=aggregation,
        scale_rewards="group",
        batch_size=size,
    )
    return find_credit(name, rewards)(found)


def latent_of(pipe: VARPipeline, tokens: Tensor) -> Tensor:
    return pipe.tokenizer.codes_to_latent(pipe.tokenizer.codebook[tokens])


def drawn_of(pipe: VARPipeline) -> Any:
    return pipe.draw(pipe.conditions([0, 1]), [("c", 0), ("c", 1)], 2, SamplingConfig(guidance_scale=1.5))


def test_the_latent_is_what_the_tokens_decode_from(tiny_pipeline: VARPipeline) -> None:
    drawn = drawn_of(tiny_pipeline)
    latent = latent_of(tiny_pipeline, drawn.tokens)
    images = tiny_pipeline.tokenizer.latent_to_images(latent)
    torch.testing.assert_close(images, drawn.images, rtol=0, atol=1e-5)


def test_the_saliency_is_the_gradient_by_finite_differences(tiny_pipeline: VARPipeline) -> None:
    tokenizer, drawn = tiny_pipeline.tokenizer, drawn_of(tiny_pipeline)
    latent = latent_of(tiny_pipeline, drawn.tokens[:1])
    given = {"corner": corner}, {"corner": 2.0}
    saliency = gradient_saliency(tokenizer, latent, drawn.conditions[:1], *given)
    h, w = saliency.shape[1:]
    for y, x in ((0, 0), (h - 1, w - 1)):
        by_hand, step = 0.0, 1e-2
        for channel in range(latent.shape[1]):
            moved = latent.repeat(2, 1, 1, 1)
            moved[0, channel, y, x] += step
            moved[1, channel, y, x] -= step
            up, down = corner(tokenizer.latent_to_images(moved), None)
            by_hand += abs(2.0 * (up - down).item() / (2 * step))
        assert saliency[0, y, x].item() == pytest.approx(by_hand, rel=0.05, abs=1e-5)


def test_a_mask_has_the_mean_1_in_every_scale_and_follows_the_area() -> None:
    schedule = ScaleSchedule((1, 2, 4))
    saliency = torch.zeros(2, 4, 4)
    saliency[0, :2, :2] = 3.0  # the upper left quarter; the second image has none at all
    mask = token_mask(saliency, schedule)
    assert mask[0].tolist() == pytest.approx([1.0, 4, 0, 0, 0, *[4, 4, 0, 0] * 2, *[0] * 8])
    assert mask[1].tolist() == [1.0] * 21


def test_the_advantage_goes_to_where_the_reward_looks() -> None:
    pipe = VARPipeline.from_pretrained("toy")  # whose decoder has learnt what is where
    drawn, tokenizer = drawn_of(pipe), pipe.tokenizer
    rewards = RewardSet({"corner": corner, "various": Diversity("pixels")})
    advantages = torch.tensor([1.0, -2.0, 0.5, 0.0])
    for size in (4, 3):
        found = credited("gradient", advantages, drawn, pipe, rewards, size)
        for scale in tokenizer.schedule.slices:  # nothing is added or lost
            torch.testing.assert_close(found[:, scale].mean(1), advantages)
    last = found[0, tokenizer.schedule.slices[-1]].view(*[tokenizer.schedule.sizes[-1]] * 2)
    assert last[0, 0] == last.max() > 5 * last[-4:, -4:].mean()


def test_a_reward_in_large_units_does_not_decide_where_the_advantage_goes() -> None:
    """Where each reward is normalised before they are summed, both are worth the same."""
    pipe = VARPipeline.from_pretrained("toy")
    drawn, advantages = drawn_of(pipe), torch.ones(4)

    def other(images: Tensor, conditions: Any) -> Tensor:
        return corner(images.flip(2, 3), conditions)

    def loud(images: Tensor, conditions: Any) -> Tensor:
        return 64 * other(images, conditions)

    asked = {"a": corner, "loud": loud}
    apart = credited("gradient", advantages, drawn, pipe, asked, 4, "normalize_then_sum")
    alike = credited("gradient", advantages, drawn, pipe, {"a": corner, "b": other}, 4)
    torch.testing.assert_close(apart, alike)
    summed = credited("gradient", advantages, drawn, pipe, asked, 4)

    def both(images: Tensor, conditions: Any) -> Tensor:
        return corner(images, conditions) + loud(images, conditions)

    as_one = credited("gradient", advantages, drawn, pipe, {"both": both}, 4)
    torch.testing.assert_close(summed, as_one)  # in a sum, units count
    assert (apart - summed).abs().max() > 1


def test_the_networks_that_score_have_a_gradient() -> None:
    pipe = VARPipeline.from_pretrained("toy")
    drawn = drawn_of(pipe)
    latent = latent_of(pipe, drawn.tokens)
    for reward in (ClipScore("a photo of a {label}", clip="toy"), Aesthetic("toy", clip="toy")):
        found = gradient_saliency(pipe.tokenizer, latent, drawn.conditions, {"a": reward}, {"a": 1.0})
        assert found.shape == (4, 8, 8) and (found.sum((1, 2)) > 0).all()


def test_a_saliency_of_ones_own(tiny_pipeline: VARPipeline, tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "def left(images, conditions):\n"
        "    places = images.new_zeros(len(images), 4, 4)\n"
        "    places[:, :, 0] = 1\n"
        "    return places\n"
        "def broken(images, conditions):\n"
        "    return -images.mean(1)\n"
        "def raises(images, conditions):\n"
        "    raise KeyError('where')\n"
    )
    given = torch.ones(4), drawn_of(tiny_pipeline), tiny_pipeline, corner, 3
    found = credited(f"{path}:left", *given)
    assert found[0, tiny_pipeline.tokenizer.schedule.slices[-1]].view(4, 4)[:, 0].tolist() == [4.0] * 4
    for name, says in (
        ("broken", r"returned .* expected \(3, height, width\) of numbers that are at least 0"),
        ("raises", r"raised KeyError: 'where' \(.*mine\.py:8\)"),
    ):
        with pytest.raises(RewardError, match=says):
            credited(f"{path}:{name}", *given)


def test_a_reward_without_a_gradient_is_named_before_it_is_needed(tiny_pipeline: VARPipeline) -> None:
    async def awaited(images: Tensor, conditions: Any) -> Tensor:
        return images.mean((1, 2, 3))

    for rewards, says in (
        ({"size": JpegCompressibility()}, "reward 'size' has no gradient with respect to the image"),
        ({"awaited": awaited}, "reward 'awaited' has no gradient with respect to the image"),
        ({"various": Diversity("pixels")}, "needs a reward of single images"),
    ):
        with pytest.raises(ConfigError, match=says):
            find_credit("gradient", RewardSet(rewards))

    def counted(images: Tensor, conditions: list[Condition]) -> list[float]:
        return [0.5] * len(images)

    def broken(images: Tensor, conditions: list[Condition]) -> Tensor:
        raise KeyError("colour")

    drawn = drawn_of(tiny_pipeline)  # of any function, it is known when it is called
    for reward, says in ((counted, "has no gradient with respect"), (broken, "raised KeyError: 'colour'")):
        with pytest.raises(RewardError, match=f"reward '{reward.__name__}' {says}"):
            credited("gradient", torch.ones(4), drawn, tiny_pipeline, reward, 4)


@pytest.mark.parametrize("shape", [(16,), (16, 4), (16, 30)])
def test_a_way_of_ones_own(make_pipeline: MakePipeline, tmp_path: Path, shape: tuple[int, ...]) -> None:
    """One line in the table; a misspelt name is told before the run."""
    with pytest.raises(ConfigError, match=r"unknown grpo\.credit 'gradiant'; did you mean 'gradient'"):
        make_trainer(make_pipeline(), tmp_path / "bad", credit="gradiant")
    with pytest.raises(ConfigError, match=r"grpo.credit 'no.py:f': no file"):
        make_trainer(make_pipeline(), tmp_path / "bad", credit="no.py:f")

    def mine(scored: Scored) -> Tensor:
        return torch.ones(shape) if scored.advantages.any() else scored.advantages

    CREDITS["mine"] = mine
    try:
        found = gradient(make_trainer(make_pipeline(), tmp_path / "a", credit="mine", beta=0.0))
    finally:
        del CREDITS["mine"]
    trainer = make_trainer(make_pipeline(), tmp_path / "b", beta=0.0)
    trainer.crediting.of_mine = lambda scores, step: torch.ones(16)  # type: ignore[method-assign]
    for name, each in gradient(trainer).items():
        torch.testing.assert_close(found[name], each)
