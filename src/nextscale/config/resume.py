"""Whether a run can start in its folder: afresh, replacing an earlier run, or continuing it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nextscale.base.errors import ConfigError
from nextscale.base.records import Record, free_on_resume
from nextscale.config.recipe import Recipe, load_recipe
from nextscale.runs.checkpoint import check_resume
from nextscale.runs.writer import RunFolder


def check_folder(recipe: Recipe) -> None:
    """Check that the run's folder can be opened, and continued if the recipe resumes a run.

    Raises:
        ConfigError: the folder holds a run that the recipe neither replaces nor continues.
        CheckpointError: `run.resume` names a path that is no checkpoint.
    """
    run = recipe.run
    if run.resume and run.overwrite:
        raise ConfigError(
            "run.resume and run.overwrite exclude each other: keep the earlier run, or replace it"
        )
    folder = RunFolder(Path(run.output_dir))
    folder.check(resume=bool(run.resume), overwrite=run.overwrite)
    if run.resume:
        check_resume(run.resume)
    if run.resume and folder.metrics.exists():
        check_resumable(recipe, folder.path / "config.yaml")


def check_resumable(recipe: Recipe, path: Path) -> None:
    """Compare a recipe with the `config.yaml` of the run that it continues.

    Raises:
        ConfigError: names the first key that would make it another run, and both values.
    """
    earlier, present = fixed_settings(load_recipe(path)), fixed_settings(recipe)
    for key in [*present, *(key for key in earlier if key not in present)]:
        was, now = earlier.get(key), present.get(key)
        if was != now:
            raise ConfigError(
                f"{key} is {now!r}, but the run in '{path.parent}' has {was!r}: resume it with that value, "
                "replace it with --run.overwrite true, or choose another --run.output_dir"
            )


def fixed_settings(recipe: Recipe) -> dict[str, Any]:
    """The values that a resumed run must keep, by dotted key: those of fields not marked FREE_ON_RESUME."""
    fixed: dict[str, Any] = {}

    def walk(key: str, value: Any) -> None:
        if isinstance(value, Record):
            value = {name: getattr(value, name) for name in type(value).model_fields} | dict.fromkeys(
                free_on_resume(type(value))
            )
        if isinstance(value, Mapping):
            for name, each in value.items():
                walk(f"{key}.{name}" if key else name, each)
        elif value is not None:
            fixed[key] = value

    walk("", recipe)
    if recipe.optimizer.lr_scheduler_type != "constant_with_warmup":
        fixed["run.max_steps"] = recipe.run.max_steps  # it shapes the schedule
    return fixed
