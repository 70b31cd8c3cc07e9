"""Checkpoints that are whole or absent, and the newest of a run.

Accelerate writes and reads what is in them; this module decides where they lie and when they count.
"""

import json
import shutil
from pathlib import Path

from accelerate import Accelerator

from nextscale.base.errors import CheckpointError
from nextscale.runs.paths import by_step, step_name

STATE_FILE = "trainer_state.json"


def save_checkpoint(accelerator: Accelerator, folder: Path, step: int, state: dict, limit: int) -> Path:
    """Write a checkpoint aside and rename it when it is whole; then remove all but the newest `limit`.

    Args:
        folder: the run's folder of checkpoints.
        step: the number of steps done.
        state: the trainer's own state; must be JSON.

    Returns:
        the checkpoint's path.
    """
    final = folder / step_name(step)
    aside = folder / f".writing-{final.name}"
    if accelerator.is_main_process:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(aside))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (aside / STATE_FILE).write_text(json.dumps(state | {"step": step}, indent=2) + "\n")
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
        for old in list_checkpoints(folder)[:-limit]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    return [path for path in by_step(folder).values() if (path / STATE_FILE).is_file()]


def find_checkpoint(resume: str, folder: Path) -> Path | None:
    """The checkpoint to resume from; None when `resume` is "auto" and there is none yet.

    Args:
        resume: "auto" for the newest in `folder`, or a checkpoint's path.

    Raises:
        CheckpointError: the path is not a checkpoint.
    """
    if resume == "auto":
        return next(reversed(list_checkpoints(folder)), None)
    path = Path(resume)
    if not (path / STATE_FILE).is_file():
        raise CheckpointError(f"'{path}' is no checkpoint: expected 'auto' or a folder with a {STATE_FILE}")
    return path


def load_checkpoint(accelerator: Accelerator, path: Path) -> dict:
    """Restore the model, the optimizer and the learning-rate schedule; returns the trainer's own state.

    Raises:
        CheckpointError: a file of the checkpoint is missing or broken.
    """
    try:
        state = _with_controllers(json.loads((path / STATE_FILE).read_text()))
        accelerator.load_state(str(path))
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"checkpoint '{path}' cannot be read: {reason}") from error
    return state


def _with_controllers(state: dict) -> dict:
    """A trainer's state as it is written now; an earlier one had each controller under a key of its own."""
    if "controllers" in state:
        return state
    names = [name for name in ("constraints", "entropy_floor") if name in state]
    controllers = {name: state[name] for name in names} | {"watch": {"first": state["first_evaluation"]}}
    return {"step": state["step"], "seconds": state["seconds"], "controllers": controllers}
