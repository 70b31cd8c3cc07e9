"""CLIP score of several prompts, and of prompts that an image should not fit."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from nextscale.base.conditions import Condition
from nextscale.base.errors import ConfigError
from nextscale.rewards import ClipScore

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
