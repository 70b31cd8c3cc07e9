"""How a run meets Accelerate: devices and processes, and what it cannot do with them."""

import os
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    patch_environment,
)
from torch import nn

from nextscale.base.errors import ConfigError
from nextscale.base.launcher import stop_with_launcher
from nextscale.base.records import did_you_mean
from nextscale.runs.config import RunConfig
from nextscale.runs.paths import RunPaths

REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed is not supported: launch with FSDP2, which saves the same memory",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM is not supported: launch with FSDP2 instead",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config is not supported: set none in the launcher",
}
"""Settings of Accelerate's launcher, as it hands them on, that a run cannot follow."""
REFUSED_OF_FSDP = {
    "FSDP_OFFLOAD_PARAMS": "fsdp_offload_params is not supported: leave it out",
    "FSDP_ACTIVATION_CHECKPOINTING": "set run.gradient_checkpointing in place of "
    "fsdp_activation_checkpointing",
}


def make_accelerator(run: RunConfig) -> Accelerator:
    """Accelerate for a run, in one process or in each of several.

    Autocast is left to torch: Accelerate would wrap the model's forward pass for good, and allows one
    precision a process.

    Raises:
        ConfigError: a launcher that says otherwise than the run, is not supported, or left its processes
            alone; an unknown tracker.
    """
    stop_with_launcher()
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
    for variable, sentence in REFUSED.items():
        if _says_yes(variable):
            raise ConfigError(sentence)
    if _says_yes("ACCELERATE_USE_CPU") and "MASTER_ADDR" in os.environ and "RANK" not in os.environ:
        # The variables that `accelerate launch --cpu --num_processes 2` sets, in the one process it starts.
        raise ConfigError(
            "there is an address for several processes (MASTER_ADDR), but this one has no RANK: `accelerate "
            "launch --cpu` starts one process alone; for several on CPUs use torchrun, with "
            "ACCELERATE_USE_CPU=true"
        )
    project = ProjectConfiguration(run.output_dir, str(RunPaths(Path(run.output_dir)).tensorboard))
    is_fsdp = asks_for_fsdp(run)
    with patch_environment(ACCELERATE_USE_FSDP="false"):  # sharding is left to torch, too
        accelerator = Accelerator(
            mixed_precision="no",
            cpu=not torch.cuda.is_available(),  # and not Apple's GPU, which has no float64 to draw with
            log_with=trackers_of(run.report_to) or None,
            project_config=project,
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=timedelta(seconds=run.ddp_timeout)),
                # What it reduces are the gradients themselves, not copies of them.
                DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            ],
        )
    if accelerator.distributed_type == DistributedType.FSDP:
        raise ConfigError("an Accelerator of your own has set up FSDP: make the trainer first")
    _check_connected(accelerator.num_processes)
    check_shards(is_fsdp, accelerator.num_processes)
    return accelerator


def check_shards(is_fsdp: bool | None, num_processes: int) -> None:
    """Check that there is something to spread a model over.

    Raises:
        ConfigError: there is one process alone.
    """
    if is_fsdp and num_processes == 1:
        raise ConfigError(
            "FSDP has nothing to spread over in one process: start several, or set run.fsdp false"
        )


def join_processes(device: str | None) -> PartialState:
    """What a command that trains nothing knows of its processes, and the device of this one.

    Args:
        device: what was asked for; a GPU, if there is one, by default.

    Raises:
        ConfigError: a launcher started several processes, but this one is left alone.
    """
    stop_with_launcher()
    state = PartialState(cpu=device == "cpu" or not torch.cuda.is_available())
    _check_connected(state.num_processes)
    return state


def started_processes() -> int:
    """The processes that a launcher such as torchrun says it started; 1 without one.

    Raises:
        ConfigError: it says no number.
    """
    told = os.environ.get("WORLD_SIZE", "1")
    if not told.isdecimal() or int(told) < 1:
        raise ConfigError(f"WORLD_SIZE is '{told}', expected the number of processes: unset it, or set it")
    return int(told)


def _check_connected(num_processes: int) -> None:
    started = started_processes()
    if num_processes != started:
        raise ConfigError(
            f"the launcher started {started} processes, but this one is connected to {num_processes - 1} "
            "others: on a CPU, set ACCELERATE_USE_CPU=true; on GPUs, start no more processes than there are "
            "GPUs"
        )


def asks_for_fsdp(run: RunConfig) -> bool:
    """Whether the run or its launcher asks for FSDP.

    Raises:
        ConfigError: they disagree, or the launcher asks for what cannot be had.
    """
    if not _says_yes("ACCELERATE_USE_FSDP"):
        return bool(run.fsdp)
    if run.fsdp is False:
        raise ConfigError("the launcher asks for FSDP, the run for none: remove run.fsdp, or launch without")
    if (version := os.environ.get("FSDP_VERSION", "1")) != "2":
        raise ConfigError(f"FSDP {version} is not supported: set fsdp_version 2 in the launcher")
    for variable, sentence in REFUSED_OF_FSDP.items():
        if _says_yes(variable):
            raise ConfigError(sentence)
    wrapped = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "None")
    policy = os.environ.get("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP")
    if wrapped != "None" or policy != "TRANSFORMER_BASED_WRAP":
        raise ConfigError(
            f"the launcher says how to wrap for FSDP ({policy}, {wrapped}), but a model says itself what it "
            "is sharded by: set neither fsdp_auto_wrap_policy nor fsdp_transformer_layer_cls_to_wrap"
        )
    return True


def reshards_after_forward() -> bool:
    """Whether FSDP lets go of what it gathered before the backward pass, as the launcher's
    `fsdp_reshard_after_forward` says; by default it does."""
    return os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() == "true"


def _says_yes(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() == "true"


def trackers_of(report_to: str | Sequence[str]) -> list[Any]:
    """The trackers that `run.report_to` names; for "none" there are none.

    Raises:
        ConfigError: one is unknown, or its package is not installed.
    """
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
