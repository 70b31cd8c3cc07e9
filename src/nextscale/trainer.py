"""GRPO for next-scale models: sample groups, score them, move the model towards the better ones.

Shapes: N groups · G images of one group · B = N G images · K rewards
"""

import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list, gather_object, set_seed
from tqdm.auto import tqdm

from nextscale.base.checks import as_number, check_kind, check_list, found
from nextscale.base.clock import Clock
from nextscale.base.conditions import Condition
from nextscale.base.errors import ConfigError, NextscaleError, RewardError, TrainingError, in_words
from nextscale.base.files import replacing_folder, write_text_aside
from nextscale.base.interrupt import Interrupted, StopOnSignal
from nextscale.base.metrics import Means
from nextscale.base.processes import fail_together
from nextscale.callbacks import Callback, ProgressBar, Trackers, Warnings, best_model
from nextscale.collector import Collector
from nextscale.controllers import AdaptiveKL, Constraints, Controller, EntropyFloor
from nextscale.credit import check_compared, credit_source, find_credit
from nextscale.crediting import Crediting
from nextscale.evaluation import Embedder, Judges, SetMeasure, step_metrics
from nextscale.evaluator import Evaluator
from nextscale.grpo import GRPOConfig
from nextscale.learner import Learner, check_reference
from nextscale.models.folder import write_folder
from nextscale.models.lora import adapted_layers, merged
from nextscale.objective import Coefficients
from nextscale.optimizer import OptimizerConfig
from nextscale.options import Options
from nextscale.pipeline import VARPipeline
from nextscale.policy import SamplingConfig
from nextscale.report.model_card import write_model_card
from nextscale.rewards.protocol import Reward
from nextscale.rewards.reward_set import RewardSet
from nextscale.runs.checkpoint import check_finite, find_checkpoint, tidy_checkpoints
from nextscale.runs.config import RunConfig
from nextscale.runs.diagnosis import diagnose
from nextscale.runs.environment import environment
from nextscale.runs.hacking import HackingWatch
from nextscale.runs.launch import make_accelerator
from nextscale.runs.result import TrainResult
from nextscale.runs.writer import RunFolder
from nextscale.saver import Progress, Saver
from nextscale.tuning import TuningConfig

LISTED = "a list of conditions: pipe.conditions([...]) makes it of classes, pipe.prompted([...]) of prompts"


