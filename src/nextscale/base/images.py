"""Image tensors as PIL images, and image files as tensors."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nextscale.base.errors import ConfigError


def to_pil(images: Tensor) -> list[Image.Image]:
    """Convert images (B, 3, H, W) in [0, 1] to a list of B PIL images."""
    pixels = to_bytes(images).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(each) for each in pixels]


def to_bytes(images: Tensor) -> Tensor:
    """Images in [0, 1] as uint8 of the same shape, rounded, as files hold them."""
    return images.detach().clamp(0, 1).mul(255).round().to(torch.uint8)


def read_image(path: Path) -> Tensor:
    """The picture in a file as (3, H, W) float32 in [0, 1].

    Raises:
        ConfigError: it is no picture, or one larger than PIL takes to be safe.
    """
    try:
        with Image.open(path) as picture:
            pixels = np.array(picture.convert("RGB"))
    except (OSError, Image.DecompressionBombError):
        raise ConfigError(f"'{path}' is no readable image; remove it") from None
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
