"""Compare the memory that `nextscale plan` counts with what a training step takes, on a CPU.

    python benchmarks/peaks.py

Each size runs in a process of its own: a VAR of random weights with the official tokenizer, two training
steps of four images with guidance, and a reward without a network. Measured is the largest resident set of
the process less what it had before the model was built. The plan counts the kernels of a CPU here.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence

import torch
from torch import Tensor

from nextscale.base.conditions import Condition
from nextscale.grpo import GRPOConfig
from nextscale.models.var import VAR, VARConfig
from nextscale.models.vqvae import VQVAE, VQVAEConfig
from nextscale.pipeline import VARPipeline
from nextscale.plan.gpus import this_cpu
from nextscale.plan.planning import make_plan
from nextscale.policy import DEFAULT_SAMPLING
from nextscale.runs.config import RunConfig
from nextscale.trainer import GRPOTrainer
from nextscale.tuning import TuningConfig

GRPO = GRPOConfig(num_groups=2, num_generations=2, class_labels=(0, 1))
CASES = (  # depth, precision, gradient checkpointing, LoRA
    (4, "no", False, False),
    (8, "no", False, False),
    (12, "no", True, False),
    (12, "bf16", False, True),
    (16, "no", False, False),
    (16, "bf16", True, False),
)


def config_of(depth: int) -> VARConfig:
    return VARConfig(depth=depth, width=64 * depth, num_heads=depth)


def run_of(precision: str, checkpointing: bool, folder: str) -> RunConfig:
    return RunConfig(
        output_dir=folder,
        max_steps=2,
        eval_steps=0,
        save_steps=0,
        per_device_train_batch_size=4,
        mixed_precision=precision,  # pyright: ignore[reportArgumentType]
        gradient_checkpointing=checkpointing,
        report_to="none",
        disable_tqdm=True,
    )


def brightness(images: Tensor, conditions: Sequence[Condition]) -> Tensor:
    return images.mean((1, 2, 3))


def resident(field: str) -> int:
    with open("/proc/self/status") as file:
        (line,) = (line for line in file if line.startswith(field))
    return int(line.split()[1]) * 1024


def measured(depth: int, precision: str, checkpointing: bool, lora: bool, folder: str) -> int:
    """Bytes that two training steps take at most, in this process."""
    left = torch.randn(512, 512)
    (left @ left, left.bfloat16() @ left.bfloat16())  # what the kernels need before anything else
    if lora:
        import peft  # noqa: F401
    before = resident("VmRSS")
    pipe = VARPipeline(VAR(config_of(depth)), VQVAE(VQVAEConfig()))
    run = run_of(precision, checkpointing, folder)
    trainer = GRPOTrainer(pipe, brightness, GRPO, tuning=TuningConfig(use_peft=lora), run=run)
    for step in (1, 2):
        trainer.step(step)
    return resident("VmHWM") - before


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--case", help=argparse.SUPPRESS)  # of the processes that this one starts
    given = parser.parse_args()
    if given.case:
        with tempfile.TemporaryDirectory() as folder:
            print(measured(*json.loads(given.case), folder))
        return
    print("| VAR | precision | | trained | plan, GB | measured, GB | plan is |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    # What is freed goes back to the system at once, so that the resident set is what is in use.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    cpu = this_cpu()
    for case in CASES:
        depth, precision, checkpointing, lora = case
        run, tuning = run_of(precision, checkpointing, "unwritten"), TuningConfig(use_peft=lora)
        plan = make_plan(
            config_of(depth),
            VQVAEConfig(),
            {},
            GRPO,
            DEFAULT_SAMPLING,
            run,
            cpu,
            tuning=tuning,
        )
        command = [sys.executable, __file__, "--case", json.dumps(case)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        took = int(done.stdout.split()[-1])
        how, what = "recomputed" if checkpointing else "", "LoRA" if lora else "all"
        cells = [f"d{depth}", "float32" if precision == "no" else precision, how, what]
        cells += [f"{plan.peak / 1e9:.2f}", f"{took / 1e9:.2f}", f"{plan.peak / took - 1:+.1%}"]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