class GRPOTrainer:
    """Fine-tunes a pipeline's transformer, in place.

    Args:
        pipe: the model; its transformer is trained, its tokenizer stays frozen.
        rewards: one reward, several by name, or a `RewardSet`, with weights, constraints and held-out ones.
        grpo: the algorithm.
        conditions: what to train on, such as `read_prompts` gives; by default `grpo.class_labels`, or else
            all classes of the model.
        eval_conditions: what evaluations draw; by default what is trained on.
        sampling: how the model is sampled, in training (but for `grpo.temperature`) as afterwards; by default
            the pipeline's. The trained pipeline keeps it as its own.
        tuning: what of the transformer is trained: by default all of it.
        judges: independent classifiers for the evaluation.
        measures: of all images of an evaluation together.
        embed: embeddings for the evaluation's diversity.
        config_yaml: the contents of the run's `config.yaml`; by default the options above.
        command: the words that the run was started with, for its `environment.json`.
        sources: name of a reward to the Python file that it is defined in; the run keeps a copy.
        callbacks: what else looks on, after the progress bar and the trackers.

    Attributes:
        should_stop: set it, in any process, to end the run after the step in hand.

    Raises:
        CheckpointError: there is no checkpoint to resume from at the path that is given.
        ConfigError: arguments of another kind, options that do not fit the model or each other, or a folder
            that is in use or holds a run.
    """

    def __init__(
        self,
        pipe: VARPipeline,
        rewards: Reward | Mapping[str, Reward],
        grpo: GRPOConfig | None = None,
        *,
        conditions: Sequence[Condition] | None = None,
        eval_conditions: Sequence[Condition] | None = None,
        sampling: SamplingConfig | None = None,
        tuning: TuningConfig | None = None,
        optimizer: OptimizerConfig | None = None,
        run: RunConfig | None = None,
        judges: Judges | None = None,
        measures: Sequence[SetMeasure] = (),
        embed: Embedder | None = None,
        config_yaml: str | None = None,
        command: Sequence[str] = (),
        sources: Mapping[str, Path] | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        # What is given, checked: its kinds, then what goes together. Nothing is written before `open`.
        check_kind("pipe", pipe, VARPipeline, "a pipeline, such as VARPipeline.from_pretrained(...)")
        self.options = Options.of(pipe, grpo, sampling, tuning, optimizer, run)
        self.grpo, self.run, self.sampling = self.options.grpo, self.options.run, self.options.sampling
        self.explored = self.options.explored  # the policy that draws in training
        self.rewards = RewardSet.of(rewards)
        for name, function in {"judges": judges, "embed": embed}.items():
            if function is not None and not callable(function):
                raise ConfigError(f"{name}: got {found(function)}, expected a function")
        of_sets = "a list of objects with the methods `features` and `measure`"
        measures = check_list("measures", measures, SetMeasure, of_sets, may_be_empty=True)
        looking_on = "a list of objects of subclasses of Callback"
        callbacks = check_list("callbacks", callbacks, Callback, looking_on, may_be_empty=True)
        if conditions is not None and self.grpo.class_labels:
            raise ConfigError("grpo.class_labels has no effect beside `conditions`: give one of them")
        if conditions is None:
            conditions = pipe.conditions(self.grpo.class_labels or range(pipe.num_classes))
        self.conditions = check_list("conditions", conditions, Condition, LISTED)
        if eval_conditions is None:
            eval_conditions = self.conditions
        eval_conditions = check_list("eval_conditions", eval_conditions, Condition, LISTED)
        self.rewards.without_held_out().check_conditions(self.conditions)
        self.rewards.check_conditions(eval_conditions)
        self.accelerator = make_accelerator(self.run)
        self.grpo.check_processes(self.accelerator.num_processes)
        check_reference(self.grpo, self.run)
        self.options.check_fit(pipe, self.rewards.weights, self.rewards.constraints, self.rewards.held_out)
        self.best = best_model(self.run)
        check_compared(self.grpo, self.rewards)
        credit = find_credit(self.grpo.credit, self.rewards)

        # The folder: free to be written to, or to be gone on in.
        self.folder = RunFolder(Path(self.run.output_dir), self.accelerator.is_main_process)
        self.sources = {**(sources or {}), **credit_source(self.grpo.credit)}
        needed = [*self.sources.values(), *([Path(pipe.source)] if pipe.source else [])]
        self.folder.check(resume=bool(self.run.resume), overwrite=self.run.overwrite, needed=needed)
        fixed = self.rewards.roles(), self.conditions
        self.options.check_continuable(self.folder, *fixed)
        self.config_yaml = config_yaml or self.options.as_yaml(pipe.source, self.rewards.describe())
        self.command = command

        # Those who do the work of a step: what is trained, its images, and how the model is measured.
        self.pipe = pipe
        options = self.options
        self.learner = Learner(pipe, self.accelerator, options)
        self.collector = Collector(pipe, self.learner, self.conditions, self.rewards, options)
        self.evaluator = Evaluator(
            pipe,
            self.learner,
            eval_conditions,
            self.rewards,
            self.folder,
            options,
            judges=judges,
            measures=measures,
            embed=embed,
        )

        # What adapts from step to step, and how scores become advantages with it.
        grpo = self.grpo
        self.constraints = Constraints(self.rewards.constraints, grpo.constraint_rate, grpo.constraint_start)
        self.watch = HackingWatch(self.rewards.held_out)
        self.entropy_floor: EntropyFloor | None = None
        self.adaptive_kl: AdaptiveKL | None = None
        self.controllers: dict[str, Controller] = {"constraints": self.constraints, "watch": self.watch}
        if grpo.entropy_floor is not None:
            num_scales = len(self.learner.objective.lengths)
            self.entropy_floor = EntropyFloor(grpo.entropy_floor, grpo.entropy_floor_rate, num_scales)
            self.controllers["entropy_floor"] = self.entropy_floor
        if grpo.target_kl is not None:
            self.adaptive_kl = AdaptiveKL(grpo.beta, grpo.target_kl, grpo.target_kl_rate)
            self.controllers["adaptive_kl"] = self.adaptive_kl
        self.crediting = Crediting(pipe, self.learner, self.rewards, self.constraints, credit, options)
        self.after_update = [each for each in (self.entropy_floor, self.adaptive_kl) if each is not None]

        # What looks on, and what is kept to go on from.
        self.bar = ProgressBar()
        own: list[Callback] = [self.bar, Warnings(), Trackers()]
        # The best model last: it may be that by a metric which another one adds.
        self.callbacks = [*own, *callbacks, *([self.best] if self.best else [])]
        of_run = options.fixed(*fixed)
        self.saver = Saver(self.learner, self.folder, of_run, self.controllers, self.callbacks)
        self.should_stop, self.has_trained = False, False

    @property
    def progress(self) -> Progress:
        """How far the run has come."""
        return self.saver.progress

    @property
    def step_done(self) -> int:
        """The number of whole steps done."""
        return self.progress.step

    # ---- the loop

    def open(self) -> None:
        """Take the run's folder for this run alone; `train` does so by itself.

        Raises:
            ConfigError: another run is using it, or it holds a run that is neither to be resumed nor
                replaced.
        """
        run, process = self.run, self.accelerator
        with fail_together():
            self.folder.open(self.config_yaml, resume=bool(run.resume), overwrite=run.overwrite)
            self.folder.keep_sources(self.sources)
            told = process.device, self.command, process.num_processes, self.learner.precision
            self.folder.write_environment(environment(*told, self.pipe.source))

    def train(self) -> TrainResult:
        """Run all steps. The pipeline is then as one that was loaded with these weights: an adapter is
        merged, and where the average of the weights is what is exported, it has that, also after a run that
        was stopped.

        Raises:
            ConfigError: as `open` does.
            RewardError: a reward that cannot be used; a checkpoint is written first.
            TrainingError: the gradient stays infinite or NaN; a checkpoint from before is written first.
            Interrupted: a KeyboardInterrupt, on Ctrl-C or SIGTERM; a checkpoint is written first.
        """
        if self.options.tuning.use_peft and not adapted_layers(self.pipe.transformer):
            raise ConfigError(
                "the pipeline no longer has this trainer's adapter: make a trainer anew, and train before "
                "another one is made for the same pipeline"
            )
        if self.has_trained:
            raise ConfigError("this trainer has been run: make a new one, to resume its run or for another")
        self.open()
        self.has_trained = True
        try:
            return self._train()
        finally:
            self.bar.close()
            self.folder.close()
            for tracker in self.accelerator.trackers:
                tracker.finish()
            self.learner.close()

    def _train(self) -> TrainResult:
        run, process = self.run, self.accelerator

        # Continue where an earlier run stopped. What it logged after its last checkpoint is logged anew.
        # All that is drawn here has seeds of its own. A user's reward may draw from the generators of all.
        set_seed(run.seed % 2**31, device_specific=True)  # numpy takes 32 bits, and a process adds its number
        path: Path | None = None
        if run.resume:
            path = find_checkpoint(process, run.resume, self.folder.checkpoints, self.warn)
        if path is not None:
            self.load(path)
            if self.step_done >= run.max_steps:
                self.say(f"all {self.step_done} steps are done; raise run.max_steps to go on")
        with fail_together():
            self.folder.keep_steps(None if path is None else self.step_done)
            if process.is_main_process and path is not None:
                tidy_checkpoints(self.folder.checkpoints, self.step_done, run.save_total_limit)
        self.tell("on_train_begin")

        # A signal is heard to the end: one may reach a process while all save, as another told them to.
        with StopOnSignal() as stop:
            return self._end(self._steps(stop))

    def _steps(self, stop: StopOnSignal) -> int:
        """All steps, or those until a signal; returns it, or 0. Ctrl-C lets the one in hand end, in all
        processes alike; what fails ends the run after a checkpoint."""
        try:
            while not (signal_number := max(gather_object([stop.requested]))):
                # An evaluation that is due may be one that an earlier run did not get to.
                if self.evaluation_is_due and self.progress.step_evaluated != self.step_done:
                    self.log(self.step_done, self.evaluate())
                if self.step_done >= self.run.max_steps:
                    break
                if any(gather_object([self.should_stop])):
                    if self.run.eval_steps and self.progress.step_evaluated != self.step_done:
                        self.log(self.step_done, self.evaluate())
                    break
                metrics = self.step(self.step_done + 1)
                self.finish_step(metrics)
        except (RewardError, TrainingError):  # raised by all processes together
            self.save_what_can_be()
            self.learner.unshard()
            raise
        except Exception:  # such as a callback's; of this process alone: others would not come to save
            if self.accelerator.num_processes == 1 and self.step_done:
                self.save_what_can_be()
            raise
        return signal_number

    def _end(self, signal_number: int) -> TrainResult:
        """A checkpoint to go on from, and the final model if nothing is left to do.

        Args:
            signal_number: of the signal that ended the steps, or 0.
        """
        self.pipe.sampling = self.sampling
        if not self.saver.is_saved:
            self.save()
        self.learner.unshard()
        if signal_number and self.step_done < self.run.max_steps:
            raise Interrupted(
                f"stopped after step {self.step_done}; continue with --run.resume auto, or in Python with "
                'RunConfig(resume="auto", ...) and the pipeline loaded anew',
                signal_number,
            )
        check_finite(self.pipe.transformer)
        # Here, since Matplotlib takes half a second, which commands that train nothing would wait for too.
        from nextscale.report.page import write_report

        with fail_together():
            is_main = self.accelerator.is_main_process
            self.learner.release(self.folder.final / "adapter" if is_main else None)
            if is_main:
                self.pipe.save_pretrained(self.folder.final)
                is_prompted, final = not self.pipe.num_classes, self.folder.final
                write_model_card(final, self.folder.path, sampling=self.sampling, is_prompted=is_prompted)
                write_report(self.folder.path)
        result = self.result()
        self.tell("on_train_end", result)
        return result

    def result(self) -> TrainResult:
        """What has been reached so far."""
        best_step = self.best.step if self.best else None
        done = self.progress
        return TrainResult(
            self.folder.path, done.step, done.seconds, done.last_metrics, done.first_evaluation, best_step
        )

    def tell(self, event: str, *arguments: Any) -> None:
        """Call an event of all callbacks."""
        for callback in self.callbacks:
            getattr(callback, event)(self, *arguments)

    def say(self, sentence: str) -> None:
        """Tell the user something, once however many processes there are."""
        if self.accelerator.is_main_process:
            tqdm.write(sentence, file=sys.stderr)

    def warn(self, sentence: str) -> None:
        """`say` what does not end the run."""
        self.say(f"Warning: {sentence}")

    def step(self, step: int) -> dict[str, float]:
        """One training step: a batch of rollouts and its updates; returns its metrics.

        Args:
            step: from 1; the images depend on it.
        """
        begin, clock = time.perf_counter(), Clock(self.accelerator.device)
        self.saver.begin_step()

        # Draw and score: this process's share of the step's groups. All see the scores of all.
        rollout = self.collector.rollout(step)
        scores = self.collector.scores(rollout)
        reward_metrics = step_metrics(self.rewards, scores)

        # Advantages. The multipliers of the constraints move first: the model's update then answers their
        # last move, and they its, which damps their swing.
        constraint_metrics = self.constraints.update(reward_metrics)
        of_all = partial(self.crediting.of_all, step=step)
        rollout, scores, refill_metrics = self.collector.refilled(rollout, scores, step, of_all)
        coefficients = self.coefficients()
        advantages = self.crediting.of_mine(scores, step)
        advantages = self.crediting.to_tokens(advantages, rollout, scores, clock)  # (B,), (B, S) or (B, L)
        advantages = self.crediting.less_kl(advantages, rollout, coefficients.beta)

        # Update: num_iterations optimizer steps on the same images, each on the gradient of all of them.
        # One that is not finite is left out, for it would end the model. What the first iteration finds out
        # (log-probs before any update, the reference's features) the others take from it.
        means, num_skipped = Means(), 0
        learner = self.learner
        with clock("update"):
            parts = learner.parts(rollout, advantages)
            for _ in range(self.grpo.num_iterations):
                for i, (batch, weight, is_last) in enumerate(parts):
                    output = learner.backward(batch, weight, coefficients, exchanges=is_last)
                    if weight:
                        means.add(output.metrics)
                    parts[i] = replace(batch, **output.kept), weight, is_last
                grad_norm = learner.clip_gradients()
                if math.isfinite(grad_norm):
                    learner.update()
                else:
                    num_skipped += 1
                    learner.num_skipped += 1
                    if learner.num_skipped > self.run.max_skipped_updates:
                        raise TrainingError(
                            diagnose(self.pipe.transformer, scores, output.metrics, learner.num_skipped)
                        )
                learner.zero_grad()

        learner.sync_reference(step)

        # Adapt entropy bonuses and beta to what the update measured, over all processes.
        loss_metrics = Means.combined(gather_object([means.parts()]))
        controller_metrics: dict[str, float] = {}
        for controller in self.after_update if not num_skipped else ():
            controller_metrics |= controller.update(loss_metrics)

        # By the clock of the main process: callbacks of all are told the same, and may act on it.
        told = time.perf_counter() - begin, rollout.seconds | clock.seconds
        elapsed, seconds = broadcast_object_list([told])[0]
        num_groups = self.grpo.num_groups + refill_metrics.get("resampled_groups", 0.0)
        num_images = num_groups * self.grpo.num_generations
        num_tokens = num_images * self.pipe.transformer.schedule.num_tokens
        return {
            **loss_metrics,
            **reward_metrics,
            **constraint_metrics,
            **refill_metrics,
            **controller_metrics,
            "grad_norm": float(grad_norm),
            "skipped_updates": float(num_skipped),
            "learning_rate": float(learner.scheduler.get_last_lr()[0]),
            "num_tokens": self.progress.num_tokens + num_tokens,
            "step_time": elapsed,
            "images_per_second": num_images / elapsed,
            **{f"time/{name}": value for name, value in seconds.items()},
        }

    def coefficients(self) -> Coefficients:
        """What the controllers of the loss say now."""
        beta = self.grpo.beta if self.adaptive_kl is None else self.adaptive_kl.beta
        return Coefficients(beta, None if self.entropy_floor is None else self.entropy_floor.bonuses)

    # ---- measuring and saving

    @property
    def evaluation_is_due(self) -> bool:
        """Whether the model is measured after the last whole step."""
        steps = self.run.eval_steps
        return bool(steps) and (self.step_done % steps == 0 or self.step_done == self.run.max_steps)

    def finish_step(self, metrics: dict[str, float]) -> None:
        """Evaluate, log and save where it is time to; what a step measured is logged even if that fails."""
        self.saver.end_step(metrics)
        evaluated: dict[str, float] = {}
        try:
            self.tell("on_step_end", metrics)
            if self.evaluation_is_due:
                evaluated = self.evaluate()
        finally:
            self.log(self.step_done, metrics | evaluated)
        if self.run.save_steps and self.step_done % self.run.save_steps == 0:
            self.save()

    def evaluate(self) -> dict[str, float]:
        """Measure the model on fixed seeds and write its sample grid; metrics with the prefix `eval_`."""
        begin = time.perf_counter()
        result = self.evaluator.measure(self.step_done, partial(self.tell, "on_prediction_step"))
        # "base" is what the untrained model scores on what it is trained on, by the policy that draws there:
        # where evaluations draw otherwise, the first step says it.
        draws_alike = self.evaluator.conditions == self.conditions and self.explored == self.sampling
        if self.step_done == 0 and draws_alike:
            self.constraints.set_base(result.metrics)
        metrics = {f"eval_{name}": value for name, value in result.metrics.items()}
        warning_metrics = self.watch.update(metrics)
        for warning in self.watch.warnings.values():
            self.warn(warning)
        elapsed = broadcast_object_list([time.perf_counter() - begin])[0]  # as in `step`
        metrics |= warning_metrics | {"eval_time": elapsed}
        if self.step_done == 0:
            self.progress.first_evaluation = dict(metrics)
        self.tell("on_evaluate", metrics)
        self.progress.step_evaluated = self.step_done  # last: what failed before is done again on resuming
        return metrics

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """A line of metrics.jsonl, which the trackers get, too.

        Raises:
            ConfigError: a callback added something that is no number.
        """
        with fail_together():
            for name, value in metrics.items():
                metrics[name] = as_number(f"the metric '{name}'", value)  # one of NumPy's, or a tensor of one
            self.folder.append_metrics({"step": step} | metrics)
        self.progress.last_metrics = metrics
        self.tell("on_log", step, metrics)

    def save(self) -> Path:
        """Write a checkpoint of the state after the last whole step; returns its path."""
        path = self.saver.save()
        self.tell("on_save", path)
        return path

    def save_last_whole_step(self) -> None:
        """Write a checkpoint of the state before a step that failed, unless there is one. Where the step had
        moved the model, in one of several iterations, the last one that was written stands."""
        if self.saver.undo_step() and not self.saver.is_saved:
            self.save()

    def save_what_can_be(self) -> None:
        """`save_last_whole_step` before an error is raised, which is what the user has to know first."""
        try:
            self.save_last_whole_step()
        except (NextscaleError, OSError) as error:
            self.warn(f"no checkpoint was written either: {in_words(error)}")

    def load(self, path: Path) -> None:
        """Continue from a checkpoint.

        Raises:
            CheckpointError: a file of it is missing or broken, or was written by an earlier version.
        """
        self.saver.load(path)
        is_ahead = any(gather_object([self.folder.drop_best_after(self.step_done)]))
        if self.best and (is_ahead or not self.folder.owns(path)):
            self.best.forget()  # it is in the other folder, or a later one has replaced it

    def export(self, folder: Path) -> None:
        """Write the model as evaluations measure it, to a folder that it can be loaded from, and after which
        step it is. All processes call it."""
        with self.learner.as_evaluated():
            model = self.learner.whole_model()
            with fail_together():
                if self.accelerator.is_main_process:
                    parts = merged(model), self.pipe.tokenizer, self.pipe.class_names, self.sampling
                    with replacing_folder(folder) as aside:
                        write_folder(aside, *parts)
                        step = {"step": self.step_done}
                        write_text_aside(aside / self.folder.best_step.name, json.dumps(step) + "\n")
