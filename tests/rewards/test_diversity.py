"""Diversity as a reward: by hand, by brute force, and the same however a group is cut."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nextscale.base.conditions import Condition
from nextscale.base.errors import ConfigError, RewardError
from nextscale.evaluation import evaluate, mean_pairwise_distance
from nextscale.grpo import GRPOConfig
from nextscale.optimizer import OptimizerConfig
from nextscale.pipeline import VARPipeline
from nextscale.policy import SamplingConfig
from nextscale.rewards.diversity import Diversity, leave_one_out_coverage, mean_to_others, small_pixels
from nextscale.rewards.groups import GroupReward
from nextscale.rewards.kinds import read_reward
from nextscale.rewards.reward_set import RewardSet
from nextscale.runs.config import RunConfig
from nextscale.trainer import GRPOTrainer

MakePipeline = Callable[..., VARPipeline]
STAR, HEART = Condition(0, "star"), Condition(1, "heart")


def unit_rows(num_groups: int, size: int, width: int) -> Tensor:
    rows = torch.randn(num_groups, size, width, generator=torch.Generator().manual_seed(0))
    return rows / rows.norm(dim=-1, keepdim=True)


def test_distances_to_the_others_by_hand() -> None:
    distances = torch.tensor([[[0.0, 1.0, 5.0], [1.0, 0.0, 3.0], [5.0, 3.0, 0.0]]])
    assert mean_to_others(distances).tolist() == [[3.0, 2.0, 4.0]]


def test_the_mean_over_a_group_is_what_evaluations_measure() -> None:
    embeddings = unit_rows(3, 5, 7)
    scores = mean_to_others(1 - embeddings @ embeddings.mT)
    expected = [mean_pairwise_distance(each) for each in embeddings]
    assert scores.mean(1).tolist() == pytest.approx(expected, rel=1e-5)


def test_coverage_is_the_volume_that_is_lost_without_an_image() -> None:
    embeddings = unit_rows(2, 4, 6).double()
    found = leave_one_out_coverage(embeddings)
    for n in range(2):
        for g in range(4):
            cosines = embeddings[n] @ embeddings[n].T + 0.01 * torch.eye(4, dtype=torch.float64)
            others = [i for i in range(4) if i != g]
            lost = torch.logdet(cosines) - torch.logdet(cosines[others][:, others])
            assert found[n, g].item() == pytest.approx(lost.item(), abs=1e-5)


def test_a_copy_adds_nothing_and_a_stranger_adds_most() -> None:
    embeddings = torch.eye(4)[[0, 0, 1, 2]][None]  # two copies, two strangers
    copy, other_copy, stranger, _ = leave_one_out_coverage(embeddings)[0].tolist()
    assert copy == pytest.approx(other_copy) == pytest.approx(math.log(1.01 - 1 / 1.01), abs=1e-4)
    assert stranger == pytest.approx(math.log(1.01), abs=1e-4)


def test_pixels_are_compared_by_their_root_mean_square() -> None:
    images = torch.zeros(2, 3, 64, 64)
    images[1] = 0.5
    assert small_pixels(images).shape == (2, 192)
    assert Diversity("pixels")(images, [STAR] * 2).tolist() == pytest.approx([0.5, 0.5])


def test_called_alone_it_takes_images_of_one_condition_for_a_group() -> None:
    reward, images = Diversity("pixels"), torch.rand(5, 3, 64, 64)
    conditions = [STAR, HEART, STAR, HEART, Condition(2, "moon")]
    scores = reward(images, conditions)
    stars = reward(images[[0, 2]], [STAR] * 2)
    assert scores[[0, 2]].tolist() == pytest.approx(stars.tolist())
    assert scores[4].isnan()  # the only moon
    both = RewardSet({"d": reward, "bright": lambda images, conditions: images.mean((1, 2, 3))})
    expected = scores + images.mean((1, 2, 3))
    torch.testing.assert_close(both(images, conditions), expected, equal_nan=True)


def make(pipe: VARPipeline, folder: Path, **options: object) -> GRPOTrainer:
    rewards = RewardSet(
        {"bright": lambda images, conditions: images.mean((1, 2, 3)), "various": Diversity("pixels")}
    )
    return GRPOTrainer(
        pipe,
        rewards,
        GRPOConfig(num_groups=3, num_generations=4, multi_objective_aggregation="normalize_then_sum"),
        sampling=SamplingConfig(guidance_scale=1.5),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        run=RunConfig(
            output_dir=str(folder), max_steps=1, eval_steps=0, report_to="none", disable_tqdm=True
        ).replace(**options),
    )


def test_scores_do_not_depend_on_where_a_batch_cuts_a_group(
    make_pipeline: MakePipeline, tmp_path: Path
) -> None:
    whole = make(make_pipeline(), tmp_path / "a")
    cut = make(make_pipeline(), tmp_path / "b", per_device_eval_batch_size=3)
    found = [each.collector.scores(each.collector.rollout(1)) for each in (whole, cut)]
    assert found[0]["various"].shape == (3, 4)
    torch.testing.assert_close(found[0]["various"], found[1]["various"])
    images = whole.collector.rollout(1).images
    small = small_pixels(images).view(3, 4, -1)
    by_hand = torch.stack([(small - small[:, [g]]).square().mean(-1).sqrt().sum(1) / 3 for g in range(4)], 1)
    torch.testing.assert_close(found[0]["various"], by_hand)


def test_it_is_trained_on_and_measured(make_pipeline: MakePipeline, tmp_path: Path) -> None:
    pipe = make_pipeline()
    before = [each.clone() for each in pipe.transformer.parameters()]
    trainer = make(pipe, tmp_path / "run")
    metrics = trainer.step(1)
    assert metrics["rewards/various/mean"] > 0
    assert not all(map(torch.equal, before, pipe.transformer.parameters()))
    measured = evaluate(pipe, trainer.rewards, trainer.sampling, num_images=6, batch_size=5)
    assert measured.metrics["rewards/various/mean"] > 0


def test_features_that_are_no_rows_of_numbers_are_refused() -> None:
    class Broken(GroupReward):
        def features(self, images: Tensor, conditions: object) -> Tensor:
            return images.new_full((len(images), 2), math.nan)

        def scores_of_groups(self, features_NGE: Tensor) -> Tensor:
            return features_NGE.sum(-1)

    with pytest.raises(RewardError, match="reward 'various' gave features that are infinite or NaN"):
        RewardSet({"various": Broken()}).scores(torch.rand(2, 3, 8, 8), [STAR] * 2)


def test_a_recipe_names_it() -> None:
    made = read_reward({"diversity": "pixels", "weight": 0.5}).make()
    assert isinstance(made, Diversity) and not made.is_clip
    toy = read_reward({"diversity": "clip", "clip": "toy", "compare_by": "coverage"}).make()
    assert isinstance(toy, Diversity) and toy.compare_by == "coverage"


def test_an_evaluation_compares_as_many_as_training() -> None:
    """Coverage depends on how many images there are: a mean to keep is of as many as are trained on."""
    rewards = RewardSet({"various": Diversity("clip", clip="toy", compare_by="coverage")})
    features = {"various": unit_rows(2, 7, 6).flatten(0, 1)}
    found = rewards.of_groups(features, 7, num_compared=3)["various"]
    groups = features["various"].view(2, 7, 6)
    for start in (0, 3):
        part = slice(start, start + 3)
        torch.testing.assert_close(found[:, part], leave_one_out_coverage(groups[:, part]))
    assert found[:, 6].isnan().all()
    whole = rewards.of_groups(features, 7, num_compared=9)["various"]
    torch.testing.assert_close(whole, leave_one_out_coverage(groups))
    assert (whole < found.nan_to_num(torch.inf)).all()  # more images cover more of what any one adds


def test_options_without_a_sense_are_refused() -> None:
    with pytest.raises(ConfigError, match="compare_by coverage is for features of length 1, not for pixels"):
        Diversity("pixels", compare_by="coverage")
    for options, says in (
        ({"compare_by": "coverage"}, "compare_by coverage is for features of length 1"),
        ({"clip": "mine/clip"}, "clip 'mine/clip' has no effect on pixels: remove it"),
    ):
        with pytest.raises(ValueError, match=says):
            read_reward({"diversity": "pixels", **options})
