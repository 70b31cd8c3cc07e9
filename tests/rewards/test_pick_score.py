"""PickScore: what transformers computes as the logits of a CLIP."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, CLIPModel

from nextscale.base.conditions import Condition
from nextscale.base.errors import CheckpointError, ConfigError
from nextscale.rewards import PickScore
from nextscale.rewards.networks.preprocessing import clip_preprocessing

CONDITIONS = [Condition(i, name) for i, name in enumerate(("star", "orange heart", "neon moon"))]


def test_the_score_is_the_logit_of_the_clip(clip_parts: tuple[Path, Path]):
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    scores = PickScore("a {label}", *clip_parts)(images, CONDITIONS)
    model, tokenizer = CLIPModel.from_pretrained(clip_parts[0]), AutoTokenizer.from_pretrained(clip_parts[1])
    tokens = tokenizer([f"a {each.text}" for each in CONDITIONS], padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(**tokens, pixel_values=clip_preprocessing(64)(images)).logits_per_image.diagonal()
    assert expected.abs().max() > 1  # so the scale is in it
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-4)


def test_the_tokenizer_is_another_repository_s(clip_parts: tuple[Path, Path], tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"tokenizer '.*none' cannot be loaded"):
        PickScore("a {label}", clip_parts[0], tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"CLIP '.*none' cannot be loaded"):
        PickScore("a {label}", tmp_path / "none", clip_parts[1])


def test_a_prompt_that_is_no_template_is_told(clip_parts: tuple[Path, Path]):
    with pytest.raises(ConfigError, match=r"prompt 'a {name}'"):
        PickScore("a {name}", *clip_parts)
