"""What is measured: rewards, diversity and judges on images of fixed seeds.

Shapes: N classes · G images of one class · E width of an embedding
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nextscale.base.seeding import generator_for
from nextscale.pipeline import VARPipeline
from nextscale.policy import SamplingConfig
from nextscale.rewards.protocol import require_scores
from nextscale.rewards.reward_set import RewardSet
from nextscale.rollout import collect

Judges = Callable[[Tensor, Tensor], dict[str, float]]
"""(images (B, 3, H, W), labels (B,)) to named shares of images, such as `judge/class_accuracy`."""

Embedder = Callable[[Tensor], Tensor]
"""Images (B, 3, H, W) to L2-normalised embeddings (B, E)."""


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        metrics: names without the prefix `eval_`.
        samples: (N, num_columns, 3, H, W), the first images of each class, for a grid.
        labels: the classes of the rows.
    """

    metrics: dict[str, float]
    samples: Tensor
    labels: list[int]


@torch.no_grad()
def evaluate(
    pipe: VARPipeline,
    rewards: RewardSet,
    sampling: SamplingConfig,
    num_images: int = 512,
    seed: int = 0,
    labels: Sequence[int] | None = None,
    judges: Judges | None = None,
    embed: Embedder | None = None,
    batch_size: int = 64,
    num_columns: int = 8,
) -> Evaluation:
    """Measure a model on at least `num_images` images, the same seeds at every call.

    Args:
        labels: classes to draw, by default all; with more classes than images, a fixed choice of them.
        judges: independent classifiers that no training sees.
        embed: for the diversity.

    Returns:
        metrics `reward`, `reward_std`, `reward_sem`, `rewards/{name}/mean`, `/std`, `/sem`, `num_images`, and
        where they apply `diversity` and what the judges say. A deviation (std) is over all images; the
        standard error of a mean (sem) counts those that were scored.

    Raises:
        RewardError: a reward that cannot be used, or that scored none of the images.
    """
    labels = _spread(list(range(pipe.num_classes)) if labels is None else list(labels), num_images, seed)
    per_class = -(-num_images // len(labels))
    scores: dict[str, list[Tensor]] = {}
    distances, rows, images_seen, labels_seen = [], [], [], []
    for label in labels:
        rollout = collect(
            pipe, [label], [("evaluate", seed, label)], per_class, sampling, rewards, batch_size
        )
        for name, each in rollout.components.items():
            scores.setdefault(name, []).append(each.flatten())
        if embed is not None and per_class > 1:
            distances.append(mean_pairwise_distance(embed(rollout.images)))
        rows.append(rollout.images[:num_columns].cpu())
        if judges is not None:
            images_seen.append(rollout.images)
            labels_seen.append(rollout.labels)
    flat = {name: torch.cat(each) for name, each in scores.items()}
    require_scores(flat)
    metrics = _score_metrics(rewards, flat) | {"num_images": float(per_class * len(labels))}
    if distances:
        metrics["diversity"] = sum(distances) / len(distances)
    if judges is not None:
        metrics |= judges(torch.cat(images_seen), torch.cat(labels_seen))
    return Evaluation(metrics, torch.stack(rows[:16]), labels[:16])


def mean_pairwise_distance(embeddings_GE: Tensor) -> float:
    """Mean over the pairs of 1 - cosine; 0 when all are alike."""
    cosine_GG = embeddings_GE.float() @ embeddings_GE.float().T
    num = len(embeddings_GE)
    return ((num * num - cosine_GG.sum()) / (num * (num - 1))).item()


def _score_metrics(rewards: RewardSet, scores: dict[str, Tensor]) -> dict[str, float]:
    total = rewards.total(scores)
    metrics = {
        "reward": total.nanmean().item(),
        "reward_std": deviation(total),
        "reward_sem": _standard_error(total),
    }
    for name, each in scores.items():
        metrics[f"rewards/{name}/mean"] = each.nanmean().item()
        metrics[f"rewards/{name}/std"] = deviation(each)
        metrics[f"rewards/{name}/sem"] = _standard_error(each)
    return metrics


def deviation(values: Tensor) -> float:
    """Sample standard deviation of the values that are not NaN; 0 of fewer than two."""
    scored = values[~values.isnan()]
    return scored.std().item() if len(scored) > 1 else 0.0


def _standard_error(values: Tensor) -> float:
    return deviation(values) / max(1, (~values.isnan()).sum().item()) ** 0.5


def _spread(labels: list[int], num_images: int, seed: int) -> list[int]:
    if len(labels) <= num_images:
        return labels
    order = torch.randperm(len(labels), generator=generator_for("evaluate", seed, "labels"))
    return sorted(labels[i] for i in order[:num_images].tolist())
