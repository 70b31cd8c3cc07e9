from pathlib import Path
from typing import Any

import pytest

from nextscale.base.errors import ConfigError
from nextscale.config.files import packaged_recipes
from nextscale.config.recipe import load_recipe
from nextscale.credit import check_compared
from nextscale.grpo import GRPOConfig, check_grpo
from nextscale.pipeline import VARPipeline
from nextscale.policy import SamplingConfig
from nextscale.rewards import RewardSet
from nextscale.rewards.diversity import Diversity
from nextscale.rewards.roles import AtLeast
from nextscale.runs.config import RunConfig
from nextscale.trainer import GRPOTrainer

WITHOUT_KL = {"beta": 0.0, "measure_kl": False}


def brightness(images, conditions):
    return images.mean((1, 2, 3))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"entropy_floor_rate": 0.5}, r"entropy_floor_rate 0\.5 has no effect without .*: set that too"),
        (
            {"constraint_rate": 1.0},
            r"constraint_rate 1\.0 has no effect .* give a reward at_least or at_most",
        ),
        (
            {"constraint_start": 0.5},
            r"constraint_start 0\.5 has no effect .* give a reward at_least or at_most",
        ),
        (
            {"measure_kl": False},
            r"measure_kl False has no effect with grpo\.beta 0\.02.* set grpo\.beta to 0",
        ),
        (
            {"multi_objective_aggregation": "normalize_then_sum"},
            r"multi_objective_aggregation normalize_then_sum has .* single reward",
        ),
        (
            {"multi_objective_aggregation": "normalize_then_sum", "scale_rewards": "none"},
            r"multi_objective_aggregation normalize_then_sum has .* (single reward|normalizes nothing)",
        ),
        (
            {"reference_dtype": "bfloat16", **WITHOUT_KL},
            r"reference_dtype bfloat16 has .* set grpo\.beta or",
        ),
        (
            {"offload_reference": True, **WITHOUT_KL},
            "offload_reference True has no effect",
        ),
        (
            {"importance_sampling_mode": "token_mask"},
            r"importance_sampling_mode token_mask has .* grpo\.importance_sampling_correction: set that too",
        ),
        ({"importance_sampling_clip_max": 2.0}, r"importance_sampling_clip_max 2\.0 has no effect without"),
        ({"epsilon": 0.1}, r"epsilon 0\.1 has no effect .* set grpo\.num_iterations to 2"),
        ({"epsilon_high": 0.3}, r"epsilon_high 0\.3 has no effect .* set grpo\.num_iterations to 2"),
        ({"branches": 4}, r"branches 4 has no effect .* grpo\.branch_scale: set that too"),
        ({"branch_temperature": 2.0}, r"branch_temperature 2\.0 has .* grpo\.branch_scale"),
        ({"branch_schedule": "in_turn"}, r"branch_schedule in_turn has .* grpo\.branch_scale"),
        ({"delta": 2.0}, r"delta 2\.0 has no effect .* set grpo\.num_iterations to 2"),
        (
            {"importance_sampling_level": "scale"},
            r"importance_sampling_level scale has no effect .* set grpo\.num_iterations to 2",
        ),
        ({"delta": 2.0, "loss_type": "cispo", "num_iterations": 2}, r"delta 2\.0 has .* cispo: use grpo"),
        ({"epsilon": 0.1, "loss_type": "reinforce"}, r"epsilon 0\.1 has .* reinforce: use grpo"),
        ({"epsilon_high": 2.0, "loss_type": "cispo"}, r"epsilon_high 2\.0 has .* grpo\.num_iterations to 2"),
        ({"epsilon_high": 2.0, "loss_type": "reinforce"}, r"epsilon_high 2\.0 has .* use grpo or cispo"),
        ({"kl_estimator": "k3", "beta": 0.0}, r"kl_estimator k3 has .* set grpo\.beta"),
        ({"kl_in_reward": True, "beta": 0.0}, r"kl_in_reward True has .* set grpo\.beta"),
        (
            {"kl_estimator": "k3", "kl_in_reward": True},
            r"kl_estimator k3 has no effect with grpo\.kl_in_reward.*: remove that",
        ),
        (
            {"kl_scale_weighting": "token", "kl_in_reward": True},
            r"kl_scale_weighting token has no effect with grpo\.kl_in_reward.*: remove that",
        ),
        ({"target_kl": 9.0, "beta": 0.0}, r"target_kl 9\.0 has .* set grpo\.beta"),
        ({"target_kl_rate": 0.1}, r"target_kl_rate 0\.1 has .* grpo\.target_kl: set that too"),
        ({"ref_model_sync_steps": 9}, r"ref_model_sync_steps 9 has .* grpo\.sync_ref_model: set that too"),
        ({"ref_model_mixup_alpha": 0.5}, r"ref_model_mixup_alpha 0\.5 has .* grpo\.sync_ref_model"),
        ({"sync_ref_model": True, **WITHOUT_KL}, "sync_ref_model True has no effect without a reference"),
        (
            {"reference_guidance_scale": 1.0, **WITHOUT_KL},
            r"reference_guidance_scale 1\.0 has no effect without a reference",
        ),
        ({"kl_scale_weighting": "token", "beta": 0.0}, "kl_scale_weighting token has .* set grpo.beta"),
        (
            {"entropy_scale_weighting": (1, 1, 1, 2)},
            r"entropy_scale_weighting \(1.* set grpo\.entropy_coef or",
        ),
    ],
)
def test_an_option_without_effect_is_refused(
    options: dict[str, Any], says: str, tiny_pipeline: VARPipeline, tmp_path: Path
) -> None:
    run = RunConfig(output_dir=str(tmp_path / "run"), report_to="none")
    name = next(iter(options))
    with pytest.raises(ConfigError, match=rf"^grpo\.{says}.*, or remove grpo\.{name}$"):
        GRPOTrainer(tiny_pipeline, brightness, GRPOConfig(**options), run=run)
    assert not (tmp_path / "run").exists()


