"""What holds for every reward that is a network: batches, devices, precision, photographs, gradients."""

import copy
from collections.abc import Callable

import pytest
import torch
from PIL import Image
from pil_processors import ImageProcessor, padded_by_pil, to_tensor
from torch import Tensor, nn
from transformers import AutoImageProcessor

from nextscale.base.conditions import Condition
from nextscale.rewards import Aesthetic, ClassProbability, ClipScore, HPSv2, ImageReward, Reward
from nextscale.rewards.networks.clip import Clip

NAMES = ("star", "orange heart", "neon moon")
CONDITIONS = [Condition(i, NAMES[i % 3]) for i in range(64)]


def random_images(num: int, size: int = 80) -> Tensor:
    """Coarse noise, so that it is not averaged away by resizing."""
    small = torch.rand(num, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return nn.functional.interpolate(small, (size, size), mode="bilinear")


def networks(reward: Reward) -> list[nn.Module]:
    values = [
        *vars(reward).values(),
        *(vars(each) for each in vars(reward).values() if isinstance(each, Clip)),
    ]
    flat = [inner for value in values for inner in (value.values() if isinstance(value, dict) else [value])]
    return [each for each in flat if isinstance(each, nn.Module)]


def test_an_image_alone_scores_as_in_a_batch_of_64(neural_reward: Reward):
    images = random_images(64)
    together = neural_reward(images, CONDITIONS)
    chosen = (0, 1, 2, 33, 63)
    alone = [neural_reward(images[i : i + 1], CONDITIONS[i : i + 1]) for i in chosen]
    assert together.shape == (64,) and together.dtype == torch.float32
    assert together.std() > 100 * (torch.cat(alone) - together[list(chosen)]).abs().max()
    torch.testing.assert_close(torch.cat(alone), together[list(chosen)], rtol=1e-5, atol=1e-5)


def test_nothing_is_trained(neural_reward: Reward):
    images = random_images(2)
    assert not neural_reward(images, CONDITIONS[:2]).requires_grad
    assert networks(neural_reward)
    for network in networks(neural_reward):
        assert not network.training and not any(each.requires_grad for each in network.parameters())


def test_scores_have_a_gradient_by_the_image(neural_reward: Reward):
    """What grpo.credit gradient needs."""
    images = random_images(2).requires_grad_()
    (gradient,) = torch.autograd.grad(neural_reward(images, CONDITIONS[:2]).sum(), images)
    assert gradient.isfinite().all() and (gradient.abs().amax((1, 2, 3)) > 0).all()


def test_scores_are_float32_under_autocast_and_nearly_the_same(neural_reward: Reward):
    images = random_images(8)
    scores = neural_reward(images, CONDITIONS[:8])
    with torch.autocast("cpu", torch.bfloat16):
        half = neural_reward(images, CONDITIONS[:8])
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, scores, rtol=0.05, atol=0.1 * scores.std().item() + 0.02)


def test_a_reward_follows_the_images_to_another_device(neural_reward: Reward):
    neural_reward(random_images(2), CONDITIONS[:2])  # so that what is remembered of texts has to follow too
    moved = copy.deepcopy(neural_reward)
    try:
        scores = moved(random_images(2).to("meta"), CONDITIONS[:2])  # fails where anything stays behind
    except RuntimeError as error:  # this device has no autocast, and no values that a mask could look at
        assert "unsupported scalarType" in str(error) or "item() cannot be called" in str(error)
    else:
        assert scores.shape == (2,) and scores.device.type == "meta"
    for network in networks(moved):
        assert {each.device.type for each in network.parameters()} == {"meta"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_reward_follows_the_images_to_the_gpu_and_back(neural_reward: Reward):
    images = random_images(8)
    scores = neural_reward(images, CONDITIONS[:8])
    there = neural_reward(images.cuda(), CONDITIONS[:8])
    assert there.device.type == "cuda"
    torch.testing.assert_close(there.cpu(), scores, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(neural_reward(images, CONDITIONS[:8]), scores)


def pil_processor(reward: Reward) -> Callable[[Image.Image], Tensor]:
    """What the network's authors do to a picture, by PIL."""
    if isinstance(reward, ClassProbability):
        processor = AutoImageProcessor.from_pretrained(reward.classifier)
    elif isinstance(reward, HPSv2):
        return lambda image: padded_by_pil(image, 64)
    else:
        processor = ImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    return lambda image: processor(image, return_tensors="pt")["pixel_values"]


def scores_by_both(
    reward: Reward, photographs: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> tuple[Tensor, Tensor]:
    """Of each photograph under each of three conditions, (9,), with our preprocessing and with PIL's."""
    images = [to_tensor(each).expand(3, -1, -1, -1) for each in photographs]
    ours = torch.cat([reward(image, CONDITIONS[:3]) for image in images])
    by_pil = torch.cat([pil_processor(reward)(each) for each in photographs]).repeat_interleave(3, 0)
    monkeypatch.setattr(getattr(reward, "clip", reward), "prepare", lambda images: by_pil)
    theirs = reward(torch.empty(9, 3, 1, 1), CONDITIONS[:3] * 3)
    assert (ours != theirs).all()  # so it is indeed another preprocessing
    return ours, theirs


def test_photographs_score_as_under_the_preprocessing_of_pil(
    neural_reward: Reward, photographs: list[Image.Image], monkeypatch: pytest.MonkeyPatch
):
    ours, theirs = scores_by_both(neural_reward, photographs, monkeypatch)
    # where a score is near 0, next to what scores differ by; for ImageReward that is 1 by definition
    spread = 1.0 if isinstance(neural_reward, ImageReward) else theirs.std().item()
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2 * spread)


@pytest.mark.parametrize("make", [lambda: Aesthetic("toy"), lambda: ClipScore("a photo of a {label}", "toy")])
def test_photographs_score_so_under_a_trained_network_too(
    make: Callable[[], Reward], photographs: list[Image.Image], monkeypatch: pytest.MonkeyPatch
):
    ours, theirs = scores_by_both(make(), photographs, monkeypatch)
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=0)
