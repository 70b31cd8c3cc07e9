"""Preprocessing of images for pretrained networks, in torch, batched and on the images' device."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from nextscale.base.errors import CheckpointError
from nextscale.models.pretrained import loading

# OpenAI's CLIP, and most of its kin.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

MODES = {2: "bilinear", 3: "bicubic"}
"""PIL's numbers of the interpolation modes that torch offers with antialiasing."""
TOLERANCE = 1 / 255
"""Largest accepted difference from the network's own processor, averaged over pixels in [0, 1]."""


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """Resize with antialiasing, crop the centre or pad, normalise: (B, 3, H, W) in [0, 1] to (B, 3, h, w).

    Attributes:
        size: (height, width) to stretch to, or one number for the side `edge`, which keeps the aspect ratio.
        edge: the side that is resized to a single `size`; with "longest", black padding makes a square.
        crop: (height, width) of the centre crop; None keeps everything.
        mode: interpolation mode.
        mean: mean of each channel.
        std: standard deviation of each channel.
    """

    size: int | tuple[int, int]
    edge: Literal["shortest", "longest"] = "shortest"
    crop: tuple[int, int] | None = None
    mode: str = "bicubic"
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD

    def __call__(self, images: Tensor) -> Tensor:
        images = images.float()
        shape = self._resized(*images.shape[-2:])
        if shape != tuple(images.shape[-2:]):
            images = F.interpolate(images, shape, mode=self.mode, antialias=True).clamp(0, 1)
        if self.crop:
            top, left = ((shape[i] - self.crop[i]) // 2 for i in (0, 1))
            images = images[..., top : top + self.crop[0], left : left + self.crop[1]]
        elif isinstance(self.size, int) and self.edge == "longest":
            down, right = (self.size - side for side in shape)
            images = F.pad(images, (right // 2, right - right // 2, down // 2, down - down // 2))
        mean, std = (torch.tensor(each, device=images.device).view(3, 1, 1) for each in (self.mean, self.std))
        return (images - mean) / std

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        if not isinstance(self.size, int):
            return self.size
        if self.edge == "longest":  # rounded, as open_clip does
            longer = max(height, width)
            return round(height * self.size / longer), round(width * self.size / longer)
        shorter = min(height, width)  # cut to whole pixels, as OpenAI and transformers do
        return height * self.size // shorter, width * self.size // shorter


def clip_preprocessing(size: int) -> Preprocessing:
    """Preprocessing of CLIP: resize the shorter side to `size`, crop the centre."""
    return Preprocessing(size=size, crop=(size, size))


def read_preprocessing(name: str | Path) -> Preprocessing:
    """Preprocessing of a model of transformers, as its `preprocessor_config.json` describes it.

    Raises:
        CheckpointError: there is no such file, or its processor does more than resize, crop and normalise.
    """
    with loading("image processor", name):
        processor = transformers.AutoImageProcessor.from_pretrained(str(name))
    unsupported = CheckpointError(
        f"image processor {type(processor).__name__} of '{name}' does not only resize, crop and normalise: "
        "its classifier cannot be used as a reward"
    )
    try:
        prepared = _from_processor(processor)
        difference = _difference(prepared, processor)
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError):
        raise unsupported from None
    if not difference < TOLERANCE:
        raise unsupported
    return prepared


def _from_processor(processor: Any) -> Preprocessing:
    size = {key: value for key, value in dict(processor.size).items() if value is not None}
    crop = None
    if getattr(processor, "do_center_crop", False):
        crop = processor.crop_size["height"], processor.crop_size["width"]
    resized = size.get("shortest_edge") or (size["height"], size["width"])
    crop_share = getattr(processor, "crop_pct", None)
    if crop_share and isinstance(resized, int):  # ConvNeXt's and ResNet's: from 384 pixels on it is stretched
        crop = None if resized >= 384 else (resized, resized)
        resized = (resized, resized) if crop is None else int(resized / crop_share)
    return Preprocessing(
        size=resized,
        crop=crop,
        mode=MODES[int(processor.resample)],
        mean=tuple(processor.image_mean) if processor.do_normalize else (0.0, 0.0, 0.0),
        std=tuple(processor.image_std) if processor.do_normalize else (1.0, 1.0, 1.0),
    )


def _difference(prepare: Preprocessing, processor: Callable[..., Any]) -> float:
    """Mean absolute difference of the two over the pixels of one smooth, non-square image."""
    y, x = np.mgrid[0:300, 0:451] / 300
    waves = [np.sin(9 * x + 3 * y), np.cos(7 * x * y), np.sin(5 * y - 4 * x)]
    pixels = np.round(127.5 + 120 * np.stack(waves, -1)).astype(np.uint8)
    theirs = processor(pixels, return_tensors="pt")["pixel_values"]
    ours = prepare(torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255)
    if theirs.shape != ours.shape:
        return float("inf")
    return ((ours - theirs).abs() * torch.tensor(prepare.std).view(3, 1, 1)).mean().item()
