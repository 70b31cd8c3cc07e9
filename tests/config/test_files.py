"""Recipes as files: which one a name means, and what YAML says."""

import re

import pytest

from nextscale.base.errors import ConfigError
from nextscale.config.files import RECIPES, packaged_recipes
from nextscale.config.recipe import load_recipe

PAINTING = "rewards: {painting: {clip_score: 'a painting of a {label}', clip: toy}}\n"


@pytest.fixture
def write(tmp_path):
    def write(text, name="mine.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


@pytest.mark.parametrize("name", packaged_recipes())
def test_packaged_recipes_say_what_they_show_and_load_by_name(name):
    recipe = load_recipe(name)
    assert recipe == load_recipe(RECIPES / f"{name}.yaml") == load_recipe(f"{name}.yaml")
    assert recipe.description and (RECIPES / f"{name}.yaml").read_text().startswith("# ")
    assert recipe.run.output_dir == f"runs/{name}"


def test_the_packaged_recipes():
    assert set(packaged_recipes()) >= {"toy-painting", "toy-aesthetic", "toy-combined", "toy-collapse"}
    assert {"toy-painting-lora", "var-d16-painting-lora", "var-d30-combined-lora"} <= set(packaged_recipes())


def test_a_file_wins_over_a_packaged_name(write, monkeypatch):
    path = write(PAINTING + "description: of mine", "toy-painting")
    monkeypatch.chdir(path.parent)
    assert load_recipe("toy-painting").description == "of mine"


def test_values_are_those_of_yaml_1_2(write):
    text = "optimizer: {learning_rate: 1e-4, weight_decay: '1e-2'}\nrun: {mixed_precision: no, seed: 010}\n"
    recipe = load_recipe(write(PAINTING + text))
    assert recipe.optimizer.learning_rate == 1e-4 and recipe.optimizer.weight_decay == 1e-2
    assert recipe.run.mixed_precision == "no" and recipe.run.seed == 10


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "holds nothing, expected keys"),
        ("just words", "holds a str, expected keys"),
        ("- a\n- b", "holds a list, expected keys"),
        ("rewards: [", "line 1, is not valid YAML"),
        ("a: 1\nb: [1, 2\nc: 3", "line 3, is not valid YAML"),
        ("a: !!python/object/apply:os.system ['true']", "not valid YAML: could not determine a constructor"),
        ("model: toy", "'rewards' is missing"),
        ("rewards: {}", "rewards = {} cannot be used"),
        ("rewards: {a: 3}", "rewards.a = 3 cannot be used"),
        (PAINTING + "grpoo: {}", "unknown key 'grpoo'; did you mean 'grpo'?"),
        (PAINTING + "grpo: {betta: 1}", "unknown key 'grpo.betta'; did you mean 'beta'?"),
        (PAINTING + "grpo: {beta: -1}", "grpo.beta = -1 cannot be used"),
        (PAINTING + "grpo: {num_groups: 2.5}", "grpo.num_groups = 2.5 cannot be used"),
        (PAINTING + "grpo: {scale_weighting: tokens}", "grpo.scale_weighting = 'tokens' cannot be used"),
        (PAINTING + "grpo: 3", "grpo = 3 cannot be used"),
        ("rewards: {a: {clipscore: b}}", "unknown key 'rewards.a.clipscore'; did you mean 'clip_score'?"),
    ],
)
def test_what_is_no_recipe_is_told_in_one_sentence(write, text, says):
    path = write(text)
    with pytest.raises(ConfigError, match=f"^recipe '{re.escape(str(path))}'") as caught:
        load_recipe(path)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match=r"no recipe 'toy-paintin'.*did you mean 'toy-painting'"):
        load_recipe("toy-paintin")
    with pytest.raises(ConfigError, match=r"no recipe 'elsewhere/mine.yaml'"):
        load_recipe("elsewhere/mine.yaml")
    with pytest.raises(ConfigError, match=r"is a folder, expected a YAML file$"):
        load_recipe(tmp_path)
    (tmp_path / "config.yaml").write_text(PAINTING)
    with pytest.raises(ConfigError, match=r"did you mean '.*config\.yaml'"):
        load_recipe(tmp_path)
    (tmp_path / "binary").write_bytes(b"\x89PNG")
    with pytest.raises(ConfigError, match=r"cannot be read"):
        load_recipe(tmp_path / "binary")
