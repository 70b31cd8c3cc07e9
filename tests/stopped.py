"""Run under torchrun by test_processes.py: the last process alone gets a signal in its second step."""

import signal
import sys
from pathlib import Path

from accelerate import PartialState
from torch import Tensor

from conftest import random_pipeline
from nextscale.base.interrupt import Interrupted
from test_trainer import make_trainer, redness

folder, number = Path(sys.argv[1]), int(sys.argv[2])
calls = 0


def interrupts(images: Tensor, conditions: list) -> Tensor:
    global calls
    calls += 1
    if calls == 2 and PartialState().is_last_process:
        signal.raise_signal(number)
    return redness(images, conditions)


trainer = make_trainer(random_pipeline(), folder / "run", interrupts, max_steps=50)
try:
    trainer.train()
except Interrupted as stopped:
    rank = trainer.accelerator.process_index
    (folder / f"{rank}.txt").write_text(f"{stopped.signal_number} after step {trainer.step_done}")
PartialState().destroy_process_group()
