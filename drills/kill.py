"""Do harm to a run at many moments, go on with it, and compare with a run that nothing happened to.

    python drills/kill.py --trials 50                     # one process, killed with SIGKILL
    python drills/kill.py --trials 50 --processes 2       # two, under torchrun: one of them, or all at once
    python drills/kill.py --processes 2 --fault launcher  # torchrun is killed, its processes are not
    python drills/kill.py --processes 2 --fault signal    # SIGTERM, SIGINT or SIGHUP, to any one process
    python drills/kill.py --fault disk                    # it is full; asks for the right to mount a tmpfs
    python drills/kill.py --processes 2 --fsdp            # with any of these, the model is sharded

Half of the moments are spread evenly at random over the run's time; the others lie where it is most delicate
to be stopped (`PLACES`): just before or after a call, in the process that makes it. Whatever the moment,

- the newest checkpoint is whole, if there was one, and nothing holds the folder;
- `nextscale train ... --run.resume auto` ends as if nothing had happened: parameters, average, optimizer,
  random numbers, controllers and metrics are the same to the last bit, times excepted;
- no step is missing or there twice, in `metrics.jsonl` and in TensorBoard's files;
- nothing is left over;
- a run that was asked to stop did so after one step in all processes, with a checkpoint of it;
- a full disk is told in one sentence.

The result is printed, and written as JSON with --output. Exit status 1 if a trial failed.
"""

import argparse
import contextlib
import functools
import importlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nextscale import __version__
from nextscale.base.errors import ConfigError
from nextscale.runs.checkpoint import list_checkpoints
from nextscale.runs.manifest import find_damage
from nextscale.runs.writer import RunFolder

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

LONGEST = 3600.0  # seconds that a run may take: on a busy machine, much more than by itself
AS_ROOT = [] if os.geteuid() == 0 else ["sudo", "--non-interactive"]  # to mount a disk of a given size

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
"""Name to function, and how many of its calls are made for sure: stopped before or after one of them."""


# ---- the process that is harmed


def signal_at(place: str, number: int, when: str, sent: int) -> None:
    """Have this process get a signal before or after the number-th call of a function from now on."""
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
        is_it = calls == number
        if is_it and when == "before":
            os.kill(os.getpid(), sent)
        result = original(*args, **options)
        if is_it and when == "after":
            os.kill(os.getpid(), sent)
        return result

    setattr(owner, name, counted)


def worker(words: list[str]) -> int:
    """`worker PLACE NUMBER WHEN RANK SIGNAL WORDS`: the command line; one process of it gets a signal."""
    place, number, when, rank, sent, *rest = words
    from nextscale.cli.main import main

    if os.environ.get("RANK", "0") == rank:
        signal_at(place, int(number), when, int(sent))
    return main(rest)


# ---- runs


@dataclass
class Ended:
    """How a run ended, and what it wrote to its standard error."""

    status: int
    told: str


