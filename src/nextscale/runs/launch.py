"""How a run meets Accelerate: devices and processes, and what it cannot do with them."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, ProjectConfiguration
from torch import nn

from nextscale.base.errors import ConfigError
from nextscale.base.records import did_you_mean
from nextscale.runs.config import RunConfig
from nextscale.runs.paths import RunPaths

REFUSED = {
    DistributedType.FSDP: "FSDP",
    DistributedType.DEEPSPEED: "DeepSpeed",
    DistributedType.MEGATRON_LM: "Megatron-LM",
}


def make_accelerator(run: RunConfig) -> Accelerator:
    """Accelerate for a run, in one process or in each of several.

    Autocast is left to torch: Accelerate would wrap the model's forward pass for good, and allows one
    precision a process.

    Raises:
        ConfigError: a launcher that says otherwise than the run, is not supported, or left its processes
            alone; an unknown tracker.
    """
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", run.mixed_precision):
        raise ConfigError(
            f"the launcher asks for mixed precision '{precision}', the run for '{run.mixed_precision}': set "
            "run.mixed_precision, and none in the launcher"
        )
    steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps != "1":
        raise ConfigError(
            f"the launcher asks for gradient accumulation over {steps} steps: set none there, and the images "
            "of a backward pass with run.per_device_train_batch_size"
        )
    for variable, name in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")):
        if os.environ.get(variable, "false").lower() == "true":
            raise ConfigError(f"{name} is not supported yet: launch with plain multi-GPU (DDP) instead")
    project = ProjectConfiguration(run.output_dir, str(RunPaths(Path(run.output_dir)).tensorboard))
    accelerator = Accelerator(
        mixed_precision="no", log_with=_trackers(run.report_to) or None, project_config=project
    )
    if name := REFUSED.get(accelerator.distributed_type):
        raise ConfigError(f"{name} is not supported yet: launch with plain multi-GPU (DDP) instead")
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != started:
        raise ConfigError(
            f"the launcher started {started} processes, but this one is connected to "
            f"{accelerator.num_processes - 1} others: on a CPU, set ACCELERATE_USE_CPU=true; on GPUs, start "
            "no more processes than there are GPUs"
        )
    return accelerator


def _trackers(report_to: str | Sequence[str]) -> list[Any]:
    names = [report_to] if isinstance(report_to, str) else list(report_to)
    available = [str(each) for each in get_available_trackers()]
    for name in names:
        if name != "none" and name not in available:
            hint = did_you_mean(name, ["none", *available])
            raise ConfigError(f"tracker '{name}' is unknown, or its package is not installed{hint}")
    return [name for name in names if name != "none"]


def check_trainable(model: nn.Module) -> None:
    """Check that the weights are float32: a learning rate of 1e-5 vanishes in those of 16 bits.

    Raises:
        ConfigError: they are not.
    """
    for name, each in model.named_parameters():
        if each.requires_grad and each.dtype != torch.float32:
            kind = str(each.dtype).removeprefix("torch.")
            raise ConfigError(
                f"'{name}' is {kind}, in which most updates round to nothing: load the model in float32, and "
                "set run.mixed_precision to bf16 for speed"
            )
