"""Rollouts: the images, in groups, sampled and scored, that one training step learns from.

Shapes: N groups · G images of one group · B = N G images · L tokens of all scales · D codebook width
· H W pixels
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nextscale.base.clock import Clock
from nextscale.base.conditions import Condition
from nextscale.base.errors import ConfigError
from nextscale.base.seeding import generator_for
from nextscale.grpo import GRPOConfig
from nextscale.models.scales import ScaleSchedule
from nextscale.pipeline import Drawn, VARPipeline
from nextscale.policy import SamplingConfig
from nextscale.rewards.reward_set import RewardSet
from nextscale.sampling import Branches


@dataclass(frozen=True)
class Rollout(Drawn):
    """Images with their scores; `seconds` also has the time of `reward`.

    Attributes:
        scores: name of each reward to its unweighted scores, (B,) on the CPU; or to features, (B, E), of a
            `GroupReward`, whose scores come when groups are whole.
    """

    scores: dict[str, Tensor]


def step_conditions(
    conditions: Sequence[Condition], num_groups: int, seed: int, step: int
) -> list[Condition]:
    """The condition of each group of a step: all conditions in shuffled rounds, so that each comes equally
    often.

    Args:
        conditions: the conditions to train on.
        step: the number of the step, from 1.

    Returns:
        `num_groups` conditions, a pure function of (seed, step).
    """
    chosen: list[Condition] = []
    position = (step - 1) * num_groups
    while len(chosen) < num_groups:
        number, offset = divmod(position + len(chosen), len(conditions))
        order = torch.randperm(len(conditions), generator=generator_for("labels", seed, number)).tolist()
        chosen += [conditions[i] for i in order[offset:]]
    return chosen[:num_groups]


def branches_of(grpo: GRPOConfig, schedule: ScaleSchedule) -> Branches | None:
    """How the images of a step share their first scales.

    Raises:
        ConfigError: they would share more scales than leave anything to differ in.
    """
    if grpo.branch_scale is None:
        return None
    if grpo.branch_scale >= schedule.num_scales:
        raise ConfigError(
            f"grpo.branch_scale {grpo.branch_scale} leaves nothing to go on with: this model has "
            f"{schedule.num_scales} scales"
        )
    return Branches(grpo.branch_scale, grpo.branches)


@torch.no_grad()
def collect(
    pipe: VARPipeline,
    conditions: Sequence[Condition],
    group_seeds: Sequence[tuple[int | str, ...]],
    num_generations: int,
    sampling: SamplingConfig,
    rewards: RewardSet,
    batch_size: int | None = None,
    share: range | None = None,
    branches: Branches | None = None,
) -> Rollout:
    """Sample, decode and score a group of images for each condition, or a share of them, batch by batch.

    Args:
        conditions: N of them.
        group_seeds: what each group's images depend on, and on nothing else.
        num_generations: G.
        batch_size: images drawn and scored at once; all by default.
        share: the images to draw, contiguous, of the N G of all groups, which it may cut; all by default.
        branches: how images of a group share their first scales; by default none do.

    Raises:
        RewardError: a reward that cannot be used.
    """
    clock, batches, scored = Clock(pipe.device), [], []
    drawn_in = conditions, group_seeds, num_generations, sampling, batch_size, share, branches
    for batch in pipe.draw_batches(*drawn_in):
        batches.append(batch)
        with clock("reward"):
            scored.append(rewards.scores(batch.images, batch.conditions))
    drawn, scores = Drawn.cat(batches), cat_by_name(scored)
    fields: dict[str, Any] = vars(drawn) | {"seconds": drawn.seconds | clock.seconds}
    return Rollout(**fields, scores=scores)


def cat_by_name(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Values of the same names in several batches, each name's put together."""
    return {name: torch.cat([each[name] for each in parts]) for name in parts[0]}