class Runs:
    """Runs that are harmed, and the one that nothing happened to.

    Args:
        scratch: a folder for all runs.
    """

    def __init__(self, scratch: Path, num_processes: int, is_fsdp: bool = False) -> None:
        self.num_processes, self.options = num_processes, RECIPE | {"run.fsdp": is_fsdp}
        begin, straight = time.monotonic(), scratch / "straight"
        if (ended := self.wait(self.start(straight))).status:
            raise RuntimeError(ended.told)
        self.seconds = time.monotonic() - begin
        self.expected = state_of(straight)
        self.bytes = sum(file.stat().st_size for file in straight.rglob("*") if file.is_file())

    def start(self, folder: Path, *before: str) -> subprocess.Popen[str]:
        """Train into a folder, or go on there; `before` are the words for `worker`."""
        options = self.options | {"run.output_dir": str(folder), "run.resume": "auto"}
        command = [sys.executable]
        if self.num_processes > 1:
            command += ["-m", "torch.distributed.run", "--standalone"]
            command += ["--nproc-per-node", str(self.num_processes)]
        command += [__file__, "worker", *before] if before else ["-m", "nextscale"]
        command += ["train", "toy-painting"]
        command += [word for key, value in options.items() for word in (f"--{key}", str(value))]
        settings = {
            "OMP_NUM_THREADS": "1",
            "ACCELERATE_USE_CPU": "true",
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "5",
        }
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=os.environ | settings, stdout=pipe, stderr=pipe, text=True)

    def wait(self, process: subprocess.Popen[str]) -> Ended:
        _, told = process.communicate(timeout=LONGEST)
        return Ended(process.returncode, told)

    def at_time(self, folder: Path, seconds: float, harm: Callable[[psutil.Process], None]) -> Ended:
        """Do harm to a run some time after its start, if it has not ended by then."""
        process = self.start(folder)
        try:
            _, told = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            harm(psutil.Process(process.pid))
            return self.wait(process)
        return Ended(process.returncode, told)

    def at_place(self, folder: Path, draw: random.Random, place: str, sent: int) -> tuple[str, Ended]:
        """Have the process that makes a call get a signal, before or after it."""
        number, when = draw.randint(1, PLACES[place][1]), draw.choice(["before", "after"])
        rank = draw.randrange(self.num_processes)
        moment = f"{when} call {number} of {place}" + f", process {rank}" * (self.num_processes > 1)
        return moment, self.wait(self.start(folder, place, str(number), when, str(rank), str(sent)))

    def judge(self, folder: Path, ended: Ended) -> tuple[str, list[str]]:
        """How a run ended, and what is wrong with what it left."""
        outcome, wrong = "killed" if ended.status else "ended before", []
        checkpoints = list_checkpoints(folder / "checkpoints")
        if checkpoints and (damage := find_damage(checkpoints[-1])):
            wrong.append(f"the newest checkpoint: {damage}")
        if stopped := re.findall(r"stopped after step (\d+)", ended.told):
            outcome = "stopped after a step"
            steps = [each["step"] for each in map(json.loads, (folder / "metrics.jsonl").open())]
            if [f"step-{int(each):06d}" for each in stopped] != [each.name for each in checkpoints[-1:]]:
                wrong.append(f"stopped after {stopped}, with {checkpoints}")
            if steps[-1] != int(stopped[0]):
                wrong.append(f"stopped after {stopped}, with metrics of {steps}")
        if ended.told.count("nextscale: error: ") > 1:
            wrong.append(f"told more than once: {ended.told[-2000:]}")
        try:
            holder = RunFolder(folder)
            holder.lock()
            holder.close()
        except ConfigError as error:
            wrong.append(str(error))
        return outcome, wrong

    def go_on(self, folder: Path) -> list[str]:
        """Go on to the end; returns what is not as in the run that nothing happened to."""
        ended = self.wait(self.start(folder))
        if ended.status:
            return [f"it does not go on: {ended.told[-2000:]}"]
        return differences(self.expected, state_of(folder))


# ---- what can happen to a run: each a function of the runs, a new folder, what to draw by, and a place, or
# None for any time. Returns the moment, the outcome, and what was wrong.

Trial = tuple[str, str, list[str]]


def kill(runs: Runs, folder: Path, draw: random.Random, place: str | None) -> Trial:
    """All processes at once; at a place, the one that comes there."""

    def kill_all(first: psutil.Process) -> None:
        for each in [first, *first.children(recursive=True)]:  # a launcher's have sessions of their own
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()

    if place is None:
        seconds = draw.uniform(0, runs.seconds)
        moment, ended = f"after {seconds:.1f} s", runs.at_time(folder, seconds, kill_all)
    else:
        moment, ended = runs.at_place(folder, draw, place, signal.SIGKILL)
    outcome, wrong = runs.judge(folder, ended)
    return moment, outcome, wrong + runs.go_on(folder)


def kill_launcher(runs: Runs, folder: Path, draw: random.Random, place: str | None) -> Trial:
    """The launcher alone, at any time: its processes have to end by themselves."""
    seconds, processes = draw.uniform(0, runs.seconds), []

    def harm(launcher: psutil.Process) -> None:
        processes.extend(launcher.children())
        launcher.kill()

    ended = runs.at_time(folder, seconds, harm)
    _, alive = psutil.wait_procs(processes, timeout=10)
    outcome, wrong = runs.judge(folder, ended)
    for each in alive:
        wrong.append(f"process {each.pid} is left")
        each.kill()
    return f"after {seconds:.1f} s", outcome, wrong + runs.go_on(folder)


