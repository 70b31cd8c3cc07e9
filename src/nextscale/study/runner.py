"""Run a study: each trial trains and measures in processes of its own; what is done is not repeated."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from nextscale.base.errors import TrainingError
from nextscale.study.plan import Study, Trial


def run_trials(
    study: Study, chosen: Sequence[Trial], jobs: int = 1, say: Callable[[str], None] = print
) -> list[str]:
    """Run all trials that are not done; returns a sentence about each that failed. The others go on.

    Args:
        jobs: how many at once. With more than one, each gets one thread: a run's numbers depend on threads.
    """
    left = [trial for trial in chosen if not trial.evaluation.exists()]
    say(f"{len(chosen)} runs, {len(chosen) - len(left)} of them done")
    failed: list[str] = []

    def run(trial: Trial) -> None:
        try:
            run_trial(study, trial, jobs)
            say(f"{trial.name}: done")
        except TrainingError as error:
            failed.append(f"{trial.name}: {error}")
            say(failed[-1])

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(run, left))
    return failed


def run_trial(study: Study, trial: Trial, jobs: int = 1) -> None:
    """Train, then measure the final model.

    Raises:
        TrainingError: a command failed; its last line.
    """
    final, config = trial.folder / "final", trial.folder / "config.yaml"
    measure = ["evaluate", str(final), "--recipe", str(config), "--num-images", str(study.num_images)]
    measure += ["--seed", str(study.eval_seed), "--output", str(trial.evaluation)]
    environment = os.environ | ({"OMP_NUM_THREADS": "1"} if jobs > 1 else {})
    for words in (trial.words(), measure):
        command = [sys.executable, "-m", "nextscale", *words]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if done.returncode:
            last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
            raise TrainingError(last.removeprefix("nextscale: error: "))
