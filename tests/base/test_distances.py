"""Distances of sets against closed forms and brute force."""

import numpy as np
import pytest
import torch

from nextscale.base.distances import Gaussian, Manifold, frechet_distance, precision_and_recall


def randn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_diagonal_gaussians_have_a_closed_form() -> None:
    means, deviations = randn(0, 2, 5), randn(1, 2, 5).abs()
    first, second = (
        Gaussian(mean, torch.diag(each**2)) for mean, each in zip(means, deviations, strict=True)
    )
    expected = ((means[0] - means[1]) ** 2).sum() + ((deviations[0] - deviations[1]) ** 2).sum()
    assert frechet_distance(first, second) == pytest.approx(expected.item())
    assert frechet_distance(first, first) == pytest.approx(0.0, abs=1e-9)


def test_of_features_it_is_the_formula_with_a_matrix_root() -> None:
    mix = randn(2, 6, 6)
    first, second = randn(3, 40, 6) @ mix, randn(4, 30, 6) + 0.5
    found = frechet_distance(Gaussian.fit(first), Gaussian.fit(second))
    c1, c2 = (np.cov(each.numpy(), rowvar=False) for each in (first, second))
    values, vectors = np.linalg.eig(c1 @ c2)  # the product itself, which is not symmetric
    root = (vectors * np.sqrt(values.astype(complex))) @ np.linalg.inv(vectors)
    gap = first.mean(0) - second.mean(0)
    expected = float(gap @ gap) + np.trace(c1 + c2 - 2 * root.real)
    assert found == pytest.approx(expected, rel=1e-8)
    assert found == pytest.approx(frechet_distance(Gaussian.fit(second), Gaussian.fit(first)))


def test_it_is_defined_where_a_covariance_is_singular() -> None:
    few = Gaussian.fit(randn(5, 3, 8))  # rank 2 of 8
    assert frechet_distance(few, few) == pytest.approx(0.0, abs=1e-6)
    assert frechet_distance(few, Gaussian.fit(randn(6, 50, 8))) > 0


def test_precision_and_recall_by_brute_force() -> None:
    true, drawn, k = randn(7, 25, 3), 0.7 * randn(8, 18, 3) + 0.4, 3

    def share(points: torch.Tensor, around: torch.Tensor) -> float:
        covered = 0
        for point in points:
            for centre in around:
                radius = sorted((centre - other).norm().item() for other in around)[k]
                if (point - centre).norm().item() <= radius:
                    covered += 1
                    break
        return covered / len(points)

    found = precision_and_recall(Manifold.fit(true, k), Manifold.fit(drawn, k))
    assert found == pytest.approx((share(drawn, true), share(true, drawn)))
    assert 0 < found[1] < found[0]


def test_a_manifold_needs_neighbours() -> None:
    with pytest.raises(ValueError, match="3 features have no 3 neighbours each"):
        Manifold.fit(randn(9, 3, 2), 3)
