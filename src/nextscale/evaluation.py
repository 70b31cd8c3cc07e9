"""Evaluation: rewards, diversity and judges on images from fixed seeds.

Shapes: B images · N conditions · G images of one condition · E width of an embedding · H W pixels
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from accelerate import PartialState
from torch import Tensor

from nextscale.advantages import beyond_rounding
from nextscale.base.checks import as_number
from nextscale.base.conditions import Condition
from nextscale.base.errors import ConfigError, RewardError
from nextscale.base.parts import Parts
from nextscale.base.processes import fail_together, from_owners, gathered, my_share, share_of
from nextscale.base.seeding import generator_for
from nextscale.base.statistics import deviation, standard_error
from nextscale.drawing import Drawn, draw_batches
from nextscale.grpo import GRPOConfig
from nextscale.models.protocol import NextScaleModel
from nextscale.objective import Microbatch, Objective
from nextscale.pipeline import VARPipeline
from nextscale.policy import SamplingConfig
from nextscale.reference import Reference
from nextscale.rewards.groups import GroupReward
from nextscale.rewards.protocol import require_scores
from nextscale.rewards.reward_set import TOTAL, RewardSet
from nextscale.rollout import cat_by_name
from nextscale.runs.config import RunConfig

MAX_ROWS = 16  # of a grid of samples, where no more are asked for

Judges = Callable[[Tensor, Sequence[Condition]], dict[str, Tensor]]
"""(images (B, 3, H, W), their conditions) to named (B,) values, such as `judge/class_accuracy`; means are
reported."""

Embedder = Callable[[Tensor], Tensor]
"""Images (B, 3, H, W) to L2-normalised embeddings (B, E)."""


KeepImages = Callable[[range, int, Tensor], None]
"""Takes which images these are, of how many, and the images, (B, 3, H, W)."""


@runtime_checkable
class SetMeasure(Protocol):
    """Measures all images of an evaluation together, by features of each: a distance of two sets, say."""

    def features(self, images: Tensor, conditions: Sequence[Condition]) -> dict[str, Tensor]:
        """Name to (B, D) features, which are all that is kept of the images."""
        ...

    def measure(self, features: Mapping[str, Tensor], conditions: Sequence[Condition]) -> dict[str, float]:
        """What is reported of all images.

        Args:
            features: of all images, of all processes.
            conditions: those that were drawn, each once.
        """
        ...


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        metrics: names without the prefix `eval_`.
        samples: (rows, columns, 3, H, W), the first images of the first conditions, for a grid.
        conditions: of the rows.
        first_tokens: (MAX_ROWS, L) of the first image of each of the first rows.
        scores: the reward, and each reward by its name, of all images; NaN for one that was not scored.
        groups: of scores that compare images with one another, the number of the group that each image is in.
        embeddings: (N G, E) of all images, where they were embedded.
        extremes: the best, the middle and the worst images, where they were asked for.
    """

    metrics: dict[str, float]
    samples: Tensor
    conditions: list[Condition]
    first_tokens: Tensor
    scores: dict[str, Tensor]
    groups: dict[str, Tensor]
    embeddings: Tensor | None = None
    extremes: "Extremes | None" = None


@dataclass(frozen=True)
class Extremes:
    """Images by their reward: what a mean hides, such as a reward that is deceived.

    Attributes:
        images: (3, n, 3, H, W): the best, those around the median, and the worst.
        rewards: of each.
        conditions: of each.
    """

    images: Tensor
    rewards: list[list[float]]
    conditions: list[list[Condition]]


