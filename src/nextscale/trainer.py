"""GRPO for next-scale models: sample groups, score them, move the model towards the better ones.

Shapes: N groups · G images of one group · B images of one backward pass · S scales · L tokens of all scales ·
V codebook size
"""

import copy
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor
from tqdm.auto import tqdm

from nextscale.advantages import add_constraints, combined_advantages
from nextscale.base.clock import Clock
from nextscale.base.errors import ConfigError, RewardError
from nextscale.base.interrupt import StopOnInterrupt
from nextscale.base.metrics import Means
from nextscale.constraints import Constraints
from nextscale.evaluation import Embedder, Judges, deviation, evaluate
from nextscale.grpo import GRPOConfig
from nextscale.grpo_loss import GRPOLoss
from nextscale.models.var import VAR
from nextscale.optimizer import OptimizerConfig, make_optimizer
from nextscale.pipeline import VARPipeline
from nextscale.policy import SamplingConfig
from nextscale.report.model_card import write_model_card
from nextscale.rewards.asking.processes import fail_together
from nextscale.rewards.protocol import Reward, require_scores
from nextscale.rewards.reward_set import RewardSet
from nextscale.rollout import Rollout, collect, step_labels
from nextscale.runs.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from nextscale.runs.config import RunConfig
from nextscale.runs.hacking import HackingWatch
from nextscale.runs.writer import RunFolder


