"""Run under torchrun by test_processes.py: runs that one process alone is stopped in. Each process writes
what stopped it."""

import errno
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from torch import Tensor

from conftest import random_pipeline
from nextscale.base.conditions import Condition
from nextscale.base.errors import RewardError
from nextscale.base.interrupt import Interrupted
from nextscale.rewards.groups import GroupReward
from nextscale.runs import checkpoint
from test_trainer import make_trainer, redness

folder = Path(sys.argv[1])
save_tensors = checkpoint.save_tensors


def interrupts(number: int) -> Callable[..., Tensor]:
    """A reward in whose second step the last process gets a signal."""
    calls = 0

    def reward(images: Tensor, conditions: list) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 2 and PartialState().is_last_process:
            signal.raise_signal(number)
        return redness(images, conditions)

    return reward


def fails_in_one(images: Tensor, conditions: list) -> Tensor:
    if PartialState().is_last_process:
        raise KeyError("one")
    return redness(images, conditions)


def fails_in_evaluation(images: Tensor, conditions: list) -> Tensor:
    if len(images) == 20 and PartialState().is_main_process:  # of a step, each process has 8
        raise KeyError("evaluation")
    return redness(images, conditions)


class FailsInOneOfGroups(GroupReward):
    """In the second step the scores of the last process are none."""

    calls = 0

    def features(self, images: Tensor, conditions: Sequence[Condition]) -> Tensor:
        return redness(images, conditions)[:, None]

    def scores_of_groups(self, features_NGE: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 2 and PartialState().is_last_process:
            raise KeyError("groups")
        return features_NGE[..., 0]


def interrupts_the_first(images: Tensor, conditions: list) -> Tensor:
    """The first process gets a signal in a step; the last one only when both write their checkpoint."""
    if PartialState().is_main_process:
        signal.raise_signal(signal.SIGTERM)
    return redness(images, conditions)


def full(tensors: Any, path: Path) -> None:
    """In the second save the disk of the first process is full. And see `interrupts_the_first`."""
    if path.name == "random-1.safetensors" and "late/checkpoints/.writing-step-000001" in str(path):
        signal.raise_signal(signal.SIGTERM)
    if path.name == "optimizer.safetensors" and "full/checkpoints/.writing-step-000002" in str(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    save_tensors(tensors, path)


checkpoint.save_tensors = full
cases: dict[str, tuple[Callable[..., Tensor], dict[str, Any]]] = {
    each.name: (interrupts(each), {"max_steps": 50})
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
}
cases["late"] = interrupts_the_first, {"max_steps": 50}
cases["fails_in_one"] = fails_in_one, {}
cases["fails_in_evaluation"] = fails_in_evaluation, {"eval_steps": 1, "eval_num_images": 40}
cases["fails_in_groups"] = FailsInOneOfGroups(), {}
cases["full"] = redness, {"save_steps": 1}
for name, (reward, options) in cases.items():
    trainer, told = make_trainer(random_pipeline(), folder / name, {name: reward}, **options), "nothing"
    try:
        trainer.train()
    except Interrupted as stopped:
        told = f"{stopped.signal_number} after step {trainer.step_done}"
    except RewardError as error:
        told = str(error)
    except OSError as error:
        told = f"{error.strerror} in {Path(error.filename).name}"
    (folder / f"{name}-{trainer.accelerator.process_index}.txt").write_text(told)
PartialState().destroy_process_group()