@torch.no_grad()
def evaluate(
    pipe: VARPipeline,
    rewards: RewardSet | None,
    sampling: SamplingConfig,
    num_images: int = 512,
    seed: int = 0,
    conditions: Sequence[Condition] | None = None,
    judges: Judges | None = None,
    embed: Embedder | None = None,
    measures: Sequence[SetMeasure] = (),
    batch_size: int = 64,
    num_compared: int | None = None,
    num_columns: int = 8,
    max_pixels: int = 0,
    num_extremes: int = 0,
    base: NextScaleModel | None = None,
    progress: Callable[[int, int], None] | None = None,
    kept: Parts | None = None,
    keep_images: KeepImages | None = None,
) -> Evaluation:
    """Measure a model on at least `num_images` images, the same seeds at every call.

    Where there are several processes, all must call it: each draws and scores its share of the images, and
    all get the measures of the whole.

    Args:
        rewards: None where only what else there is to measure is wanted.
        num_images: rounded up to equally many for each condition.
        conditions: what to draw, classes or prompts, by default all classes; a fixed choice of them where
            `num_images` does not suffice for one image of each, for two where diversity is measured, or for
            `num_compared` where a reward compares images.
        judges: independent classifiers that no training sees.
        embed: measures diversity, the mean distance between two images of one condition.
        measures: of all images together.
        batch_size: images drawn and scored at once, across conditions.
        num_compared: images that a reward of groups compares, by default all of a condition: as many as in
            training, where its scores depend on how many there are.
        num_columns: images of each row of `Evaluation.samples`.
        max_pixels: `Evaluation.samples` may have more rows than MAX_ROWS, of so many pixels in all.
        base: a model to measure the KL to, in nats an image, under the same policy.
        num_extremes: images of each row of `Extremes`.
        progress: called after every batch with the images that this process has drawn, and is to draw.
        kept: where what is found of each batch is kept, and read if it is there: of an evaluation that was
            stopped and is otherwise the same, by as many processes and in batches of the same size.
        keep_images: is given the images of each batch that is drawn.

    Returns:
        metrics `num_images`, and where they apply `reward`, `reward_std`, `reward_sem`,
        `rewards/{name}/mean`, `/std` and `/sem`, `diversity`, what judges say and `measures` give. A standard
        deviation (std) is over all images; the standard error of a mean (sem) counts those that were scored.

    Raises:
        RewardError: a reward that cannot be used, or that scored none of the images; in all processes.
        ConfigError: there are more processes than images.
    """
    asked = pipe.all_conditions() if conditions is None else conditions
    images = _Images.of(
        pipe, asked, rewards, num_images, num_compared, embed is not None, num_columns, max_pixels, seed
    )
    if rewards is not None:
        rewards.check_conditions(images.conditions)
    by = _Instruments(rewards, judges, embed, measures, _to_base(pipe, base, sampling))
    with fail_together():
        here = _draw(pipe, images, by, sampling, batch_size, progress, kept, keep_images)

    # From here on, all processes have the whole.
    shares = [share_of(images.total, r, images.num_processes) for r in range(images.num_processes)]
    owners = [r for r, share in enumerate(shares) if images.in_grid(share)]
    grid = torch.cat(from_owners(here.pop("grid"), owners)).unflatten(0, (-1, images.columns))
    whole = gathered(here)
    tokens_BL = whole["tokens"].long()
    metrics: dict[str, float] = {}
    scores: dict[str, Tensor] = {}
    groups: dict[str, Tensor] = {}
    if rewards is not None:
        with fail_together():  # each process asks a reward of groups
            by_group = rewards.of_groups(_of("score", whole), images.per_condition, num_compared)
        flat = {name: each.flatten() for name, each in by_group.items()}
        try:
            require_scores(flat)
        except RewardError:
            if kept is not None:
                kept.forget()  # or the next try would find the same
            raise
        reward = rewards.total(flat)
        # The total comes first, also where the one reward is called so.
        scores = {TOTAL: reward} | flat | {TOTAL: reward}
        groups = _groups(rewards, images.total, images.per_condition, num_compared)
        metrics |= _reward_metrics(reward, flat, groups)
    metrics |= by.metrics(whole, images)
    return Evaluation(
        metrics,
        grid,
        images.conditions[: images.rows],
        tokens_BL[:: images.per_condition][:MAX_ROWS],
        scores,
        groups,
        whole.get("embedding"),
        _extremes(pipe, images, scores[TOTAL], tokens_BL, num_extremes) if scores and num_extremes else None,
    )


