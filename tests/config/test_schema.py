"""The keys of a recipe as the command line reads them."""

import json

import pytest

from nextscale.config.recipe import Recipe, json_schema
from nextscale.config.schema import FILE, is_text, main_options, recipe_keys, recipe_sections, type_name
from nextscale.rewards.kinds import REWARD_KINDS, RewardOptions


def test_the_schema_is_that_of_the_records():
    assert json.loads(FILE.read_text()) == json_schema(), "run `make schema`"


def test_sections_and_their_keys():
    sections = recipe_sections()
    assert list(sections["recipe"][1]) == ["description", "model", "vae", "prompts", "eval_prompts"]
    for name in ("sampling", "grpo", "optimizer", "run"):
        text, keys = sections[name]
        record = Recipe.model_fields[name].annotation
        assert text == record.__doc__ and list(keys) == [f"{name}.{each}" for each in record.model_fields]
    assert list(sections["rewards"][1]) == [f"rewards.NAME.{each}" for each in RewardOptions.model_fields]
    assert sum(len(keys) for _, keys in sections.values()) == len(recipe_keys())
    assert main_options() == {kind: record.main_option for kind, record in REWARD_KINDS.items()}


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("grpo.beta", "NUMBER"),
        ("grpo.epsilon_high", "NUMBER"),
        ("grpo.num_groups", "INT"),
        ("grpo.class_labels", "[INT|TEXT,...]"),
        ("grpo.scale_weighting", "token|scale|NUMBER|[NUMBER,...]"),
        ("rewards.NAME.at_most", "NUMBER|base"),
        ("rewards.NAME.held_out", "true|false"),
        ("rewards.NAME.score_range", "[NUMBER,...]"),
        ("rewards.NAME.negative", "TEXT|[TEXT,...]"),
    ],
)
def test_types_as_the_help_shows_them(key, name):
    assert type_name(recipe_keys()[key]) == name


@pytest.mark.parametrize(
    ("key", "value", "is_typed"),
    [
        ("grpo.scale_rewards", "none", True),
        ("rewards.NAME.clip_score", "{label}: no", True),
        ("rewards.NAME.clip_score", " [a, b]", False),
        ("rewards.NAME.at_least", "base", False),
        ("grpo.beta", "1e-2", False),
        ("grpo.scale_weighting", "token", False),
    ],
)
def test_what_is_taken_as_typed(key, value, is_typed):
    assert is_text(recipe_keys()[key], value) == is_typed
