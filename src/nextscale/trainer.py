"""GRPO for next-scale models: sample groups, score them, move the model towards the better ones.

Shapes: N groups · G images of one group · B images of one backward pass · S scales · L tokens of all scales ·
V codebook size
"""

import copy
import json
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator
from accelerate.utils import gather, gather_object
from pydantic import Field
from torch import Tensor
from tqdm.auto import tqdm
from transformers import get_scheduler

from nextscale.advantages import Aggregation, ScaleRewards, combined_advantages
from nextscale.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from nextscale.errors import ConfigError, RewardError
from nextscale.evaluation import Embedder, Evaluation, Judges, evaluate
from nextscale.log_probs import teacher_forced_logits
from nextscale.metrics import Means
from nextscale.models.var import VAR
from nextscale.objective import ScaleWeighting, clipped_surrogate, grpo_loss, token_weights
from nextscale.pipeline import VARPipeline
from nextscale.policy import (
    SamplingConfig,
    exact_entropy,
    exact_kl,
    kept_tokens,
    policy_log_probs,
    token_log_probs,
)
from nextscale.records import Record
from nextscale.rewards.base import Reward, WeightedSum
from nextscale.rollout import Clock, Rollout, collect, step_labels
from nextscale.run_folder import RunFolder


class GRPOConfig(Record):
    """The algorithm. Names are TRL's wherever the same thing exists there."""

    num_generations: int = Field(8, ge=2)
    """G, images of one group."""
    num_groups: int = Field(8, ge=1)
    """Groups of a step, over all processes."""
    class_labels: tuple[int, ...] | None = Field(None, min_length=1)
    """Classes to train on; all of the model's by default."""
    num_iterations: int = Field(1, ge=1)
    """Updates on one batch of rollouts."""
    beta: float = Field(0.02, ge=0)
    """Weight of the exact KL to the frozen reference, in nats."""
    measure_kl: bool = True
    """Keep the reference for the log where beta is 0; costs a forward pass a step."""
    epsilon: float = Field(0.2, gt=0, lt=1)
    """The ratio is clipped below 1 - epsilon."""
    epsilon_high: float | None = Field(None, gt=0)
    """The ratio is clipped above 1 + epsilon_high; by default epsilon."""
    entropy_coef: float = Field(0.0, ge=0)
    """Weight of an entropy bonus, in nats."""
    scale_rewards: ScaleRewards = "group"
    """What rewards are divided by: their group's deviation, the batch's, or nothing."""
    multi_objective_aggregation: Aggregation = "sum_then_normalize"
    """Several rewards: weighted sum first, or each normalised in its group first."""
    scale_weighting: ScaleWeighting | tuple[float, ...] = "scale"
    """Weight of tokens in the loss: "token" all alike, "scale" each scale the same total, or one weight a scale."""


class OptimizerConfig(Record):
    """AdamW and its schedule."""

    learning_rate: float = Field(1e-4, gt=0)
    """Peak learning rate."""
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    """Decay of the first moment."""
    adam_beta2: float = Field(0.95, ge=0, lt=1)
    """Decay of the second moment."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay."""
    max_grad_norm: float = Field(1.0, gt=0)
    """The gradient is clipped to this norm."""
    warmup_steps: int = Field(0, ge=0)
    """Updates of linear warm-up."""
    lr_scheduler_type: Literal["constant_with_warmup", "linear", "cosine"] = "constant_with_warmup"
    """What the learning rate does after the warm-up."""


class RunConfig(Record):
    """The run: how long, how often what, and where to."""

    output_dir: str = "runs/run"
    """The run's folder."""
    max_steps: int = Field(100, ge=1)
    """Steps of rollouts."""
    seed: int = Field(0, ge=0)
    """Of everything random."""
    per_device_train_batch_size: int = Field(32, ge=1)
    """Images of one backward pass; more are accumulated."""
    per_device_eval_batch_size: int = Field(64, ge=1)
    """Images drawn and scored at once, in rollouts and evaluations."""
    eval_steps: int = Field(25, ge=0)
    """Steps between evaluations; there is one before and one after in any case. 0 switches all off."""
    eval_num_images: int = Field(512, ge=2)
    """Images of an evaluation, at least."""
    eval_seed: int = Field(1000, ge=0)
    """Of the evaluation's images."""
    diversity_clip: str | None = None
    """The CLIP whose embeddings measure diversity: "toy", a folder or a hub repository."""
    save_steps: int = Field(50, ge=0)
    """Steps between checkpoints; 0 leaves only the final model."""
    save_total_limit: int = Field(2, ge=1)
    """Checkpoints kept."""
    resume: str | None = None
    """"auto" continues from the newest checkpoint, a path from that one."""
    overwrite: bool = False
    """Remove an earlier run in the same folder."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """Autocast of the transformer; head and log-softmax stay float32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    report_to: Literal["tensorboard", "none"] = "tensorboard"
    """Where metrics go besides metrics.jsonl."""
    disable_tqdm: bool = False
    """No progress bar."""


