"""Pictures as the aim: how near an image is to some pictures, and how far from the others of its group.

Shapes: B images · N groups · G images of one group · P pictures · E width of an embedding
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from nextscale.base.conditions import Condition
from nextscale.base.errors import ConfigError
from nextscale.base.images import image_files
from nextscale.rewards.clip_score import DEFAULT_CLIP
from nextscale.rewards.diversity import mean_to_others
from nextscale.rewards.groups import GroupReward
from nextscale.rewards.networks.clip import load_clip
from nextscale.rewards.protocol import RewardConfig

BANDWIDTH = 0.4


class Pictures(GroupReward):
    """An image's part in how near its group comes to a set of pictures, in (-1, 1):

        mean of k(x, y) over the pictures y - mean of k(x, x') over the others of its group,

    k a Gaussian of the distance of CLIP embeddings. Its slope in an image is that of -G / 2 times the group's
    squared maximum mean discrepancy (MMD) from the pictures. So images are drawn to the pictures and kept
    apart, and a group is as near as it can be when it is spread as they are.

    Args:
        folder: of the pictures, PNG, JPEG or WebP, all of them for every condition; or of sub-folders, each
            with those of the condition that it is named for, such as "star" or "golden retriever".
        clip: "toy", a folder, or a hub repository.
        bandwidth: of the Gaussian; embeddings are of length 1.

    Raises:
        ConfigError: there is no picture, or one cannot be read, or some are in sub-folders and some are not.
        CheckpointError: the CLIP cannot be loaded.

    Source: Gretton et al., "A kernel two-sample test", 2012, equation 3; with CLIP embeddings it is CMMD
    (arXiv 2401.09603), whose estimate keeps the terms of an image with itself.
    """

    def __init__(
        self, folder: str | Path, clip: str | Path = DEFAULT_CLIP, bandwidth: float = BANDWIDTH
    ) -> None:
        self.folder, self.bandwidth = Path(folder), bandwidth
        self.files: dict[str, list[Path]] = {}
        for file in image_files(self.folder):
            below = file.relative_to(self.folder).parts[:-1]
            self.files.setdefault(below[0].casefold() if below else "", []).append(file)
        if not self.files:
            raise ConfigError(f"'{folder}' has no pictures (PNG, JPEG or WebP): give a folder that has some")
        if "" in self.files and len(self.files) > 1:
            raise ConfigError(
                f"'{folder}' has pictures both in sub-folders and beside them: keep them in one or the other"
            )
        self.clip = load_clip(clip)
        self._embeddings: dict[str, Tensor] = {}

    def features(self, images: Tensor, conditions: Sequence[Condition]) -> Tensor:
        """(B, E + 1): embeddings, and how near each is to the pictures."""
        embeddings_BE = self.clip.embed_images(images).float()
        near = []
        for embedding_E, condition in zip(embeddings_BE, conditions, strict=True):
            pictures_PE = self.pictures_of(condition).to(images.device)
            near.append(self._kernel(embedding_E[None], pictures_PE).mean())
        return torch.cat([embeddings_BE, torch.stack(near)[:, None]], 1)

    def scores_of_groups(self, features_NGE: Tensor) -> Tensor:
        embeddings_NGE, near_NG = features_NGE[..., :-1], features_NGE[..., -1]
        return near_NG - mean_to_others(self._kernel(embeddings_NGE, embeddings_NGE))

    def check_conditions(self, conditions: Sequence[Condition]) -> None:
        for each in conditions:
            self.name_of(each)

    def name_of(self, condition: Condition) -> str:
        """Of the sub-folder with the pictures for a condition; empty if all are for every one.

        Raises:
            ConfigError: there is none.
        """
        name = "" if "" in self.files else condition.text.casefold()
        if name not in self.files:
            raise ConfigError(
                f"'{self.folder}' has sub-folders, but none with pictures for '{condition.text}': add one, "
                "or keep all pictures in the folder itself"
            )
        return name

    def pictures_of(self, condition: Condition) -> Tensor:
        """(P, E) embeddings of the pictures for a condition.

        Raises:
            ConfigError: there are none, or one cannot be read.
        """
        name = self.name_of(condition)
        if name not in self._embeddings:
            self._embeddings[name] = self.clip.embed_files(self.files[name], self.clip.model.device)
        return self._embeddings[name]

    def _kernel(self, first: Tensor, second: Tensor) -> Tensor:
        """(..., B, P) of embeddings of length 1, whose squared distance is 2 - 2 cosine."""
        with torch.autocast(first.device.type, enabled=False):
            return torch.exp((first @ second.mT - 1) / self.bandwidth**2)


class PicturesConfig(RewardConfig):
    """Pictures as the aim: near to those in a folder, and apart from one another."""

    main_option = "folder"
    reward = Pictures

    kind: Literal["pictures"] = "pictures"
    folder: str
    """Folder of pictures, or of sub-folders, each with those of the class or prompt that it is named for;
    looked for beside the recipe, then from the working directory."""
    clip: str = DEFAULT_CLIP
    """CLIP: "toy", a folder or a hub repository; an aesthetic head comes with its own by default."""
    bandwidth: float = Field(default=BANDWIDTH, ge=0.01)
    """Of the Gaussian by which embeddings, of length 1, are compared."""

    @property
    def backbone(self) -> str | None:
        return self.clip
