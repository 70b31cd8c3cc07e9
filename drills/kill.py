"""Kill a run with SIGKILL at many moments, resume it, and compare with a run that nothing happened to.

    python drills/kill.py --trials 50                  # one process
    python drills/kill.py --trials 50 --processes 2    # two, under torchrun

Half of the moments are spread evenly at random over the run's time; the others lie where it is most delicate
to be killed (`PLACES`): just before or after a call, in the process that makes it. Whatever the moment,

- the newest checkpoint is whole, if there was one;
- `nextscale train ... --run.resume auto` ends as if nothing had happened: parameters, average, optimizer,
  random numbers, controllers and metrics are the same to the last bit, times excepted;
- no step is missing or there twice, in `metrics.jsonl` and in TensorBoard's files;
- nothing is left over.

The result is printed, and written as JSON with --output. Exit status 1 if a trial failed.
"""

import argparse
import contextlib
import functools
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nextscale import __version__
from nextscale.runs.checkpoint import list_checkpoints
from nextscale.runs.manifest import find_damage

NUM_STEPS = 3
RECIPE = {
    "grpo.num_groups": 2,
    "grpo.num_generations": 4,
    "grpo.entropy_floor": 0.5,
    "tuning.ema_decay": 0.5,
    "run.max_steps": NUM_STEPS,
    "run.save_steps": 1,
    "run.eval_steps": NUM_STEPS - 1,
    "run.eval_num_images": 4,
    "run.per_device_eval_batch_size": 8,
    "run.disable_tqdm": True,
    "run.mixed_precision": "no",
    "run.report_to": "tensorboard",
}
"""What differs from toy-painting: it is short, saves after each step, and has all that has a state."""

PLACES = {
    "rollout": ("nextscale.collector:collect", 3),
    "reward": ("nextscale.rewards.clip_score:ClipScore.__call__", 3),
    "loss": ("nextscale.learner:Learner.backward", 3),
    "update": ("nextscale.learner:Learner.update", 3),
    "evaluation": ("nextscale.trainer:evaluate", 2),
    "metrics": ("nextscale.runs.writer:RunFolder.append_metrics", 4),
    "tensors of a checkpoint": ("nextscale.runs.checkpoint:save_tensors", 4),
    "state of a checkpoint": ("nextscale.runs.checkpoint:write_text_aside", 4),
    "manifest": ("nextscale.runs.checkpoint:write_manifest", 3),
    "renaming": ("pathlib:Path.rename", 4),
    "replacing": ("pathlib:Path.replace", 4),
    "removing": ("shutil:rmtree", 4),
    "start": ("nextscale.runs.writer:RunFolder.open", 1),
    "cutting the metrics": ("nextscale.runs.writer:RunFolder.keep_steps", 1),
    "final model": ("nextscale.pipeline:VARPipeline.save_pretrained", 1),
    "report": ("nextscale.trainer:write_report", 1),
}
"""Name to function, and how many of its calls are made for sure: killed before or after one of them."""


# ---- the process that is killed


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at(place: str, number: int, when: str) -> None:
    """Have this process killed before or after the number-th call of a function from now on."""
    module, _, path = PLACES[place][0].partition(":")
    owner: Any = importlib.import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    original, calls = getattr(owner, name), 0

    @functools.wraps(original)
    def counted(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number and when == "before":
            die()
        result = original(*args, **options)
        if calls == number:
            die()
        return result

    setattr(owner, name, counted)


def worker(words: list[str]) -> int:
    """`worker PLACE NUMBER WHEN RANK WORDS`: the command line, killed in one of its processes."""
    place, number, when, rank, *rest = words
    from nextscale.cli.main import main

    if os.environ.get("RANK", "0") == rank:
        kill_at(place, int(number), when)
    return main(rest)


# ---- the trials


class Drill:
    """Trials against one run that nothing happened to.

    Args:
        scratch: a folder for all runs.
    """

    def __init__(self, scratch: Path, num_processes: int) -> None:
        self.scratch, self.num_processes = scratch, num_processes
        begin = time.monotonic()
        self.finish(self.start(self.train(scratch / "straight")), expected=0)
        self.seconds = time.monotonic() - begin
        self.expected = state_of(scratch / "straight")

    def train(self, folder: Path, *before: str) -> list[str]:
        """The words that train into a folder, or go on there."""
        overrides = RECIPE | {"run.output_dir": str(folder), "run.resume": "auto"}
        words = [word for key, value in overrides.items() for word in (f"--{key}", str(value))]
        own = [__file__, "worker", *before] if before else ["-m", "nextscale"]
        return [*own, "train", "toy-painting", *words]

    def start(self, words: list[str]) -> subprocess.Popen[str]:
        command = [sys.executable, *words]
        if self.num_processes > 1:
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
            command = [sys.executable, *launcher, str(self.num_processes), *words]
        settings = {
            "OMP_NUM_THREADS": "1",
            "ACCELERATE_USE_CPU": "true",
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "5",
        }
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=os.environ | settings, stdout=pipe, stderr=pipe, text=True)

    def finish(self, process: subprocess.Popen[str], expected: int | None = None) -> int:
        """Wait for a run; returns its exit status."""
        _, told = process.communicate(timeout=600)
        if expected is not None and process.returncode != expected:
            raise RuntimeError(f"exit status {process.returncode}, expected {expected}:\n{told}")
        return process.returncode

    def at_time(self, folder: Path, seconds: float) -> str:
        """Kill all processes of a run some time after its start."""
        process = self.start(self.train(folder))
        try:
            process.communicate(timeout=seconds)
            return "ended before"
        except subprocess.TimeoutExpired:
            root = psutil.Process(process.pid)
            for each in [root, *root.children(recursive=True)]:  # a launcher's have sessions of their own
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.kill()
            process.communicate()
            return "killed"

    def at_place(self, folder: Path, place: str, number: int, when: str, rank: int) -> str:
        """Kill the process that makes a call; a launcher then ends the others."""
        process = self.start(self.train(folder, place, str(number), when, str(rank)))
        return "killed" if self.finish(process) else "ended before"

    def resume(self, folder: Path) -> list[str]:
        """Go on to the end; returns what is not as in the run that nothing happened to."""
        wrong = []
        checkpoints = list_checkpoints(folder / "checkpoints")
        if checkpoints and (damage := find_damage(checkpoints[-1])):
            wrong.append(f"after the kill, the newest checkpoint: {damage}")
        self.finish(self.start(self.train(folder)), expected=0)
        return wrong + differences(self.expected, state_of(folder))


