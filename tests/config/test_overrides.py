"""Overrides: what is typed for a key of a recipe reaches it, or is answered in one sentence."""

import pytest
import yaml

from nextscale.base.errors import ConfigError
from nextscale.config.overrides import apply_overrides
from nextscale.config.recipe import Recipe, load_recipe, read_recipe
from nextscale.rewards import AtLeast, AtMost

PAINTING = "rewards: {painting: {clip_score: 'a painting of a {label}', clip: toy}}\n"


@pytest.fixture
def write(tmp_path):
    def write(text, name="mine.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def flat(values, prefix=""):
    """Every value under its dotted key."""
    pairs = {}
    for key, value in values.items():
        pairs |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return pairs


def test_overrides_reach_every_section(write):
    recipe = load_recipe(
        write(PAINTING),
        {
            "model": "some/folder",
            "description": "12",
            "sampling.top-k": "5",
            "grpo.class_labels": "[1, 2]",
            "grpo.scale-weighting": "[1, 2e0]",
            "grpo.epsilon_high": "null",
            "optimizer.learning_rate": "2e-5",
            "run.overwrite": "true",
            "run.mixed_precision": "no",
            "run.output_dir": "007",
            "run.resume": "auto",
            "rewards.painting.weight": "0.5",
            "rewards.mine.python": "a.py:f",
            "rewards.mine.at-least": "1e-1",
            "rewards.kept.python": "a.py:g",
            "rewards.kept.at_most": "base",
            "rewards.other.python": "a.py:h",
            "rewards.other.held_out": "true",
        },
    )
    assert recipe.model == "some/folder" and recipe.description == "12"
    assert recipe.sampling.top_k == 5
    assert recipe.grpo.class_labels == (1, 2) and recipe.grpo.scale_weighting == (1.0, 2.0)
    assert recipe.grpo.epsilon_high is None
    assert recipe.optimizer.learning_rate == 2e-5
    assert recipe.run.overwrite is True and recipe.run.mixed_precision == "no"
    assert recipe.run.output_dir == "007" and recipe.run.resume == "auto"
    assert recipe.rewards["painting"].weight == 0.5 and recipe.rewards["painting"].clip == "toy"
    assert recipe.rewards["mine"].function == "a.py:f"
    assert recipe.rewards["mine"].constraint == AtLeast(0.1)
    assert recipe.rewards["kept"].constraint == AtMost("base")
    assert recipe.rewards["other"].held_out


def test_every_key_can_be_overridden_with_its_own_value():
    mapping = read_recipe("toy-combined")
    values = flat(load_recipe("toy-combined").model_dump())
    texts = {
        key: yaml.safe_dump(value, default_flow_style=True).split("\n")[0] for key, value in values.items()
    }
    texts = {key: text for key, text in texts.items() if not isinstance(values[key], str)}
    assert len(texts) > 30
    assert Recipe.from_mapping(apply_overrides(mapping, texts)) == load_recipe("toy-combined")


def test_the_mapping_itself_stays_as_it_was():
    mapping = read_recipe("toy-painting")
    apply_overrides(mapping, {"grpo.beta": "0.5", "rewards.painting.weight": "3"})
    assert mapping == read_recipe("toy-painting")


def test_hyphens_in_the_name_of_a_reward():
    mapping = {"rewards": {"my-own_one": {"python": "a.py:f"}}}
    for key in ("rewards.my-own_one.weight", "rewards.my_own_one.weight", "rewards.my-own-one.weight"):
        assert apply_overrides(mapping, {key: "2"})["rewards"] == {
            "my-own_one": {"python": "a.py:f", "weight": 2}
        }


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("grpo.betta", "1", "unknown key 'grpo.betta'; did you mean 'grpo.beta'?"),
        ("gpro.beta", "1", "unknown key 'gpro.beta'; did you mean 'grpo.beta'?"),
        ("xyz", "x", "unknown key 'xyz'; valid are description, model, vae, prompts"),
        ("modle", "x", "unknown key 'modle'; did you mean 'model'?"),
        ("model.name", "x", "'model' has no keys of its own"),
        ("grpo", "1", "expected a key such as 'grpo.num_generations'"),
        ("grpo.beta.x", "1", "expected a key such as"),
        ("rewards.painting", "1", "expected a key such as 'rewards.NAME.kind'"),
        ("rewards.painting.wait", "1", "did you mean 'rewards.painting.weight'?"),
        ("rewards.paint.weight", "1", "the recipe has no reward 'paint'; did you mean 'painting'?"),
        ("rewards.painting.prompts", "1", "did you mean 'rewards.painting.prompt'?"),
        ("grpo.beta", "[1", "value '[1' of 'grpo.beta'"),
    ],
)
def test_overrides_that_cannot_be(key, value, says):
    with pytest.raises(ConfigError) as caught:
        apply_overrides(read_recipe("toy-painting"), {key: value})
    assert says in str(caught.value)


def test_an_override_of_a_broken_section(write):
    with pytest.raises(ConfigError, match=r"'grpo' of the recipe is 3"):
        load_recipe(write(PAINTING + "grpo: 3"), {"grpo.beta": "1"})
    with pytest.raises(ConfigError, match=r"'rewards' of the recipe is None|rewards = None"):
        load_recipe(write("rewards:"), {"rewards.a.weight": "1"})
    with pytest.raises(ConfigError, match=r"rewards = \['a'\] cannot be used"):
        load_recipe(write("rewards: [a]"), {"grpo.beta": "1"})


@pytest.mark.parametrize(
    "overrides",
    [
        {"rewards.new.clip_score": "a {label}", "rewards.new.clip": "toy"},
        {"rewards.new.clip": "toy", "rewards.new.clip-score": "a {label}"},
        {"rewards.new.kind": "clip_score", "rewards.new.prompt": "a {label}", "rewards.new.clip": "toy"},
        {"rewards.painting.clip_score": "a {label}"},
        {"rewards.painting.prompt": "a {label}"},
        {"rewards.painting.kind": "clip_score", "rewards.painting.prompt": "a {label}"},
    ],
)
@pytest.mark.parametrize(
    "form", ["{clip_score: 'a b', clip: toy}", "{kind: clip_score, prompt: 'a b', clip: toy}"]
)
def test_a_reward_is_overridden_in_short_and_in_full_however_the_recipe_writes_it(write, form, overrides):
    (name,) = {key.split(".")[1] for key in overrides}
    reward = load_recipe(write(f"rewards: {{painting: {form}}}"), overrides).rewards[name]
    assert (reward.kind, reward.prompt, reward.clip, reward.weight) == ("clip_score", "a {label}", "toy", 1)


def test_a_reward_may_become_one_of_another_kind(write):
    path = write("rewards: {a: {pick_score: 'a {label}', weight: 2}}")
    reward = load_recipe(path, {"rewards.a.kind": "hps", "rewards.a.checkpoint": "a.pt"}).rewards["a"]
    assert (reward.kind, reward.prompt, reward.checkpoint, reward.weight) == ("hps", "a {label}", "a.pt", 2)
    with pytest.raises(ConfigError, match=r"unknown kind 'hsp'; did you mean 'hps'\?"):
        load_recipe(path, {"rewards.a.kind": "hsp"})
    with pytest.raises(ConfigError, match=r"needs exactly one of aesthetic, .*, got pick_score and python"):
        load_recipe(path, {"rewards.a.python": "a.py:f"})
    with pytest.raises(ConfigError, match="'prompt' has no effect on a reward of kind 'aesthetic'"):
        load_recipe(path, {"rewards.a.kind": "aesthetic"})
