"""How near images are to the true pictures of the miniature world, in the features of the judges.

What the judges see in 2,048 true pictures of each style comes with the package: no evaluation has to draw
them, and all compare with the same.

Shapes: B images · N true pictures · D width of a feature
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nextscale.base.conditions import Condition
from nextscale.base.distances import NEIGHBOURS, Gaussian, Manifold, frechet_distance, precision_and_recall
from nextscale.base.errors import CheckpointError
from nextscale.base.tensors import read_state_dict
from nextscale.models.zoo import TOY_ASSETS
from nextscale.toy.judges import KINDS, look

REFERENCES = "references.safetensors"
LIMITS = "references.json"  # how near true pictures and reconstructions come
TRUE_STYLES = ("photo", "painting")  # of the true pictures that images are compared with
NUM_TRUE = 2048  # of each style, equally many of each class


@dataclass(frozen=True)
class TruePictures:
    """What the judges see in true pictures of one style.

    Attributes:
        labels: (N,) class of each.
        features: of each judge, (N, D).
    """

    labels: Tensor
    features: dict[str, Tensor]

    def of(self, labels: Sequence[int]) -> "TruePictures":
        """Those of these classes."""
        chosen = torch.isin(self.labels, torch.tensor(labels))
        return TruePictures(self.labels[chosen], {kind: each[chosen] for kind, each in self.features.items()})


def pack(features_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Features as numbers of four bits, two in a byte, (N, D / 2), and (D,) what one unit of a column is.

    They are at least 0, as they come out of a ReLU. Rounding adds less than a hundredth to their variance,
    and takes a quarter of the place of float16.
    """
    unit_D = features_ND.amax(0).clamp_min(1e-12) / 15
    units_ND = (features_ND / unit_D).round().to(torch.uint8)
    return units_ND[:, ::2] * 16 + units_ND[:, 1::2], unit_D


def unpack(packed_Nd: Tensor, unit_D: Tensor) -> Tensor:
    """(N, D) features from `pack`."""
    return torch.stack([packed_Nd // 16, packed_Nd % 16], -1).flatten(1) * unit_D


def read_references(folder: Path = TOY_ASSETS / "judges") -> dict[str, TruePictures]:
    """The true pictures that come with the judges in a folder, by style.

    Raises:
        CheckpointError: their file is missing, broken, or not one of these.
    """
    path = folder / REFERENCES
    stored = read_state_dict(path)
    try:
        return {
            style: TruePictures(
                stored["labels"].long(),
                {kind: unpack(stored[f"{style}.{kind}"], stored[f"{style}.{kind}.unit"]) for kind in KINDS},
            )
            for style in TRUE_STYLES
        }
    except KeyError as error:
        raise CheckpointError(
            f"'{path}' lacks '{error.args[0]}': write it anew with 'nextscale toy references'"
        ) from None


class Realism:
    """Fréchet distance, precision and recall of images against true pictures of the same classes.

    Args:
        references: true pictures by style; by default those that come with the package.
    """

    def __init__(self, references: Mapping[str, TruePictures] | None = None) -> None:
        self.references = read_references() if references is None else references
        self.fitted: dict[tuple[tuple[int, ...], str, str], tuple[Gaussian, Manifold]] = {}

    def features(self, images: Tensor, conditions: Sequence[Condition]) -> dict[str, Tensor]:
        """What each judge sees in the images, (B, D)."""
        return {kind: look(images, kind)[1] for kind in KINDS}

    def measure(self, features: Mapping[str, Tensor], conditions: Sequence[Condition]) -> dict[str, float]:
        """`judge/{frechet,precision,recall}/{style}/{kind}`: against the true pictures of a style, in the
        features of a judge."""
        found = self.distances(features, [each.label for each in conditions if each.label is not None])
        return {f"judge/{name}": value for name, value in found.items()}

    def distances(self, features: Mapping[str, Tensor], labels: Sequence[int]) -> dict[str, float]:
        """The same by `{frechet,precision,recall}/{style}/{kind}`; the last two where there are more images
        than `NEIGHBOURS`.

        Args:
            features: of each judge, (B, D).
            labels: the classes that the images are of.
        """
        found: dict[str, float] = {}
        for kind in KINDS:
            drawn_BD = features[kind].float().cpu()
            gaussian = Gaussian.fit(drawn_BD)
            manifold = Manifold.fit(drawn_BD) if len(drawn_BD) > NEIGHBOURS else None
            for style in self.references:
                true_gaussian, true_manifold = self._fitted(tuple(sorted(set(labels))), style, kind)
                found[f"frechet/{style}/{kind}"] = frechet_distance(true_gaussian, gaussian)
                if manifold is not None:
                    shares = precision_and_recall(true_manifold, manifold)
                    found[f"precision/{style}/{kind}"], found[f"recall/{style}/{kind}"] = shares
        return found

    def _fitted(self, labels: tuple[int, ...], style: str, kind: str) -> tuple[Gaussian, Manifold]:
        """The true pictures of these classes, fitted once."""
        key = labels, style, kind
        if key not in self.fitted:
            features = self.references[style].of(labels).features[kind]
            self.fitted[key] = Gaussian.fit(features), Manifold.fit(features)
        return self.fitted[key]
