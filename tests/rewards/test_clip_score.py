"""CLIP score of several prompts, and of prompts that an image should not fit."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from nextscale.base.conditions import Condition
from nextscale.base.errors import ConfigError
from nextscale.rewards import ClipClass, ClipScore
from nextscale.rewards.networks.prompts import fill

CONDITIONS = [Condition(i, name) for i, name in enumerate(("star", "orange heart", "neon moon"))]
PROMPTS = ("a painting of a {label}", "a {label}", "a photo")


def images() -> Tensor:
    return torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def scores_of(prompts: tuple[str, ...], clip: Path) -> Tensor:
    """(P, 3) of each prompt alone."""
    return torch.stack([ClipScore(prompt, clip)(images(), CONDITIONS) for prompt in prompts])


def test_several_prompts_are_averaged(clip_folder: Path):
    alone = scores_of(PROMPTS, clip_folder)
    assert alone.std(0).min() > 0.01
    torch.testing.assert_close(ClipScore(PROMPTS, clip_folder)(images(), CONDITIONS), alone.mean(0))
    torch.testing.assert_close(ClipScore(list(PROMPTS[:1]), clip_folder)(images(), CONDITIONS), alone[0])


def test_negative_prompts_are_taken_off(clip_folder: Path):
    alone = scores_of(PROMPTS, clip_folder)
    one = ClipScore(PROMPTS[0], clip_folder, negative=PROMPTS[2])(images(), CONDITIONS)
    torch.testing.assert_close(one, alone[0] - alone[2])
    two = ClipScore(PROMPTS[0], clip_folder, negative=PROMPTS[1:])(images(), CONDITIONS)
    torch.testing.assert_close(two, alone[0] - alone[1:].mean(0))


def test_every_prompt_is_checked(clip_folder: Path):
    for wrong in (("a {label}", ""), ("a {label}", "a {labels}")):
        with pytest.raises(ConfigError, match="prompt"):
            ClipScore(wrong, clip_folder)
        with pytest.raises(ConfigError, match="prompt"):
            ClipScore("a {label}", clip_folder, negative=wrong)
    with pytest.raises(ConfigError, match="no prompt given"):
        ClipScore((), clip_folder)


def prompted(text: str, **data: object) -> Condition:
    return Condition(None, text, data)


def test_columns_of_the_prompts_file_are_filled_in(clip_folder: Path):
    conditions = [prompted("a", colour="red", number=2), prompted("b", colour="blue", number=3.5)]
    filled = fill("{data[number]} {data[colour]} {{data[x]}} of {text}", conditions)
    assert filled == ["2 red {data[x]} of a", "3.5 blue {data[x]} of b"]
    by_column = ClipScore("a {data[colour]} star", clip_folder)(images()[:2], conditions)
    by_text = [
        ClipScore(f"a {each.data['colour']} star", clip_folder)(images()[i : i + 1], [each])
        for i, each in enumerate(conditions)
    ]
    torch.testing.assert_close(by_column, torch.cat(by_text))


@pytest.mark.parametrize("data", [{}, {"colour": ""}, {"colour": None}, {"colour": ["red"]}])
def test_a_column_that_a_prompt_has_not_is_told_of(clip_folder: Path, data: dict):
    reward = ClipScore("a {data[colour]} star", clip_folder)
    conditions = [prompted("first", colour="red"), prompted("second", **data)]
    reward.check_conditions(conditions[:1])
    has = "no such column" if not data else r"(''|None|\['red'\]) there"
    told = f"needs the column 'colour', and the prompt 'second' has {has}: add a text"
    with pytest.raises(ConfigError, match=told):
        reward.check_conditions(conditions)
    with pytest.raises(ConfigError, match=told):
        reward(images()[:2], conditions)


@pytest.mark.parametrize(
    "prompt", ["{data}", "{data[0]}", "{data[]}", "{data.colour}", "{data[a][b]}", "{label.x}", "{0}", "{}"]
)
def test_no_other_fields_are_filled_in(clip_folder: Path, prompt: str):
    with pytest.raises(ConfigError, match="prompt"):
        ClipScore(prompt, clip_folder)


def test_where_classes_are_filled_in_there_are_no_columns(clip_folder: Path):
    with pytest.raises(ConfigError, match=r"may hold the field \{label\} or \{text\} and no other"):
        ClipClass(["star", "heart"], "a {data[colour]} {label}", clip_folder)