def test_a_temperature_of_training_differs_from_that_of_sampling(
    tiny_pipeline: VARPipeline, tmp_path: Path
) -> None:
    run = RunConfig(output_dir=str(tmp_path / "run"), report_to="none")
    sampling = SamplingConfig(temperature=1.3)
    with pytest.raises(ConfigError, match=r"^grpo\.temperature 1\.3 has no .* is the same: set another"):
        GRPOTrainer(tiny_pipeline, brightness, GRPOConfig(temperature=1.3), sampling=sampling, run=run)


@pytest.mark.parametrize("filtering", [{"top_k": 9}, {"top_p": 0.9}])
def test_a_kl_by_drawn_tokens_is_refused_where_only_some_are_drawn(
    filtering: dict[str, Any], tiny_pipeline: VARPipeline, tmp_path: Path
) -> None:
    run = RunConfig(output_dir=str(tmp_path / "run"), report_to="none")
    sampling, grpo = SamplingConfig(**filtering), GRPOConfig(kl_estimator="k3")
    with pytest.raises(ConfigError, match=r"^grpo\.kl_estimator k3 is wrong with sampling\.top_k or top_p"):
        GRPOTrainer(tiny_pipeline, brightness, grpo, sampling=sampling, run=run)
    assert grpo.explored(SamplingConfig()) == SamplingConfig()
    assert grpo.replace(kl_estimator="forward").explored(sampling) == sampling


@pytest.mark.parametrize("role", ["weights", "constraints"])
def test_a_diversity_of_groups_of_two_is_refused(
    role: str, tiny_pipeline: VARPipeline, tmp_path: Path
) -> None:
    run = RunConfig(output_dir=str(tmp_path / "run"), report_to="none")
    given = {"weights": {"apart": 1.0}} if role == "weights" else {"constraints": {"apart": AtLeast(0.1)}}
    rewards = RewardSet({"apart": Diversity("pixels"), "bright": brightness}, **given)
    with pytest.raises(ConfigError, match=r"^reward 'apart' has no effect with grpo\.num_generations 2"):
        GRPOTrainer(tiny_pipeline, rewards, GRPOConfig(num_generations=2), run=run)
    check_compared(GRPOConfig(num_generations=3), rewards)
    by_slope = GRPOConfig(num_generations=2, credit="contribution")
    if role == "weights":  # a slope in units of what the sum of both varies by
        check_compared(by_slope, rewards)
        alone = RewardSet({"apart": Diversity("pixels")})
        apart = GRPOConfig(
            num_generations=2, credit="contribution", multi_objective_aggregation="normalize_then_sum"
        )
        for grpo, given_rewards in ((by_slope, alone), (apart, rewards)):
            with pytest.raises(ConfigError, match=r"^reward 'apart' has no effect with"):
                check_compared(grpo, given_rewards)
    else:
        with pytest.raises(ConfigError, match=r"^reward 'apart' has no effect with"):
            check_compared(by_slope, rewards)


