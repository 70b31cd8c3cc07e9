"""Run under torchrun by test_processes.py: draws a step's groups, takes its gradient, writes both."""

import sys
from pathlib import Path

import torch
from accelerate import PartialState

from conftest import random_pipeline
from test_trainer import gradient, make_trainer

folder = Path(sys.argv[1])
trainer = make_trainer(random_pipeline(), folder / "run", per_device_train_batch_size=3)
taken = gradient(trainer)
state = PartialState()
content = {"tokens": trainer.rollout(1).tokens, **taken}
torch.save(content, folder / f"{state.num_processes}-{state.process_index}.pt")
trainer.accelerator.end_training()
