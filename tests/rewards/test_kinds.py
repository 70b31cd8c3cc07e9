"""Kinds of rewards: their records, the table of them, and a new one added to it."""

import itertools
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, get_args

import pytest

from nextscale.base.errors import ConfigError
from nextscale.base.records import free_on_resume
from nextscale.base.roles import ROLES
from nextscale.rewards import AtLeast, AtMost
from nextscale.rewards.jpeg import JPEG_REWARDS, JpegConfig
from nextscale.rewards.kinds import RECORDS, REWARD_KINDS, RewardOptions, read_reward
from nextscale.rewards.pixels import PIXEL_REWARDS, PixelsConfig
from nextscale.rewards.protocol import RewardConfig

PACKAGE = Path(__file__).resolve().parents[2] / "src" / "nextscale"
PAGE = PACKAGE.parents[1] / "docs" / "rewards.md"


def test_every_record_has_a_kind_and_a_main_option_and_describes_all():
    assert len(REWARD_KINDS) == len(RECORDS)
    for kind, record in REWARD_KINDS.items():
        assert get_args(record.model_fields["kind"].annotation) == (kind,)
        assert record.main_option in record.own_options() and record.__doc__
        assert all(record.model_fields[name].description for name in record.own_options())
        assert not set(record.own_options()) & set(REWARD_KINDS)  # a key is a kind or an option, never both
        for name in record.own_options():  # what an option means does not depend on the kind
            assert RewardOptions.model_fields[name].description.startswith(
                record.model_fields[name].description
            )


def test_a_reward_has_one_kind():
    for values in ({}, {"weight": 2.0}, {"aesthetic": "toy", "python": "a.py:f"}):
        with pytest.raises(ConfigError, match=f"exactly one of {', '.join(REWARD_KINDS)}"):
            read_reward(values)


def test_a_kind_without_a_value_is_told_with_an_example():
    with pytest.raises(ConfigError, match="'jpeg' has no value: give one, such as 'jpeg: compressibility'"):
        read_reward({"jpeg": None, "weight": 2.0})
    for kind, record in REWARD_KINDS.items():
        with pytest.raises(ConfigError, match=f"'{kind}' has no value: give one, such as '{kind}: ") as told:
            read_reward({kind: None})
        example = str(told.value).split(f"such as '{kind}: ")[1].removesuffix("'")
        needed = {"vlm_model": "m"} if kind == "vlm_judge" else {}
        read_reward({kind: example, **needed})
        assert example != record.main_option.upper()


def test_the_short_form_is_that_of_the_kind_and_its_main_option():
    for kind, record in REWARD_KINDS.items():
        (value, *_) = get_args(record.model_fields[record.main_option].annotation) or ("word",)
        value = value if isinstance(value, str) else "word"
        needed = {"vlm_model": "m"} if kind == "vlm_judge" else {}
        short = read_reward({kind: value, **needed})
        assert short == read_reward({"kind": kind, record.main_option: value, **needed}) == read_reward(short)
        assert type(short) is record and short.weight == 1.0
        same = {"kind": kind, kind: value, **needed}
        assert read_reward(same) == short
        with pytest.raises(ConfigError, match=f"'{record.main_option}' and '{kind}' mean the same option"):
            read_reward({**same, record.main_option: value})


def test_an_option_that_is_null_is_one_that_is_not_given():
    values = {"clip_score": "a {label}", "clip": None, "python": None, "match": None, "at_least": None}
    assert read_reward(values) == read_reward({"clip_score": "a {label}"})


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"python": "a.py:f", "clip": "toy"}, "'clip' has no effect on a reward of kind 'python'; remove it"),
        (
            {"pick_score": "a", "negative": "b"},
            "'negative' has no effect on a reward of kind 'pick_score'; remove it",
        ),
        ({"clip_score": "a", "wieght": 2}, "did you mean 'weight'?"),
        ({"clipscore": "a"}, "unknown key 'clipscore'; did you mean 'clip_score'?"),
        ({"kind": "clipscore"}, "unknown kind 'clipscore'; did you mean 'clip_score'?"),
        ({"kind": ["clip_score"]}, "unknown kind '['clip_score']'"),
        ({"kind": "remote"}, "'url' is missing"),
        ({"clip_score": 3}, "prompt = 3 cannot be used"),
        (3, "expected the options of a reward, such as 'clip_score: a painting of a {label}'"),
    ],
)
def test_what_is_no_reward_is_told_in_one_sentence(values: Any, says: str):
    with pytest.raises(ConfigError) as caught:
        read_reward(values)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_a_reward_has_one_role():
    kind = {"python": "a.py:f"}
    assert read_reward(kind).weight == 1.0 and read_reward(kind).constraint is None
    least, most = read_reward({**kind, "at_least": "base"}), read_reward({**kind, "at_most": 0})
    assert (least.weight, least.constraint) == (None, AtLeast("base"))
    assert (most.weight, most.constraint) == (None, AtMost(0.0))
    assert read_reward({**kind, "held_out": True}).weight is None
    values = {"weight": 0.0, "at_least": 0, "at_most": "base", "held_out": True}
    assert set(values) == set(ROLES) <= set(RewardConfig.model_fields)
    for first, second in itertools.combinations(ROLES, 2):
        with pytest.raises(ConfigError, match=f"'{first}' has no effect beside '{second}'"):
            read_reward({**kind, **{role: values[role] for role in (first, second)}})


