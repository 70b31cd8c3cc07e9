"""Rollouts: drawn and scored batch by batch."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nextscale.drawing import draw_batches
from nextscale.pipeline import VARPipeline
from nextscale.policy import SamplingConfig
from nextscale.rewards import RewardSet
from nextscale.rollout import collect, condition_again
from nextscale.runs.reader import images_of
from test_trainer import make_trainer

SEEDS = [("test", i) for i in range(3)]
POLICY = SamplingConfig(guidance_scale=1.5)


def test_rewards_see_the_images_batch_by_batch(tiny_pipeline: VARPipeline) -> None:
    sizes: list[int] = []

    def only_class_3(images: Tensor, conditions: list) -> Tensor:
        sizes.append(len(images))
        is_scored = torch.tensor([each.label == 3 for each in conditions])
        return torch.where(is_scored, images[:, 0].mean((1, 2)), math.nan)

    conditions, rewards = tiny_pipeline.conditions([0, 2, 3]), RewardSet({"a": only_class_3})
    whole, parts = (collect(tiny_pipeline, conditions, SEEDS, 4, POLICY, rewards, size) for size in (None, 5))
    assert sizes == [12, 5, 5, 2]
    assert whole.scores["a"].shape == parts.scores["a"].shape == (12,)
    torch.testing.assert_close(parts.scores, whole.scores, rtol=0, atol=1e-5, equal_nan=True)
    assert set(parts.seconds) == {"rollout", "decode", "reward"}


@pytest.mark.parametrize("batch_size", [1, 3, 4, 5, 12, 64])
def test_batches_are_what_is_drawn_at_once(tiny_pipeline: VARPipeline, batch_size: int) -> None:
    conditions = tiny_pipeline.conditions([0, 2, 3])
    whole = tiny_pipeline.draw(conditions, SEEDS, 4, POLICY)
    networks = tiny_pipeline.transformer, tiny_pipeline.tokenizer
    batches = list(draw_batches(*networks, conditions, SEEDS, 4, POLICY, batch_size))
    assert [len(each.images) for each in batches[:-1]] == [batch_size] * (len(batches) - 1)
    assert sum(len(each.conditions) for each in batches) == 12
    parts = tiny_pipeline.draw(conditions, SEEDS, 4, POLICY, batch_size)
    assert parts.conditions == whole.conditions and torch.equal(parts.tokens, whole.tokens)
    assert torch.equal(parts.conditioning["labels"], whole.conditioning["labels"])
    for name in ("log_probs", "inputs", "images"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), rtol=0, atol=1e-4)


def test_images_take_the_places_of_others(tiny_pipeline: VARPipeline) -> None:
    rewards = RewardSet({"red": lambda images, conditions: images[:, 0].mean((1, 2))})
    first = collect(tiny_pipeline, tiny_pipeline.conditions([0, 2, 3]), SEEDS, 2, POLICY, rewards)
    other = collect(tiny_pipeline, tiny_pipeline.conditions([1]), [("other",)], 2, POLICY, rewards)
    mixed = first.replaced([4, 1], other)
    assert [each.label for each in mixed.conditions] == [0, 1, 2, 2, 1, 3]
    assert mixed.conditioning["labels"].tolist() == [0, 1, 2, 2, 1, 3]
    for name in ("tokens", "log_probs", "inputs", "images"):
        mine, theirs, found = (getattr(each, name) for each in (first, other, mixed))
        assert torch.equal(found, torch.stack([mine[0], theirs[1], mine[2], mine[3], theirs[0], mine[5]])), (
            name
        )
    assert mixed.scores["red"][[4, 1]].tolist() == other.scores["red"].tolist()
    assert mixed.seconds["rollout"] == first.seconds["rollout"] + other.seconds["rollout"]


def test_groups_with_nothing_to_learn_from_are_drawn_anew(
    make_pipeline: Callable[..., VARPipeline], tmp_path: Path
) -> None:
    """A reward of classes 2 and 3 alone: a group of another class has only scores of 0."""

    def red_of_some(images: Tensor, conditions: list[Any]) -> Tensor:
        is_some = torch.tensor([each.label >= 2 for each in conditions])
        return images[:, 0].mean((1, 2)) * is_some

    def trainer_of(limit: int) -> Any:
        pipe, folder = make_pipeline(), tmp_path / str(limit)
        return make_trainer(pipe, folder, red_of_some, num_groups=5, max_resamplings=limit)

    plain, once, often = trainer_of(0), trainer_of(1), trainer_of(20)
    first = plain.collector.rollout(1)
    scores = plain.collector.scores(first)
    idle = [n for n in range(5) if first.conditions[4 * n].label < 2]
    assert 2 <= len(idle) <= 3  # of five groups, in rounds of the four classes
    of_all = plain.crediting.of_mine
    assert plain.collector.refilled(first, scores, 1, of_all) == (first, scores, {})

    # By hand: group n, again, with the condition and the numbers of this attempt.
    drawn, refilled_scores, metrics = once.collector.refilled(first, scores, 1, of_all)
    conditions = [condition_again(once.conditions, 0, 1, n, 1) for n in idle]
    seeds = [("rollout", 0, 1, n, "again", 1) for n in idle]
    pipe, rewards = plain.pipe, plain.rewards
    expected = collect(pipe, conditions, seeds, 4, plain.sampling, rewards)
    rows = [4 * n + g for n in idle for g in range(4)]
    kept = [i for i in range(20) if i not in rows]
    assert torch.equal(drawn.tokens[rows], expected.tokens)
    assert torch.equal(drawn.tokens[kept], first.tokens[kept])
    assert [drawn.conditions[i] for i in rows] == expected.conditions
    (name,) = scores
    torch.testing.assert_close(refilled_scores[name].flatten()[rows], expected.scores[name])
    still = [n for n, each in zip(idle, conditions, strict=True) if each.label in (0, 1)]
    assert metrics == {"resampled_groups": len(idle), "idle_groups": len(still)}

    # Idle is a group in which nothing that is trained differs.
    options = {"num_groups": 5, "max_resamplings": 1, "train_scales": 2}
    coarse = make_trainer(make_pipeline(), tmp_path / "coarse", red_of_some, **options)
    by_scale = torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(20, 4)
    redrawn = coarse.collector.refilled(first, scores, 1, lambda _: by_scale)[2]
    assert redrawn == {"resampled_groups": 5, "idle_groups": 5}

    # In the end none is left, and what is logged of the reward is of the first draw, as without it.
    found, untouched = often.step(1), plain.step(1)
    assert found["idle_groups"] == 0 and found["resampled_groups"] >= len(idle)
    assert found["reward"] == untouched["reward"]
    # What is drawn anew is counted as drawn.
    num_images = 20 + 4 * found["resampled_groups"]
    assert found["num_tokens"] == num_images * plain.pipe.transformer.schedule.num_tokens
    assert images_of(found) == num_images and images_of(untouched) == 20
    assert found["frac_reward_zero_std"] == pytest.approx(len(idle) / 5)
