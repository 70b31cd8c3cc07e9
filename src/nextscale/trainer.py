"""GRPO for next-scale models: sample groups, score them, move the model towards the better ones.

Shapes: N groups · G images of one group · B = N G images · K rewards
"""

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor
from tqdm.auto import tqdm

from nextscale.advantages import add_constraints, combined_advantages
from nextscale.base.clock import Clock
from nextscale.base.conditions import Condition
from nextscale.base.errors import ConfigError, RewardError
from nextscale.base.interrupt import StopOnInterrupt
from nextscale.base.metrics import Means
from nextscale.base.statistics import deviation
from nextscale.controllers import Constraints, Controller, EntropyFloor
from nextscale.evaluation import Embedder, Judges, evaluate, score_metrics
from nextscale.grpo import GRPOConfig, check_grpo
from nextscale.losses import Microbatch, Objective
from nextscale.optimizer import OptimizerConfig, make_optimizer
from nextscale.pipeline import VARPipeline
from nextscale.policy import SamplingConfig
from nextscale.reference import Reference
from nextscale.report.model_card import write_model_card
from nextscale.rewards.asking.processes import fail_together
from nextscale.rewards.protocol import Reward, require_scores
from nextscale.rewards.reward_set import RewardSet
from nextscale.rollout import Rollout, collect, step_conditions
from nextscale.runs.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from nextscale.runs.config import RunConfig
from nextscale.runs.environment import environment
from nextscale.runs.hacking import HackingWatch
from nextscale.runs.writer import RunFolder


