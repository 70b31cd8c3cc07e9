"""CLIP and its score: equal to what transformers itself computes; what cannot be used is told."""

import logging
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pil_processors import ImageProcessor, to_tensor
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, CLIPModel

from nextscale.base.conditions import Condition
from nextscale.base.errors import CheckpointError, ConfigError
from nextscale.rewards import ClipScore
from nextscale.rewards.networks.clip import Clip, load_clip
from nextscale.rewards.networks.preprocessing import MEAN, STD, clip_preprocessing

CLASSES = ("star", "orange heart", "neon moon")
CONDITIONS = [Condition(i, name) for i, name in enumerate(CLASSES)]


def random_images(num: int = 3, size: int = 64) -> Tensor:
    return torch.rand(num, 3, size, size, generator=torch.Generator().manual_seed(0))


def smooth_image(height: int, width: int) -> Image.Image:
    """An image with gradients, waves and an edge, as a photograph has."""
    y, x = np.mgrid[0:height, 0:width] / min(height, width)
    red = 0.5 + 0.4 * np.sin(7 * x + 3 * y)
    green = 0.2 + 0.5 * x * y
    blue = 0.5 + 0.3 * np.cos(20 * x * y) * (np.hypot(x - 0.6, y - 0.4) < 0.3)
    pixels = np.stack([red, green, blue], -1).clip(0, 1)
    return Image.fromarray((255 * pixels).round().astype(np.uint8))


def cosines(folder: Path, images: Tensor, texts: list[str]) -> Tensor:
    """Of each image with its text, by transformers' own forward pass, one text at a time and so unpadded."""
    model, tokenizer = CLIPModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    pixels = (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    found = []
    with torch.no_grad():
        for pixel, text in zip(pixels, texts, strict=True):
            out = model(**tokenizer([text], return_tensors="pt"), pixel_values=pixel[None])
            found.append(out.logits_per_image[0, 0] / model.logit_scale.exp())
    return torch.stack(found)


def test_the_score_is_the_cosine_that_transformers_computes(clip_folder: Path):
    images, reward = random_images(), ClipScore("a painting of a {label}", clip=clip_folder)
    scores = reward(images, CONDITIONS)
    expected = cosines(clip_folder, images, [f"a painting of a {name}" for name in CLASSES])
    assert scores.shape == (3,) and scores.std() > 0.01
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)


def test_embeddings_have_length_one_and_the_width_of_the_projection(clip_folder: Path):
    clip = load_clip(clip_folder)
    for embeddings in (clip.embed_images(random_images()), clip.embed_texts(CLASSES)):
        assert embeddings.shape == (3, 24) and not embeddings.requires_grad
        torch.testing.assert_close(embeddings.norm(dim=-1), torch.ones(3))