@dataclass(frozen=True)
class _Images:
    """Which images an evaluation draws, and which of them its grid shows.

    Attributes:
        conditions: those that are drawn, each once.
        per_condition: images of each, one after the other.
        seed: of the evaluation.
        columns, rows: of the grid at most.
    """

    conditions: list[Condition]
    per_condition: int
    seed: int
    columns: int
    rows: int

    @staticmethod
    def of(
        pipe: VARPipeline,
        asked: Sequence[Condition],
        rewards: RewardSet | None,
        num_images: int,
        num_compared: int | None,
        is_embedded: bool,
        num_columns: int,
        max_pixels: int,
        seed: int,
    ) -> "_Images":
        """At least `num_images`, as `evaluate` has its arguments.

        Args:
            is_embedded: whether the images of a condition are compared with one another.

        Raises:
            ConfigError: there are more processes than images.
        """
        fewest = 2 if is_embedded else 1  # images of a condition
        if rewards and any(isinstance(each, GroupReward) for each in rewards.rewards.values()):
            fewest = max(min(num_compared or 2, num_images), 2)  # what it says depends on how many
        different = list({each.key: each for each in asked}.values())  # one given twice has the same images
        chosen = _spread(different, max(num_images // fewest, 1), seed)
        per_condition = max(-(-num_images // len(chosen)), fewest)
        columns = min(num_columns, per_condition)
        rows = max(MAX_ROWS, max_pixels // (columns * pipe.tokenizer.config.image_size**2))
        images = _Images(chosen, per_condition, seed, columns, rows)
        if images.total < images.num_processes:
            raise ConfigError(
                f"{images.num_processes} processes cannot share the {images.total} images of an evaluation: "
                "draw at least that many"
            )
        return images

    @property
    def total(self) -> int:
        return len(self.conditions) * self.per_condition

    @property
    def num_processes(self) -> int:
        return PartialState().num_processes

    @property
    def seeds(self) -> list[tuple[int | str, ...]]:
        """Of the images of each condition."""
        return [("evaluate", self.seed, condition.key) for condition in self.conditions]

    def in_grid(self, images: range) -> list[int]:
        """Which of these images are in the grid of samples, counted from the first of them."""
        places = [divmod(i, self.per_condition) for i in images]
        return [i for i, (row, column) in enumerate(places) if row < self.rows and column < self.columns]


@dataclass(frozen=True)
class _Instruments:
    """What images are measured by: `evaluate` has the same, and `to_base` measures the KL."""

    rewards: RewardSet | None
    judges: Judges | None
    embed: Embedder | None
    measures: Sequence[SetMeasure]
    to_base: Objective | None

    def look(self, pipe: VARPipeline, batch: Drawn, shown: list[int]) -> dict[str, Tensor]:
        """All that is kept of a batch, its kind before its name: no images but those that are shown."""
        found = {"grid": batch.images[shown], "tokens": batch.tokens.int()}
        if self.rewards is not None:
            found |= _named("score", self.rewards.scores(batch.images, batch.conditions))
        if self.to_base is not None:
            parts = batch.conditioning, batch.tokens, batch.inputs, batch.log_probs, batch.log_probs
            kl_BL = self.to_base.divergence(pipe.transformer, Microbatch(*parts))[1]
            found["kl"] = kl_BL.sum(1).float()
        if self.embed is not None:
            found["embedding"] = self.embed(batch.images).float()
        if self.judges is not None:
            judged, num = self.judges(batch.images, batch.conditions), len(batch.images)
            found |= _named("judge", {name: _values(name, each, num) for name, each in judged.items()})
        for i, each in enumerate(self.measures):
            features = each.features(batch.images, batch.conditions)
            found |= _named(f"measure {i}", {name: value.float() for name, value in features.items()})
        return {name: value.cpu() for name, value in found.items()}

    def metrics(self, whole: Mapping[str, Tensor], images: _Images) -> dict[str, float]:
        """What is reported of all images, besides the rewards.

        Args:
            whole: from `look`, of all images, of all processes.
        """
        metrics = {"num_images": float(images.total)}
        if "embedding" in whole:
            by_condition = whole["embedding"].split(images.per_condition)
            metrics["diversity"] = sum(map(mean_pairwise_distance, by_condition)) / len(by_condition)
        if "kl" in whole:
            metrics["kl_per_image"] = whole["kl"].mean().item()
        metrics |= {name: each.float().mean().item() for name, each in _of("judge", whole).items()}
        for i, each in enumerate(self.measures):
            measured = each.measure(_of(f"measure {i}", whole), images.conditions)
            metrics |= {name: as_number(f"the measure '{name}'", value) for name, value in measured.items()}
        return metrics


def _to_base(pipe: VARPipeline, base: NextScaleModel | None, sampling: SamplingConfig) -> Objective | None:
    """What measures the KL to a base, if there is one: as training logs it, before filtering."""
    if base is None:
        return None
    unfiltered = sampling.replace(top_k=0, top_p=1.0)
    return Objective(GRPOConfig(), unfiltered, pipe.transformer.schedule, Reference(base))


def _draw(
    pipe: VARPipeline,
    images: _Images,
    by: _Instruments,
    sampling: SamplingConfig,
    batch_size: int,
    progress: Callable[[int, int], None] | None,
    kept: Parts | None,
    keep_images: KeepImages | None,
) -> dict[str, Tensor]:
    """What there is to keep of this process's images, but for those that were kept before."""
    mine = my_share(images.total)
    parts = [] if kept is None else kept.read(range(mine.start, mine.stop, batch_size))
    done = min(mine.start + len(parts) * batch_size, mine.stop)
    if parts and progress is not None:
        progress(done - mine.start, len(mine))
    rest = range(done, mine.stop)
    drawn_in = images.conditions, images.seeds, images.per_condition, sampling, batch_size, rest
    for batch in draw_batches(pipe.transformer, pipe.tokenizer, *drawn_in):
        these = range(done, done + len(batch.images))
        parts.append(by.look(pipe, batch, images.in_grid(these)))
        if keep_images is not None:
            keep_images(these, images.total, batch.images)
        if kept is not None:  # last: what is kept is not drawn again
            kept.keep(these.start, parts[-1])
        done = these.stop
        if progress is not None:
            progress(done - mine.start, len(mine))
    return cat_by_name(parts)


def _extremes(pipe: VARPipeline, images: _Images, reward: Tensor, tokens_BL: Tensor, num: int) -> Extremes:
    """The best, the middle and the worst `num` images by their reward, of those that were scored."""
    order = [i for i in reward.argsort(descending=True).tolist() if not reward[i].isnan()]
    middle = max((len(order) - num) // 2, 0)
    rows = [order[:num], order[middle : middle + num], order[-num:]]
    return Extremes(
        torch.stack([decoded(pipe, tokens_BL[row]) for row in rows]),
        [[reward[i].item() for i in row] for row in rows],
        [[images.conditions[i // images.per_condition] for i in row] for row in rows],
    )


@torch.no_grad()
def decoded(pipe: VARPipeline, tokens_BL: Tensor) -> Tensor:
    """(B, 3, H, W) the images of these tokens, one at a time, on the CPU."""
    return torch.cat([pipe.tokenizer.decode(each[None].to(pipe.device)).cpu() for each in tokens_BL])


@torch.no_grad()
def scale_images(pipe: VARPipeline, tokens_BL: Tensor) -> Tensor:
    """(B, S, 3, H, W) how images come to be: each decoded from its first scales alone, one more each time."""
    tokenizer, tokens_BL = pipe.tokenizer, tokens_BL.to(pipe.device)
    latent_BDhw, images = tokenizer.empty_latent(len(tokens_BL)), []
    for k, part in enumerate(tokenizer.schedule.slices):
        latent_BDhw = tokenizer.add_scale(latent_BDhw, tokens_BL[:, part], k)
        images.append(torch.cat([tokenizer.latent_to_images(each[None]).cpu() for each in latent_BDhw]))
    return torch.stack(images, 1)


def check_evaluated(run: RunConfig, held_out: Sequence[str]) -> None:
    """Check that what is only measured will be.

    Args:
        held_out: names of the rewards that are.

    Raises:
        ConfigError: there are such rewards, and no evaluations.
    """
    if held_out and not run.eval_steps:
        raise ConfigError(
            f"reward '{held_out[0]}' is held out, but with run.eval_steps 0 nothing measures it: set "
            "run.eval_steps, or remove the reward"
        )


def step_metrics(rewards: RewardSet, scores: Mapping[str, Tensor]) -> dict[str, float]:
    """What is logged of the rewards of a training step.

    Args:
        scores: of each reward, (N, G), groups in rows.

    Returns:
        `reward`, `reward_std` (the mean over groups), `frac_reward_zero_std`, and what `score_metrics` gives.
    """
    total_NG = rewards.total(scores)
    return {
        "reward": total_NG.nanmean().item(),
        "reward_std": deviation(total_NG).mean().item(),
        "frac_reward_zero_std": (beyond_rounding(total_NG) == 0).float().mean().item(),
        **score_metrics(scores),
    }


def score_metrics(scores: Mapping[str, Tensor]) -> dict[str, float]:
    """`rewards/{name}/mean` and `/std` of each reward, over the images that it scored.

    Args:
        scores: name to scores of any shape; NaN for an image that was not scored.
    """
    means = {f"rewards/{name}/mean": each.nanmean().item() for name, each in scores.items()}
    return means | {f"rewards/{name}/std": deviation(each.flatten()).item() for name, each in scores.items()}


def mean_pairwise_distance(embeddings_GE: Tensor) -> float:
    """Mean of 1 - cosine over all pairs; 0 if all embeddings are equal."""
    num = len(embeddings_GE)
    cosines = embeddings_GE.float().sum(0).square().sum()  # of all with all; no product for autocast to round
    return ((num * num - cosines) / (num * (num - 1))).item()


def _groups(
    rewards: RewardSet, total: int, per_condition: int, num_compared: int | None
) -> dict[str, Tensor]:
    """`Evaluation.groups`, as `RewardSet.of_groups` cuts the images of a condition."""
    size = min(num_compared or per_condition, per_condition)
    condition, place = torch.arange(total) // per_condition, torch.arange(total) % per_condition
    group = condition * -(-per_condition // size) + place // size
    compares = [name for name, each in rewards.rewards.items() if isinstance(each, GroupReward)]
    if any(name in rewards.weights for name in compares):
        compares.append("reward")
    return dict.fromkeys(compares, group)


def _reward_metrics(
    reward: Tensor, scores: Mapping[str, Tensor], groups: Mapping[str, Tensor]
) -> dict[str, float]:
    """What is reported of the reward and of each reward, of all images."""
    return {
        "reward": reward.nanmean().item(),
        "reward_std": deviation(reward).item(),
        "reward_sem": standard_error(reward, groups.get("reward")).item(),
        **score_metrics(scores),
        **{
            f"rewards/{name}/sem": standard_error(each, groups.get(name)).item()
            for name, each in scores.items()
        },
    }


def _values(name: str, given: Any, num_images: int) -> Tensor:
    """What a judge says of images, (B,).

    Raises:
        ConfigError: it is not one number for each.
    """
    values = torch.as_tensor(given)
    if values.shape != (num_images,):
        raise ConfigError(
            f"a judge's '{name}' has shape {tuple(values.shape)}, expected ({num_images},), one number for "
            "each image"
        )
    return values


def _named(kind: str, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Values with their kind before their names."""
    return {f"{kind}/{name}": each for name, each in values.items()}


def _of(kind: str, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The values of a kind, by their names."""
    return {
        name.removeprefix(f"{kind}/"): each for name, each in values.items() if name.startswith(f"{kind}/")
    }


def _spread(conditions: Sequence[Condition], most: int, seed: int) -> list[Condition]:
    """All conditions, or of more than `most`, a fixed choice of so many."""
    if len(conditions) <= most:
        return list(conditions)
    order = torch.randperm(len(conditions), generator=generator_for("evaluate", seed, "labels"))
    return [conditions[i] for i in sorted(order[:most].tolist())]
