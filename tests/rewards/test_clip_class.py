"""CLIP class: what transformers' CLIP says as a zero-shot classifier."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, CLIPModel

from nextscale.base.conditions import Condition
from nextscale.base.errors import ConfigError
from nextscale.models.class_names import imagenet_names
from nextscale.rewards import ClipClass

NAMES = ("star", "orange heart", "neon moon")
CONDITIONS = [Condition(i, name) for i, name in enumerate(NAMES)]


def images() -> Tensor:
    return torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def zero_shot(clip: Path, prompt: str, pixels: Tensor) -> Tensor:
    """(B, K) logits, by transformers alone."""
    model, tokenizer = CLIPModel.from_pretrained(clip), AutoTokenizer.from_pretrained(clip)
    rows = []
    for name in NAMES:
        tokens = tokenizer(prompt.format(label=name), return_tensors="pt")["input_ids"]
        with torch.no_grad():
            rows.append(model(input_ids=tokens, pixel_values=pixels).logits_per_image[:, 0])
    return torch.stack(rows, 1)


def test_it_is_the_log_probability_of_the_own_class(clip_folder: Path):
    reward = ClipClass(NAMES, "a painting of a {label}", clip_folder)
    logits = zero_shot(clip_folder, "a painting of a {label}", reward.clip.prepare(images()))
    scores = reward(images(), CONDITIONS)
    torch.testing.assert_close(scores, logits.log_softmax(1).diagonal(), rtol=1e-4, atol=1e-4)
    assert scores.max() < 0
    with torch.autocast("cpu", torch.bfloat16):  # the towers round, the product of embeddings does not
        assert reward(images(), CONDITIONS).dtype == torch.float32
    # Of one image all classes together are certain.
    same = images()[:1].expand(3, -1, -1, -1)
    torch.testing.assert_close(reward(same, CONDITIONS).exp().sum(), torch.tensor(1.0))
    several = ClipClass(NAMES, ("a painting of a {label}", "a {label}"), clip_folder)
    other = zero_shot(clip_folder, "a {label}", reward.clip.prepare(images()))
    mean = ((logits + other) / 2).log_softmax(1).diagonal()
    torch.testing.assert_close(several(images(), CONDITIONS), mean, rtol=1e-4, atol=1e-4)


def test_it_has_a_gradient_in_the_images(clip_folder: Path):
    pixels = images().requires_grad_()
    ClipClass(NAMES, clip=clip_folder)(pixels, CONDITIONS).sum().backward()
    assert pixels.grad is not None and pixels.grad.abs().sum() > 0


def test_the_classes_are_checked(clip_folder: Path):
    for wrong, told in (
        (("star",), "needs two classes or more, each once, got star"),
        (("star", "moon", "star"), "each once, got star, moon, star"),
        ("imagnet", "needs a list of classes, or 'imagenet', got 'imagnet'"),
    ):
        with pytest.raises(ConfigError, match=told):
            ClipClass(wrong, clip=clip_folder)
    reward = ClipClass(NAMES, clip=clip_folder)
    with pytest.raises(ConfigError, match="no class 'stars'; did you mean 'star'\\?; add it to `among`"):
        reward(images(), [Condition(0, "stars")] * 3)
    assert ClipClass("imagenet", clip=clip_folder).names == imagenet_names()