def state_of(folder: Path) -> dict[str, Any]:
    """All that a run has come to, but for times."""
    (newest,) = list_checkpoints(folder / "checkpoints")[-1:]
    state = json.loads((newest / "trainer_state.json").read_text())
    (logged,) = {path.parent for path in folder.rglob("events.out*")}
    events = EventAccumulator(str(logged)).Reload()
    hidden = [path for path in folder.rglob(".*") if path.name != ".lock"]
    return {
        "tensors": {file.name: load_file(file) for file in newest.glob("*.safetensors")},
        "final model": {file.name: load_file(file) for file in (folder / "final").glob("*.safetensors")},
        "state": without_times(state),
        "metrics": [without_times(json.loads(line)) for line in (folder / "metrics.jsonl").open()],
        "tensorboard": [event.step for event in events.Scalars("learning_rate")],
        "checkpoints": [path.name for path in list_checkpoints(folder / "checkpoints")],
        "files": sorted(path.name for path in folder.iterdir()),
        "left over": [str(path.relative_to(folder)) for path in hidden],
    }


def without_times(content: Any) -> Any:
    """JSON without what a clock says."""
    if isinstance(content, list):
        return [without_times(each) for each in content]
    if not isinstance(content, dict):
        return content
    clocks = ("time/", "seconds", "step_time", "images_per_second", "eval_time", "bytes")
    return {key: without_times(value) for key, value in content.items() if not key.startswith(clocks)}


def differences(expected: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """What differs, by name."""
    wrong = []
    for name, value in expected.items():
        if name in ("tensors", "final model"):
            files = {file: of.keys() for file, of in value.items()}
            same = files == {file: of.keys() for file, of in found[name].items()} and all(
                torch.equal(each.view(torch.uint8), found[name][file][key].view(torch.uint8))
                if each.ndim
                else torch.equal(each, found[name][file][key])
                for file, of in value.items()
                for key, each in of.items()
            )
        else:
            same = value == found[name]
        if not same:
            wrong.append(name)
    return wrong


def drill(
    num_trials: int,
    num_processes: int,
    seed: int,
    say: Callable[[str], None],
    output: Path | None = None,
    done: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """All trials; returns what came of them.

    Args:
        output: JSON file, written anew after each trial.
        done: trials of a drill that was ended before, which are not run again.
    """
    places = list(PLACES)
    random.Random(seed).shuffle(places)
    trials = list(done)
    with tempfile.TemporaryDirectory() as scratch:
        whole = Drill(Path(scratch), num_processes)
        say(f"uninterrupted: {whole.seconds:.1f} s")
        for i in range(len(trials), num_trials):
            draw = random.Random(f"{seed}, {i}")
            folder = Path(scratch) / f"trial-{i}"
            if i % 2:  # at any time
                seconds = draw.uniform(0, whole.seconds)
                moment = f"after {seconds:.1f} s"
                outcome = whole.at_time(folder, seconds)
            else:
                place = places[i // 2 % len(places)]
                number, when = draw.randint(1, PLACES[place][1]), draw.choice(["before", "after"])
                rank = draw.randrange(num_processes)
                moment = f"{when} call {number} of {place}" + f", process {rank}" * (num_processes > 1)
                outcome = whole.at_place(folder, place, number, when, rank)
            wrong = whole.resume(folder)
            trials.append({"moment": moment, "outcome": outcome, "wrong": wrong})
            say(f"{i + 1}: {outcome} {moment}: {'; '.join(wrong) or 'as if nothing had happened'}")
            shutil.rmtree(folder)
            result = summary(trials, whole.seconds, num_processes, seed)
            if output:
                output.write_text(json.dumps(result, indent=2) + "\n")
    return result


def summary(
    trials: Sequence[dict[str, Any]], seconds: float, num_processes: int, seed: int
) -> dict[str, Any]:
    return {
        "date": date.today().isoformat(),
        "command": f"python drills/kill.py --trials {len(trials)} --processes {num_processes} --seed {seed}",
        "nextscale": __version__,
        "torch": torch.__version__,
        "seconds_uninterrupted": round(seconds, 1),
        "outcomes": dict(Counter(trial["outcome"] for trial in trials)),
        "wrong": sum(bool(trial["wrong"]) for trial in trials),
        "trials": list(trials),
    }


def main() -> int:
    if sys.argv[1:2] == ["worker"]:
        return worker(sys.argv[2:])
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON file, written after each trial")
    parser.add_argument("--go-on", action="store_true", help="keep the trials that --output has")
    args = parser.parse_args()
    done = []
    if args.go_on and args.output and args.output.exists():
        done = json.loads(args.output.read_text())["trials"]
    say = functools.partial(print, flush=True)
    result = drill(args.trials, args.processes, args.seed, say, args.output, done)
    print(f"{result['wrong']} of {args.trials} trials went wrong")
    return 1 if result["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
