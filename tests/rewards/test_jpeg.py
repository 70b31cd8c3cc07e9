"""The size of an image as a JPEG."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from nextscale.base.conditions import Condition
from nextscale.rewards import JpegCompressibility, JpegIncompressibility, score

CONDITIONS = [Condition(0, "star")] * 3


@pytest.fixture
def images() -> torch.Tensor:
    """Plain, a ramp, and noise."""
    ramp = torch.linspace(0, 1, 40).expand(3, 32, 40)
    noise = torch.rand(3, 32, 40, generator=torch.Generator().manual_seed(0))
    return torch.stack([torch.full((3, 32, 40), 0.5), ramp, noise])


def test_kilobytes_are_those_of_the_file(images: torch.Tensor, tmp_path: Path):
    for i, image in enumerate(images):
        pixels = (255 * image).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(tmp_path / f"{i}.jpg", quality=95)
    expected = [(tmp_path / f"{i}.jpg").stat().st_size / 1000 for i in range(3)]
    kilobytes = score("jpeg", JpegIncompressibility(), images, CONDITIONS)
    assert kilobytes.tolist() == pytest.approx(expected)
    assert torch.equal(score("jpeg", JpegCompressibility(), images, CONDITIONS), -kilobytes)


def test_noise_is_larger_than_a_plain_image(images: torch.Tensor):
    plain, ramp, noise = JpegIncompressibility()(images, CONDITIONS).tolist()
    assert 0 < plain < ramp < noise
    # 3 x 32 x 40 bytes of pixels: noise cannot be packed much below them, a plain image is all header
    assert plain < 1 and noise > 2
