"""What looks on while a run goes: events under the names that transformers' users know."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from nextscale.base.errors import ConfigError
from nextscale.base.metrics import finite
from nextscale.base.precision import has_fast_bfloat16
from nextscale.runs.config import MAX_DRIFT, RunConfig
from nextscale.runs.result import TrainResult

if TYPE_CHECKING:
    from nextscale.trainer import GRPOTrainer


class Callback:
    """Does something at events of a run. A subclass overrides the events that it needs.

    Every process calls every event, with the same metrics. `trainer.accelerator.is_main_process` tells which
    one is to write. To end a run after the step in hand, set `trainer.should_stop` in any process.
    """

    def on_train_begin(self, trainer: "GRPOTrainer") -> None:
        """Before the first step, or before the next one of a run that was resumed."""

    def on_step_end(self, trainer: "GRPOTrainer", metrics: Mapping[str, float]) -> None:
        """After a training step, before the evaluation that may follow; `trainer.step_done` is its number."""

    def on_prediction_step(self, trainer: "GRPOTrainer", num_done: int, num_images: int) -> None:
        """After a batch of an evaluation: this process has drawn `num_done` of its `num_images`."""

    def on_evaluate(self, trainer: "GRPOTrainer", metrics: dict[str, float]) -> None:
        """After an evaluation, with the model that it measured (see `GRPOTrainer.export`); what is added to
        the metrics is logged with them."""

    def on_log(self, trainer: "GRPOTrainer", step: int, metrics: Mapping[str, float]) -> None:
        """After a line of metrics.jsonl: what a step measured, or an evaluation, or both."""

    def on_save(self, trainer: "GRPOTrainer", path: Path) -> None:
        """After a checkpoint was written."""

    def on_train_end(self, trainer: "GRPOTrainer", result: TrainResult) -> None:
        """After the final model was written. A run that was interrupted or failed does not come here."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to hold of it: numbers, text, lists and mappings alone."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state that `state_dict` gave."""


def named(callbacks: Sequence[Callback]) -> dict[str, Callback]:
    """Callbacks by what a checkpoint calls them: their class, and which of its kind they are."""
    found: dict[str, Callback] = {}
    for each in callbacks:
        kind = type(each).__name__
        number = sum(type(other).__name__ == kind for other in found.values())
        found[f"{kind}-{number}" if number else kind] = each
    return found


class ProgressBar(Callback):
    """The steps done, and the time left, evaluations included; of an evaluation, the images drawn."""

    def __init__(self) -> None:
        self.bar: tqdm | None = None
        self.inner: tqdm | None = None
        self.seconds: dict[str, list[float]] = {"step_time": [], "eval_time": []}

    def on_train_begin(self, trainer: "GRPOTrainer") -> None:
        disable = trainer.run.disable_tqdm or not trainer.accelerator.is_main_process
        form = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
        self.bar = tqdm(
            total=trainer.run.max_steps,
            initial=trainer.step_done,
            desc="GRPO",
            unit="step",
            disable=disable,
            bar_format=form,
        )

    def on_prediction_step(self, trainer: "GRPOTrainer", num_done: int, num_images: int) -> None:
        if self.bar is None or self.bar.disable:
            return
        if self.inner is None:
            self.inner = tqdm(total=num_images, desc="evaluating", unit="image", leave=False)
        self.inner.update(num_done - self.inner.n)
        if num_done == num_images:
            self.inner.close()
            self.inner = None

    def on_evaluate(self, trainer: "GRPOTrainer", metrics: dict[str, float]) -> None:
        self.seconds["eval_time"].append(metrics["eval_time"])

    def on_step_end(self, trainer: "GRPOTrainer", metrics: Mapping[str, float]) -> None:
        self.seconds["step_time"].append(metrics["step_time"])
        if self.bar is None:
            return
        shown = {"reward": f"{metrics['reward']:.3f}"}
        if "kl_per_image" in metrics:
            shown["kl"] = f"{metrics['kl_per_image']:.1f}"
        shown["images/s"] = f"{metrics['images_per_second']:.0f}"
        self.bar.set_postfix(
            shown | {"left": tqdm.format_interval(self.seconds_left(trainer))}, refresh=False
        )
        self.bar.update()

    def seconds_left(self, trainer: "GRPOTrainer") -> float:
        """Of the steps and the evaluations to come, by the mean of those that were."""
        every, last, done = trainer.run.eval_steps, trainer.run.max_steps, trainer.step_done
        num_evaluations = last // every - (done - 1) // every + bool(last % every) if every else 0
        means = {name: sum(seen) / max(len(seen), 1) for name, seen in self.seconds.items()}
        return (last - done) * means["step_time"] + num_evaluations * means["eval_time"]

    def close(self) -> None:
        """Leave the bar as it is."""
        for each in (self.inner, self.bar):
            if each is not None:
                each.close()


class Warnings(Callback):
    """Says what a user should look into: once, not at every step."""

    def __init__(self) -> None:
        self.was_idle = False  # in the last step
        self.has_drifted = False  # in any step

    def on_train_begin(self, trainer: "GRPOTrainer") -> None:
        if trainer.learner.precision == "bf16" and not has_fast_bfloat16(trainer.accelerator.device.type):
            trainer.say(
                "Warning: this machine has no instructions for bfloat16, and takes many times as long as for "
                "float32: set run.mixed_precision to auto"
            )

    def on_step_end(self, trainer: "GRPOTrainer", metrics: Mapping[str, float]) -> None:
        # Of groups that were drawn anew until they differed, the rewards are logged as they first were. Where
        # a constraint is missed, images may differ in that alone.
        idle_groups = metrics.get("idle_groups", metrics["frac_reward_zero_std"] * trainer.grpo.num_groups)
        is_constrained = any(trainer.constraints.coefficients.values())
        is_idle = idle_groups == trainer.grpo.num_groups and not is_constrained
        if is_idle and not self.was_idle:
            trainer.say(
                "Warning: all images of each group have the same reward, so there is nothing to learn"
            )
        self.was_idle = is_idle

        drift = metrics["sampling/sampling_logp_difference/mean"]
        if drift > MAX_DRIFT[trainer.learner.precision] and not self.has_drifted:
            self.has_drifted = True
            trainer.say(
                f"Warning: sampler and trainer differ by {drift:.2g} nats a token on average, more than "
                "rounding explains; docs/policy.md says what to check"
            )


class Trackers(Callback):
    """Hands metrics, samples and the report to the trackers of `run.report_to`, by Accelerate."""

    def on_train_begin(self, trainer: "GRPOTrainer") -> None:
        kwargs: dict[str, dict[str, Any]] = {"tensorboard": {"purge_step": trainer.step_done + 1}}
        if not _has_wandb_key():
            kwargs["wandb"] = {"mode": "offline"}
        trainer.accelerator.init_trackers("nextscale", init_kwargs=kwargs)

    def on_log(self, trainer: "GRPOTrainer", step: int, metrics: Mapping[str, float]) -> None:
        trainer.accelerator.log(finite(metrics), step=step)

    def on_evaluate(self, trainer: "GRPOTrainer", metrics: dict[str, float]) -> None:
        grid = trainer.folder.grid(trainer.step_done)
        if trainer.accelerator.is_main_process and grid.exists():
            with Image.open(grid) as picture:
                pixels = np.asarray(picture.convert("RGB"))
            for tracker in trainer.accelerator.trackers:
                log_image(tracker, "samples", pixels, trainer.step_done)

    def on_train_end(self, trainer: "GRPOTrainer", result: TrainResult) -> None:
        report = trainer.folder.report
        for tracker in trainer.accelerator.trackers if report.exists() else ():
            if tracker.name == "wandb" and trainer.accelerator.is_main_process:
                tracker.tracker.save(str(report), base_path=str(report.parent), policy="now")


def log_image(tracker: Any, name: str, pixels: np.ndarray, step: int) -> None:
    """Hand an image to a tracker, if it takes images.

    Args:
        tracker: one of Accelerate's.
        pixels: (height, width, 3) uint8.
    """
    if tracker.name == "tensorboard":
        tracker.log_images({name: pixels[None]}, step=step, dataformats="NHWC")
    elif tracker.name == "trackio":
        import trackio  # pyright: ignore[reportMissingImports]

        tracker.log({name: trackio.Image(pixels)}, step=step)
    elif hasattr(tracker, "log_images"):
        tracker.log_images({name: [pixels]}, step=step)


class BestModel(Callback):
    """Keeps the model that was best by a metric of the evaluations, and may end a run that gets no better.

    Args:
        metric: such as eval_reward.
        greater_is_better: whether the greatest is best, or the least.
        patience: evaluations in a row without a better one after which the run ends; by default it does not.
    """

    def __init__(self, metric: str, *, greater_is_better: bool = True, patience: int | None = None) -> None:
        self.metric, self.sign, self.patience = metric, 1 if greater_is_better else -1, patience
        self.best: float | None = None
        self.step, self.num_worse = 0, 0

    def on_train_begin(self, trainer: "GRPOTrainer") -> None:
        self._stop_if_done(trainer)

    def on_evaluate(self, trainer: "GRPOTrainer", metrics: dict[str, float]) -> None:
        if self.metric not in metrics:
            names = ", ".join(sorted(name for name in metrics if name.startswith("eval_")))
            raise ConfigError(
                f"run.save_best '{self.metric}' is no metric of the evaluations: use one of {names}"
            )
        value = metrics[self.metric]
        if math.isfinite(value) and (self.best is None or self.sign * value > self.sign * self.best):
            trainer.export(trainer.folder.best)  # first: if it fails, the folder holds the one before
            self.best, self.step, self.num_worse = value, trainer.step_done, 0
        else:
            self.num_worse += 1
        if self.best is not None:
            metrics |= {"best/value": self.best, "best/step": float(self.step)}
        self._stop_if_done(trainer)

    def forget(self) -> None:
        """Begin anew, where the best model so far is not at hand."""
        self.best, self.step, self.num_worse = None, 0, 0

    def state_dict(self) -> dict[str, Any]:
        return {"by": self._by, "best": self.best, "step": self.step, "num_worse": self.num_worse}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["by"] == self._by:  # else it was the best by another metric
            self.best, self.step, self.num_worse = state["best"], state["step"], state["num_worse"]

    @property
    def _by(self) -> list[Any]:
        return [self.metric, self.sign]

    def _stop_if_done(self, trainer: "GRPOTrainer") -> None:
        if self.patience is None or self.num_worse < self.patience or trainer.should_stop:
            return
        trainer.should_stop = True
        trainer.say(
            f"Stopped early after step {trainer.step_done}: {self.metric} was best after step "
            f"{self.step}, {self.num_worse} evaluations ago"
        )


def best_model(run: RunConfig) -> BestModel | None:
    """What keeps the best model, if the run asks for it.

    Raises:
        ConfigError: an option without effect.
    """
    if run.save_best is not None:
        if not run.eval_steps:
            raise ConfigError("run.save_best has no effect with run.eval_steps 0: set that, or remove it")
        return BestModel(
            run.save_best, greater_is_better=run.greater_is_better, patience=run.early_stopping_patience
        )
    for name in ("greater_is_better", "early_stopping_patience"):
        if getattr(run, name) != RunConfig.model_fields[name].default:
            raise ConfigError(f"run.{name} has no effect without run.save_best: set that too, or remove it")
    return None


def _has_wandb_key() -> bool:
    """Whether Weights & Biases knows a user, or was told how to run; without, it would ask and wait."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE"):
        return True
    netrc = Path.home() / ".netrc"
    return netrc.exists() and "wandb" in netrc.read_text(encoding="utf-8", errors="replace")
