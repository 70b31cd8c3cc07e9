"""Size of an image as a JPEG: a reward that needs no model, for trying things out.

Source: DDPO (arXiv 2305.13301) and its code, github.com/kvablack/ddpo-pytorch, `rewards.py`.
"""

from collections.abc import Sequence
from io import BytesIO
from typing import Literal

import torch
from torch import Tensor

from nextscale.base.conditions import Condition
from nextscale.base.images import to_pil
from nextscale.rewards.protocol import Reward, RewardConfig

QUALITY = 95
BYTES_PER_KILOBYTE = 1000


class JpegIncompressibility:
    """Kilobytes of an image as a JPEG, above 0: the more detail and noise, the higher."""

    has_gradient = False

    def __call__(self, images: Tensor, conditions: Sequence[Condition]) -> Tensor:
        return jpeg_kilobytes(images)


class JpegCompressibility:
    """Kilobytes of an image as a JPEG, negated, below 0: the plainer, the higher."""

    has_gradient = False

    def __call__(self, images: Tensor, conditions: Sequence[Condition]) -> Tensor:
        return -jpeg_kilobytes(images)


JPEG_REWARDS = {"compressibility": JpegCompressibility, "incompressibility": JpegIncompressibility}


def jpeg_kilobytes(images: Tensor) -> Tensor:
    """(B, 3, H, W) in [0, 1] to (B,) sizes on the CPU; encoded in memory, one image at a time."""
    sizes = []
    for image in to_pil(images):
        buffer = BytesIO()
        image.save(buffer, format="JPEG", quality=QUALITY)
        sizes.append(buffer.tell() / BYTES_PER_KILOBYTE)
    return torch.tensor(sizes, dtype=torch.float32)


class JpegConfig(RewardConfig):
    """Kilobytes of the image as a JPEG, negated for compressibility."""

    main_option = "measure"

    kind: Literal["jpeg"] = "jpeg"
    measure: Literal["compressibility", "incompressibility"]
    """Whether small or large files score high."""

    def make(self) -> Reward:
        return JPEG_REWARDS[self.measure]()
