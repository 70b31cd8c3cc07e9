"""Statistics of the pixels, against plain numpy, and at their known points."""

import numpy as np
import pytest
import torch

from nextscale.rewards.pixels import PIXEL_REWARDS, brightness, colourfulness, sharpness


@pytest.fixture
def images() -> torch.Tensor:
    """Noise of rising contrast, not square."""
    noise = torch.rand(4, 3, 9, 13, generator=torch.Generator().manual_seed(0))
    return noise * torch.tensor([0.1, 0.4, 0.7, 1.0]).view(4, 1, 1, 1)


def grey_of(image: torch.Tensor) -> np.ndarray:
    red, green, blue = image.double().numpy()
    return 0.299 * red + 0.587 * green + 0.114 * blue


def test_colourfulness_is_that_of_the_paper(images: torch.Tensor):
    for image, found in zip(images, colourfulness(images).tolist(), strict=True):
        red, green, blue = 255 * image.double().numpy()
        rg, yb = red - green, 0.5 * (red + green) - blue
        expected = np.hypot(rg.std(), yb.std()) + 0.3 * np.hypot(rg.mean(), yb.mean())
        assert found == pytest.approx(expected, rel=1e-5)


def test_colourfulness_at_known_points():
    grey = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0)).expand(1, 3, 8, 8)
    red = torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    assert colourfulness(grey).item() == pytest.approx(0, abs=1e-3)
    # all red: no deviation, means 255 and 127.5
    assert colourfulness(red).item() == pytest.approx(0.3 * 255 * 1.25**0.5)


def test_a_plain_image_has_a_slope():
    for plain in (
        torch.zeros(1, 3, 8, 8),
        torch.full((1, 3, 8, 8), 0.5),
        torch.rand(1, 3, 1, 1).expand(1, 3, 8, 8),
    ):
        images = torch.cat([plain, torch.rand(1, 3, 8, 8)]).requires_grad_()
        for reward in (colourfulness, sharpness, brightness):
            (slope,) = torch.autograd.grad(reward(images).sum(), images)
            assert slope.isfinite().all() and slope[1].abs().max() > 0, reward


def test_sharpness_is_the_variance_of_the_laplacian(images: torch.Tensor):
    for image, found in zip(images, sharpness(images).tolist(), strict=True):
        grey = np.pad(255 * grey_of(image), 1, mode="reflect")
        values = [
            grey[y - 1, x] + grey[y + 1, x] + grey[y, x - 1] + grey[y, x + 1] - 4 * grey[y, x]
            for y in range(1, grey.shape[0] - 1)
            for x in range(1, grey.shape[1] - 1)
        ]
        assert found == pytest.approx(np.var(values), rel=1e-4)


def test_sharpness_falls_when_an_image_is_blurred(images: torch.Tensor):
    blurred = torch.nn.functional.avg_pool2d(images, 3, stride=1)
    assert (sharpness(blurred) < sharpness(images) / 4).all()
    assert sharpness(torch.full((1, 3, 8, 8), 0.3)).item() == pytest.approx(0, abs=1e-6)


def test_brightness_is_the_mean_luma(images: torch.Tensor):
    assert brightness(images).tolist() == pytest.approx([grey_of(image).mean() for image in images])
    ends = torch.stack([torch.zeros(3, 4, 4), torch.ones(3, 4, 4)])
    assert brightness(ends).tolist() == pytest.approx([0, 1])


@pytest.mark.parametrize("name", PIXEL_REWARDS)
def test_a_batch_and_autocast_change_nothing(images: torch.Tensor, name: str):
    whole = PIXEL_REWARDS[name](images, [])
    singly = torch.cat([PIXEL_REWARDS[name](image[None], []) for image in images])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = PIXEL_REWARDS[name](images, [])
    assert whole.shape == (4,) and torch.allclose(whole, singly, rtol=1e-5)
    assert torch.equal(whole, cast)
