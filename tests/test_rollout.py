"""Rollouts: drawn and scored batch by batch."""

import math

import pytest
import torch
from torch import Tensor

from nextscale.pipeline import VARPipeline
from nextscale.policy import SamplingConfig
from nextscale.rewards import RewardSet
from nextscale.rollout import collect

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
    batches = list(tiny_pipeline.draw_batches(conditions, SEEDS, 4, POLICY, batch_size))
    assert [len(each.images) for each in batches[:-1]] == [batch_size] * (len(batches) - 1)
    assert sum(len(each.conditions) for each in batches) == 12
    parts = tiny_pipeline.draw(conditions, SEEDS, 4, POLICY, batch_size)
    assert parts.conditions == whole.conditions and torch.equal(parts.tokens, whole.tokens)
    assert torch.equal(parts.conditioning["labels"], whole.conditioning["labels"])
    for name in ("log_probs", "inputs", "images"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), rtol=0, atol=1e-4)
