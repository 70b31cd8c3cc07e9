"""Run under torchrun by test_processes.py: a reward that fails in the last process alone, and one that fails
in an evaluation, in the first process alone. Each process writes what stopped it."""

import sys
from pathlib import Path

from accelerate import PartialState
from torch import Tensor

from conftest import random_pipeline
from nextscale.base.errors import RewardError
from test_trainer import make_trainer, redness

folder = Path(sys.argv[1])


def fails_in_one(images: Tensor, conditions: list) -> Tensor:
    if PartialState().is_last_process:
        raise KeyError("one")
    return redness(images, conditions)


def fails_in_evaluation(images: Tensor, conditions: list) -> Tensor:
    if len(images) == 20 and PartialState().is_main_process:  # of a step, each process has 8
        raise KeyError("evaluation")
    return redness(images, conditions)


for reward in (fails_in_one, fails_in_evaluation):
    options = {"eval_steps": int(reward is fails_in_evaluation), "eval_num_images": 40}
    trainer = make_trainer(random_pipeline(), folder / reward.__name__, reward, **options)
    try:
        trainer.train()
    except RewardError as error:
        (folder / f"{reward.__name__}-{trainer.accelerator.process_index}.txt").write_text(str(error))
PartialState().destroy_process_group()