class GRPOTrainer:
    """Fine-tunes a pipeline's transformer, in place.

    Args:
        pipe: the model; its transformer is trained, its tokenizer stays frozen.
        rewards: one reward, several by name, or a `RewardSet`, with weights, constraints and held-out ones.
        grpo: the algorithm.
        conditions: what to train on; by default `grpo.class_labels`, or else all classes of the model.
        sampling: the policy that draws, and is trained.
        judges: independent classifiers for the evaluation.
        embed: embeddings for the evaluation's diversity.
        config_yaml: the contents of the run's `config.yaml`; by default the options above.
        command: the words that the run was started with, for its `environment.json`.

    Raises:
        ConfigError: options that do not fit the model or each other, or a folder that is in use or holds a
        run.
    """

    def __init__(
        self,
        pipe: VARPipeline,
        rewards: Reward | Mapping[str, Reward],
        grpo: GRPOConfig | None = None,
        *,
        conditions: Sequence[Condition] | None = None,
        sampling: SamplingConfig | None = None,
        optimizer: OptimizerConfig | None = None,
        run: RunConfig | None = None,
        judges: Judges | None = None,
        embed: Embedder | None = None,
        config_yaml: str | None = None,
        command: Sequence[str] = (),
    ) -> None:
        self.grpo, self.run = grpo or GRPOConfig(), run or RunConfig()
        self.sampling, self.optimizer_config = sampling or SamplingConfig(), optimizer or OptimizerConfig()
        self.rewards, self.judges, self.embed = _named(rewards), judges, embed
        # Accelerate keeps one precision a process and refuses another: forget that of an earlier trainer.
        if AcceleratorState._shared_state.get("_mixed_precision") != self.run.mixed_precision:
            AcceleratorState._reset_state()
        self.accelerator = Accelerator(
            mixed_precision=self.run.mixed_precision,
            log_with=None if self.run.report_to == "none" else self.run.report_to,
            project_dir=self.run.output_dir,
        )
        if conditions is None:
            labels = self.grpo.class_labels
            conditions = pipe.conditions(labels) if labels else pipe.all_conditions()
        self.conditions = list(conditions)
        self.grpo.check_processes(self.accelerator.num_processes)
        self._check_held_out()
        check_grpo(self.grpo, self.rewards.weights, self.rewards.constraints)
        self.folder = RunFolder(Path(self.run.output_dir), self.accelerator.is_main_process)
        self.folder.check(resume=bool(self.run.resume), overwrite=self.run.overwrite)
        self.config_yaml, self.command = config_yaml or self._default_config(pipe.source), command

        self.pipe = pipe.to(self.accelerator.device)
        transformer = pipe.transformer
        transformer.gradient_checkpointing = self.run.gradient_checkpointing
        reference = Reference.copy_of(transformer) if self.grpo.needs_reference else None
        self.objective = Objective(
            self.grpo, self.sampling, transformer.schedule, reference, self.accelerator.device
        )

        grpo_ = self.grpo
        self.constraints = Constraints(
            self.rewards.constraints, grpo_.constraint_rate, grpo_.constraint_start
        )
        self.watch = HackingWatch(self.rewards.held_out)
        self.entropy_floor: EntropyFloor | None = None
        self.controllers: dict[str, Controller] = {"constraints": self.constraints, "watch": self.watch}
        if grpo_.entropy_floor is not None:
            num_scales = transformer.schedule.num_scales
            self.entropy_floor = EntropyFloor(grpo_.entropy_floor, grpo_.entropy_floor_rate, num_scales)
            self.controllers["entropy_floor"] = self.entropy_floor

        optimizer_, self.scheduler = make_optimizer(
            transformer, self.optimizer_config, self.run.max_steps * self.grpo.num_iterations
        )
        self.model, self.optimizer = self.accelerator.prepare(transformer, optimizer_)
        self.accelerator.register_for_checkpointing(self.scheduler)
        self.step_done, self.seconds_done = 0, 0.0

    # ---- the loop

    def open(self) -> None:
        """Take the run's folder for this run alone; `train` does so by itself.

        Raises:
            ConfigError: another run is using it, or it holds a run that is neither to be resumed nor
            replaced.
        """
        run = self.run
        self.folder.open(self.config_yaml, resume=bool(run.resume), overwrite=run.overwrite)
        self.folder.write_environment(environment(self.accelerator.device, self.command))

    def train(self) -> Path:
        """Run all steps; returns the run's folder.

        Raises:
            ConfigError: as `open` does.
            RewardError: a reward that cannot be used; a checkpoint is written first.
        """
        self.open()
        try:
            return self._train()
        finally:
            self.folder.close()

    def _train(self) -> Path:
        run, process = self.run, self.accelerator

        # Continue where an earlier run stopped. What it logged after its last checkpoint is logged anew.
        if run.resume and (path := find_checkpoint(run.resume, self.folder.checkpoints)):
            self.load(path)
        self.folder.keep_steps(self.step_done)
        if run.report_to != "none":
            process.init_trackers("tensorboard")

        # All steps. Ctrl-C lets the one in hand end; a reward that fails ends the run after a checkpoint.
        disable = run.disable_tqdm or not process.is_main_process
        bar = tqdm(total=run.max_steps, initial=self.step_done, desc="GRPO", unit="step", disable=disable)
        with bar, StopOnInterrupt() as stop:
            try:
                if self.step_done == 0 and run.eval_steps:
                    self.log(0, self.evaluate(0))
                while self.step_done < run.max_steps and not stop.requested:
                    metrics = self.step(self.step_done + 1)
                    self.finish_step(metrics)
                    bar.update()
                    bar.set_postfix(_postfix(metrics))
            except RewardError:
                self.save()
                raise

        # The end: the final model, or a checkpoint to go on from.
        if stop.requested and self.step_done < run.max_steps:
            self.save()
            tqdm.write(f"stopped after step {self.step_done}; continue with --run.resume auto")
        elif process.is_main_process:
            self.pipe.save_pretrained(self.folder.final)
            write_model_card(self.folder.final, self.folder.path)
        process.wait_for_everyone()
        process.end_training()
        return self.folder.path

    def step(self, step: int) -> dict[str, float]:
        """One training step: a batch of rollouts and its updates; returns its metrics.

        Args:
            step: from 1; the images depend on it.
        """
        begin, clock = time.perf_counter(), Clock(self.accelerator.device)

        # Draw and score: this process's share of the step's groups.
        rollout = self.rollout(step)
        reward_metrics = self.reward_metrics(rollout)

        # Advantages. The multipliers of the constraints move first: the model's update then answers their
        # last move, and they its, which damps their swing.
        constraint_metrics = self.constraints.update(reward_metrics)
        advantages_B = self.advantages(rollout).flatten()

        # Update: num_iterations optimizer steps on the same images, each on the gradient of all of them.
        means, bonuses = Means(), None if self.entropy_floor is None else self.entropy_floor.bonuses
        with clock("update"):
            for _ in range(self.grpo.num_iterations):
                for batch, share, is_last in self.microbatches(rollout, advantages_B):
                    # Processes exchange gradients once, in the last backward pass.
                    with self.accelerator.accumulate() if is_last else self.accelerator.no_sync(self.model):
                        with self.accelerator.autocast():
                            output = self.objective(self.model, batch, bonuses)
                        # The loss is a mean over the microbatch: its share makes the sum a mean over all
                        # images.
                        self.accelerator.backward(output.loss * share)
                    means.add(output.metrics)
                grad_norm = self.accelerator.clip_grad_norm_(
                    self.model.parameters(), self.optimizer_config.max_grad_norm
                )
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()
        assert grad_norm is not None  # as it is for all but XLA

        # Adapt the entropy bonuses to what the update measured, over all processes.
        loss_metrics = self.gathered(means)
        floor_metrics = {} if self.entropy_floor is None else self.entropy_floor.update(loss_metrics)

        # Measure.
        elapsed = time.perf_counter() - begin
        num_images = self.grpo.num_images
        seconds = rollout.seconds | clock.seconds
        return {
            **loss_metrics,
            **reward_metrics,
            **constraint_metrics,
            **floor_metrics,
            "grad_norm": float(grad_norm),
            "learning_rate": float(self.scheduler.get_last_lr()[0]),
            "num_tokens": float(step * num_images * self.pipe.transformer.schedule.num_tokens),
            "step_time": elapsed,
            "images_per_second": num_images / elapsed,
            **{f"time/{name}": value for name, value in seconds.items()},
        }

    # ---- the parts of a step

    def rollout(self, step: int) -> Rollout:
        """This process's groups of a step: every num_processes-th, from its own index on."""
        conditions = step_conditions(self.conditions, self.grpo.num_groups, self.run.seed, step)
        mine = range(self.accelerator.process_index, len(conditions), self.accelerator.num_processes)
        with fail_together(), self.accelerator.autocast():
            return collect(
                self.pipe,
                [conditions[group] for group in mine],
                [("rollout", self.run.seed, step, group) for group in mine],
                self.grpo.num_generations,
                self.sampling,
                self.rewards.without_held_out(),
                self.run.per_device_eval_batch_size,
            )

    def advantages(self, rollout: Rollout) -> Tensor:
        """(N, G) advantages of this process's images."""
        rewards_KNG = torch.stack([rollout.scores[name] for name in self.rewards.weights])
        weights_K = torch.tensor(list(self.rewards.weights.values()))
        grpo, coefficients = self.grpo, self.constraints.coefficients
        advantages_NG = combined_advantages(
            rewards_KNG,
            weights_K,
            grpo.scale_rewards,
            grpo.multi_objective_aggregation,
            grpo.advantage_epsilon,
        )
        advantages_NG = add_constraints(advantages_NG, rollout.scores, coefficients, grpo.advantage_epsilon)
        return advantages_NG.to(self.accelerator.device)

    def microbatches(
        self, rollout: Rollout, advantages_B: Tensor
    ) -> Iterator[tuple[Microbatch, float, bool]]:
        """The rollout in parts of `per_device_train_batch_size`: each with its share of the images, and
        whether it is the last."""
        num_images, size = len(advantages_B), self.run.per_device_train_batch_size
        for start in range(0, num_images, size):
            part = slice(start, start + size)
            batch = Microbatch(
                conditioning=rollout.conditioning.select(part),
                tokens=rollout.tokens[part],
                inputs=rollout.inputs[part],
                log_probs=rollout.log_probs[part],
                advantages=advantages_B[part],
            )
            yield batch, len(batch.tokens) / num_images, start + size >= num_images

    def reward_metrics(self, rollout: Rollout) -> dict[str, float]:
        """Of the rewards, over all processes; raises where one of them scored none of the step's images."""
        names = list(rollout.scores)
        mine_KNG = torch.stack([rollout.scores[name] for name in names]).to(self.accelerator.device)
        all_NKG = self.accelerator.gather(mine_KNG.transpose(0, 1).contiguous())
        assert isinstance(all_NKG, Tensor)
        scores = dict(zip(names, all_NKG.transpose(0, 1).cpu(), strict=True))
        require_scores(scores)
        total_NG = self.rewards.total(scores)
        deviation_N = deviation(total_NG)
        return {
            "reward": total_NG.nanmean().item(),
            "reward_std": deviation_N.mean().item(),
            "frac_reward_zero_std": (deviation_N == 0).float().mean().item(),
            **score_metrics(scores),
        }

    def gathered(self, means: Means) -> dict[str, float]:
        """Means (or extremes, by name) over all processes, which have equally many images."""
        whole = Means()
        for part in gather_object([dict(means.items())]):
            whole.add({name: torch.tensor(value) for name, value in part.items()})
        return dict(whole.items())

    # ---- measuring and saving

    def finish_step(self, metrics: dict[str, float]) -> None:
        """Evaluate, log and save where it is time to; what a step measured is logged even if that fails."""
        run = self.run
        self.step_done += 1
        self.seconds_done += metrics["step_time"]
        evaluated: dict[str, float] = {}
        try:
            if run.eval_steps and (self.step_done % run.eval_steps == 0 or self.step_done == run.max_steps):
                evaluated = self.evaluate(self.step_done)
        finally:
            self.log(self.step_done, metrics | evaluated)
        if run.save_steps and self.step_done % run.save_steps == 0:
            self.save()

    def evaluate(self, step: int) -> dict[str, float]:
        """Measure the model on fixed seeds and write its sample grid; metrics with the prefix `eval_`."""
        begin = time.perf_counter()
        self.accelerator.wait_for_everyone()
        metrics: dict[str, float] = {}
        with fail_together():
            if self.accelerator.is_main_process:
                with self.accelerator.autocast():
                    result = evaluate(
                        self.pipe,
                        self.rewards,
                        self.sampling,
                        num_images=self.run.eval_num_images,
                        seed=self.run.eval_seed,
                        conditions=self.conditions,
                        judges=self.judges,
                        embed=self.embed,
                        batch_size=self.run.per_device_eval_batch_size,
                    )
                self.folder.save_grid(step, result.samples, [each.text for each in result.conditions])
                metrics = result.metrics
        (metrics,) = broadcast_object_list([metrics])
        if step == 0:
            self.constraints.set_base(metrics)
        metrics = {f"eval_{name}": value for name, value in metrics.items()}
        warning_metrics = self.watch.update(metrics)
        for warning in self.watch.warnings.values():
            if self.accelerator.is_main_process:
                tqdm.write(f"Warning: {warning}", file=sys.stderr)
        return metrics | warning_metrics | {"eval_time": time.perf_counter() - begin}

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """A line of metrics.jsonl, and the same to the tracker."""
        self.folder.append_metrics({"step": step} | metrics)
        if self.run.report_to != "none":
            self.accelerator.log(metrics, step=step)

    def save(self) -> Path:
        """Write a checkpoint of the state after the last whole step; returns its path."""
        state = {
            "seconds": self.seconds_done,
            "controllers": {name: each.state_dict() for name, each in self.controllers.items()},
        }
        return save_checkpoint(
            self.accelerator, self.folder.checkpoints, self.step_done, state, self.run.save_total_limit
        )

    def load(self, path: Path) -> None:
        """Continue from a checkpoint.

        Raises:
            CheckpointError: a file of it is missing or broken.
        """
        state = load_checkpoint(self.accelerator, path)
        self.step_done, self.seconds_done = state["step"], state["seconds"]
        for name, controller in self.controllers.items():
            controller.load_state_dict(state["controllers"][name])

    def _check_held_out(self) -> None:
        if self.rewards.held_out and not self.run.eval_steps:
            raise ConfigError(
                f"reward '{self.rewards.held_out[0]}' is held out, but with run.eval_steps 0 nothing "
                "measures it: set run.eval_steps, or remove the reward"
            )

    def _default_config(self, model: str | None) -> str:
        sections = {
            "model": model,
            "sampling": self.sampling.model_dump(),
            "rewards": self.rewards.roles(),
            "grpo": self.grpo.model_dump(),
            "optimizer": self.optimizer_config.model_dump(),
            "run": self.run.model_dump(),
        }
        return json.dumps(sections, indent=2) + "\n"  # JSON is YAML


def _named(rewards: Reward | Mapping[str, Reward]) -> RewardSet:
    if isinstance(rewards, RewardSet):
        return rewards
    if isinstance(rewards, Mapping):
        return RewardSet(rewards)
    name = getattr(rewards, "__name__", type(rewards).__name__)
    return RewardSet({name: rewards})


def _postfix(metrics: dict[str, float]) -> dict[str, str]:
    shown = {"reward": f"{metrics['reward']:.3f}"}
    if "kl_per_image" in metrics:
        shown["kl"] = f"{metrics['kl_per_image']:.1f}"
    return shown | {"images/s": f"{metrics['images_per_second']:.0f}"}
