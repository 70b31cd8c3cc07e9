"""The options of a run."""

from typing import Literal

from pydantic import Field

from nextscale.base.records import Record


class RunConfig(Record):
    """The run: how long, how often what, and where to."""

    output_dir: str = "runs/run"
    """The run's folder."""
    max_steps: int = Field(default=100, ge=1)
    """Steps of rollouts."""
    seed: int = Field(default=0, ge=0)
    """Of everything random."""
    per_device_train_batch_size: int = Field(default=32, ge=1)
    """Images of one backward pass; more are accumulated."""
    per_device_eval_batch_size: int = Field(default=64, ge=1)
    """Images drawn and scored at once, in rollouts and evaluations."""
    eval_steps: int = Field(default=25, ge=0)
    """Steps between evaluations; there is one before and one after in any case. 0 switches all off."""
    eval_num_images: int = Field(default=512, ge=2)
    """Images of an evaluation, at least."""
    eval_seed: int = Field(default=1000, ge=0)
    """Of the evaluation's images."""
    diversity_clip: str | None = None
    """The CLIP whose embeddings measure diversity: "toy", a folder or a hub repository."""
    save_steps: int = Field(default=50, ge=0)
    """Steps between checkpoints; 0 leaves only the final model."""
    save_total_limit: int = Field(default=2, ge=1)
    """Checkpoints kept."""
    resume: str | None = None
    """"auto" continues from the newest checkpoint, a path from that one."""
    overwrite: bool = False
    """Remove an earlier run in the same folder."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """Autocast of every network, the decoder's and the rewards' too; head and log-softmax stay float32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    report_to: Literal["tensorboard", "none"] = "tensorboard"
    """Where metrics go besides metrics.jsonl."""
    disable_tqdm: bool = False
    """No progress bar."""
