"""What an evaluation measures, by independent formulas."""

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor

from nextscale import drawing
from nextscale.base.conditions import Condition
from nextscale.evaluation import evaluate
from nextscale.pipeline import VARPipeline
from nextscale.policy import SamplingConfig
from nextscale.rewards import RewardSet
from nextscale.rewards.groups import GroupReward


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


class Apart(GroupReward):
    """Mean distance of an image's brightness to those of its group."""

    def features(self, images: Tensor, conditions: Sequence[Condition]) -> Tensor:
        return images.mean((1, 2, 3))[:, None]

    def scores_of_groups(self, features_NGE: Tensor) -> Tensor:
        pairs = (features_NGE - features_NGE.mT).abs()
        return pairs.sum(-1) / (pairs.shape[-1] - 1)


def test_what_compares_images_is_measured_in_groups_of_the_size_of_training(
    tiny_pipeline: VARPipeline,
) -> None:
    """Of four classes, as many as there are images for; the error of a mean counts groups."""
    rewards = RewardSet({"apart": Apart(), "bright": lambda images, conditions: images.mean((1, 2, 3))})
    options: dict[str, Any] = {"num_images": 12, "batch_size": 5}
    found = evaluate(tiny_pipeline, rewards, SamplingConfig(), num_compared=6, **options)
    assert found.groups["apart"].tolist() == [0] * 6 + [1] * 6
    assert set(found.groups) == {"apart", "reward"}  # the sum has it in it
    means = found.scores["apart"].unflatten(0, (2, 6)).mean(1)
    assert found.metrics["rewards/apart/sem"] == pytest.approx(means.std().item() / math.sqrt(2))
    bright = found.scores["bright"]
    assert found.metrics["rewards/bright/sem"] == pytest.approx(bright.std().item() / math.sqrt(12))
    cut = evaluate(
        tiny_pipeline, rewards, SamplingConfig(), num_compared=2, **options
    )  # groups of 3, cut to 2
    assert cut.groups["apart"].tolist() == [0, 0, 1, 2, 2, 3, 4, 4, 5, 6, 6, 7]
    assert cut.scores["apart"].isnan().tolist() == [False, False, True] * 4
    few = evaluate(tiny_pipeline, rewards, SamplingConfig(), num_images=3, num_compared=6)
    assert few.metrics["num_images"] == 3


def test_the_extremes_are_those_of_all_images(make_pipeline: Callable[..., VARPipeline]) -> None:
    pipe, images = make_pipeline(), []

    def reward(batch: Tensor, conditions: list) -> Tensor:
        images.append(batch.cpu())
        return redness(batch, conditions)

    rewards = RewardSet({"red": reward})
    found = evaluate(pipe, rewards, SamplingConfig(), num_images=20, batch_size=7, num_extremes=2).extremes
    assert found is not None
    order = redness(torch.cat(images), []).sort(descending=True)
    expected = [0, 1, 9, 10, 18, 19]  # the best, those in the middle, the worst
    torch.testing.assert_close(torch.tensor(found.rewards).flatten(), order.values[expected])
    torch.testing.assert_close(found.images.flatten(0, 1), torch.cat(images)[order.indices[expected]])


def redness(images: Tensor, conditions: list) -> Tensor:
    return images[:, 0].mean((1, 2))


def embed(images: Tensor) -> Tensor:
    return torch.nn.functional.normalize(images.flatten(1) - 0.5, dim=-1)


