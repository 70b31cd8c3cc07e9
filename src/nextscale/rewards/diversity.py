"""Diversity as an aim: how much an image differs from the others of its group.

Shapes: B images · N groups · G images of one group · E width of an embedding
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import pydantic
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from nextscale.base.conditions import Condition
from nextscale.base.errors import ConfigError
from nextscale.rewards.clip_score import DEFAULT_CLIP
from nextscale.rewards.groups import GroupReward
from nextscale.rewards.networks.clip import load_clip
from nextscale.rewards.protocol import RewardConfig

PIXELS = 8  # of a side, to which images are shrunk where pixels are compared: layout and colours remain

Comparison = Literal["distance", "coverage"]


class Diversity(GroupReward):
    """Mean distance of an image to the others of its group, or what the group would cover less without it.

    Evaluations measure diversity as the mean distance in a CLIP's embeddings: with another CLIP here, or with
    pixels, that measure stays independent of training.

    Args:
        features: "clip" for a CLIP's embeddings, whose distance is 1 - cosine, in [0, 2]; "pixels" for the
            image shrunk to 8x8, whose distance is the root mean square difference, in [0, 1].
        clip: "toy", a folder, or a hub repository.
        compare_by: "distance", or "coverage": the logarithm of how much smaller the volume that the group's
            images span is without this one, in which a near copy of any other image adds nothing. Only in
            clip's features.

    Raises:
        CheckpointError: the CLIP cannot be loaded.
        ConfigError: a coverage of pixels.

    Source: leave-one-out contributions to a group's diversity, as arXiv 2603.23086 gives them to a
    distribution's distance. The volume is a determinantal point process's (arXiv 1207.6083, section 2).
    """

    def __init__(
        self,
        features: Literal["clip", "pixels"] = "clip",
        clip: str | Path = DEFAULT_CLIP,
        compare_by: Comparison = "distance",
    ) -> None:
        if error := _misfit(features, compare_by):
            raise ConfigError(error)
        self.compare_by, self.is_clip = compare_by, features == "clip"
        self.embed: Callable[[Tensor], Tensor] = (
            load_clip(clip).embed_images if self.is_clip else small_pixels
        )

    def features(self, images: Tensor, conditions: Sequence[Condition]) -> Tensor:
        return self.embed(images).float()

    def scores_of_groups(self, features_NGE: Tensor) -> Tensor:
        if self.compare_by == "coverage":
            return leave_one_out_coverage(features_NGE)
        if self.is_clip:
            return mean_to_others(1 - features_NGE @ features_NGE.mT)
        width = features_NGE.shape[-1]
        return mean_to_others(torch.cdist(features_NGE, features_NGE) / width**0.5)


def _misfit(features: str, compare_by: str) -> str | None:
    if compare_by == "coverage" and features != "clip":
        return f"compare_by coverage is for features of length 1, not for {features}: use clip, or distance"
    return None


def small_pixels(images: Tensor) -> Tensor:
    """(B, 3 * 8 * 8) the images, shrunk."""
    small = F.interpolate(images, (PIXELS, PIXELS), mode="area")
    return rearrange(small, "B c h w -> B (c h w)")


def mean_to_others(pairs_NGG: Tensor) -> Tensor:
    """(N, G) mean of what each image has with the others of its group, such as a distance."""
    num = pairs_NGG.shape[-1]
    to_itself = pairs_NGG.diagonal(dim1=1, dim2=2)
    return (pairs_NGG.sum(2) - to_itself) / (num - 1)


def leave_one_out_coverage(embeddings_NGE: Tensor, softness: float = 0.01) -> Tensor:
    """(N, G) log det(K) - log det(K without the image), K the cosines of a group with `softness` added to the
    diagonal: the part of an embedding that the others do not span, as the logarithm of its square.

    It is -log of the image's entry in the diagonal of K^-1.

    Args:
        embeddings_NGE: L2-normalised.
    """
    num = embeddings_NGE.shape[1]
    embeddings_NGE = embeddings_NGE.double()
    cosines_NGG = embeddings_NGE @ embeddings_NGE.mT + softness * torch.eye(num).to(embeddings_NGE)
    return -torch.linalg.inv(cosines_NGG).diagonal(dim1=1, dim2=2).log().float()


class DiversityConfig(RewardConfig):
    """Diversity: how much an image differs from the others of its group."""

    main_option = "features"
    reward = Diversity

    kind: Literal["diversity"] = "diversity"
    features: Literal["clip", "pixels"] = "clip"
    """What is compared: "clip" for a CLIP's embeddings, "pixels" for the image shrunk to 8x8."""
    clip: str = DEFAULT_CLIP
    """CLIP: "toy", a folder or a hub repository; an aesthetic head comes with its own by default."""
    compare_by: Comparison = "distance"
    """Mean distance to the others, or what the group's coverage loses without the image."""

    @pydantic.model_validator(mode="after")
    def _fits(self) -> "DiversityConfig":
        if error := _misfit(self.features, self.compare_by):
            raise ValueError(error)
        if self.features != "clip" and self.clip != DEFAULT_CLIP:
            raise ValueError(f"clip '{self.clip}' has no effect on {self.features}: remove it")
        return self

    @property
    def backbone(self) -> str | None:
        return self.clip if self.features == "clip" else None
