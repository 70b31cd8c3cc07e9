"""The miniature world: what it draws, says and rates."""

import math
from dataclasses import fields, replace
from itertools import pairwise

import pytest
import torch

from nextscale.toy.world import (
    CLASSES,
    CONTRAST,
    IMAGE_SIZE,
    MAX_OFFSET,
    MAX_ROTATION,
    PAINTERS,
    SATURATION,
    SIZE,
    STYLES,
    VOCABULARY,
    Drawing,
    Scenes,
    beauty,
    caption,
    captions,
    draw,
    ratings,
    render,
    sample_scenes,
)

NUM_MANY = 6000


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def every_kind() -> Scenes:
    """One scene of each class in each style."""
    labels = torch.arange(len(CLASSES)).repeat_interleave(len(STYLES))
    styles = torch.arange(len(STYLES)).repeat(len(CLASSES))
    return sample_scenes(len(labels), generator(), labels, styles)


@pytest.fixture(scope="module")
def many() -> Scenes:
    return sample_scenes(NUM_MANY, generator(1))


def as_dict(scenes: Scenes) -> dict[str, torch.Tensor]:
    return {field.name: getattr(scenes, field.name) for field in fields(scenes)}


def test_images_are_in_range_and_differ():
    images = render(every_kind())
    assert images.shape == (40, 3, IMAGE_SIZE, IMAGE_SIZE) and images.dtype == torch.float32
    assert images.isfinite().all() and images.min() >= 0 and images.max() <= 1
    assert (images.flatten(1).std(1) > 0.03).all()
    distances = torch.cdist(images.flatten(1), images.flatten(1)) + 1e9 * torch.eye(40)
    assert distances.min() > 3


def test_the_seed_decides_everything():
    first, second = (sample_scenes(20, generator(3)) for _ in range(2))
    assert torch.equal(render(first), render(second))
    assert captions(first, generator(4)) == captions(second, generator(4))
    assert torch.equal(ratings(first, generator(5)), ratings(second, generator(5)))
    assert not torch.equal(first.x, sample_scenes(20, generator(6)).x)


def test_the_first_scenes_do_not_depend_on_their_number():
    few, more = (as_dict(sample_scenes(num, generator())) for num in (7, 50))
    for name, values in few.items():
        assert torch.equal(values, more[name][:7]), name


def test_given_labels_and_styles_change_nothing_else():
    free = as_dict(sample_scenes(9, generator()))
    labels, styles = torch.full((9,), 5), torch.full((9,), 2)
    given = as_dict(sample_scenes(9, generator(), labels, styles))
    assert torch.equal(given.pop("label"), labels) and torch.equal(given.pop("style"), styles)
    for name, values in given.items():
        assert torch.equal(values, free[name]), name


def test_an_image_does_not_depend_on_its_batch():
    scenes = sample_scenes(60, generator(2))
    images = render(scenes)
    for i in (0, 17, 59):
        torch.testing.assert_close(render(scenes[i : i + 1])[0], images[i], rtol=0, atol=1e-6)
    order = torch.randperm(60, generator=generator())
    torch.testing.assert_close(render(scenes[order]), images[order], rtol=0, atol=1e-6)


def test_attributes_fill_their_ranges(many: Scenes):
    limits = {
        "saturation": SATURATION,
        "contrast": CONTRAST,
        "size": SIZE,
        "rotation": (-MAX_ROTATION, MAX_ROTATION),
    }
    for name, (low, high) in limits.items():
        values, tolerance = getattr(many, name), 0.01 * (high - low)
        assert low - 1e-5 <= values.min() < low + tolerance, name
        assert high - tolerance < values.max() <= high + 1e-5, name
    offset = torch.hypot(many.x, many.y)
    assert 0.99 * MAX_OFFSET < offset.max() <= MAX_OFFSET + 1e-5
    for name, values in (("label", CLASSES), ("style", STYLES)):
        counts = torch.bincount(getattr(many, name), minlength=len(values))
        expected = NUM_MANY / len(values)
        assert (counts - expected).abs().max() < 5 * math.sqrt(expected), name
    assert many.ground_lightness.min() > 0 and many.ground_lightness.max() < 1


@pytest.mark.parametrize("name", CLASSES)
def test_the_largest_object_stays_inside_the_frame(name: str):
    num = 48
    angle = torch.arange(num) * (2 * math.pi / 16)
    rotation = torch.linspace(-MAX_ROTATION, MAX_ROTATION, 3).repeat_interleave(16)
    scenes = replace(
        sample_scenes(num, generator()),
        x=MAX_OFFSET * angle.cos(),
        y=MAX_OFFSET * angle.sin(),
        size=torch.full((num,), SIZE[1]),
        rotation=rotation,
    )
    outline = draw(scenes, name).outline
    border = torch.cat([outline[:, 0], outline[:, -1], outline[:, :, 0], outline[:, :, -1]], 1)
    assert border.min() > 0
    assert (outline.flatten(1).min(1).values < -3).all()  # and it is there