def send_signal(runs: Runs, folder: Path, draw: random.Random, place: str | None) -> Trial:
    """One that asks to stop: to any one process, the launcher included; at a place, to who comes there."""
    sent = draw.choice([signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
    if place is None:
        seconds = draw.uniform(0, runs.seconds)
        target = draw.randrange(runs.num_processes + 1) if runs.num_processes > 1 else 0

        def harm(first: psutil.Process) -> None:
            [first, *first.children()][: target + 1][-1].send_signal(sent)

        to = f" to {f'process {target - 1}' if target else 'the launcher'}" * (runs.num_processes > 1)
        moment, ended = f"after {seconds:.1f} s{to}", runs.at_time(folder, seconds, harm)
    else:
        moment, ended = runs.at_place(folder, draw, place, sent)
    outcome, wrong = runs.judge(folder, ended)
    return f"{sent.name} {moment}", outcome, wrong + runs.go_on(folder)


def fill_disk(runs: Runs, folder: Path, draw: random.Random, place: str | None) -> Trial:
    """A disk that is too small for the run; or at any time, one that others fill."""
    share, disk = draw.random(), folder / "disk"
    disk.mkdir(parents=True)

    def mount(option: str) -> None:
        subprocess.run([*AS_ROOT, "mount", "-t", "tmpfs", "-o", option, "drill", str(disk)], check=True)

    def fill(_: psutil.Process) -> None:
        with contextlib.suppress(OSError), (disk / "other").open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass

    if place is None:
        size, seconds = 2 * runs.bytes, share * runs.seconds
        moment = f"full after {seconds:.1f} s"
    else:
        size, seconds = round(share * runs.bytes), LONGEST
        moment = f"full with {size / 1e6:.2f} MB"
    mount(f"size={size}")
    try:
        ended = runs.at_time(disk / "run", seconds, fill)
        outcome, wrong = runs.judge(disk / "run", ended)
        tracebacks = ended.told.count("Traceback") - (runs.num_processes > 1)  # torchrun's own
        if ended.status:
            outcome = "ended by an error"
            if ended.status not in (1, 2) or "No space left" not in ended.told or tracebacks > 0:
                wrong.append(f"exit status {ended.status}: {ended.told[-4000:]}")
        (disk / "other").unlink(missing_ok=True)
        mount(f"remount,size={4 * runs.bytes}")
        return moment, outcome, wrong + runs.go_on(disk / "run")
    finally:
        subprocess.run([*AS_ROOT, "umount", str(disk)], check=True)


FAULTS: dict[str, Callable[[Runs, Path, random.Random, str | None], Trial]] = {
    "kill": kill,
    "launcher": kill_launcher,
    "signal": send_signal,
    "disk": fill_disk,
}


# ---- comparing


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


# ---- the drill


def drill(
    num_trials: int,
    num_processes: int = 1,
    *,
    fault: str = "kill",
    is_fsdp: bool = False,
    seed: int = 0,
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
        runs = Runs(Path(scratch), num_processes, is_fsdp)
        print(f"uninterrupted: {runs.seconds:.1f} s", flush=True)
        for i in range(len(trials), num_trials):
            place = None if i % 2 else places[i // 2 % len(places)]
            folder = Path(scratch) / f"trial-{i}"
            moment, outcome, wrong = FAULTS[fault](runs, folder, random.Random(f"{seed}, {i}"), place)
            trials.append({"moment": moment, "outcome": outcome, "wrong": wrong})
            told = "; ".join(wrong) or "as if nothing had happened"
            print(f"{i + 1}: {outcome}, {moment}: {told}", flush=True)
            shutil.rmtree(folder)
            words = f"--trials {len(trials)} --processes {num_processes} --fault {fault}{' --fsdp' * is_fsdp}"
            result = {
                "date": date.today().isoformat(),
                "command": f"python drills/kill.py {words} --seed {seed}",
                "nextscale": __version__,
                "torch": torch.__version__,
                "seconds_uninterrupted": round(runs.seconds, 1),
                "outcomes": dict(Counter(trial["outcome"] for trial in trials)),
                "wrong": sum(bool(trial["wrong"]) for trial in trials),
                "trials": trials,
            }
            if output:
                output.write_text(json.dumps(result, indent=2) + "\n")
    return result


def main() -> int:
    if sys.argv[1:2] == ["worker"]:
        return worker(sys.argv[2:])
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--fault", choices=FAULTS, default="kill")
    parser.add_argument("--fsdp", action="store_true", help="with several processes: shard the model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON file, written after each trial")
    parser.add_argument("--go-on", action="store_true", help="keep the trials that --output has")
    args = parser.parse_args()
    done = []
    if args.go_on and args.output and args.output.exists():
        done = json.loads(args.output.read_text())["trials"]
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # or under nohup the runs would ignore it as well
    result = drill(
        args.trials,
        args.processes,
        fault=args.fault,
        is_fsdp=args.fsdp,
        seed=args.seed,
        output=args.output,
        done=done,
    )
    print(f"{result['wrong']} of {args.trials} trials went wrong")
    return 1 if result["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