@pytest.fixture
def draws(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the batches that are drawn."""
    sizes: list[int] = []
    sample = drawing.sample

    def counted(transformer: Any, tokenizer: Any, conditioning: Any, *more: Any) -> Any:
        sizes.append(len(conditioning))
        return sample(transformer, tokenizer, conditioning, *more)

    monkeypatch.setattr(drawing, "sample", counted)
    return sizes


def test_batches_are_full_across_conditions(
    make_pipeline: Callable[..., VARPipeline], draws: list[int]
) -> None:
    pipe, sizes, images_seen = make_pipeline(num_classes=40), [], []

    def reward(images: Tensor, conditions: list) -> Tensor:
        sizes.append(len(images))
        images_seen.append(images)
        return torch.tensor([float(each.label) for each in conditions])

    found = evaluate(pipe, RewardSet({"label": reward}), SamplingConfig(), num_images=40, batch_size=16)
    assert draws == sizes == [16, 16, 8]
    assert (found.metrics["reward"], found.metrics["num_images"]) == (19.5, 40.0)
    alone = [
        pipe.draw([each], [("evaluate", 0, each.key)], 1, SamplingConfig()) for each in pipe.all_conditions()
    ]
    expected = torch.cat([each.images for each in alone])
    torch.testing.assert_close(torch.cat(images_seen), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.samples, expected[:16, None], rtol=0, atol=1e-5)
    more = evaluate(pipe, RewardSet({"reward": redness}), SamplingConfig(), 40, max_pixels=20 * 8 * 8)
    assert torch.equal(more.samples[:16], found.samples) and len(more.samples) == len(more.conditions) == 20
    assert [each.label for each in found.conditions] == list(range(16))


def test_a_class_that_is_given_twice_is_drawn_once(tiny_pipeline: VARPipeline) -> None:
    """Its images would be the same again, and the standard error too small."""
    rewards = RewardSet({"bright": lambda images, conditions: images.mean((1, 2, 3))})
    twice, once = (
        evaluate(tiny_pipeline, rewards, tiny_pipeline.sampling, 8, conditions=tiny_pipeline.conditions(each))
        for each in ([0, 1, 0], [0, 1])
    )
    assert twice.metrics == once.metrics and len(twice.scores["bright"].unique()) == 8


def test_the_grid_has_the_first_images_of_each_condition(tiny_pipeline: VARPipeline) -> None:
    options = {"num_images": 20, "num_columns": 3}
    whole, parts = (
        evaluate(tiny_pipeline, RewardSet({"a": redness}), SamplingConfig(), batch_size=size, **options)
        for size in (64, 3)
    )
    drawn = tiny_pipeline.draw(
        tiny_pipeline.all_conditions(), [("evaluate", 0, i) for i in range(4)], 5, SamplingConfig()
    )
    assert torch.equal(whole.samples, drawn.images.unflatten(0, (4, 5))[:, :3])
    torch.testing.assert_close(parts.samples, whole.samples, rtol=0, atol=1e-5)


def test_no_images_are_kept_beyond_their_batch(tiny_pipeline: VARPipeline) -> None:
    alive: list[weakref.ref] = []
    most = 0

    def watching(images: Tensor) -> Tensor:
        nonlocal most
        alive.append(weakref.ref(images))
        most = max(most, sum(each() is not None for each in alive))
        return embed(images)

    evaluate(
        tiny_pipeline,
        RewardSet({"a": redness}),
        SamplingConfig(),
        num_images=40,
        embed=watching,
        batch_size=4,
    )
    assert (len(alive), most) == (10, 1)


@pytest.mark.parametrize(
    ("num_images", "classes", "each"), [(4, 2, 2), (7, 3, 3), (8, 4, 2), (9, 4, 3), (1, 1, 2)]
)
def test_diversity_is_measured_wherever_it_is_asked_for(
    tiny_pipeline: VARPipeline, num_images: int, classes: int, each: int
) -> None:
    """Also where there are as few images as classes: then of fewer classes, two images each."""
    seen: dict[int, list[Tensor]] = {}

    def reward(images: Tensor, conditions: list) -> Tensor:
        for embedding, condition in zip(embed(images), conditions, strict=True):
            seen.setdefault(condition.label, []).append(embedding)
        return redness(images, conditions)

    rewards, options = RewardSet({"a": reward}), {"num_images": num_images, "batch_size": 3}
    metrics = evaluate(tiny_pipeline, rewards, SamplingConfig(), embed=embed, **options).metrics
    assert [len(group) for group in seen.values()] == [each] * classes
    assert metrics["num_images"] == classes * each
    distances = [1 - a @ b for group in seen.values() for a, b in combinations(group, 2)]
    assert metrics["diversity"] == pytest.approx(torch.stack(distances).mean().item(), abs=1e-6)
    assert "diversity" not in evaluate(tiny_pipeline, rewards, SamplingConfig(), **options).metrics


def test_what_judges_say_is_a_mean_over_all_images(tiny_pipeline: VARPipeline) -> None:
    sizes = []

    def judges(images: Tensor, conditions: list) -> dict[str, Tensor]:
        sizes.append(len(images))
        return {"judge/label": torch.tensor([each.label for each in conditions])}

    metrics = evaluate(
        tiny_pipeline, RewardSet({"a": redness}), SamplingConfig(), num_images=8, judges=judges, batch_size=7
    ).metrics
    assert sizes == [7, 1] and metrics["judge/label"] == 1.5


def test_a_reward_that_edits_images_spoils_no_measure(tiny_pipeline: VARPipeline) -> None:
    def paints(images: Tensor, conditions: list) -> Tensor:
        conditions.clear()
        return images.fill_(1.0)[:, 0].mean((1, 2))

    def judges(images: Tensor, conditions: list) -> dict[str, Tensor]:
        return {
            "judge/red": redness(images, conditions),
            "judge/label": torch.tensor([c.label for c in conditions]),
        }

    rewards = RewardSet({"paints": paints, "red": redness})
    found = evaluate(tiny_pipeline, rewards, SamplingConfig(), num_images=8, judges=judges)
    assert found.metrics["rewards/paints/mean"] == 1 and found.metrics["judge/label"] == 1.5
    assert found.metrics["judge/red"] == pytest.approx(found.metrics["rewards/red/mean"], abs=1e-6)
    assert found.samples.mean() < 0.9  # nor are they white in the grid


class Spread:
    """The variance of brightness over all images, and what it was given."""

    def __init__(self) -> None:
        self.given: dict[str, Tensor] = {}
        self.conditions: list[int | str] = []

    def features(self, images: Tensor, conditions: Sequence[Condition]) -> dict[str, Tensor]:
        labels = torch.tensor([each.label for each in conditions])
        return {"brightness": images.mean((1, 2, 3)), "label": labels}

    def measure(self, features: Mapping[str, Tensor], conditions: Sequence[Condition]) -> dict[str, float]:
        self.given, self.conditions = dict(features), [each.key for each in conditions]
        return {"spread": features["brightness"].double().var().item()}


def test_a_set_is_measured_as_a_whole(tiny_pipeline: VARPipeline) -> None:
    """However it is cut into batches, and beside other measures with features of the same names."""
    spread, same, scores = Spread(), Spread(), []

    def bright(images: Tensor, conditions: Sequence[Condition]) -> Tensor:
        scores.append(images.mean((1, 2, 3)))
        return scores[-1]

    rewards, sampling = RewardSet({"a": bright}), SamplingConfig()
    for size in (64, 5):
        scores.clear()
        options = {"num_images": 12, "batch_size": size, "measures": [spread, same]}
        metrics = evaluate(tiny_pipeline, rewards, sampling, embed=embed, **options).metrics
        assert metrics["spread"] == pytest.approx(torch.cat(scores).double().var().item(), rel=1e-6)
        assert torch.equal(spread.given["brightness"], torch.cat(scores))
        assert spread.given["label"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
        assert spread.conditions == [0, 1, 2, 3] and spread.given.keys() == same.given.keys()
        assert "diversity" in metrics


def test_the_total_is_told_also_where_the_one_reward_is_called_so(tiny_pipeline: VARPipeline) -> None:
    def reward(images: Tensor, conditions: list) -> Tensor:
        return images.mean((1, 2, 3))

    found = evaluate(
        tiny_pipeline, RewardSet({"reward": reward}, {"reward": 3.0}), SamplingConfig(), num_images=8
    )
    assert found.metrics["reward"] == pytest.approx(3 * found.metrics["rewards/reward/mean"])
    assert list(found.scores) == ["reward"]
    assert found.scores["reward"].mean().item() == pytest.approx(found.metrics["reward"])
