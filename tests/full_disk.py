"""Run under torchrun by test_processes.py: in the second save the disk of the first process alone is full.
Each process writes what stopped it."""

import errno
import os
import sys
from pathlib import Path
from typing import Any

from accelerate import PartialState

from conftest import random_pipeline
from nextscale.runs import checkpoint
from test_trainer import make_trainer

folder = Path(sys.argv[1])
save = checkpoint.save_tensors


def full(tensors: Any, path: Path) -> None:
    if path.name == "optimizer.safetensors" and "step-000002" in str(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    save(tensors, path)


checkpoint.save_tensors = full
trainer = make_trainer(random_pipeline(), folder / "run", save_steps=1)
try:
    trainer.train()
except OSError as error:
    rank = trainer.accelerator.process_index
    (folder / f"{rank}.txt").write_text(f"{error.strerror} in {Path(error.filename).name}")
PartialState().destroy_process_group()
