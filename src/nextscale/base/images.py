"""Image tensors as PIL images, and image files as tensors."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nextscale.base.errors import ConfigError

IMAGE_FILES = (".png", ".jpg", ".jpeg", ".webp")
MAX_PIXELS = 2**26
"""Of a picture that is read: a file of some kilobytes can unpack to any number of them."""


def to_pil(images: Tensor) -> list[Image.Image]:
    """Convert images (B, 3, H, W) in [0, 1] to a list of B PIL images."""
    pixels = to_bytes(images).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(each) for each in pixels]


def to_bytes(images: Tensor) -> Tensor:
    """Images in [0, 1] as uint8 of the same shape, rounded, as files hold them."""
    return images.detach().clamp(0, 1).mul(255).round().to(torch.uint8)


def image_files(folder: Path) -> list[Path]:
    """The image files in a folder and those below it, in the order of their paths."""
    return sorted(each for each in folder.rglob("*") if each.suffix.lower() in IMAGE_FILES)


def read_image(path: Path) -> Tensor:
    """The picture in a file as (3, H, W) float32 in [0, 1].

    Raises:
        ConfigError: it is no picture, or has more than 67 million pixels.
    """
    try:
        with Image.open(path) as picture:
            if (found := picture.width * picture.height) > MAX_PIXELS:
                raise ConfigError(f"'{path}' has {found:,} pixels, more than {MAX_PIXELS:,}; make it smaller")
            pixels = np.array(picture.convert("RGB"))
    except (OSError, Image.DecompressionBombError):
        raise ConfigError(f"'{path}' is no readable image; remove it") from None
    return torch.from_numpy(pixels).permute(2, 0, 1).float().div_(255)
