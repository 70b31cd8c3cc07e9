"""Run a study: each trial trains and measures in processes of its own; what is done is not repeated."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from nextscale.base.errors import ConfigError, NextscaleError, TrainingError
from nextscale.config.build import resolve
from nextscale.config.recipe import load_recipe, to_yaml
from nextscale.models.folder import CONFIG as MODEL_CONFIG
from nextscale.runs.reader import read_object
from nextscale.study.plan import Study, Trial


def run_trials(
    study: Study, chosen: Sequence[Trial], jobs: int = 1, say: Callable[[str], None] = print
) -> list[str]:
    """Run all trials that are not done; returns a sentence about each that failed. The others go on.

    Args:
        jobs: how many at once. With more than one, each gets one thread: a run's numbers depend on threads.
    """
    left = [trial for trial in chosen if not is_measured(study, trial)]
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
    """Train if that is not done, then measure the final model.

    Raises:
        TrainingError: a command failed; its last line.
    """
    final, config = trial.folder / "final", trial.config
    measure = ["evaluate", str(final), "--recipe", str(config), "--num-images", str(study.num_images)]
    measure += ["--seed", str(study.eval_seed), "--output", str(trial.evaluation)]
    environment = os.environ | ({"OMP_NUM_THREADS": "1"} if jobs > 1 else {})
    if is_trained(trial):
        todo = [measure]
    else:
        trial.evaluation.unlink(missing_ok=True)  # of another model: it must not be taken for this one's
        todo = [trial.words(), measure]
    for words in todo:
        command = [sys.executable, "-m", "nextscale", *words]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if done.returncode:
            last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
            raise TrainingError(last.removeprefix("nextscale: error: "))


def is_trained(trial: Trial) -> bool:
    """Whether its folder has the final model, whole, of a run with the options that it has now: where it lies
    and what its recipe says of itself aside."""
    if not (trial.folder / "final" / MODEL_CONFIG).is_file():  # written last
        return False
    try:
        ran, asked = load_recipe(trial.config), resolve(trial.load())
    except NextscaleError:  # then training will tell
        return False
    place = {"output_dir": ran.run.output_dir, "resume": None, "overwrite": False}
    lasting = asked.replace(description=ran.description, run=asked.run.replace(**place))
    return to_yaml(ran) == to_yaml(lasting)


def is_measured(study: Study, trial: Trial) -> bool:
    """Whether it is trained, and measured on the images that the study asks for: no fewer, and no more, since
    Fréchet distances compare with those of equally many alone."""
    if not trial.evaluation.is_file() or not is_trained(trial):
        return False
    try:
        measured = read_object(trial.evaluation)
    except ConfigError:  # it was cut off
        return False
    asked = {"asked_images": study.num_images, "seed": study.eval_seed}
    return asked.items() <= measured.items()