def without_object(scenes: Scenes) -> Drawing:
    drawing = draw(scenes, "star")
    far, none = torch.full_like(drawing.outline, 1e3), torch.zeros_like(drawing.outline)
    return drawing._replace(outline=far, pale=far, deep=far, shade=none, gloss=none)


@pytest.mark.parametrize("style", STYLES)
def test_the_ground_has_a_period_of_eight_pixels(style: str):
    scenes = sample_scenes(6, generator())
    ground = PAINTERS[style](scenes, without_object(scenes))
    if style == "photo":  # has no texture, only light that falls off
        assert ground.diff(dim=2).abs().max() < 0.01 and ground.diff(dim=3).abs().max() < 0.01
        return
    ground = ground.expand(6, 3, IMAGE_SIZE, IMAGE_SIZE)
    torch.testing.assert_close(ground[:, :, 8:], ground[:, :, :-8], rtol=0, atol=1e-5)
    torch.testing.assert_close(ground[..., 8:], ground[..., :-8], rtol=0, atol=1e-5)
    if style != "sketch":  # blank paper
        assert ground[:, :, :8, :8].flatten(2).std(2).max() > 0.01


def test_captions_use_the_vocabulary_and_tell_the_truth(many: Scenes):
    texts = captions(many, generator())
    assert {word for text in texts for word in text.split()} == set(VOCABULARY)
    for i, text in enumerate(texts):
        words = text.split()
        assert {word for word in words if word in CLASSES} == {CLASSES[many.label[i]]}, text
        assert {word for word in words if word in STYLES} == {STYLES[many.style[i]]}, text
        if "large" in words or "small" in words:
            assert ("large" in words) == (many.size[i] > sum(SIZE) / 2), text
        if "bright" in words or "pale" in words:
            assert ("bright" in words) == (many.saturation[i] > sum(SATURATION) / 2), text
        for article, following in pairwise(words):
            if article in ("a", "an"):
                assert (article == "an") == (following[0] in "aeiou"), text


def test_the_plain_caption():
    assert caption("star", "photo") == "a photo of a star"
    assert caption("heart", "painting", "orange") == "a painting of an orange heart"
    for wrong in (("circle", "photo"), ("star", "oil"), ("star", "photo", "magenta")):
        with pytest.raises(ValueError, match=r"unknown (label|style|colour)"):
            caption(*wrong)


def test_beauty_is_standardised(many: Scenes):
    found = beauty(many)
    assert abs(found.mean()) < 5 / math.sqrt(NUM_MANY)
    assert abs(found.std() - 1) < 0.05


def test_ratings_follow_beauty(many: Scenes):
    found = ratings(many, generator())
    assert found.shape == (NUM_MANY,) and found.min() >= 1 and found.max() <= 10
    assert torch.corrcoef(torch.stack([found, beauty(many)]))[0, 1] > 0.8
    assert abs(found.mean() - 5) < 0.1


@pytest.mark.parametrize("attribute", ["label", "style", "colour", "ground"])
def test_ratings_are_neutral(many: Scenes, attribute: str):
    found, groups = ratings(many, generator()), getattr(many, attribute)
    for value in groups.unique():
        chosen = found[groups == value]
        error = found.std() / math.sqrt(len(chosen))
        assert abs(chosen.mean() - found.mean()) < 4 * error, f"{attribute} {value}"


def test_beauty_has_nothing_to_do_with_label_and_style():
    scenes = sample_scenes(50, generator())
    other = replace(scenes, label=scenes.label.flip(0), style=scenes.style.flip(0))
    assert torch.equal(beauty(scenes), beauty(other))


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("labels", torch.tensor([0, 1, 8])),
        ("labels", torch.tensor([0, -1, 2])),
        ("labels", torch.tensor([0, 1])),
        ("labels", torch.tensor([[0, 1, 2]])),
        ("styles", torch.tensor([0, 1, 5])),
        ("styles", torch.tensor([-1, 1, 2])),
        ("styles", torch.tensor(0)),
    ],
)
def test_impossible_labels_and_styles_are_told(name: str, wrong: torch.Tensor):
    with pytest.raises(ValueError, match=f"{name} must be 3 indices below"):
        sample_scenes(3, generator(), **{name: wrong})
