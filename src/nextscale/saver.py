"""How far a run has come, and its checkpoints: of whole steps, with the same options."""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nextscale.base.errors import CheckpointError, in_words
from nextscale.base.metrics import finite
from nextscale.callbacks import Callback, named
from nextscale.controllers import Controller
from nextscale.learner import Learner
from nextscale.runs.writer import RunFolder


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        step: the number of whole steps done.
        seconds: what they took, without evaluations.
        num_tokens: those of all images that they drew.
        step_evaluated: after how many of them the model was last measured; None before the first time.
        first_evaluation: what was measured before the first step.
        last_metrics: what was logged last.
    """

    step: int = 0
    seconds: float = 0.0
    num_tokens: float = 0.0
    step_evaluated: int | None = None
    first_evaluation: dict[str, float] = field(default_factory=dict)
    last_metrics: dict[str, float] = field(default_factory=dict)

    def state_dict(self) -> dict[str, Any]:
        """All but the step, which a checkpoint has of its own; exact in JSON."""
        return {
            "seconds": self.seconds,
            "num_tokens": self.num_tokens,
            "step_evaluated": self.step_evaluated,
            "first_evaluation": finite(self.first_evaluation),
            "last_metrics": finite(self.last_metrics),
        }

    @staticmethod
    def of(state: Mapping[str, Any], tokens_of_a_step: int) -> "Progress":
        """What a checkpoint holds.

        Args:
            tokens_of_a_step: where an earlier version wrote no number of tokens.

        Raises:
            KeyError, TypeError, ValueError: it does not hold it.
        """
        step, evaluated = _count(state["step"]), state["step_evaluated"]
        num_tokens = state.get("num_tokens", float(step * tokens_of_a_step))
        if not math.isfinite(state["seconds"]) or not math.isfinite(num_tokens):
            raise ValueError("the seconds or the tokens are no number")
        return Progress(
            step,
            state["seconds"],
            num_tokens,
            None if evaluated is None else _count(evaluated),
            dict(state.get("first_evaluation", {})),
            dict(state.get("last_metrics", {})),
        )


class Saver:
    """Writes the checkpoints of a run, and goes on from one.

    Args:
        options: those that a resumed run must keep, from `Options.fixed`.
        controllers: what adapts from step to step, by name.
        callbacks: what looks on; those that keep a state have it in the checkpoints, too.

    Attributes:
        progress: as the trainer counts it; the state that is written is that after `progress.step` steps.
    """

    def __init__(
        self,
        learner: Learner,
        folder: RunFolder,
        options: Mapping[str, Any],
        controllers: Mapping[str, Controller],
        callbacks: Sequence[Callback],
    ) -> None:
        self.learner, self.folder, self.options = learner, folder, options
        self.controllers, self.callbacks = controllers, callbacks
        self.progress = Progress()
        self.saved: tuple[int, int | None] | None = None  # steps done and evaluated in the last checkpoint
        # Before the step in hand, if there is one: the controllers' states, and the updates made so far.
        self.before_step: tuple[dict[str, dict[str, Any]], int] | None = None

    def begin_step(self) -> None:
        """A step is begun: until `end_step`, the state of the last whole one is that of now."""
        self.before_step = copy.deepcopy(self._states()), self.learner.num_updates

    def end_step(self, metrics: Mapping[str, float]) -> None:
        """The step is whole.

        Args:
            metrics: what it measured.
        """
        self.before_step = None
        self.progress.step += 1
        self.progress.seconds += metrics["step_time"]
        self.progress.num_tokens = metrics["num_tokens"]

    def undo_step(self) -> bool:
        """A step has failed: put the controllers back. Returns whether the state is that of the last whole
        step; it is not where the step had moved the model, in one of several iterations."""
        if self.before_step is None:
            return True
        states, num_updates = self.before_step
        for name, state in states.items():
            self.controllers[name].load_state_dict(state)
        return self.learner.num_updates == num_updates

    @property
    def is_saved(self) -> bool:
        """Whether the folder's last checkpoint, written or gone on from, is of the present state."""
        return self.saved == (self.progress.step, self.progress.step_evaluated)

    def save(self) -> Path:
        """Write a checkpoint of the state after the last whole step; returns its path."""
        state = self.progress.state_dict() | {
            "num_skipped": self.learner.num_skipped,
            "options": dict(self.options),
            "scheduler": self.learner.scheduler.state_dict(),
            "controllers": self._states(),
            "callbacks": {name: each.state_dict() for name, each in named(self.callbacks).items()},
        }
        self.saved = self.progress.step, self.progress.step_evaluated
        limit = self.learner.run.save_total_limit
        return self.learner.save(self.folder.checkpoints, self.progress.step, state, limit=limit)

    def load(self, path: Path) -> None:
        """Continue from a checkpoint.

        Raises:
            CheckpointError: a file of it is missing or broken, or was written by an earlier version.
        """
        state = self.learner.load(path)
        try:
            schedule, num_images = self.learner.pipe.transformer.schedule, self.learner.grpo.num_images
            progress = Progress.of(state, num_images * schedule.num_tokens)
            num_skipped = _count(state["num_skipped"])
            for name, controller in self.controllers.items():
                controller.load_state_dict(state["controllers"][name])
            for name, callback in named(self.callbacks).items():
                if theirs := state.get("callbacks", {}).get(name):
                    callback.load_state_dict(theirs)
            self.learner.scheduler.load_state_dict(state["scheduler"])
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
            raise CheckpointError(
                f"checkpoint '{path}' cannot be read: its trainer_state.json is damaged ({in_words(error)}); "
                "go on from another one"
            ) from error
        self.progress, self.learner.num_skipped = progress, num_skipped
        if self.folder.owns(path):
            self.saved = progress.step, progress.step_evaluated

    def _states(self) -> dict[str, dict[str, Any]]:
        return {name: each.state_dict() for name, each in self.controllers.items()}


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{str(value)[:40]!r} is no number of steps")
    return value