class GRPOTrainer:
    """Fine-tunes a pipeline's transformer, in place.

    Args:
        pipe: the model; its transformer is trained, its tokenizer stays frozen.
        rewards: one reward, several by name, or a `WeightedSum`.
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
        self.judges, self.embed = judges, embed
        self.accelerator = Accelerator(
            mixed_precision=self.run.mixed_precision,
            log_with=None if self.run.report_to == "none" else self.run.report_to,
            project_dir=self.run.output_dir,
        )
        self.labels = list(self.grpo.class_labels or range(pipe.num_classes))
        pipe.conditions(self.labels)
        self._check_processes()
        self.folder = RunFolder(Path(self.run.output_dir), self.accelerator.is_main_process)
        self.folder.open(
            self._default_config() if config_yaml is None else config_yaml,
            resume=bool(self.run.resume),
            overwrite=self.run.overwrite,
        )

        self.pipe = pipe.to(self.accelerator.device)
        self.pipe.transformer.gradient_checkpointing = self.run.gradient_checkpointing
        self.reference: VAR | None = None
        if self.grpo.beta or self.grpo.measure_kl:
            self.reference = copy.deepcopy(pipe.transformer).requires_grad_(False)
        self._prepare()
        schedule = pipe.transformer.schedule
        self.weights_L = token_weights(schedule.lengths, self.grpo.scale_weighting).to(self.accelerator.device)
        self.step_done, self.seconds_done = 0, 0.0

    def _check_processes(self) -> None:
        processes = self.accelerator.num_processes
        if self.grpo.num_groups % processes:
            raise ConfigError(
                f"num_groups {self.grpo.num_groups} cannot be shared by {processes} processes: use a multiple"
            )

    def _default_config(self) -> str:
        sections = {
            "sampling": self.sampling.model_dump(),
            "rewards": {name: {"weight": weight} for name, weight in self.rewards.weights.items()},
            "grpo": self.grpo.model_dump(),
            "optimizer": self.optimizer_config.model_dump(),
            "run": self.run.model_dump(),
        }
        return json.dumps(sections, indent=2) + "\n"  # JSON is YAML

    def _prepare(self) -> None:
        config = self.optimizer_config
        optimizer = torch.optim.AdamW(
            self.pipe.transformer.parameters(),
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            weight_decay=config.weight_decay,
        )
        scheduler = get_scheduler(
            config.lr_scheduler_type,
            optimizer,
            num_warmup_steps=config.warmup_steps,
            num_training_steps=self.run.max_steps * self.grpo.num_iterations,
        )
        self.model, self.optimizer = self.accelerator.prepare(self.pipe.transformer, optimizer)
        self.scheduler = scheduler
        self.accelerator.register_for_checkpointing(scheduler)

    # ------------------------------------------------------------------------------------------------- the loop

    def train(self) -> Path:
        """Run all steps; returns the run's folder.

        Raises:
            RewardError: a reward that cannot be used; a checkpoint is written first.
        """
        run, process = self.run, self.accelerator
        if run.resume and (path := find_checkpoint(run.resume, self.folder.checkpoints)):
            state = load_checkpoint(process, path)
            self.step_done, self.seconds_done = state["step"], state["seconds"]
        self.folder.keep_steps(self.step_done)
        if run.report_to != "none":
            process.init_trackers("tensorboard")
        if self.step_done == 0 and run.eval_steps:
            self.log(0, self.evaluate(0))
        disable = run.disable_tqdm or not process.is_main_process
        bar = tqdm(total=run.max_steps, initial=self.step_done, desc="GRPO", unit="step", disable=disable)
        with bar, _stop_on_interrupt() as stop:
            while self.step_done < run.max_steps and not stop.requested:
                step = self.step_done + 1
                try:
                    metrics = self.step(step)
                    self.step_done, self.seconds_done = step, self.seconds_done + metrics["step_time"]
                    if run.eval_steps and (step % run.eval_steps == 0 or step == run.max_steps):
                        metrics |= self.evaluate(step)
                except RewardError:
                    self.save()
                    raise
                self.log(step, metrics)
                if run.save_steps and step % run.save_steps == 0:
                    self.save()
                bar.update()
                bar.set_postfix(_postfix(metrics))
        if stop.requested and self.step_done < run.max_steps:
            self.save()
            tqdm.write(f"stopped after step {self.step_done}; continue with --run.resume auto")
        elif process.is_main_process:
            self.pipe.save_pretrained(self.folder.final)
        process.wait_for_everyone()
        process.end_training()
        return self.folder.path

    def step(self, step: int) -> dict[str, float]:
        """One batch of rollouts and its updates; returns its metrics."""
        begin = time.perf_counter()
        rollout = self.rollout(step)
        advantages_NG = self.advantages(rollout)
        means, clock = Means(), Clock(self.accelerator.device)
        with clock("update"):
            for _ in range(self.grpo.num_iterations):
                grad_norm = self.update(rollout, advantages_NG.flatten(), means)
        metrics = self._gathered(means) | self._reward_metrics(rollout)
        seconds = rollout.seconds | clock.seconds
        elapsed = time.perf_counter() - begin
        num_images = self.grpo.num_groups * self.grpo.num_generations
        return metrics | {
            "grad_norm": grad_norm,
            "learning_rate": self.scheduler.get_last_lr()[0],
            "num_tokens": float(step * num_images * self.weights_L.numel()),
            "step_time": elapsed,
            "images_per_second": num_images / elapsed,
            **{f"time/{name}": value for name, value in seconds.items()},
        }

    def rollout(self, step: int) -> Rollout:
        """This process's groups of a step."""
        labels = step_labels(self.labels, self.grpo.num_groups, self.run.seed, step)
        mine = range(self.accelerator.process_index, len(labels), self.accelerator.num_processes)
        with self.accelerator.autocast():
            return collect(
                self.pipe,
                [labels[group] for group in mine],
                [("rollout", self.run.seed, step, group) for group in mine],
                self.grpo.num_generations,
                self.sampling,
                self.rewards,
                self.run.per_device_eval_batch_size,
            )

    def advantages(self, rollout: Rollout) -> Tensor:
        """(N, G) advantages of this process's images."""
        rewards_KNG = torch.stack(list(rollout.components.values()))
        weights_K = torch.tensor([self.rewards.weights[name] for name in rollout.components])
        return combined_advantages(
            rewards_KNG, weights_K, self.grpo.scale_rewards, self.grpo.multi_objective_aggregation
        ).to(self.accelerator.device)

    def update(self, rollout: Rollout, advantages_B: Tensor, means: Means) -> float:
        """One optimizer step on all images of the rollout; returns the gradient's norm before clipping."""
        num_images = len(advantages_B)
        starts = range(0, num_images, self.run.per_device_train_batch_size)
        for start in starts:
            part = slice(start, start + self.run.per_device_train_batch_size)
            is_last = start == starts[-1]
            with self.accelerator.accumulate() if is_last else self.accelerator.no_sync(self.model):
                loss = self.loss(rollout, advantages_B, part, means)
                # The loss is a mean over the part: its share makes the sum a mean over all images.
                share = len(advantages_B[part]) / num_images
                self.accelerator.backward(loss * share)
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.optimizer_config.max_grad_norm)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        return float(norm)

    def loss(self, rollout: Rollout, advantages_B: Tensor, part: slice, means: Means) -> Tensor:
        """The GRPO loss of some of the rollout's images, and their metrics into `means`."""
        grpo, sampling = self.grpo, self.sampling
        tokens_BL, labels_B, inputs_BLD = rollout.tokens[part], rollout.labels[part], rollout.inputs[part]
        with self.accelerator.autocast():
            logits_BLV = teacher_forced_logits(
                self.pipe.transformer, labels_B, inputs_BLD, sampling, wrapped=self.model
            )
        log_probs_BLV = policy_log_probs(logits_BLV, sampling, drawn_Bl=tokens_BL)
        log_probs_BL = token_log_probs(log_probs_BLV, tokens_BL)
        surrogate = clipped_surrogate(
            log_probs_BL, rollout.log_probs[part], advantages_B[part], grpo.epsilon, grpo.epsilon_high
        )
        # KL and entropy are of the unfiltered distributions: the filtered ones may have other supports.
        full_BLV = logits_BLV.log_softmax(-1) if sampling.is_filtered else log_probs_BLV
        entropy_BL = exact_entropy(full_BLV)
        kl_BL = None
        if self.reference is not None:
            with torch.no_grad(), self.accelerator.autocast():
                reference_BLV = teacher_forced_logits(self.reference, labels_B, inputs_BLD, sampling)
            kl_BL = exact_kl(full_BLV, reference_BLV.log_softmax(-1))
            means.add(kl=kl_BL, kl_per_image=kl_BL.sum(1))
        loss = grpo_loss(
            surrogate.objective_BL, kl_BL, entropy_BL, self.weights_L, grpo.beta, grpo.entropy_coef
        )
        difference_BL = (log_probs_BL.detach() - rollout.log_probs[part]).abs()
        means.add(loss=loss, entropy=entropy_BL)
        means.put("clip_ratio/low_mean", surrogate.is_low_clipped_BL.float())
        means.put("clip_ratio/high_mean", surrogate.is_high_clipped_BL.float())
        means.put("clip_ratio/region_mean", (surrogate.is_low_clipped_BL | surrogate.is_high_clipped_BL).float())
        for name in ("mean", "max"):
            means.put(f"sampling/sampling_logp_difference/{name}", difference_BL)
        for name in ("min", "mean", "max"):
            means.put(f"sampling/importance_sampling_ratio/{name}", surrogate.ratio_BL)
        if sampling.is_filtered:
            removed_BLV = ~kept_tokens(logits_BLV, sampling)
            means.put("sampling/filtered_mass", (full_BLV.detach().exp() * removed_BLV).sum(-1))
        return loss

    # ------------------------------------------------------------------------------------- measuring and saving

    def evaluate(self, step: int) -> dict[str, float]:
        """Measure the model on fixed seeds and write its sample grid; metrics with the prefix `eval_`."""
        begin = time.perf_counter()
        self.accelerator.wait_for_everyone()
        result: list[Evaluation | None] = [None]
        if self.accelerator.is_main_process:
            with self.accelerator.autocast():
                result[0] = evaluate(
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
            names = [condition.text for condition in self.pipe.conditions(result[0].labels)]
            self.folder.save_grid(step, result[0].samples, names)
        self.accelerator.wait_for_everyone()
        metrics = result[0].metrics if result[0] else {}
        return {f"eval_{name}": value for name, value in metrics.items()} | {
            "eval_time": time.perf_counter() - begin
        }

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """A line of metrics.jsonl, and the same to the tracker."""
        self.folder.append_metrics({"step": step} | metrics)
        if self.run.report_to != "none":
            self.accelerator.log(metrics, step=step)

    def save(self) -> Path:
        """A checkpoint of the state after the last whole step."""
        state = {"seconds": self.seconds_done}
        return save_checkpoint(
            self.accelerator, self.folder.checkpoints, self.step_done, state, self.run.save_total_limit
        )

    def _reward_metrics(self, rollout: Rollout) -> dict[str, float]:
        names = list(rollout.components)
        mine_KNG = torch.stack([rollout.components[name] for name in names]).to(self.accelerator.device)
        all_KNG = gather(mine_KNG.transpose(0, 1).contiguous()).transpose(0, 1).cpu()
        total_NG = self.rewards.total(dict(zip(names, all_KNG, strict=True)))
        deviation_N = torch.tensor([_deviation(group) for group in total_NG])
        metrics = {
            "reward": total_NG.nanmean().item(),
            "reward_std": deviation_N.mean().item(),
            "frac_reward_zero_std": (deviation_N == 0).float().mean().item(),
        }
        for name, scores_NG in zip(names, all_KNG, strict=True):
            metrics[f"rewards/{name}/mean"] = scores_NG.nanmean().item()
            metrics[f"rewards/{name}/std"] = _deviation(scores_NG)
        return metrics

    def _gathered(self, means: Means) -> dict[str, float]:
        """Means (or extremes, by name) over all processes, which have equally many images."""
        parts = gather_object([dict(means.items())])
        whole = Means()
        for part in parts:
            for name, value in part.items():
                whole.put(name, value)
        return dict(whole.items())


class _stop_on_interrupt:
    """The first Ctrl-C lets the step in hand end, so that its state can be saved; the second is immediate."""

    requested = False

    def __enter__(self) -> "_stop_on_interrupt":
        self._previous: Callable | int | None = None
        try:
            self._previous = signal.signal(signal.SIGINT, self._request)
        except ValueError:  # not in the main thread: the interrupt is not ours to take
            pass
        return self

    def _request(self, *_: object) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *_: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)


def _named(rewards: Reward | Mapping[str, Reward]) -> WeightedSum:
    if isinstance(rewards, WeightedSum):
        return rewards
    if isinstance(rewards, Mapping):
        return WeightedSum(rewards)
    name = getattr(rewards, "__name__", type(rewards).__name__)
    return WeightedSum({name: rewards})


def _deviation(values: Tensor) -> float:
    scored = values[~values.isnan()]
    return scored.std().item() if len(scored) > 1 else 0.0


def _postfix(metrics: dict[str, float]) -> dict[str, str]:
    shown = {"reward": f"{metrics['reward']:.3f}"}
    if "kl_per_image" in metrics:
        shown["kl"] = f"{metrics['kl_per_image']:.1f}"
    return shown | {"images/s": f"{metrics['images_per_second']:.0f}"}