class GRPOTrainer:
    """Fine-tunes a pipeline's transformer, in place.

    Args:
        pipe: the model; its transformer is trained, its tokenizer stays frozen.
        rewards: one reward, several by name, or a `RewardSet`, with weights, constraints and held-out ones.
        grpo: the algorithm.
        sampling: the policy that draws, and is trained.
        judges: independent classifiers for the evaluation.
        embed: embeddings for the evaluation's diversity.
        config_yaml: what stands in the run's `config.yaml`.

    Raises:
        ConfigError: options that do not fit the model or each other.
    """

    def __init__(
        self,
        pipe: VARPipeline,
        rewards: Reward | Mapping[str, Reward],
        grpo: GRPOConfig | None = None,
        *,
        sampling: SamplingConfig | None = None,
        optimizer: OptimizerConfig | None = None,
        run: RunConfig | None = None,
        judges: Judges | None = None,
        embed: Embedder | None = None,
        config_yaml: str | None = None,
    ) -> None:
        self.grpo, self.run = grpo or GRPOConfig(), run or RunConfig()
        self.sampling, self.optimizer_config = sampling or SamplingConfig(), optimizer or OptimizerConfig()
        self.rewards = _named(rewards)
        self.constraints = Constraints(
            self.rewards.constraints, self.grpo.constraint_rate, self.grpo.constraint_start
        )
        self.judges, self.embed = judges, embed
        # Accelerate keeps one precision a process and refuses another: forget that of an earlier trainer.
        if AcceleratorState._shared_state.get("_mixed_precision") != self.run.mixed_precision:
            AcceleratorState._reset_state()
        self.accelerator = Accelerator(
            mixed_precision=self.run.mixed_precision,
            log_with=None if self.run.report_to == "none" else self.run.report_to,
            project_dir=self.run.output_dir,
        )
        self.labels = list(self.grpo.class_labels or range(pipe.num_classes))
        pipe.conditions(self.labels)
        check_processes(self.grpo, self.accelerator.num_processes)
        self._check_held_out()
        self.folder = RunFolder(Path(self.run.output_dir), self.accelerator.is_main_process)
        self.folder.open(
            self._default_config(pipe.source) if config_yaml is None else config_yaml,
            resume=bool(self.run.resume),
            overwrite=self.run.overwrite,
        )

        self.pipe = pipe.to(self.accelerator.device)
        self.pipe.transformer.gradient_checkpointing = self.run.gradient_checkpointing
        reference: VAR | None = None
        if self.grpo.beta or self.grpo.measure_kl:
            reference = copy.deepcopy(pipe.transformer).requires_grad_(False)
        self.loss = GRPOLoss(self.grpo, self.sampling, pipe.transformer, reference)
        self._prepare()
        self.step_done, self.seconds_done = 0, 0.0
        self.watch = HackingWatch(self.rewards.held_out)

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

    def _prepare(self) -> None:
        optimizer, scheduler = make_optimizer(
            self.pipe.transformer, self.optimizer_config, self.run.max_steps * self.grpo.num_iterations
        )
        self.model, self.optimizer = self.accelerator.prepare(self.pipe.transformer, optimizer)
        self.scheduler = scheduler
        self.accelerator.register_for_checkpointing(scheduler)

    # ---- the loop

    def train(self) -> Path:
        """Run all steps; returns the run's folder.

        Raises:
            RewardError: a reward that cannot be used; a checkpoint is written first.
        """
        run, process = self.run, self.accelerator
        if run.resume and (path := find_checkpoint(run.resume, self.folder.checkpoints)):
            state = load_checkpoint(process, path)
            self.step_done, self.seconds_done = state["step"], state["seconds"]
            self.constraints.load_state_dict(state["constraints"])
            self.watch.first = state["first_evaluation"]
            if self.loss.entropy_floor is not None:
                self.loss.entropy_floor.load_state_dict(state["entropy_floor"])
        self.folder.keep_steps(self.step_done)
        if run.report_to != "none":
            process.init_trackers("tensorboard")
        disable = run.disable_tqdm or not process.is_main_process
        bar = tqdm(total=run.max_steps, initial=self.step_done, desc="GRPO", unit="step", disable=disable)
        with bar, StopOnInterrupt() as stop:
            try:
                if self.step_done == 0 and run.eval_steps:
                    self.log(0, self.evaluate(0))
                while self.step_done < run.max_steps and not stop.requested:
                    metrics = self.step(self.step_done + 1)
                    self._finish_step(metrics)
                    bar.update()
                    bar.set_postfix(_postfix(metrics))
            except RewardError:
                self.save()
                raise
        if stop.requested and self.step_done < run.max_steps:
            self.save()
            tqdm.write(f"stopped after step {self.step_done}; continue with --run.resume auto")
        elif process.is_main_process:
            self.pipe.save_pretrained(self.folder.final)
            write_model_card(self.folder.final, self.folder.path)
        process.wait_for_everyone()
        process.end_training()
        return self.folder.path

    def _finish_step(self, metrics: dict[str, float]) -> None:
        """Evaluate, log and save where it is time to; what a step measured is logged even if that fails."""
        run = self.run
        self.step_done += 1
        self.seconds_done += metrics["step_time"]
        try:
            if run.eval_steps and (self.step_done % run.eval_steps == 0 or self.step_done == run.max_steps):
                metrics |= self.evaluate(self.step_done)
        finally:
            self.log(self.step_done, metrics)
        if run.save_steps and self.step_done % run.save_steps == 0:
            self.save()

    def step(self, step: int) -> dict[str, float]:
        """One batch of rollouts and its updates; returns its metrics."""
        begin = time.perf_counter()
        rollout = self.rollout(step)
        reward_metrics = self._reward_metrics(rollout)
        reward_metrics |= self.constraints.update(reward_metrics)
        advantages_NG = self.advantages(rollout)
        means, clock = Means(), Clock(self.accelerator.device)
        with clock("update"):
            for _ in range(self.grpo.num_iterations):
                grad_norm = self.update(rollout, advantages_NG.flatten(), means)
        metrics = self._gathered(means) | reward_metrics
        metrics |= self.loss.finish_step(metrics)
        seconds = rollout.seconds | clock.seconds
        elapsed = time.perf_counter() - begin
        num_images = self.grpo.num_groups * self.grpo.num_generations
        return metrics | {
            "grad_norm": grad_norm,
            "learning_rate": self.scheduler.get_last_lr()[0],
            "num_tokens": float(step * num_images * self.pipe.transformer.schedule.num_tokens),
            "step_time": elapsed,
            "images_per_second": num_images / elapsed,
            **{f"time/{name}": value for name, value in seconds.items()},
        }

    def rollout(self, step: int) -> Rollout:
        """This process's groups of a step."""
        labels = step_labels(self.labels, self.grpo.num_groups, self.run.seed, step)
        mine = range(self.accelerator.process_index, len(labels), self.accelerator.num_processes)
        with fail_together(), self.accelerator.autocast():
            return collect(
                self.pipe,
                [labels[group] for group in mine],
                [("rollout", self.run.seed, step, group) for group in mine],
                self.grpo.num_generations,
                self.sampling,
                self.rewards.without_held_out(),
                self.run.per_device_eval_batch_size,
            )

    def advantages(self, rollout: Rollout) -> Tensor:
        """(N, G) advantages of this process's images."""
        rewards_KNG = torch.stack([rollout.components[name] for name in self.rewards.weights])
        weights_K = torch.tensor(list(self.rewards.weights.values()))
        advantages_NG = combined_advantages(
            rewards_KNG, weights_K, self.grpo.scale_rewards, self.grpo.multi_objective_aggregation
        )
        advantages_NG = add_constraints(advantages_NG, rollout.components, self.constraints.coefficients)
        return advantages_NG.to(self.accelerator.device)

    def update(self, rollout: Rollout, advantages_B: Tensor, means: Means) -> float:
        """One optimizer step on all images of the rollout; returns the gradient's norm before clipping."""
        num_images = len(advantages_B)
        starts = range(0, num_images, self.run.per_device_train_batch_size)
        for start in starts:
            part = slice(start, start + self.run.per_device_train_batch_size)
            is_last = start == starts[-1]
            with self.accelerator.accumulate() if is_last else self.accelerator.no_sync(self.model):
                with self.accelerator.autocast():
                    loss = self.loss(self.model, rollout, advantages_B, part, means)
                # The loss is a mean over the part: its share makes the sum a mean over all images.
                share = len(advantages_B[part]) / num_images
                self.accelerator.backward(loss * share)
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.optimizer_config.max_grad_norm)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        assert norm is not None
        return float(norm)

    # ---- measuring and saving

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
                        labels=self.grpo.class_labels,
                        judges=self.judges,
                        embed=self.embed,
                        batch_size=self.run.per_device_eval_batch_size,
                    )
                names = [condition.text for condition in self.pipe.conditions(result.labels)]
                self.folder.save_grid(step, result.samples, names)
                metrics = result.metrics
        (metrics,) = broadcast_object_list([metrics])
        if step == 0:
            self.constraints.set_base(metrics)
        metrics = {f"eval_{name}": value for name, value in metrics.items()}
        warnings = self.watch(metrics)
        for warning in filter(None, warnings.values() if self.accelerator.is_main_process else ()):
            tqdm.write(f"Warning: {warning}", file=sys.stderr)
        metrics |= {f"eval_warnings/{name}": float(warning is not None) for name, warning in warnings.items()}
        return metrics | {"eval_time": time.perf_counter() - begin}

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """A line of metrics.jsonl, and the same to the tracker."""
        self.folder.append_metrics({"step": step} | metrics)
        if self.run.report_to != "none":
            self.accelerator.log(metrics, step=step)

    def save(self) -> Path:
        """A checkpoint of the state after the last whole step."""
        state: dict[str, object] = {
            "seconds": self.seconds_done,
            "constraints": self.constraints.state_dict(),
            "first_evaluation": self.watch.first,
        }
        if self.loss.entropy_floor is not None:
            state["entropy_floor"] = self.loss.entropy_floor.state_dict()
        return save_checkpoint(
            self.accelerator, self.folder.checkpoints, self.step_done, state, self.run.save_total_limit
        )

    def _reward_metrics(self, rollout: Rollout) -> dict[str, float]:
        """Over all processes; raises where a reward scored none of the step's images."""
        names = list(rollout.components)
        mine_KNG = torch.stack([rollout.components[name] for name in names]).to(self.accelerator.device)
        all_NKG = self.accelerator.gather(mine_KNG.transpose(0, 1).contiguous())
        assert isinstance(all_NKG, Tensor)
        all_KNG = all_NKG.transpose(0, 1).cpu()
        require_scores(dict(zip(names, all_KNG, strict=True)))
        total_NG = self.rewards.total(dict(zip(names, all_KNG, strict=True)))
        deviation_N = torch.tensor([deviation(group) for group in total_NG])
        metrics = {
            "reward": total_NG.nanmean().item(),
            "reward_std": deviation_N.mean().item(),
            "frac_reward_zero_std": (deviation_N == 0).float().mean().item(),
        }
        for name, scores_NG in zip(names, all_KNG, strict=True):
            metrics[f"rewards/{name}/mean"] = scores_NG.nanmean().item()
            metrics[f"rewards/{name}/std"] = deviation(scores_NG)
        return metrics

    def _gathered(self, means: Means) -> dict[str, float]:
        """Means (or extremes, by name) over all processes, which have equally many images."""
        parts = gather_object([dict(means.items())])
        whole = Means()
        for part in parts:
            for name, value in part.items():
                whole.put(name, value)
        return dict(whole.items())


def check_processes(grpo: GRPOConfig, num_processes: int) -> None:
    """Whether so many processes can share the groups of a step.

    Raises:
        ConfigError: they cannot.
    """
    if num_processes < 1 or grpo.num_groups % num_processes:
        raise ConfigError(
            f"num_groups {grpo.num_groups} cannot be shared by {num_processes} processes: use a multiple"
        )


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
