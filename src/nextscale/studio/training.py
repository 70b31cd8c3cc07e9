"""A fine-tuning that was started from the page: a process of its own, which outlives a closed tab and can be
stopped."""

import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from nextscale.base.errors import ConfigError
from nextscale.config.files import RECIPES, dump_yaml, read_mapping
from nextscale.models.embedded import CLIPS
from nextscale.rewards.networks.prompts import check_prompts
from nextscale.runs.paths import RunPaths

MAX_STEPS = 1000
PROMPTS = "prompts.txt"  # of a run that was started with prompts of its own


@dataclass
class Training:
    """A run that goes on.

    Attributes:
        paths: of the run.
        process: that trains.
        log: where what it says is written.
        is_stopping: whether it was asked to stop.
    """

    paths: RunPaths
    process: "subprocess.Popen[bytes]" = field(repr=False)
    log: Path
    is_stopping: bool = False

    @property
    def is_running(self) -> bool:
        """Whether it goes on."""
        return self.process.poll() is None

    def stop(self) -> None:
        """Let the step in hand end, write a checkpoint and end the run. A second signal would end it at once,
        without one, so it is not sent."""
        if self.is_running and not self.is_stopping:
            self.process.send_signal(signal.SIGINT)
            self.is_stopping = True

    def status(self) -> str:
        """What to tell of it."""
        if self.is_running:
            doing = "Stopping after the step in hand" if self.is_stopping else "Running"
            return f"{doing}: {self.paths.path.name}"
        code = self.process.returncode
        if code == 0:
            return f"Done: {self.paths.path.name}. Its model can be chosen in Draw, its report is in Runs."
        said = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return f"Ended early: {said[-1] if said else f'exit status {code}'}"


def recipe_of(
    model: str,
    prompt: str,
    clip: str,
    steps: int,
    learning_rate: float,
    folder: Path,
    *,
    is_prompted: bool = False,
    prompts: Sequence[str] = (),
) -> str:
    """The recipe of a fine-tuning towards a prompt: that of toy-painting, or for a model that draws by
    prompts that of toy-text-attributes, with what the page asks for.

    Args:
        prompts: to train on, which `start` writes into the folder; by default the miniature's.

    Raises:
        ConfigError: an empty prompt, or a number that is out of range.
    """
    if not prompt or not prompt.strip():
        raise ConfigError("write a prompt to tune towards, such as: a painting of a {label}")
    if steps is None or learning_rate is None:  # an emptied field
        raise ConfigError("steps and the learning rate must be numbers")
    if not 1 <= steps <= MAX_STEPS:
        raise ConfigError(f"steps must be between 1 and {MAX_STEPS}, got {steps}")
    if not 0 < learning_rate < 1:
        raise ConfigError(f"the learning rate must be above 0 and below 1, got {learning_rate}")
    content = read_mapping("toy-text-attributes" if is_prompted else "toy-painting")
    del content["sampling"]  # as the model is sampled
    content |= {"description": f"Started from the studio, towards: {prompt.strip()}", "model": model}
    content["rewards"]["follows" if is_prompted else "painting"] |= {
        "clip_score": prompt.strip(),
        "clip": clip,
    }
    if clip not in CLIPS:  # diversity of the miniature's images is told by "toy" in all of its recipes
        content["rewards"]["diversity"] |= {"clip": clip}
        content["run"] |= {"diversity_clip": clip}
    if prompts:
        content |= {"prompts": str(folder / PROMPTS)}
        del content["eval_prompts"]
    elif is_prompted:
        content |= {key: str(RECIPES / content[key]) for key in ("prompts", "eval_prompts")}
    content["optimizer"] |= {"learning_rate": learning_rate}
    content["run"] |= {
        "output_dir": str(folder),
        "max_steps": steps,
        "eval_steps": max(1, min(10, steps // 3)),
        "eval_num_images": 128,
        "report_to": "none",
    }
    return dump_yaml(content)


def prompts_of(text: str, needs_some: bool) -> list[str]:
    """The prompts of a field of the page, one a line.

    Raises:
        ConfigError: one stands there twice, or there are none where some are needed.
    """
    lines = text.replace("\r\n", "\n").split("\n")  # and not at U+2028 and its like, as in a file of prompts
    found = [" ".join(line.split()) for line in lines if line.strip()]
    for prompt, number in Counter(found).items():
        if number > 1:
            raise ConfigError(f"the prompt '{prompt}' stands there {number} times: give it once")
    if needs_some and not found:
        raise ConfigError("write the prompts to train on, one a line")
    return found


def start(runs: Path, name: str, *, prompt: str, prompts: Sequence[str] = (), **options: Any) -> Training:
    """Start a fine-tuning in a new folder of `runs`.

    Args:
        name: of the folder; by default the time.
        prompt, prompts, options: of `recipe_of`.

    Raises:
        ConfigError: a name that is none or taken, or an option that cannot be used.
    """
    name = (name or "").strip() or datetime.now().strftime("studio-%Y%m%d-%H%M%S")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        raise ConfigError(f"'{name}' is no name for a run: use letters, digits, dots and dashes")
    folder = runs / name
    if folder.exists():
        raise ConfigError(f"there is a run '{name}' already: choose another name")
    text = recipe_of(folder=folder, prompt=prompt, prompts=prompts, **options)
    check_prompts(prompt.strip(), columns=False)
    folder.mkdir(parents=True)
    if prompts:
        (folder / PROMPTS).write_text("\n".join(prompts) + "\n", encoding="utf-8")
    recipe, log = folder / "recipe.yaml", folder / "log.txt"
    recipe.write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "nextscale", "train", str(recipe), "--run.disable_tqdm", "true"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=os.environ.copy()
        )
    return Training(RunPaths(folder), process, log)
