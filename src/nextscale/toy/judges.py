"""The judges: two independent classifiers, of class and of style, that are never used as a reward.

They are convolutional networks with batch normalisation, trained with their own seeds on their own images, so
that they catch an image that fools a reward (a vision transformer) without showing what it should.

Shapes: B images · K kinds
"""

from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from nextscale.base.conditions import Condition
from nextscale.base.tensors import build_strictly, read_state_dict
from nextscale.models.zoo import TOY_ASSETS
from nextscale.toy.world import CLASSES, STYLES

KINDS = {"class": CLASSES, "style": STYLES}


class Judge(nn.Sequential):
    """A plain convolutional classifier of 64x64 images: (B, 3, 64, 64) in [0, 1] to (B, K) logits."""

    def __init__(self, num_kinds: int, width: int = 16) -> None:
        layers: list[nn.Module] = [nn.BatchNorm2d(3)]
        widths = (3, width, width, 2 * width, 3 * width)
        for channels_in, channels_out in pairwise(widths):
            layers += [
                nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False),
                nn.BatchNorm2d(channels_out),
                nn.ReLU(),
                nn.MaxPool2d(2),
            ]
        layers += [nn.Flatten(), nn.Dropout(0.3), nn.Linear(widths[-1] * 16, num_kinds)]
        super().__init__(*layers)


def load_judge(kind: str, folder: Path = TOY_ASSETS / "judges") -> Judge:
    """The shipped judge of "class" or "style".

    Raises:
        CheckpointError: its file is missing or broken.
    """
    path = folder / f"{kind}.safetensors"
    return build_strictly(lambda: Judge(len(KINDS[kind])), read_state_dict(path), path).requires_grad_(False)


@torch.no_grad()
def judge(model: Judge, images: Tensor) -> Tensor:
    """(B,) index of the kind that the judge sees in each image."""
    return model(images).argmax(-1)


@cache
def _shipped(kind: str, device: torch.device) -> Judge:
    return load_judge(kind).to(device)


def judge_images(images: Tensor, conditions: Sequence[Condition]) -> dict[str, Tensor]:
    """What the shipped judges say of images that were asked to show these classes.

    Returns:
        (B,) values, 1 or 0: `judge/class_accuracy`, whether the class judge sees the class asked for, and
        `judge/style/{style}`, whether the style judge calls the image so. Their means are shares of images.
    """
    seen, styles = (judge(_shipped(kind, images.device), images).cpu() for kind in ("class", "style"))
    asked = torch.tensor([condition.label for condition in conditions])
    shares = {f"judge/style/{style}": (styles == index).float() for index, style in enumerate(STYLES)}
    return {"judge/class_accuracy": (seen == asked).float(), **shares}
