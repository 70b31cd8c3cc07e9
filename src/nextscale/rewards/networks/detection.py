"""Object detectors of transformers: the objects in images, with their boxes, and masks where the network has
them.

Shapes: B images · H W pixels · Q queries of the network · K classes
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from nextscale.base.errors import CheckpointError
from nextscale.models.pretrained import follow, load_frozen, loading

MASKED = ("mask2former", "maskformer")
"""Networks that draw a mask of each object, and no box."""
LEAST_SCORE = 0.1
"""Objects below that are left out at once."""


@dataclass(frozen=True)
class Found:
    """An object in an image.

    Attributes:
        name: of its class.
        score: the network's confidence, in [0, 1].
        box: left, top, right and bottom, in pixels.
        mask: (H, W) bool, where the network gives one.
    """

    name: str
    score: float
    box: tuple[float, float, float, float]
    mask: Tensor | None = None


def network_class(config: Any) -> Any:
    """The class of transformers for a detector with this configuration."""
    has_masks = config.model_type in MASKED
    return (
        transformers.AutoModelForUniversalSegmentation
        if has_masks
        else transformers.AutoModelForObjectDetection
    )


class Detector:
    """Finds objects of the classes that it was trained on.

    Args:
        name: folder or hub repository of a detector (DETR and its kin, RT-DETR, YOLOS, Mask2Former).

    Raises:
        CheckpointError: it cannot be loaded.
    """

    def __init__(self, name: str | Path) -> None:
        with loading("detector", name):
            config = transformers.AutoConfig.from_pretrained(str(name))
        self.has_masks = config.model_type in MASKED
        self.model = load_frozen(network_class(config), "detector", name)
        self.size, self.mean, self.std = read_preparation(name)
        names = self.model.config.id2label
        self.names = [str(names[i]) for i in range(len(names))]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> list[list[Found]]:
        """The objects in each of (B, 3, H, W) images in [0, 1], the surest first."""
        follow(self.model, images)
        output = self.model(pixel_values=self._prepared(images))
        found = self._of_masks(output, images) if self.has_masks else self._of_boxes(output, images)
        return [sorted(each, key=lambda one: -one.score) for each in found]

    def _prepared(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        shape = input_shape(self.size, height, width)
        images = images.float()
        if shape != (height, width):
            images = F.interpolate(images, shape, mode="bilinear", antialias=True).clamp(0, 1)
        mean, std = (torch.tensor(each, device=images.device).view(3, 1, 1) for each in (self.mean, self.std))
        return (images - mean) / std

    def _of_boxes(self, output: Any, images: Tensor) -> list[list[Found]]:
        height, width = images.shape[-2:]
        scores_BQK = _class_scores(output.logits, len(self.names))
        x_BQ, y_BQ, w_BQ, h_BQ = output.pred_boxes.float().unbind(-1)
        boxes = [x_BQ - w_BQ / 2, y_BQ - h_BQ / 2, x_BQ + w_BQ / 2, y_BQ + h_BQ / 2]
        sides = torch.tensor([width, height, width, height], device=images.device)
        boxes_BQ4 = torch.stack(boxes, -1).clamp(0, 1) * sides
        return [
            [
                Found(self.names[k], score, tuple(box))
                for box, row in zip(boxes_Q4.tolist(), scores_QK.tolist(), strict=True)
                for k, score in enumerate(row)
                if score >= LEAST_SCORE
            ]
            for boxes_Q4, scores_QK in zip(boxes_BQ4, scores_BQK, strict=True)
        ]

    def _of_masks(self, output: Any, images: Tensor) -> list[list[Found]]:
        scores_BQK = _class_scores(output.class_queries_logits, len(self.names))
        logits_BQhw = output.masks_queries_logits.float()
        found: list[list[Found]] = []
        for scores_QK, logits_Qhw in zip(scores_BQK, logits_BQhw, strict=True):
            soft_QHW = F.interpolate(logits_Qhw[None], images.shape[-2:], mode="bilinear")[0].sigmoid()
            of_image = []
            for row, soft_HW in zip(scores_QK.tolist(), soft_QHW, strict=True):
                mask_HW = soft_HW > 0.5
                if not mask_HW.any():
                    continue
                # As instance segmentation is scored: how sure the class is, times how sure the mask is.
                sureness = float(soft_HW[mask_HW].mean())
                rows, columns = mask_HW.any(1).nonzero().flatten(), mask_HW.any(0).nonzero().flatten()
                edges = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
                box: Any = tuple(float(each) for each in edges)
                of_image += [
                    Found(self.names[k], score * sureness, box, mask_HW)
                    for k, score in enumerate(row)
                    if score * sureness >= LEAST_SCORE
                ]
            found.append(of_image)
        return found


@dataclass(frozen=True)
class _Edges:
    """A size by its shortest side, unless the longest one would be too long."""

    shortest: int
    longest: int

    def of(self, height: int, width: int) -> tuple[int, int]:
        factor = min(self.shortest / min(height, width), self.longest / max(height, width))
        return round(height * factor), round(width * factor)


def _class_scores(logits_BQK: Tensor, num_classes: int) -> Tensor:
    """(B, Q, K): softmax where there is a class for "nothing", which is the last; else sigmoid."""
    logits_BQK = logits_BQK.float()
    if logits_BQK.shape[-1] == num_classes + 1:
        return logits_BQK.softmax(-1)[..., :-1]
    return logits_BQK.sigmoid()


def input_shape(size: Any, height: int, width: int) -> tuple[int, int]:
    """The height and width that an image of this height and width is shown in.

    Args:
        size: the first of what `read_preparation` gives.
    """
    if isinstance(size, _Edges):
        return size.of(height, width)
    return (height, width) if size[0] is None else size


def read_preparation(name: str | Path) -> tuple[Any, Sequence[float], Sequence[float]]:
    """Size, mean and standard deviation, as its preprocessor_config.json says."""
    from transformers import ImageProcessingMixin

    with loading("image processor", name):
        settings, _ = ImageProcessingMixin.get_image_processor_dict(str(name))
    normalises = settings.get("do_normalize", True)
    mean = settings.get("image_mean", [0.485, 0.456, 0.406]) if normalises else [0.0] * 3
    std = settings.get("image_std", [0.229, 0.224, 0.225]) if normalises else [1.0] * 3
    size = settings.get("size", {"shortest_edge": 800, "longest_edge": 1333})
    if not settings.get("do_resize", True):
        return (None, None), mean, std
    if isinstance(size, int):  # files of older releases
        return _Edges(size, settings.get("max_size") or 1333), mean, std
    if {"height", "width"} <= size.keys():
        return (size["height"], size["width"]), mean, std
    if "shortest_edge" in size:
        return _Edges(size["shortest_edge"], size.get("longest_edge") or 10**6), mean, std
    raise CheckpointError(f"detector '{name}' wants images of the size {size}, which is not supported")
