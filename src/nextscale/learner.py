"""What learns: the model in training, its loss, and its optimizer, in one process or spread over several."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.nn.parallel import DistributedDataParallel

from nextscale.base.average import Average
from nextscale.base.errors import ConfigError
from nextscale.base.precision import precision_on
from nextscale.drawing import Drawn
from nextscale.grpo import GRPOConfig
from nextscale.losses import LossOutput
from nextscale.models.lora import adapter_off, write_adapter
from nextscale.models.protocol import NextScaleModel
from nextscale.objective import Coefficients, Microbatch, Objective, microbatches
from nextscale.optimizer import make_optimizer
from nextscale.options import Options
from nextscale.pipeline import VARPipeline
from nextscale.reference import Reference, reference_dtype
from nextscale.runs.checkpoint import load_checkpoint, save_checkpoint
from nextscale.runs.config import RunConfig
from nextscale.runs.launch import asks_for_fsdp, check_trainable, reshards_after_forward
from nextscale.runs.sharding import Sharded, whole_of
from nextscale.tuning import base_fingerprint, check_tuning, frozen_fingerprint, tune, untune


class Learner:
    """A pipeline's transformer, made ready to be trained in place.

    Until `close` the pipeline belongs to it: it may hold an adapter, or parameters spread over processes.

    Args:
        pipe: moved to the accelerator's device.
        accelerator: says how many processes there are, and how they share the model.

    Attributes:
        model: what runs in training: the transformer, or what wraps it for several processes.
        objective: from a microbatch to its loss.
        average: the moving average of the weights, if one is kept.
        num_skipped: updates in a row that were left out, since their gradient was not finite.

    Raises:
        ConfigError: weights that cannot be trained, or a tuning that does not fit the model.
    """

    def __init__(self, pipe: VARPipeline, accelerator: Accelerator, options: Options) -> None:
        self.pipe, self.accelerator = pipe, accelerator
        self.grpo, self.tuning, self.run = grpo, tuning, run = options.grpo, options.tuning, options.run
        self.max_grad_norm = options.optimizer.max_grad_norm
        self.precision = precision_on(accelerator.device.type, run.mixed_precision)
        transformer = pipe.transformer
        check_trainable(transformer)
        untune(transformer)  # of a trainer that was made and never run
        check_tuning(tuning, transformer)
        pipe.to(accelerator.device)
        transformer.gradient_checkpointing = run.gradient_checkpointing
        if run.activation_offloading:
            transformer.keeping_inputs = partial(save_on_cpu, pin_memory=accelerator.device.type == "cuda")
        if run.torch_compile:
            pipe.compile()
        # The reference is not in checkpoints, unless it moves: a run goes on from the model that it began
        # with. An adapter's base is frozen, and known again by that.
        keeps_base = grpo.needs_reference and not grpo.sync_ref_model and not tuning.use_peft
        self.base = base_fingerprint(transformer) if keeps_base else None
        tune(transformer, tuning, run.seed)
        self.frozen = frozen_fingerprint(transformer)

        # Over several processes, the model is a copy in each, or spread over all. The reference is a copy of
        # it, or with LoRA the model itself with its adapter off.
        reference: Reference | None = None
        if grpo.needs_reference and not tuning.use_peft:
            dtype = reference_dtype(grpo, self.precision)
            reference = Reference.copy_of(transformer, dtype, grpo.offload_reference)
        self.sharded: Sharded | None = None
        self.model: nn.Module
        if asks_for_fsdp(run):
            reshards = reshards_after_forward()
            self.sharded = Sharded(transformer, reshard_after_forward=reshards)
            pipe.transformer = self.model = transformer = self.sharded.model
            if reference is not None:
                reference.model = Sharded(reference.model, reshard_after_forward=reshards).model
        else:
            self.model = accelerator.prepare(transformer)
        if grpo.needs_reference and tuning.use_peft:
            reference = Reference(transformer, partial(adapter_off, transformer))
        schedule, device = transformer.schedule, accelerator.device
        self.objective = Objective(grpo, options.explored, schedule, reference, device)

        num_updates = run.max_steps * grpo.num_iterations
        adamw, self.scheduler = make_optimizer(transformer, options.optimizer, num_updates)
        self.optimizer = accelerator.prepare(adamw)
        self.average: Average | None = None
        if tuning.ema_decay is not None:
            trained = (each for each in transformer.parameters() if each.requires_grad)
            self.average = Average(trained, tuning.ema_decay)
        self.num_updates, self.num_skipped = 0, 0  # by this process; updates left out in a row
        # Last, since it holds for the process: where something above fails, nothing is left behind.
        self.uses_tf32 = self.precision == "bf16" and accelerator.device.type == "cuda"
        if self.uses_tf32:  # for the little that is not bfloat16
            self.precision_before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("high")

    # ---- an update

    def parts(self, drawn: Drawn, advantages: Tensor) -> list[tuple[Microbatch, float, bool]]:
        """This process's images in `microbatches`.

        A reference that waits in main memory is brought here once for all of them, before there is a gradient
        that needs the same room; what it makes of them waits in main memory as well.
        """
        num_images, size = self.grpo.num_images, self.run.per_device_train_batch_size
        parts = list(microbatches(drawn, advantages, num_images, size))
        objective, reference = self.objective, self.objective.reference
        if reference is None or not reference.is_offloaded:
            return parts
        with reference.brought_to(self.accelerator.device), self.autocast():
            return [
                (
                    replace(batch, reference_features=objective.reference_features(batch).cpu()),
                    weight,
                    is_last,
                )
                for batch, weight, is_last in parts
            ]

    def backward(
        self, batch: Microbatch, weight: float, coefficients: Coefficients, *, exchanges: bool
    ) -> LossOutput:
        """The loss of a microbatch; its gradient is added to that of the others.

        Args:
            weight: of the microbatch's mean, from `microbatches`: the sum is a mean over all images.
            exchanges: whether the processes exchange gradients: once an update, in the last backward pass.
        """
        with nullcontext() if exchanges else self.accelerator.no_sync(self.model):
            with self.autocast():
                output = self.objective(self.model, batch, coefficients)
            self.accelerator.backward(output.loss * weight)
        return output

    def divergence(self, drawn: Drawn) -> tuple[Tensor, Tensor]:
        """`Objective.divergence` of this process's images, part by part. All processes call it."""
        parts = self.parts(drawn, drawn.log_probs)
        with self.autocast():
            found = [(self.objective.divergence(self.model, part), weight) for part, weight, _ in parts]
        log_ratios, kl = zip(*(each for each, weight in found if weight), strict=True)
        return torch.cat(log_ratios), torch.cat(kl)

    def clip_gradients(self) -> float:
        """Clip the gradient; returns its norm from before."""
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        assert norm is not None  # as it is for all but XLA
        return float(whole_of(norm))

    def update(self) -> None:
        """One step of the optimizer, of its schedule and of the moving average."""
        self.num_updates += 1  # also one that fails half way
        self.optimizer.step()
        self.scheduler.step()
        if self.average is not None:
            self.average.update()
        self.num_skipped = 0

    def sync_reference(self, step: int) -> None:
        """Move the reference towards the model, in the steps where it is time to."""
        grpo, reference = self.grpo, self.objective.reference
        if reference is not None and grpo.sync_ref_model and step % grpo.ref_model_sync_steps == 0:
            reference.move_towards(self.pipe.transformer, grpo.ref_model_mixup_alpha)

    def zero_grad(self) -> None:
        """Forget the gradient."""
        keeps_buckets = isinstance(self.model, DistributedDataParallel)  # which the gradients are views of
        self.optimizer.zero_grad(set_to_none=not keeps_buckets)

    # ---- what the model is run in

    def autocast(self) -> torch.autocast:
        """What networks run under: bfloat16 where the run asks for it."""
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def whole(self) -> AbstractContextManager[None]:
        """Where the model is sharded, hold all of it in all processes: to sample."""
        return self.sharded.whole() if self.sharded else nullcontext()

    def as_evaluated(self) -> AbstractContextManager[None]:
        """With the weights that evaluations measure: those in training, or their average."""
        is_average = self.average is not None and self.tuning.evaluates_average
        return self.average.in_place() if self.average and is_average else nullcontext()

    # ---- saving, and giving the model back

    def save(self, folder: Path, step: int, state: dict[str, Any], *, limit: int) -> Path:
        """Write a checkpoint, and in it the state of what is not of the model; returns its path.

        Args:
            folder: of all checkpoints, of which the newest `limit` stay.
            state: see `load`.
        """
        parts = self.accelerator, self.model, self.optimizer.optimizer
        return save_checkpoint(*parts, folder, step, state, limit, **self._beside())

    def load(self, path: Path) -> dict[str, Any]:
        """Continue from a checkpoint; returns the state that was saved with it.

        Raises:
            CheckpointError: a file of it is missing or broken, or was written by an earlier version.
        """
        parts = self.accelerator, self.model, self.optimizer.optimizer
        return load_checkpoint(*parts, path, **self._beside())

    def _beside(self) -> dict[str, Any]:
        """What a checkpoint holds besides the model and the optimizer."""
        reference = self.objective.reference if self.grpo.sync_ref_model else None
        return {
            "average": self.average,
            "frozen": self.frozen,
            "base": self.base,
            "reference": None if reference is None else reference.model,
        }

    def whole_model(self) -> NextScaleModel:
        """The model as it is now, however it is spread over processes, which all call this; read it alone.
        Where it is sharded, a copy, with weights in the main process alone."""
        return self.sharded.gathered() if self.sharded is not None else self.pipe.transformer

    def unshard(self) -> None:
        """Give the pipeline back its transformer, whole, where it was sharded."""
        if self.sharded is not None:
            self._take_average()
            self.pipe.transformer, self.sharded = self.sharded.restore(), None

    def release(self, adapter: Path | None = None) -> None:
        """Make the pipeline one as any other, with the weights to export; write their adapter before.

        Args:
            adapter: the folder to write it to.
        """
        self._take_average()
        if adapter is not None and self.tuning.use_peft:
            write_adapter(self.pipe.transformer, adapter, self.pipe.source, self.pipe.sampling)
        untune(self.pipe.transformer)

    def close(self) -> None:
        """Leave nothing behind in the pipeline, however training ended."""
        # What wraps the model for several processes hooks its gradients, and goes with its last reference.
        self.model = self.pipe.transformer
        self.accelerator.free_memory()
        if self.sharded is None:  # else one process alone failed, and the others would not help to gather
            self.release()
        self.pipe.transformer.gradient_checkpointing = False
        self.pipe.transformer.keeping_inputs = nullcontext
        if self.run.torch_compile:
            self.pipe.compile(False)
        if self.uses_tf32:
            torch.set_float32_matmul_precision(self.precision_before)

    def _take_average(self) -> None:
        """Put the average in the weights' place, if it is what is exported; it is not kept any longer."""
        if self.average is not None and self.tuning.exports_average:
            self.average.exchange()
        self.average = None


def check_reference(grpo: GRPOConfig, run: RunConfig) -> None:
    """Check that the reference can be kept as the options say.

    Raises:
        ConfigError: it cannot.
    """
    if grpo.sync_ref_model and grpo.reference_dtype == "bfloat16":
        raise ConfigError(
            "grpo.reference_dtype bfloat16 rounds the moves of grpo.sync_ref_model away: remove one of them"
        )
    if grpo.sync_ref_model and asks_for_fsdp(run):
        raise ConfigError(
            "grpo.sync_ref_model cannot move a reference that FSDP spreads over the processes: remove one of "
            "them"
        )
    if grpo.offload_reference and asks_for_fsdp(run):
        raise ConfigError(
            "grpo.offload_reference has no effect with FSDP, which spreads the reference over all processes: "
            "remove one of them"
        )
