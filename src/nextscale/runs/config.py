"""The options of a run."""

from typing import Self

from pydantic import Field, field_validator, model_validator

from nextscale.base.precision import AskedPrecision
from nextscale.base.records import FREE_ON_RESUME, Record


class RunConfig(Record):
    """How long a run is, what it measures and saves, and where it writes."""

    output_dir: str = Field(default="runs/run", json_schema_extra=FREE_ON_RESUME)
    """Folder that the run writes to."""
    max_steps: int = Field(default=100, ge=1, json_schema_extra=FREE_ON_RESUME)
    """Training steps; each draws one batch of rollouts."""
    seed: int = Field(default=0, ge=0)
    """Seed of all random draws; also of Python's, NumPy's and torch's own generators, for rewards."""
    per_device_train_batch_size: int = Field(default=32, ge=1)
    """Images per backward pass; gradients are accumulated over the rest of the batch."""
    per_device_eval_batch_size: int = Field(default=64, ge=1)
    """Images sampled and scored at once, in rollouts and evaluations."""
    eval_steps: int = Field(default=25, ge=0, json_schema_extra=FREE_ON_RESUME)
    """Steps between evaluations, besides one before training and one after. 0 turns all of them off."""
    eval_num_images: int = Field(default=512, ge=2)
    """Minimum number of images per evaluation."""
    eval_seed: int = Field(default=1000, ge=0)
    """Seed of the images that evaluations draw."""
    diversity_clip: str | None = None
    """CLIP model whose embeddings measure diversity: "toy", a folder or a hub repository."""
    save_steps: int = Field(default=50, ge=0, json_schema_extra=FREE_ON_RESUME)
    """Steps between checkpoints. 0 saves one at the end alone."""
    save_total_limit: int = Field(default=2, ge=1, json_schema_extra=FREE_ON_RESUME)
    """Number of checkpoints to keep."""
    save_best: str | None = Field(default=None, json_schema_extra=FREE_ON_RESUME)
    """Metric of the evaluations, such as eval_reward: the model that was best by it is kept in best/."""
    greater_is_better: bool = Field(default=True, json_schema_extra=FREE_ON_RESUME)
    """Whether the greatest value of save_best is best, or the least."""
    early_stopping_patience: int | None = Field(default=None, ge=1, json_schema_extra=FREE_ON_RESUME)
    """End the run after so many evaluations in a row without a better one by save_best."""
    resume: str | None = Field(default=None, json_schema_extra=FREE_ON_RESUME)
    """Checkpoint to continue from: "auto" for the newest in output_dir, or a path."""
    overwrite: bool = Field(default=False, json_schema_extra=FREE_ON_RESUME)
    """Replace an earlier run in output_dir."""
    mixed_precision: AskedPrecision = "no"
    """Autocast for all networks, rewards included; output head and log-softmax stay in float32, and on a GPU
    multiply in TF32. "auto" is bf16 where the device has instructions for it, as many CPUs have not."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: saves memory, takes about a third longer."""
    activation_offloading: bool = False
    """Keep what each recomputed block starts from in main memory until the backward pass needs it: the
    gradient is the same, and the GPU holds one of them at a time, for the price of two copies."""
    torch_compile: bool = False
    """Fuse the layers of model and decoder with torch.compile: for GPUs, where an update takes two thirds of
    the time and less memory, after a minute of compiling."""
    fsdp: bool | None = Field(default=None, json_schema_extra=FREE_ON_RESUME)
    """Spread weights, gradients and the optimizer's state over the processes (FSDP2); by default, as the
    launcher says."""
    ddp_timeout: int = Field(default=1800, ge=1, le=31_536_000, json_schema_extra=FREE_ON_RESUME)
    """Seconds after which a process that waits for the others gives up; the slowest reward must fit in."""
    max_skipped_updates: int = Field(default=3, ge=1)
    """Updates in a row that may be skipped because the gradient is not finite; one more ends the run."""
    report_to: str | tuple[str, ...] = Field(default="tensorboard", json_schema_extra=FREE_ON_RESUME)
    """Trackers that get the metrics besides metrics.jsonl: one or several of Accelerate's, or "none"."""
    disable_tqdm: bool = Field(default=False, json_schema_extra=FREE_ON_RESUME)
    """Hide the progress bar."""

    @field_validator("output_dir")
    @classmethod
    def _names_a_folder(cls, output_dir: str) -> str:
        if not output_dir.strip():  # which would be the working directory
            raise ValueError("give the folder to write to, such as runs/mine")
        if "\0" in output_dir:
            raise ValueError("no folder has a zero byte in its name: leave that out")
        return output_dir

    @model_validator(mode="after")
    def _check_offloading(self) -> Self:
        if self.activation_offloading and not self.gradient_checkpointing:
            raise ValueError(
                "activation_offloading has no effect without gradient_checkpointing: set both or neither"
            )
        return self


MAX_DRIFT = {"no": 0.01, "bf16": 0.05}
"""Mean difference of log-probs between sampler and trainer, by precision, above which they hardly run the
same policy: rounding gives at most 4e-6 and 0.03 in the miniature world (docs/policy.md)."""