def test_options_with_what_they_need_are_accepted() -> None:
    one = {"a": 1.0}
    check_grpo(GRPOConfig(entropy_floor=0.5, entropy_floor_rate=0.5), one, ())
    check_grpo(GRPOConfig(constraint_rate=1.0, constraint_start=0.5), one, ("b",))
    check_grpo(GRPOConfig(measure_kl=False, beta=0.0), one, ())
    check_grpo(GRPOConfig(epsilon=0.1, epsilon_high=0.3, num_iterations=2), one, ())
    check_grpo(GRPOConfig(loss_type="cispo", epsilon_high=0.5), one, ())  # which cuts ratios of 1 as well
    check_grpo(GRPOConfig(loss_type="mine", epsilon=0.1, delta=2.0), one, ())  # of which nothing is known
    check_grpo(GRPOConfig(target_kl=9.0, target_kl_rate=0.1, kl_estimator="forward"), one, ())
    check_grpo(GRPOConfig(sync_ref_model=True, ref_model_sync_steps=9, beta=0.0), one, ())
    check_grpo(GRPOConfig(reference_dtype="bfloat16", offload_reference=True, beta=0.0), one, ())
    corrected = {"importance_sampling_mode": "token_mask", "importance_sampling_clip_max": 2.0}
    check_grpo(GRPOConfig(importance_sampling_correction=True, **corrected), one, ())
    separately = GRPOConfig(multi_objective_aggregation="normalize_then_sum")
    with pytest.raises(ConfigError, match=r"with grpo\.scale_rewards none, which normalizes nothing"):
        check_grpo(separately.replace(scale_rewards="none"), {"a": 1.0, "b": 2.0}, ())
    check_grpo(separately.replace(scale_rewards="none", branch_scale=2), {"a": 1.0, "b": 2.0}, ())
    check_grpo(separately, {"a": 1.0, "b": 1.0}, ())
    check_grpo(separately, {"a": 0.5}, ("b",))  # a weight that normalising the sum would undo


@pytest.mark.parametrize("name", packaged_recipes())
def test_packaged_recipes_have_no_option_without_effect(name: str) -> None:
    recipe = load_recipe(name)
    weights = {name: each.weight for name, each in recipe.rewards.items() if each.weight is not None}
    check_grpo(recipe.grpo, weights, [name for name, each in recipe.rewards.items() if each.constraint])


def test_a_group_is_shared_by_whole_branches() -> None:
    for options in ({"num_generations": 9}, {"num_generations": 2}):
        with pytest.raises(ConfigError, match=r"has to be a multiple of that, and at least twice it"):
            check_grpo(GRPOConfig(branch_scale=2, **options), {"a": 1.0}, ())
    check_grpo(GRPOConfig(branch_scale=2, branches=4, branch_schedule="in_turn"), {"a": 1.0}, ())


def test_turns_need_scales_of_both_kinds() -> None:
    with pytest.raises(ConfigError, match=r"in_turn leaves nothing to train .*train_scales 2 is not above"):
        check_grpo(GRPOConfig(branch_scale=2, train_scales=2, branch_schedule="in_turn"), {"a": 1.0}, ())
    check_grpo(GRPOConfig(branch_scale=2, train_scales=3, branch_schedule="in_turn"), {"a": 1.0}, ())
    check_grpo(GRPOConfig(branch_scale=2, train_scales=2), {"a": 1.0}, ())


def test_a_loss_without_ratios_makes_one_update() -> None:
    with pytest.raises(ConfigError, match=r"num_iterations 2 needs ratios.* set grpo\.num_iterations"):
        check_grpo(GRPOConfig(loss_type="reinforce", num_iterations=2), {"a": 1.0}, ())


def test_a_scale_whose_entropy_has_no_weight_cannot_have_a_floor() -> None:
    options = {"entropy_floor": 0.5, "entropy_scale_weighting": (1.0, 0.0)}
    with pytest.raises(ConfigError, match=r"entropy_floor cannot hold a scale whose weight in .* is 0: give"):
        check_grpo(GRPOConfig(**options), {"a": 1.0}, ())
    check_grpo(GRPOConfig(entropy_floor=0.5, scale_weighting=(1.0, 0.0)), {"a": 1.0}, ())
