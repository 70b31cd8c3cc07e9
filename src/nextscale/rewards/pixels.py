"""Statistics of the pixels: rewards that need no model. They are easily fooled: use them as tools, not goals.

Shapes: B images · H W pixels
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from nextscale.base.conditions import Condition
from nextscale.rewards.protocol import Reward, RewardConfig

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as in JPEG, PIL's "L" and OpenCV's grey
LEVELS = 255  # the published figures of colourfulness and sharpness are of 8-bit images
MEAN_WEIGHT = 0.3  # of the mean against the deviation, fitted by the authors to what people said


def colourfulness(images: Tensor, conditions: Sequence[Condition] = ()) -> Tensor:
    """How colourful people find an image: 0 for grey, 33 moderately, 59 quite, 109 extremely colourful.

    Args:
        images: (B, 3, H, W) in [0, 1].

    Returns:
        (B,) the deviation plus 0.3 times the mean of the opponent colours red-green and yellow-blue.

    Source: Hasler and Süsstrunk, Measuring colourfulness in natural images (SPIE 2003), metric M3.
    """
    red, green, blue = (LEVELS * images.float()).unbind(1)
    opponents = rearrange([red - green, (red + green) / 2 - blue], "two B H W -> B two (H W)")
    means = opponents.mean(-1)
    # As a norm: of a plain image it is 0 and has the slope 0, where a root's would be infinite.
    deviation = (opponents - means[..., None]).flatten(1).norm(dim=-1) / opponents.shape[-1] ** 0.5
    return deviation + MEAN_WEIGHT * means.norm(dim=-1)


def sharpness(images: Tensor, conditions: Sequence[Condition] = ()) -> Tensor:
    """Variance of the Laplacian of the luma, on the scale of 8-bit images: 0 for a plain image, hundreds for
    a photograph of 256 px, 50,000 for uniform noise. It depends on the size of the image.

    Args:
        images: (B, 3, H, W) in [0, 1], H and W at least 2.

    Returns:
        (B,) at least 0.

    Source: Pech-Pacheco et al., Diatom autofocusing in brightfield microscopy (ICPR 2000), LAPV; kernel and
        mirrored border are those of OpenCV's `Laplacian(grey, CV_64F).var()`.
    """
    luma = F.pad(LEVELS * _luma(images), (1, 1, 1, 1), mode="reflect")
    # Sums, not a convolution, which autocast would round to 8 bits of precision.
    above, below, left, right = luma[:, :-2, 1:-1], luma[:, 2:, 1:-1], luma[:, 1:-1, :-2], luma[:, 1:-1, 2:]
    laplacian = above + below + left + right - 4 * luma[:, 1:-1, 1:-1]
    return laplacian.flatten(1).var(-1, correction=0)


def brightness(images: Tensor, conditions: Sequence[Condition] = ()) -> Tensor:
    """Mean luma: 0 is black, 1 is white.

    Args:
        images: (B, 3, H, W) in [0, 1].

    Returns:
        (B,) in [0, 1].
    """
    return _luma(images).mean((1, 2))


PIXEL_REWARDS: dict[str, Reward] = {
    "colourfulness": colourfulness,
    "sharpness": sharpness,
    "brightness": brightness,
}


def _luma(images: Tensor) -> Tensor:
    weights = torch.tensor(LUMA, device=images.device).view(3, 1, 1)
    return (weights * images.float()).sum(1)


class PixelsConfig(RewardConfig):
    """Statistic of the pixels."""

    main_option = "statistic"

    kind: Literal["pixels"] = "pixels"
    statistic: Literal["colourfulness", "sharpness", "brightness"]
    """Which statistic."""

    def make(self) -> Reward:
        return PIXEL_REWARDS[self.statistic]
