"""What a resumed run may change."""

import pytest

from nextscale.base.errors import ConfigError
from nextscale.config.recipe import Recipe, load_recipe, to_yaml
from nextscale.config.resume import check_resumable, fixed_settings
from nextscale.rewards.python import PythonConfig
from nextscale.runs.config import RunConfig

FREE_OF_A_RUN = {
    "fsdp",
    "ddp_timeout",
    "output_dir",
    "max_steps",
    "resume",
    "overwrite",
    "disable_tqdm",
    "eval_steps",
    "save_steps",
}
FREE_OF_A_RUN |= {
    "save_total_limit",
    "report_to",
    "save_best",
    "greater_is_better",
    "early_stopping_patience",
}


@pytest.fixture
def recipe():
    return Recipe(rewards={"bright": PythonConfig(function="rewards.py:bright")})


@pytest.fixture
def path(tmp_path, recipe):
    """The config.yaml of an earlier run."""
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(recipe))
    return path


def test_the_fields_say_what_may_change(recipe):
    full = recipe.replace(run=RunConfig(resume="auto", diversity_clip="toy"))
    fixed = {key.removeprefix("run.") for key in fixed_settings(full) if key.startswith("run.")}
    assert fixed == set(RunConfig.model_fields) - FREE_OF_A_RUN
    assert "grpo.beta" in fixed_settings(recipe) and "description" not in fixed_settings(recipe)


def test_what_may_change_on_resume(recipe, path):
    changes = {"run.max_steps": "9", "run.save_steps": "1", "run.eval_steps": "1", "description": "x"}
    changes["rewards.bright.timeout"] = "60"
    check_resumable(load_recipe(path, changes), path)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"grpo.beta": "0.5"},
            r"grpo\.beta is 0\.5, but the run in '.*' has 0\.02: resume it",
        ),
        ({"grpo.entropy_floor": "0.5"}, r"grpo\.entropy_floor is 0\.5, but .* has None"),
        ({"rewards.more.python": "a.py:f"}, r"rewards\.more\.\w+ is .*, but .* has None"),
    ],
)
def test_what_may_not_change_on_resume(path, changes, says):
    with pytest.raises(ConfigError, match=says):
        check_resumable(load_recipe(path, changes), path)


def test_a_value_that_was_set_cannot_be_dropped(recipe, path):
    path.write_text(to_yaml(recipe.replace(grpo=recipe.grpo.replace(entropy_floor=0.5))))
    with pytest.raises(ConfigError, match=r"grpo\.entropy_floor is None, but .* has 0\.5"):
        check_resumable(recipe, path)


def test_the_number_of_steps_may_change_unless_the_schedule_depends_on_it(recipe, path):
    linear = recipe.replace(optimizer=recipe.optimizer.replace(lr_scheduler_type="linear"))
    path.write_text(to_yaml(linear))
    check_resumable(linear, path)
    with pytest.raises(ConfigError, match=r"run\.max_steps is 9"):
        check_resumable(linear.replace(run=linear.run.replace(max_steps=9)), path)
