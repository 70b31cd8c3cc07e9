"""Crediting: from the scores of a step to what each of its tokens is trained by.

Shapes: N groups · G images of one group · B images of this process · S scales · L tokens of all scales
"""

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from nextscale.advantages import expected_later_kl, kl_costs, later_kl, step_advantages
from nextscale.base.clock import Clock
from nextscale.base.processes import gathered, my_share
from nextscale.controllers import Constraints
from nextscale.credit import Credit, Scored
from nextscale.learner import Learner
from nextscale.objective import per_token
from nextscale.options import Options
from nextscale.pipeline import VARPipeline
from nextscale.rewards.reward_set import RewardSet
from nextscale.rollout import Rollout


class Crediting:
    """The advantages of this process's images, and of their tokens.

    Args:
        learner: holds the model.
        constraints: those rewards count by their multipliers.
        credit: says which tokens an image's advantage is given to.
    """

    def __init__(
        self,
        pipe: VARPipeline,
        learner: Learner,
        rewards: RewardSet,
        constraints: Constraints,
        credit: Credit,
        options: Options,
    ) -> None:
        self.pipe, self.learner, self.rewards = pipe, learner, rewards
        self.constraints, self.credit = constraints, credit
        self.grpo, self.run = options.grpo, options.run

    def of_all(self, scores: Mapping[str, Tensor], step: int) -> Tensor:
        """The advantages of the images of all processes: (N G,), or (N G, S).

        Args:
            scores: of each reward, (N, G), from `Collector.scores`.
            step: its number.
        """
        num_scales = self.pipe.transformer.schedule.num_scales
        coefficients = self.constraints.coefficients
        return step_advantages(scores, self.rewards.weights, coefficients, self.grpo, num_scales, step)

    def of_mine(self, scores: Mapping[str, Tensor], step: int = 1) -> Tensor:
        """Those of this process's images, which may depend on the scores of all: (B,), or (B, S)."""
        mine = my_share(self.grpo.num_images)
        return self.of_all(scores, step)[mine.start : mine.stop].to(self.learner.accelerator.device)

    def to_tokens(
        self, advantages: Tensor, rollout: Rollout, scores: Mapping[str, Tensor], clock: Clock
    ) -> Tensor:
        """The advantages of images, given to the tokens that `grpo.credit` says: as they are, or (B, L)."""
        if self.grpo.credit == "none":
            return advantages
        scored = Scored(
            advantages=advantages,
            rollout=rollout,
            scores=scores,
            tokenizer=self.pipe.tokenizer,
            rewards=self.rewards,
            coefficients=self.constraints.coefficients,
            aggregation=self.grpo.multi_objective_aggregation,
            scale_rewards=self.grpo.scale_rewards,
            batch_size=self.run.per_device_train_batch_size,  # a decoder's backward pass takes as much memory
        )
        with clock("credit"), self.learner.autocast():
            return self.credit(scored)

    def less_kl(self, advantages: Tensor, rollout: Rollout, beta: float) -> Tensor:
        """The advantages, less what each token cost in KL, where `grpo.kl_in_reward` has it there.

        Args:
            beta: weight of the KL.
        """
        if not self.grpo.kl_in_reward:
            return advantages
        lengths, schedule = self.learner.objective.lengths, self.pipe.transformer.schedule
        log_ratios_BL, kl_BL = self.learner.divergence(rollout)
        later_BS = later_kl(kl_BL, lengths)

        # What is to be expected is what others of the group had, whose images other processes may have.
        mine, grpo = my_share(self.grpo.num_images), self.grpo
        later_NGS = gathered({"later": later_BS})["later"].unflatten(0, (-1, grpo.num_generations))
        expected_NGS = expected_later_kl(later_NGS, grpo.branch_scale, grpo.branches)
        expected_BS = expected_NGS.flatten(0, 1)[mine.start : mine.stop].to(later_BS)
        costs_Bl = kl_costs(log_ratios_BL, kl_BL, later_BS, expected_BS, lengths)
        costs_BL = F.pad(costs_Bl, (0, schedule.num_tokens - costs_Bl.shape[1]))
        return per_token(advantages, schedule) - beta * costs_BL