@pytest.mark.parametrize(
    ("record", "table"), [(JpegConfig, JPEG_REWARDS), (PixelsConfig, PIXEL_REWARDS)], ids=["jpeg", "pixels"]
)
def test_every_word_of_a_kind_is_in_its_table(record: type[RewardConfig], table: dict):
    name = record.main_option
    assert get_args(record.model_fields[name].annotation) == tuple(table)
    with pytest.raises(
        ConfigError, match=rf"{name} = 'size' cannot be used: input should be '{next(iter(table))}'"
    ):
        record(**{name: "size"})


@pytest.mark.parametrize(
    ("values", "backbone"),
    [
        ({"aesthetic": "laion-v1-b32"}, "openai/clip-vit-base-patch32"),
        ({"aesthetic": "head.pth"}, "openai/clip-vit-large-patch14"),
        ({"aesthetic": "head.pth", "clip": "toy"}, "toy"),
        ({"clip_score": "a {label}"}, "openai/clip-vit-large-patch14"),
        ({"clip_score": "a {label}", "clip": "toy"}, "toy"),
        ({"pick_score": "a {label}"}, "yuvalkirstain/PickScore_v1"),
        ({"hps": "a {label}"}, "xswu/HPSv2"),
        ({"hps": "a {label}", "checkpoint": "hps.pt"}, "hps.pt"),
        ({"image_reward": "a {label}"}, "THUDM/ImageReward"),
        ({"class_probability": "a/b", "match": "label"}, "a/b"),
        ({"python": "a.py:f"}, None),
    ],
)
def test_a_record_names_the_network_that_its_reward_runs(values: dict, backbone: str | None):
    assert read_reward(values).backbone == backbone


def test_how_a_reward_is_asked_may_change_on_resume_and_what_it_is_may_not():
    asking = {"timeout", "request_timeout", "retries", "batch_size", "concurrency", "api_key_env"}
    assert free_on_resume(RewardOptions) == asking
    assert free_on_resume(REWARD_KINDS["vlm_judge"]) == asking - {"batch_size"}


USING_IT = """
import sys, torch
from nextscale.cli.main import main
from nextscale.config.build import make_rewards
from nextscale.config.recipe import load_recipe, to_yaml, write_schema

write_schema()  # as `make schema` does
recipe = load_recipe("mine.yaml", {"rewards.second.redness": "3", "rewards.second.weight": "0.5"})
images = torch.tensor([1.0, 0.0, 0.5]).view(1, 3, 1, 1)
print(make_rewards(recipe.rewards).scores(images, []), to_yaml(recipe))
main(["train", "--help"])
"""


def test_a_new_kind_is_a_file_and_its_place_in_the_table(tmp_path: Path):
    """The example of docs/rewards.md, in a copy of the package: recipes, overrides and the help know it."""
    copy = tmp_path / "nextscale"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("assets", "__pycache__"))
    example = re.search(
        r"```python\n *# src/nextscale/rewards/redness.py\n(.*?)```", PAGE.read_text(), re.DOTALL
    )
    assert example
    (copy / "rewards" / "redness.py").write_text(textwrap.dedent(example[1]))
    table = (copy / "rewards" / "kinds.py").read_text()
    table = table.replace("    RemoteConfig,\n", "    RemoteConfig,\n    RednessConfig,\n")
    imports = "from nextscale.rewards.remote import"
    table = table.replace(imports, f"from nextscale.rewards.redness import RednessConfig\n{imports}")
    (copy / "rewards" / "kinds.py").write_text(table)
    (tmp_path / "mine.yaml").write_text("rewards: {first: {redness: 2}}")
    done = subprocess.run(
        [sys.executable, "-c", USING_IT],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "{'first': tensor([1.]), 'second': tensor([1.5000])}" in done.stdout
    assert "    kind: redness\n    factor: 3.0\n    weight: 0.5\n" in done.stdout
    assert "--rewards.NAME.redness NUMBER" in done.stdout
    assert "Factor of the score. Option of redness. (default: 1.0)" in done.stdout
