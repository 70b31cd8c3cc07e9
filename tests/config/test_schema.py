"""The keys of a recipe as the command line reads them."""

import json

from nextscale.config.recipe import REWARD_KINDS, Recipe
from nextscale.config.schema import FILE, is_text, recipe_groups, reward_kinds, type_name


def test_the_schema_is_that_of_the_records():
    assert json.loads(FILE.read_text()) == Recipe.model_json_schema(), "run `make schema`"


def test_groups_of_keys():
    groups = recipe_groups()
    assert list(groups[""][1]) == ["description", "model", "vae"]
    for name in ("sampling", "grpo", "optimizer", "run"):
        text, keys = groups[name]
        record = Recipe.model_fields[name].annotation
        assert text == record.__doc__ and list(keys) == list(record.model_fields)
    assert {"weight", "at_least", "timeout", *REWARD_KINDS} <= set(groups["rewards.NAME"][1])
    assert reward_kinds() == set(REWARD_KINDS)


def test_types_as_the_help_shows_them():
    names = {name: type_name(schema) for name, schema in recipe_groups()["grpo"][1].items()}
    assert names["beta"] == "NUMBER" and names["epsilon_high"] == "NUMBER" and names["num_groups"] == "INT"
    assert names["class_labels"] == "[INT,...]" and names["scale_weighting"] == "token|scale|[NUMBER,...]"
    names = {name: type_name(schema) for name, schema in recipe_groups()["rewards.NAME"][1].items()}
    assert names["at_most"] == "NUMBER|base" and names["held_out"] == "true|false"
    assert names["score_range"] == "[NUMBER,...]" and names["negative"] == "TEXT|[TEXT,...]"


def test_what_is_taken_as_typed():
    grpo, rewards = recipe_groups()["grpo"][1], recipe_groups()["rewards.NAME"][1]
    assert is_text(grpo["scale_rewards"], "none") and is_text(rewards["clip_score"], "{label}: no")
    assert not is_text(rewards["clip_score"], " [a, b]") and not is_text(rewards["at_least"], "base")
    assert not is_text(grpo["beta"], "1e-2") and not is_text(grpo["scale_weighting"], "token")
