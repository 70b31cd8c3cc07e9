"""The script for SLURM, with stand-ins for SLURM's own commands."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from nextscale.runs.checkpoint import list_checkpoints
from test_trainer import metrics_of

SCRIPT = Path(__file__).parents[1] / "examples" / "launch" / "slurm.sh"
STAND_INS = {
    "srun": 'shift; exec "$@"',
    "torchrun": 'while [ "$1" != -m ]; do shift; done; exec "$PYTHON" "$@"',
    "scontrol": 'echo "$@" >> "$ASKED"; echo localhost',
}


def start(folder: Path) -> "subprocess.Popen[str]":
    """Start the job, as SLURM does, and each time it is queued again."""
    slurm = {"SLURM_JOB_ID": "17", "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "localhost"}
    own = {"PYTHON": sys.executable, "ASKED": str(folder / "asked"), "OMP_NUM_THREADS": "1"}
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    words = ["toy-painting", "--grpo.num_groups", "2", "--grpo.num_generations", "2", "--run.eval_steps", "0"]
    words += ["--run.max_steps", "6", "--run.output_dir", str(folder / "run"), "--run.report_to", "none"]
    words += ["--optimizer.lr_scheduler_type", "constant_with_warmup"]
    environment = os.environ | slurm | own | {"PATH": path}
    return subprocess.Popen(["bash", str(SCRIPT), *words], env=environment, stderr=subprocess.PIPE, text=True)


def test_a_preempted_job_is_queued_again_and_goes_on(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    for name, text in STAND_INS.items():
        file = tmp_path / "bin" / name
        file.write_text(f"#!/bin/bash\n{text}\n")
        file.chmod(0o755)

    job, metrics = start(tmp_path), tmp_path / "run" / "metrics.jsonl"
    while not metrics.exists() and job.poll() is None:
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)  # to the script alone, as --signal=B:TERM has it
    _, told = job.communicate(timeout=120)
    assert job.returncode == 0 and "stopped after step" in told, told
    assert (tmp_path / "asked").read_text().splitlines()[-1] == "requeue 17"
    (checkpoint,) = list_checkpoints(tmp_path / "run" / "checkpoints")
    done = int(checkpoint.name.removeprefix("step-"))
    assert 1 <= done < 6

    again = start(tmp_path)
    _, told = again.communicate(timeout=120)
    assert again.returncode == 0, told
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    assert (tmp_path / "asked").read_text().splitlines()[-1] != "requeue 17"
