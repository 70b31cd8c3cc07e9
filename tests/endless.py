"""Run under torchrun by test_processes.py: a run that does not end by itself."""

import sys
from pathlib import Path

from conftest import random_pipeline
from test_trainer import make_trainer, redness

make_trainer(random_pipeline(), Path(sys.argv[1]), redness, max_steps=100_000).train()
