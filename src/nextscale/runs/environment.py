"""What a run was made with: hardware, versions, and the command that started it."""

import os
import platform
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch


def environment(
    device: torch.device,
    command: Sequence[str],
    num_processes: int = 1,
    precision: str | None = None,
    model: str | None = None,
) -> dict[str, object]:
    """The content of a run's `environment.json`; no path of the machine is in it.

    Args:
        device: where the model is trained.
        command: the words that started the run.
        num_processes: processes that share the run.
        precision: that networks run in, where one is set.
        model: the name or path that the model was loaded by. Whether it is a path is told, since "a/b" may be
            one, or a repository.
    """
    told: dict[str, object] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "num_processes": num_processes,
        "num_threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "nextscale": sys.modules["nextscale"].__version__,  # an import would run upward
        "python": platform.python_version(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(_without_folders(word) for word in command),
    }
    if precision is not None:
        told["mixed_precision"] = precision
    if model is not None:
        told["model_is_local"] = Path(model).exists()
    return told


def _without_folders(word: str) -> str:
    option, equals, value = word.rpartition("=")
    return option + equals + (os.path.basename(value) if os.path.isabs(value) else value)
