"""What an evaluation measures, by independent formulas."""

import math

import pytest
import torch
from torch import Tensor

from nextscale.evaluation import evaluate
from nextscale.pipeline import VARPipeline
from nextscale.policy import SamplingConfig
from nextscale.rewards import RewardSet


def test_the_standard_error_counts_the_images_that_were_scored(tiny_pipeline: VARPipeline) -> None:
    scores: list[Tensor] = []

    def some(images: Tensor, conditions: list) -> Tensor:
        values = images.mean((1, 2, 3)).cpu()
        scores.append(values[::2].double())
        return torch.where(torch.arange(len(images)) % 2 == 0, values, math.nan)

    def every(images: Tensor, conditions: list) -> Tensor:
        return images[:, 0].mean((1, 2))

    rewards = RewardSet({"every": every, "some": some}, held_out=["some"])
    metrics = evaluate(tiny_pipeline, rewards, SamplingConfig(), num_images=32).metrics
    scored = torch.cat(scores)
    assert len(scored) == 16 and metrics["num_images"] == 32
    assert metrics["rewards/some/std"] == pytest.approx(scored.std().item())
    assert metrics["rewards/some/sem"] == pytest.approx(scored.std().item() / 4)
    assert metrics["reward"] == metrics["rewards/every/mean"]
    assert metrics["reward_sem"] == pytest.approx(metrics["reward_std"] / math.sqrt(32))
