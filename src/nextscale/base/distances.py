"""Distances between two sets of images, in the features of a network: how near the one is to the other, and
how much of it.

Shapes: N M images · D width of a feature
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

NEIGHBOURS = 5  # k of precision and recall
CHUNK = 512  # rows of a matrix of distances at once: 8 MB against 2,048 images


@dataclass(frozen=True)
class Gaussian:
    """A Gaussian fitted to features, in float64: its eigenvalues span more digits than float32 has.

    Attributes:
        mean: (D,).
        covariance: (D, D), unbiased.
    """

    mean: Tensor
    covariance: Tensor

    @classmethod
    def fit(cls, features_ND: Tensor) -> "Gaussian":
        """The Gaussian of these features; of a single one, its covariance is 0."""
        features_ND = features_ND.double()
        mean_D = features_ND.mean(0)
        centred_ND = features_ND - mean_D
        return cls(mean_D, centred_ND.T @ centred_ND / max(len(features_ND) - 1, 1))


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """Squared 2-Wasserstein distance of two Gaussians, |m1 - m2|² + tr(C1 + C2 - 2 (C1 C2)^½).

    Fitted to few images it is too large, the more so the fewer they are: compare only distances of equally
    many images.

    Source: Heusel et al., arXiv 1706.08500, equation 6. C1 C2 is similar to the symmetric C1^½ C2 C1^½, whose
    eigenvalues are real and at least 0; those of C1 C2 itself would come out complex where it is singular.
    """
    eigenvalues_D, vectors_DD = torch.linalg.eigh(first.covariance)
    root_DD = vectors_DD * eigenvalues_D.clamp_min(0).sqrt() @ vectors_DD.T
    squares_D = torch.linalg.eigvalsh(root_DD @ second.covariance @ root_DD)
    cross = squares_D.clamp_min(0).sqrt().sum()  # rounding leaves some below 0
    spread = first.covariance.trace() + second.covariance.trace() - 2 * cross
    return ((first.mean - second.mean).square().sum() + spread).clamp_min(0).item()


@dataclass(frozen=True)
class Manifold:
    """Where a set of images is in feature space: a ball around each, as wide as to its k-th neighbour.

    Attributes:
        features: (N, D) float64.
        radii: (N,).
    """

    features: Tensor
    radii: Tensor

    @classmethod
    def fit(cls, features_ND: Tensor, num_neighbours: int = NEIGHBOURS) -> "Manifold":
        """The manifold of these features.

        Raises:
            ValueError: there are not more features than neighbours.
        """
        if len(features_ND) <= num_neighbours:
            raise ValueError(f"{len(features_ND)} features have no {num_neighbours} neighbours each")
        features_ND = features_ND.double()
        # The nearest of all is the point itself.
        nearest = [each.kthvalue(num_neighbours + 1).values for each in _distances(features_ND, features_ND)]
        return cls(features_ND, torch.cat(nearest))

    def covers(self, features_MD: Tensor) -> Tensor:
        """(M,) whether each feature is within a ball."""
        chunks = _distances(features_MD.double(), self.features)
        return torch.cat([(each_MN <= self.radii).any(1) for each_MN in chunks])


def precision_and_recall(true: Manifold, drawn: Manifold) -> tuple[float, float]:
    """The share of drawn images that could be true ones, and of true images that could have been drawn.

    A true image counts as what could have been drawn where it is in the manifold of the drawn images. Both
    depend on the numbers of images.

    Source: Kynkäänniemi et al., arXiv 1904.06991, equations 1 and 2.
    """
    precision = true.covers(drawn.features).double().mean().item()
    return precision, drawn.covers(true.features).double().mean().item()


def maximum_mean_discrepancy(first_ND: Tensor, second_MD: Tensor, sigma: float = 10.0) -> float:
    """1000 times the squared maximum mean discrepancy under a Gaussian kernel: CMMD, of CLIP embeddings of
    length 1. Unlike the Fréchet distance it assumes no Gaussian, and needs fewer images.

    Args:
        sigma: width of the kernel exp(-|x - y|² / (2 sigma²)).

    Source: Jayasumana et al., arXiv 2401.09603, section 4: the biased estimate, and both constants.
    """

    def mean_kernel(left_ND: Tensor, right_MD: Tensor) -> float:
        kernels = (torch.exp(each.square() / (-2 * sigma**2)).sum() for each in _distances(left_ND, right_MD))
        return sum(each.item() for each in kernels) / (len(left_ND) * len(right_MD))

    first_ND, second_MD = first_ND.double(), second_MD.double()
    within = mean_kernel(first_ND, first_ND) + mean_kernel(second_MD, second_MD)
    return 1000 * max(within - 2 * mean_kernel(first_ND, second_MD), 0.0)


def _distances(first_ND: Tensor, second_MD: Tensor) -> Iterator[Tensor]:
    """Euclidean distances in chunks of rows, together (N, M)."""
    for part in first_ND.split(CHUNK):
        yield torch.cdist(part, second_MD)
