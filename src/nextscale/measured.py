"""Several models measured on the same seeds: their means with intervals, and paired differences.

Shapes: N images
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from nextscale.base.distances import Gaussian, frechet_distance, maximum_mean_discrepancy
from nextscale.base.numbers import number
from nextscale.base.statistics import standard_error
from nextscale.fid import OFFICIAL_IMAGES

Z95 = 1.96
"""Standard errors of half a 95 % interval of a mean of many."""
INTERVALS = "; ± is half of the 95 % interval of the mean over images."
FEW = 2048
"""Images under which a Fréchet distance is labelled as one of few."""
UNCERTAIN = ("reward_std", "reward_sem", "num_images")
OFFICIAL = {"fid": "FID", "inception_score": "Inception Score"}
"""Metrics that are published of 50,000 images, and what they are called."""


@dataclass(frozen=True)
class Measured:
    """A model and what was measured of it.

    Attributes:
        name: as a table calls it.
        settings: how it was drawn from.
        metrics: from an evaluation.
        scores: the reward and each reward of all images, (N,); NaN for one that was not scored.
        groups: of scores that compare images with one another, the number of the group that each image is in.
    """

    name: str
    settings: dict[str, Any]
    metrics: dict[str, float]
    scores: Mapping[str, Tensor]
    groups: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Mean:
    """A mean with half of its 95 % interval, over the images of an evaluation; NaN where one image, or one
    group, says nothing of others."""

    value: float
    half: float

    def __str__(self) -> str:
        return number(self.value) if math.isnan(self.half) else f"{number(self.value)} ± {self.half:.2g}"


def mean_of(scores_N: Tensor, group_N: Tensor | None = None) -> Mean:
    """The mean of the images that were scored.

    Args:
        group_N: the group of each image, where its score depends on the others of that.
    """
    is_scored_N = ~scores_N.isnan()
    apart = is_scored_N.sum() if group_N is None else len(group_N[is_scored_N].unique())
    half = Z95 * standard_error(scores_N, group_N).item() if apart > 1 else math.nan
    return Mean(scores_N.nanmean().item(), half)


def paired_difference(first_N: Tensor, second_N: Tensor, group_N: Tensor | None = None) -> Mean:
    """How much more the second model's images score than the first's of the same seeds, image by image. What
    both share of an image's luck cancels, so that the interval is smaller than that of either mean.

    Args:
        group_N: as `mean_of` takes it.
    """
    return mean_of(second_N - first_N, group_N)


def knee(gains: Sequence[float], kept: Sequence[float]) -> int:
    """The place on a curve where what is gained stops being worth what it costs: farthest above the line from
    its first point to its last.

    Args:
        gains: of a reward, in order of strength.
        kept: of what should not fall.

    Source: Satopää et al. 2011, "Finding a 'Kneedle' in a Haystack": the largest difference of the normalised
    curves.
    """

    def risen(values: Sequence[float]) -> list[float]:
        """From 0 to 1; where the last is no more than the first, 0 throughout."""
        span = values[-1] - values[0]
        return [(each - values[0]) / span if span > 0 else 0.0 for each in values]

    gain, loss = risen(gains), risen([-each for each in kept])
    return max(range(len(gain)), key=lambda i: gain[i] - loss[i])


def table_rows(models: Sequence[Measured]) -> list[list[str]]:
    """What a table shows of each measure: a row of values, and for rewards, with several models, one of
    paired differences to the first."""
    rows: list[list[str]] = []
    first = models[0]
    for name in first.scores:
        rows.append([name, *(str(mean_of(each.scores[name], each.groups.get(name))) for each in models)])
        if len(models) > 1:
            others = (_difference(first, each, name) for each in models[1:])
            rows.append([f"  less {first.name}", "", *(_signed(each) for each in others)])
    names = dict.fromkeys(name for each in models for name in each.metrics)
    plain = [n for n in names if n not in UNCERTAIN and n != "reward" and not n.startswith("rewards/")]
    rows += [[]] if rows else []
    images = int(first.metrics["num_images"])
    few = f" of {images:,} images" if images < OFFICIAL_IMAGES else ""
    for name in plain:
        values = (each.metrics.get(name) for each in models)
        label = f"{OFFICIAL[name]}{few}" if name in OFFICIAL else name
        rows.append([label, *("" if each is None else number(each) for each in values)])
    return rows


def notes(models: Sequence[Measured]) -> list[str]:
    """What a reader of the table has to know."""
    images = int(models[0].metrics["num_images"])
    told = [f"{images:,} images of fixed seeds" + ("." if not models[0].scores else INTERVALS)]
    if len(models) > 1 and models[0].scores:
        told.append("Differences are paired: image by image, of the same seeds.")
    measures_sets = any("frechet" in name or "cmmd" in name for name in models[0].metrics)
    if measures_sets and images < FEW:
        told.append(
            f"Distances of {images:,} images, fewer than {FEW:,}, are too large: compare them with those of "
            "equally many alone."
        )
    if "fid" in models[0].metrics and images < OFFICIAL_IMAGES:
        told.append(
            f"FID and Inception Score of {images:,} images cannot be compared with published ones, which are "
            f"of {OFFICIAL_IMAGES:,}."
        )
    return told


def differences(models: Sequence[Measured]) -> dict[str, dict[str, dict[str, float]]]:
    """The paired differences to the first model, by model and reward, for JSON."""
    first = models[0]
    return {
        other.name: {name: vars(_difference(first, other, name)) for name in first.scores}
        for other in models[1:]
    }


def _difference(first: Measured, second: Measured, name: str) -> Mean:
    return paired_difference(first.scores[name], second.scores[name], first.groups.get(name))


def _signed(mean: Mean) -> str:
    sign = "+" if mean.value > 0 else ""
    return f"{sign}{mean}"


def clip_distances(first_NE: Tensor, second_ME: Tensor) -> dict[str, float]:
    """Fréchet distance and CMMD of two sets of CLIP embeddings of length 1."""
    first_NE, second_ME = first_NE.float(), second_ME.float()
    return {
        "clip/frechet": frechet_distance(Gaussian.fit(first_NE), Gaussian.fit(second_ME)),
        "clip/cmmd": maximum_mean_discrepancy(first_NE, second_ME),
    }
