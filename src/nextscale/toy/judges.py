"""The judges: two independent classifiers, of class and of style, that are never used as a reward.

They are convolutional networks with batch normalisation, trained with their own seeds on their own images, so
that they catch an image that fools a reward (a vision transformer) without showing what it should.

Shapes: B images · K kinds · D width of the pooled features
"""

from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextscale.base.conditions import Condition
from nextscale.base.tensors import build_strictly, read_state_dict
from nextscale.models.zoo import TOY_ASSETS
from nextscale.toy.prompts import ATTRIBUTES, NAMED, targets_of
from nextscale.toy.world import CLASSES, STYLES

KINDS = {"class": CLASSES, "style": STYLES}
OF_PROMPTS = {name: values for name, values in ATTRIBUTES.items() if name != "object"}
"""What further judges tell of a picture: with the class judge, all that a prompt names."""
HEAD = -3  # the layers after the last maps: Flatten, Dropout, Linear


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

    def look(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, K) logits, and (B, D) features: the last maps, (B, 48, 4, 4), by quarters of the image.

        Pooled to 2x2, a feature has 192 numbers, whose covariance 2,048 images, or 512, still determine; the
        768 of the maps would need many more. Where in the image something is, it keeps by quarters.
        """
        body, head = list(self)[:HEAD], list(self)[HEAD:]
        maps = images
        for layer in body:
            maps = layer(maps)
        logits = maps
        for layer in head:
            logits = layer(logits)
        return logits, F.avg_pool2d(maps, 2).flatten(1)


def load_judge(kind: str, folder: Path = TOY_ASSETS / "judges") -> Judge:
    """The shipped judge of "class" or "style", or of "colour", "ground" or "place".

    Raises:
        CheckpointError: its file is missing or broken.
    """
    path = folder / f"{kind}.safetensors"
    return build_strictly(
        lambda: Judge(len((KINDS | OF_PROMPTS)[kind])), read_state_dict(path), path
    ).requires_grad_(False)


@cache
def shipped_judge(kind: str, device: torch.device) -> Judge:
    """The shipped judge, loaded once for each device."""
    return load_judge(kind).to(device)


def look(images: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """What a shipped judge sees, as `Judge.look` gives it; in float32, whatever the evaluation runs in: what
    it is compared with was."""
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        return shipped_judge(kind, images.device).look(images.float())


def judge_images(images: Tensor, conditions: Sequence[Condition]) -> dict[str, Tensor]:
    """What the shipped judges say of images that were asked to show these classes.

    Returns:
        (B,) values: `judge/class_accuracy`, 1 where the class judge sees the class asked for, else 0;
        `judge/class_log_prob`, its log-probability of that class in nats; and `judge/style/{style}`, 1 where
        the style judge calls the image so. The means of all but the log-probability are shares of images.
    """
    of_class, of_style = (look(images, kind)[0].cpu() for kind in KINDS)
    asked = torch.tensor([condition.label for condition in conditions])
    styles = of_style.argmax(-1)
    return {
        "judge/class_accuracy": (of_class.argmax(-1) == asked).float(),
        "judge/class_log_prob": of_class.log_softmax(-1).gather(-1, asked[:, None]).squeeze(-1),
        **{f"judge/style/{style}": (styles == index).float() for index, style in enumerate(STYLES)},
    }


def judge_prompted(images: Tensor, conditions: Sequence[Condition]) -> dict[str, Tensor]:
    """What the shipped judges say of images that were asked for by prompts.

    Returns:
        (B,) values: `judge/{name}_right` for object, colour, ground, place and style, 1 where a judge sees
        what the prompt names, or where it names nothing; `judge/all_right`, 1 where all are; and
        `judge/style/{style}`, 1 where the style judge calls the image so.
    """
    texts = [condition.text for condition in conditions]
    kinds = {name: "class" if name == "object" else name for name in NAMED}
    seen = {name: look(images, kind)[0].cpu().argmax(-1) for name, kind in kinds.items()}
    right = {}
    for name, seen_B in seen.items():
        asked_B = targets_of(texts, name)
        right[name] = ((seen_B == asked_B) | (asked_B < 0)).float()
    right["all"] = torch.stack(list(right.values())).prod(0)
    return {
        **{f"judge/{name}_right": each for name, each in right.items()},
        **{f"judge/style/{style}": (seen["style"] == i).float() for i, style in enumerate(STYLES)},
    }
