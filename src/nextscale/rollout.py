"""Rollouts: the images, in groups, sampled and scored, that one training step learns from.

Shapes: N groups · G images of one group · B = N G images · L tokens of all scales · D codebook width
· H W pixels
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nextscale.base.clock import Clock
from nextscale.base.conditions import Condition
from nextscale.base.errors import ConfigError
from nextscale.base.processes import my_share
from nextscale.base.seeding import generator_for
from nextscale.drawing import Drawn, draw_batches
from nextscale.grpo import GRPOConfig
from nextscale.models.scales import ScaleSchedule
from nextscale.pipeline import VARPipeline
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

    def replaced(self, rows: Sequence[int], others: "Rollout") -> "Rollout":
        """These images, with others in the place of some.

        Args:
            rows: for each of the others, the place of the image that it replaces.
        """
        num = len(self.images)
        order_B = torch.arange(num)
        order_B[list(rows)] = torch.arange(num, num + len(rows))
        drawn = Drawn.cat([self, others]).select(order_B)
        scores = cat_by_name([self.scores, others.scores])
        return Rollout(**vars(drawn), scores={name: each[order_B] for name, each in scores.items()})


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


def condition_again(
    conditions: Sequence[Condition], seed: int, step: int, group: int, attempt: int
) -> Condition:
    """The condition of a group that is drawn anew: any, since that of the first draw had nothing to teach."""
    generator = generator_for("labels", seed, step, group, "again", attempt)
    return conditions[int(torch.randint(len(conditions), (), generator=generator))]


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
    for batch in draw_batches(pipe.transformer, pipe.tokenizer, *drawn_in):
        batches.append(batch)
        with clock("reward"):
            scored.append(rewards.scores(batch.images, batch.conditions))
    drawn, scores = Drawn.cat(batches), cat_by_name(scored)
    fields: dict[str, Any] = vars(drawn) | {"seconds": drawn.seconds | clock.seconds}
    return Rollout(**fields, scores=scores)


@dataclass(frozen=True)
class Refilled:
    """A rollout after groups with nothing to learn from were drawn anew.

    Attributes:
        scores: of the images of all processes, (N, G).
        num_redrawn: groups that were drawn anew, each counted as often as it was.
        num_idle: groups that still have nothing to learn from.
    """

    rollout: Rollout
    scores: dict[str, Tensor]
    num_redrawn: int
    num_idle: int


def refilled(
    rollout: Rollout,
    scores: dict[str, Tensor],
    limit: int,
    idle_groups: Callable[[dict[str, Tensor]], Sequence[int]],
    draw: Callable[[Sequence[int], int, range], Rollout | None],
    gather: Callable[[Rollout], dict[str, Tensor]],
) -> Refilled:
    """Draw groups anew that have nothing to learn from, up to `limit` times. Each process draws those images
    that are in the places of its own, so that none has to be moved.

    Args:
        rollout: this process's share of the step's images.
        scores: of the images of all processes, (N, G).
        idle_groups: the numbers of the groups with nothing to learn from, by the scores; in order.
        draw: (groups, attempt, share) to this process's images of these groups, of which it has a share; None
            where that is empty. All processes call it equally often.
        gather: a rollout to the scores of all processes, (N, G).

    Source: dynamic sampling of DAPO (arXiv 2503.14476, section 3.2), there without a limit.
    """
    num_groups, size = next(iter(scores.values())).shape
    mine, num_redrawn = my_share(num_groups * size), 0
    idle = idle_groups(scores)
    for attempt in range(1, limit + 1):
        if not idle:
            break
        num_redrawn += len(idle)
        places = [i for i in mine if i // size in set(idle)]
        groups = sorted({i // size for i in places})
        # Of the groups in question, a share cuts the first and the last at most.
        start = places[0] - groups[0] * size if places else 0
        others = draw(groups, attempt, range(start, start + len(places)))
        if others is not None:
            rollout = rollout.replaced([i - mine.start for i in places], others)
        scores = gather(rollout)
        idle = idle_groups(scores)
    return Refilled(rollout, scores, num_redrawn, len(idle))


def cat_by_name(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Values of the same names in several batches, each name's put together."""
    return {name: torch.cat([each[name] for each in parts]) for name in parts[0]}
