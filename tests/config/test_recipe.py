import itertools
import re
from typing import get_args

import pytest
import yaml

from nextscale.base.errors import ConfigError
from nextscale.config.build import make_rewards
from nextscale.config.reading import RECIPES, packaged_recipes
from nextscale.config.recipe import (
    COMMON_OPTIONS,
    REWARD_KINDS,
    ROLES,
    Recipe,
    RewardConfig,
    load_recipe,
    to_yaml,
)
from nextscale.constraints import AtLeast, AtMost
from nextscale.rewards.jpeg import JPEG_REWARDS
from nextscale.rewards.pixels import PIXEL_REWARDS

PAINTING = "rewards: {painting: {clip_score: 'a painting of a {label}', clip: toy}}\n"


@pytest.fixture
def write(tmp_path):
    def write(text, name="mine.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


# Rewards


def test_every_kind_of_reward_has_a_field_and_every_field_a_use():
    options = {name for kind in REWARD_KINDS.values() for name in kind.options}
    assert set(RewardConfig.model_fields) == {*REWARD_KINDS, *options, *COMMON_OPTIONS}


def test_a_reward_is_of_one_kind():
    reward = RewardConfig(clip_score="a {label}", clip="toy", weight=2)
    assert (reward.kind, reward.options(), reward.weight) == ("clip_score", {"clip": "toy"}, 2.0)
    for values in ({}, {"weight": 2.0}, {"aesthetic": "toy", "python": "a.py:f"}):
        with pytest.raises(ConfigError, match=f"exactly one of {', '.join(REWARD_KINDS)}"):
            RewardConfig(**values)


def test_an_option_without_effect_is_an_error():
    with pytest.raises(ConfigError, match=r"'clip' has no effect on a python reward"):
        RewardConfig(python="a.py:f", clip="toy")


def test_a_reward_has_one_role():
    kind = {"python": "a.py:f"}
    assert RewardConfig(**kind).weight == 1.0 and RewardConfig(**kind).constraint is None
    least, most = RewardConfig(**kind, at_least="base"), RewardConfig(**kind, at_most=0)
    assert (least.weight, least.constraint) == (None, AtLeast("base"))
    assert (most.weight, most.constraint) == (None, AtMost(0.0))
    assert RewardConfig(**kind, held_out=True).weight is None
    values = {"weight": 0.0, "at_least": 0, "at_most": "base", "held_out": True}
    for first, second in itertools.combinations(ROLES, 2):
        with pytest.raises(ConfigError, match=f"'{first}' has no effect beside '{second}'"):
            RewardConfig(**kind, **{role: values[role] for role in (first, second)})


@pytest.mark.parametrize("bound", ["bass", ".nan", "true", "[1]"])
def test_a_bound_is_a_number_or_base(bound):
    with pytest.raises(ConfigError, match=r"rewards\.painting\.at_most = .* expected a number, or base"):
        load_recipe("toy-painting", {"rewards.painting.at_most": bound})


def test_a_recipe_trains_on_a_reward():
    for role, value in (("at_least", "base"), ("held_out", "true")):
        with pytest.raises(ConfigError, match="every reward is a constraint or held out"):
            load_recipe("toy-aesthetic", {f"rewards.aesthetic.{role}": value})


def test_every_neural_kind_and_its_options():
    for values in (
        {"aesthetic": "laion-v2-l14", "clip": "a/b"},
        {"clip_score": ("a {label}", "a photo"), "negative": ("a moon",), "clip": "a/b"},
        {"pick_score": "a {label}", "checkpoint": "a/b", "tokenizer": "c/d"},
        {"hps": "a {label}", "checkpoint": "a.pt", "tokenizer": "c/d"},
        {"image_reward": "a {label}", "checkpoint": "a.pt", "tokenizer": "c/d"},
        {"class_probability": "a/b", "match": "label"},
    ):
        kind, *options = values
        reward = RewardConfig(**values)
        assert reward.kind == kind and set(reward.options()) == set(options)
    with pytest.raises(ConfigError, match=r"'negative' has no effect on a pick_score reward"):
        RewardConfig(pick_score="a {label}", negative="a moon")


def test_prompts_are_one_or_several(write):
    several = "rewards: {r: {clip_score: [a, 'b {label}'], negative: c, clip: toy}}"
    reward = load_recipe(write(several)).rewards["r"]
    assert reward.clip_score == ("a", "b {label}") and reward.negative == "c"
    assert load_recipe(write(to_yaml(load_recipe(write(several))), "again.yaml")).rewards["r"] == reward
    texts = {"rewards.r.clip_score": "{label}: no", "rewards.r.negative": "[a moon, '{label}']"}
    reward = load_recipe(write(several), texts).rewards["r"]
    assert reward.clip_score == "{label}: no" and reward.negative == ("a moon", "{label}")
    assert load_recipe(write(several), {"rewards.r.negative": "null"}).rewards["r"].negative is None


@pytest.mark.parametrize(("kind", "table"), [("jpeg", JPEG_REWARDS), ("pixels", PIXEL_REWARDS)])
def test_every_word_of_a_kind_is_in_its_table(kind, table):
    (words, _) = get_args(RewardConfig.model_fields[kind].annotation)
    assert get_args(words) == tuple(table)
    with pytest.raises(
        ConfigError, match=rf"{kind} = 'size' cannot be used: input should be '{next(iter(table))}'"
    ):
        RewardConfig(**{kind: "size"})


def test_options_reach_their_reward(monkeypatch):
    monkeypatch.setenv("KEY", "sesame")
    request = {"request_timeout": 7.0, "retries": 5, "api_key_env": "KEY"}
    asking = {"vlm_model": "m", "question": "{label}?", "score_range": (1, 5), "concurrency": 3}
    configs = {
        "far": RewardConfig(remote="http://h/score", batch_size=9, timeout=60, **request),
        "judge": RewardConfig(vlm_judge="http://h/v1", weight=2, **request, **asking),
    }
    made = make_rewards(configs)
    far, judge = made.rewards.values()
    assert (made.timeouts, made.weights) == ({"far": 60.0}, {"far": 1.0, "judge": 2.0})
    assert (far.batch_size, judge.concurrency, judge.vlm_model) == (9, 3, "m")
    assert judge.question == "{label}?" and "1 to 5" in judge.instruction
    for server in (far.server, judge.server):
        assert (server.retries, server._client.timeout.read) == (5, 7.0)
        assert server._client.headers["Authorization"] == "Bearer sesame"
    assert "sesame" not in to_yaml(Recipe(rewards=configs))
    with pytest.raises(ConfigError, match="reward 'judge': a judge needs vlm_model"):
        make_rewards({"judge": RewardConfig(vlm_judge="http://h/v1")})


@pytest.mark.parametrize("weight", [".nan", ".inf"])
def test_a_weight_is_a_number(write, weight):
    with pytest.raises(ConfigError, match=r"rewards\.r\.weight = (nan|inf) cannot be used"):
        load_recipe(write(f"rewards: {{r: {{python: 'a.py:f', weight: {weight}}}}}"))


# Reading


@pytest.mark.parametrize("name", packaged_recipes())
def test_packaged_recipes_say_what_they_show_and_load_by_name(name):
    recipe = load_recipe(name)
    assert recipe == load_recipe(RECIPES / f"{name}.yaml") == load_recipe(f"{name}.yaml")
    assert recipe.description and (RECIPES / f"{name}.yaml").read_text().startswith("# ")
    assert recipe.run.output_dir == f"runs/{name}"


def test_the_packaged_recipes():
    assert set(packaged_recipes()) >= {"toy-painting", "toy-aesthetic", "toy-combined", "toy-collapse"}


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


def test_a_python_file_beside_the_recipe_is_found(write, tmp_path, monkeypatch):
    """Before one of the working directory; an override is typed there, and means that one."""
    path = write("rewards: {a: {python: 'mine.py:f'}, b: {python: 'other.py:f'}, c: {python: '/mine.py:f'}}")
    (tmp_path / "mine.py").touch()
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "mine.py").touch()
    monkeypatch.chdir(tmp_path / "work")
    found = {name: reward.python for name, reward in load_recipe(path).rewards.items()}
    assert found == {"a": f"{tmp_path}/mine.py:f", "b": "other.py:f", "c": "/mine.py:f"}
    assert load_recipe("../mine.yaml").rewards["a"].python == "../mine.py:f"
    assert load_recipe(path, {"rewards.a.python": "mine.py:f"}).rewards["a"].python == "mine.py:f"


# Writing


def test_the_resolved_recipe_has_all_keys_and_loads_back_equal(write):
    text = "description: '1e-4'\nmodel: 'no'\nrun: {output_dir: '010', mixed_precision: no}\n"
    weights = "grpo: {scale_weighting: [1, 2.5e-7], class_labels: [3]}\noptimizer: {learning_rate: 1e-5}\n"
    recipe = load_recipe(write(text + weights + PAINTING))
    resolved = to_yaml(recipe)
    assert load_recipe(write(resolved, "resolved.yaml")) == recipe
    loaded = yaml.safe_load(resolved)  # any reader of YAML 1.1, such as the report, gets the same
    assert loaded["run"]["mixed_precision"] == "no" and loaded["model"] == "no"
    assert loaded["run"]["output_dir"] == "010" and loaded["description"] == "1e-4"
    for name in ("sampling", "grpo", "optimizer", "run"):
        assert set(loaded[name]) == set(type(getattr(recipe, name)).model_fields)
    assert loaded["rewards"]["painting"]["weight"] == 1.0
