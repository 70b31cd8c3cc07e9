"""Whether a run can start in its folder: afresh, replacing an earlier run, or continuing it."""

from pathlib import Path
from typing import Any

from nextscale.base.errors import ConfigError
from nextscale.base.records import changed_value, fixed_values
from nextscale.config.recipe import Recipe, load_recipe
from nextscale.runs.checkpoint import check_resume
from nextscale.runs.paths import run_of
from nextscale.runs.writer import RunFolder


def check_folder(recipe: Recipe) -> None:
    """Check that the run's folder can be opened, and continued if the recipe resumes a run.

    Raises:
        ConfigError: the folder holds a run that the recipe neither replaces nor continues.
        CheckpointError: `run.resume` names a path that is no checkpoint.
    """
    run = recipe.run
    folder = RunFolder(Path(run.output_dir))
    folder.check(resume=bool(run.resume), overwrite=run.overwrite)
    if run.resume:
        check_resume(run.resume)
        # A checkpoint that is asked for by its path may be of a run in another folder.
        runs = [folder] if run.resume == "auto" else [folder, run_of(Path(run.resume))]
        for each in runs:
            if each.metrics.exists():
                check_resumable(recipe, each.config)


def check_resumable(recipe: Recipe, path: Path) -> None:
    """Compare a recipe with the `config.yaml` of the run that it continues.

    Raises:
        ConfigError: names the first key that would make it another run, and both values.
    """
    if changed := changed_value(fixed_settings(load_recipe(path)), fixed_settings(recipe)):
        key, was, now = changed
        raise ConfigError(
            f"{key} is {now!r}, but the run in '{path.parent}' has {was!r}: resume it with that value, "
            "or begin a new run in another --run.output_dir, without --run.resume"
        )


def fixed_settings(recipe: Recipe) -> dict[str, Any]:
    """The values that a resumed run must keep, by dotted key."""
    fixed = fixed_values(recipe)
    if recipe.optimizer.depends_on_the_end:
        fixed["run.max_steps"] = recipe.run.max_steps
    return fixed