def test_an_image_scores_the_same_alone_and_in_a_batch(clip_folder: Path):
    images, reward = random_images(), ClipScore("a {label}", clip=clip_folder)
    together = reward(images, CONDITIONS)
    reward.clip._texts.clear()
    alone = [reward(images[i : i + 1], CONDITIONS[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(torch.cat(alone), together, rtol=0, atol=1e-6)


def test_texts_are_remembered_in_any_order(clip_folder: Path):
    clip = Clip.from_pretrained(clip_folder)
    first = clip.embed_texts(["a star", "a moon", "a star"])
    assert torch.equal(first[0], first[2]) and not torch.equal(first[0], first[1])
    again = clip.embed_texts(["a moon", "a fish", "a star"])
    assert torch.equal(again[0], first[1]) and torch.equal(again[2], first[0])
    assert list(clip._texts) == ["a star", "a moon", "a fish"]


def test_a_text_s_embedding_does_not_depend_on_the_others_to_the_bit(clip_folder: Path):
    texts = [f"a {'neon ' * count}star" for count in range(6)]
    together = Clip.from_pretrained(clip_folder).embed_texts(texts)
    for i, text in enumerate(texts):
        assert torch.equal(Clip.from_pretrained(clip_folder).embed_texts([text])[0], together[i])


def test_what_is_kept_of_a_text_or_file_is_in_float32_whoever_asked_first(clip_folder: Path, tmp_path: Path):
    Image.new("RGB", (40, 40), (200, 30, 60)).save(tmp_path / "a.png")
    clip, later = Clip.from_pretrained(clip_folder), Clip.from_pretrained(clip_folder)
    with torch.autocast("cpu", torch.bfloat16):
        text, file = clip.embed_texts(["a star"]), clip.embed_files([tmp_path / "a.png"], "cpu")
    assert torch.equal(text, later.embed_texts(["a star"]))
    assert torch.equal(file, later.embed_files([tmp_path / "a.png"], "cpu"))


def test_a_text_longer_than_the_model_takes_is_cut(clip_folder: Path):
    clip = Clip.from_pretrained(clip_folder)
    long, longer = ("star " * count for count in (40, 60))
    torch.testing.assert_close(clip.embed_texts([long]), clip.embed_texts([longer]))


# 123 and 119 leave a fraction over, where it matters whether a size is cut or rounded.
@pytest.mark.parametrize("shape", [(150, 200), (240, 180), (100, 123), (119, 100), (40, 51), (64, 64)])
def test_preprocessing_agrees_with_that_of_transformers(clip_folder: Path, shape: tuple[int, int]):
    image = smooth_image(*shape)
    theirs = ImageProcessor.from_pretrained(clip_folder)(image, return_tensors="pt")["pixel_values"]
    ours = clip_preprocessing(64)(to_tensor(image))
    assert ours.shape == theirs.shape == (1, 3, 64, 64)
    difference = (ours - theirs).abs() * torch.tensor(STD).view(3, 1, 1)
    assert difference.mean() < 1 / 255
    assert difference.max() < 3 / 255


def test_images_of_the_right_size_are_only_normalised():
    images = random_images()
    expected = (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    assert torch.equal(clip_preprocessing(64)(images), expected)


def test_images_of_any_size_are_scored(clip_folder: Path):
    reward = ClipScore("a {label}", clip=clip_folder)
    image = smooth_image(128, 128)
    large = reward(to_tensor(image), CONDITIONS[:1])
    small = reward(to_tensor(image.resize((64, 64), Image.Resampling.BICUBIC)), CONDITIONS[:1])
    torch.testing.assert_close(large, small, rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "a {}",
        "a {0}",
        "a {labels}",
        "a {label.text}",
        "a {label[0]}",
        "a {label",
        "a }",
        "{label:d}",
        "{label:{w}}",
    ],
)
def test_a_prompt_that_is_no_template_of_a_label_is_told(prompt: str, clip_folder: Path):
    with pytest.raises(ConfigError, match="prompt"):
        ClipScore(prompt, clip=clip_folder)


def test_a_prompt_need_not_name_the_label_and_may_hold_braces(clip_folder: Path):
    images = random_images(2)
    scores = ClipScore("a painting", clip=clip_folder)(images, CONDITIONS[:2])
    torch.testing.assert_close(scores, cosines(clip_folder, images, ["a painting"] * 2), rtol=0, atol=1e-5)
    assert math.isfinite(ClipScore("a {{star}} {label}", clip=clip_folder)(images[:1], CONDITIONS[:1]).item())


def test_a_missing_clip_is_told_in_one_sentence(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    for name in ("none", "empty"):
        with pytest.raises(CheckpointError, match=f"CLIP '.*{name}' cannot be loaded") as caught:
            ClipScore(clip=tmp_path / name)
        assert "\n" not in str(caught.value)


def test_a_clip_with_broken_or_missing_weights_is_told(clip_folder: Path, tmp_path: Path):
    folder = tmp_path / "clip"
    shutil.copytree(clip_folder, folder)
    weights = folder / "model.safetensors"
    state = load_file(clip_folder / weights.name)
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        Clip.from_pretrained(folder)
    del state["text_projection.weight"]  # transformers would fill it with random numbers
    save_file(state, weights, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"text_projection\.weight"):
        Clip.from_pretrained(folder)
    state["text_projection.weight"] = torch.zeros(24, 63)
    save_file(state, weights, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        Clip.from_pretrained(folder)


def test_a_text_that_is_cut_is_told_of(clip_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    clip = Clip.from_pretrained(clip_folder)
    short = "a red star"
    clip.embed_texts([short])
    assert not caplog.records
    long = " ".join([short] * clip.max_text_length)
    with caplog.at_level(logging.WARNING):
        clip.embed_texts([long, long])
    (record,) = caplog.records
    assert "is cut: it has" in record.getMessage() and len(record.getMessage()) < 400
