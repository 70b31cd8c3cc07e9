"""What the authors of networks do to a picture before they show it to them, by PIL."""

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from nextscale.rewards.networks.preprocessing import MEAN, STD

try:  # since transformers 5; before, the processor of this name was the one that uses PIL
    from transformers import CLIPImageProcessorPil as ImageProcessor
except ImportError:
    from transformers import CLIPImageProcessor as ImageProcessor

__all__ = ["ImageProcessor", "padded_by_pil", "to_tensor"]


def to_tensor(image: Image.Image) -> Tensor:
    """(1, 3, H, W) in [0, 1]."""
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None].float() / 255


def padded_by_pil(image: Image.Image, size: int) -> Tensor:
    """(1, 3, size, size): the longer side to `size`, black around it, normalised as CLIP is."""
    contained = ImageOps.contain(image, (size, size), Image.Resampling.BICUBIC)
    canvas = Image.new("RGB", (size, size))
    canvas.paste(contained, ((size - contained.width) // 2, (size - contained.height) // 2))
    pixels = (np.asarray(canvas) / 255 - MEAN) / STD
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
