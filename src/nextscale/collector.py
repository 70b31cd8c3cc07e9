"""Collects the images of a training step: this process's share of them, and the scores of all.

Shapes: N groups · G images of one group · L tokens of all scales
"""

from collections.abc import Callable, Sequence

from torch import Tensor

from nextscale.base.conditions import Condition
from nextscale.base.processes import fail_together, gathered, my_share
from nextscale.learner import Learner
from nextscale.options import Options
from nextscale.pipeline import VARPipeline
from nextscale.rewards.protocol import require_scores
from nextscale.rewards.reward_set import RewardSet
from nextscale.rollout import Rollout, branches_of, collect, condition_again, refilled, step_conditions


class Collector:
    """Draws and scores the images of a step. A group's images depend on the run's seed, the step and the
    group's index, and on nothing else.

    Args:
        learner: holds the model.
        conditions: what to train on.
    """

    def __init__(
        self,
        pipe: VARPipeline,
        learner: Learner,
        conditions: Sequence[Condition],
        rewards: RewardSet,
        options: Options,
    ) -> None:
        self.pipe, self.learner, self.conditions = pipe, learner, conditions
        self.rewards = rewards.without_held_out()
        self.grpo, self.sampling, self.run = options.grpo, options.explored, options.run
        self.branches = branches_of(self.grpo, pipe.transformer.schedule)

    def rollout(self, step: int) -> Rollout:
        """This process's share of a step's images, which are cut regardless of groups."""
        num_groups, seed = self.grpo.num_groups, self.run.seed
        conditions = step_conditions(self.conditions, num_groups, seed, step)
        seeds = [("rollout", seed, step, group) for group in range(num_groups)]
        rollout = self._collect(conditions, seeds, my_share(self.grpo.num_images))
        assert rollout is not None, "check_processes leaves no process without images"
        return rollout

    def scores(self, rollout: Rollout) -> dict[str, Tensor]:
        """The scores of all processes, (N, G) with the groups in the order of the step.

        Raises:
            RewardError: a reward that scored none of the step's images, or cannot be used.
        """
        of_all = gathered(rollout.scores)
        with fail_together():  # each process asks a reward of groups
            scores = self.rewards.of_groups(of_all, self.grpo.num_generations)
        require_scores(scores)
        return scores

    def refilled(
        self,
        rollout: Rollout,
        scores: dict[str, Tensor],
        step: int,
        advantages: Callable[[dict[str, Tensor]], Tensor],
    ) -> tuple[Rollout, dict[str, Tensor], dict[str, float]]:
        """The rollout and the scores, as `rollout.refilled` has them where `grpo.max_resamplings` asks for
        it, and what is logged of that.

        Args:
            advantages: of the images of all groups by their scores: idle are groups in which all that are
                trained are 0.
        """
        limit, num_groups, seed = self.grpo.max_resamplings, self.grpo.num_groups, self.run.seed
        if not limit:
            return rollout, scores, {}

        def idle_groups(scores: dict[str, Tensor]) -> list[int]:
            trained = advantages(scores)
            if trained.dim() > 1:  # of scales, where rollouts branch
                trained = trained[:, : self.grpo.train_scales]
            by_group = trained.unflatten(0, (num_groups, -1)).flatten(1)
            return (by_group == 0).all(1).nonzero().flatten().tolist()

        def draw(groups: Sequence[int], attempt: int, share: range) -> Rollout | None:
            conditions = [condition_again(self.conditions, seed, step, each, attempt) for each in groups]
            seeds = [("rollout", seed, step, each, "again", attempt) for each in groups]
            return self._collect(conditions, seeds, share)

        done = refilled(rollout, scores, limit, idle_groups, draw, self.scores)
        counts = {"resampled_groups": float(done.num_redrawn), "idle_groups": float(done.num_idle)}
        return done.rollout, done.scores, counts

    def _collect(
        self, conditions: Sequence[Condition], seeds: Sequence[tuple[int | str, ...]], share: range
    ) -> Rollout | None:
        with fail_together(), self.learner.whole(), self.learner.autocast():
            if not share:  # all processes are here, to gather the model, but not all have images to draw
                return None
            return collect(
                self.pipe,
                conditions,
                seeds,
                self.grpo.num_generations,
                self.sampling,
                self.rewards,
                self.run.per_device_eval_batch_size,
                share,
                self.branches,
            )
