"""Where everything lies in a run folder. Whoever writes or reads one takes the names from here."""

from pathlib import Path
from typing import Literal

PictureKind = Literal["all", "extremes", "scales"]
"""More rows than the grid has; the best, middle and worst images by reward; how some came to be, by scale."""


class RunPaths:
    """The files and folders of a run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"  # the resolved recipe
        self.environment = path / "environment.json"
        self.metrics = path / "metrics.jsonl"  # one object a step
        self.rewards = path / "rewards"  # the Python files of a user's own rewards
        self.samples = path / "samples"  # grids of images
        self.samples_index = self.samples / "index.json"  # what the rows of a grid are
        self.checkpoints = path / "checkpoints"
        self.final = path / "final"  # the trained model
        self.best = path / "best"  # the best model by a metric, where one is kept
        self.best_step = path / "best" / "step.json"  # after which step it was
        self.tensorboard = path / "tensorboard"
        self.report = path / "report.html"
        self.lock_file = path / ".lock"

    def grid(self, step: int) -> Path:
        """The grid of samples after `step` steps."""
        return self.samples / f"{step_name(step)}.png"

    def pictures(self, kind: PictureKind, step: int) -> Path:
        """What else is shown after `step` steps; what it is is beside, as JSON."""
        return self.samples / f"{kind}-{step_name(step)}.png"

    def grids(self) -> dict[int, Path]:
        """The grids of samples that there are, by step, in order."""
        return by_step(self.samples, ".png")


def run_of(checkpoint: Path) -> RunPaths:
    """The run whose checkpoint this is."""
    return RunPaths(checkpoint.resolve().parent.parent)


def step_name(step: int) -> str:
    """What a checkpoint or a grid is called."""
    return f"step-{step:06d}"


def by_step(folder: Path, ending: str = "", before: str = "") -> dict[int, Path]:
    """The paths in `folder` that `step_name` named, by step, in order.

    Args:
        ending, before: what stands after the name, and before it.
    """
    found = {
        path.name.removeprefix(f"{before}step-").removesuffix(ending): path
        for path in folder.glob(f"{before}step-*{ending}")
    }
    return {int(step): found[step] for step in sorted(filter(str.isdecimal, found), key=int)}
