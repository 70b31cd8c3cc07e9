"""Evaluation: rewards, diversity and judges on images from fixed seeds.

Shapes: B images · N conditions · G images of one condition · E width of an embedding · H W pixels
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nextscale.base.conditions import Condition
from nextscale.base.seeding import generator_for
from nextscale.base.statistics import deviation, standard_error
from nextscale.pipeline import VARPipeline
from nextscale.policy import SamplingConfig
from nextscale.rewards.protocol import require_scores
from nextscale.rewards.reward_set import RewardSet
from nextscale.rollout import collect

MAX_ROWS = 16  # of a grid of samples

Judges = Callable[[Tensor, Sequence[Condition]], dict[str, float]]
"""(images (B, 3, H, W), their conditions) to named shares of images, such as `judge/class_accuracy`."""

Embedder = Callable[[Tensor], Tensor]
"""Images (B, 3, H, W) to L2-normalised embeddings (B, E)."""


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        metrics: names without the prefix `eval_`.
        samples: (N, num_columns, 3, H, W), the first images of each condition, for a grid.
        conditions: of the rows.
    """

    metrics: dict[str, float]
    samples: Tensor
    conditions: list[Condition]


@torch.no_grad()
def evaluate(
    pipe: VARPipeline,
    rewards: RewardSet,
    sampling: SamplingConfig,
    num_images: int = 512,
    seed: int = 0,
    conditions: Sequence[Condition] | None = None,
    judges: Judges | None = None,
    embed: Embedder | None = None,
    batch_size: int = 64,
    num_columns: int = 8,
) -> Evaluation:
    """Measure a model on at least `num_images` images, the same seeds at every call.

    Args:
        conditions: what to draw, by default all classes; of more conditions than images, a fixed choice.
        judges: independent classifiers that no training sees.
        embed: for the diversity.

    Returns:
        metrics `reward`, `reward_std`, `reward_sem`, `rewards/{name}/mean`, `/std`, `/sem`, `num_images`, and
        where they apply `diversity` and what the judges say. A standard deviation (std) is over all images;
        the standard error of a mean (sem) counts those that were scored.

    Raises:
        RewardError: a reward that cannot be used, or that scored none of the images.
    """
    chosen = _spread(pipe.all_conditions() if conditions is None else conditions, num_images, seed)
    per_condition = -(-num_images // len(chosen))
    scores: dict[str, list[Tensor]] = {}
    distances, rows, images_seen, conditions_seen = [], [], [], []
    for condition in chosen:
        seeds = [("evaluate", seed, condition.key)]
        rollout = collect(pipe, [condition], seeds, per_condition, sampling, rewards, batch_size)
        for name, each in rollout.scores.items():
            scores.setdefault(name, []).append(each.flatten())
        if embed is not None and per_condition > 1:
            distances.append(mean_pairwise_distance(embed(rollout.images)))
        rows.append(rollout.images[:num_columns].cpu())
        if judges is not None:
            images_seen.append(rollout.images)
            conditions_seen += rollout.conditions
    flat = {name: torch.cat(each) for name, each in scores.items()}
    require_scores(flat)
    total = rewards.total(flat)
    metrics = {
        "reward": total.nanmean().item(),
        "reward_std": deviation(total).item(),
        "reward_sem": standard_error(total).item(),
        **score_metrics(flat),
        **{f"rewards/{name}/sem": standard_error(each).item() for name, each in flat.items()},
        "num_images": float(per_condition * len(chosen)),
    }
    if distances:
        metrics["diversity"] = sum(distances) / len(distances)
    if judges is not None:
        metrics |= judges(torch.cat(images_seen), conditions_seen)
    return Evaluation(metrics, torch.stack(rows[:MAX_ROWS]), chosen[:MAX_ROWS])


def score_metrics(scores: Mapping[str, Tensor]) -> dict[str, float]:
    """`rewards/{name}/mean` and `/std` of each reward, over the images that it scored.

    Args:
        scores: name to scores of any shape; NaN for an image that was not scored.
    """
    means = {f"rewards/{name}/mean": each.nanmean().item() for name, each in scores.items()}
    return means | {f"rewards/{name}/std": deviation(each.flatten()).item() for name, each in scores.items()}


def mean_pairwise_distance(embeddings_GE: Tensor) -> float:
    """Mean of 1 - cosine over all pairs; 0 if all embeddings are equal."""
    cosine_GG = embeddings_GE.float() @ embeddings_GE.float().T
    num = len(embeddings_GE)
    return ((num * num - cosine_GG.sum()) / (num * (num - 1))).item()


def _spread(conditions: Sequence[Condition], num_images: int, seed: int) -> list[Condition]:
    """All conditions, or where they are more than the images, as many as those in a fixed choice."""
    if len(conditions) <= num_images:
        return list(conditions)
    order = torch.randperm(len(conditions), generator=generator_for("evaluate", seed, "labels"))
    return [conditions[i] for i in sorted(order[:num_images].tolist())]
