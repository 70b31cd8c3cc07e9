"""What a study compares: a YAML file of experiments, their variants and seeds."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pydantic
from pydantic import Field

from nextscale.base.errors import ConfigError, in_words
from nextscale.base.files import read_text
from nextscale.base.records import Record, describe_validation_error, did_you_mean
from nextscale.config.files import parse_yaml
from nextscale.config.recipe import Recipe, load_recipe

Overrides = dict[str, Any]
"""Dotted keys of a recipe to values, as on the command line."""

OWN = {"run.seed", "run.output_dir", "run.overwrite", "run.report_to", "run.disable_tqdm", "run.resume"}
"""Options of each run that a study sets itself, or leaves alone."""


class Experiment(Record):
    """One recipe, and what is varied of it."""

    recipe: str
    """A packaged recipe, or a file beside the study or from the working directory."""
    aim: str = "reward"
    """Metric that the curves show, which training and evaluation both have: such as rewards/NAME/mean, where
    variants have other rewards besides."""
    against_diversity: str | None = None
    """Measure of the evaluation that is drawn against diversity; by default the aim."""
    common: Overrides = Field(default_factory=dict)
    """Overrides of all variants."""
    variants: dict[str, Overrides] = Field(min_length=1)
    """Name to what differs: overrides, and where it is another `recipe`, that."""


class Study(Record):
    """Experiments, and how each run of them is measured."""

    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(min_length=1)
    """Seeds of the runs: others than those that settings were tuned on."""
    num_images: int = Field(default=512, ge=2)
    """Images of each run's evaluation."""
    eval_seed: int = Field(default=2000, ge=0)
    """Seed of these images."""
    experiments: dict[str, Experiment] = Field(min_length=1)
    """Name to experiment; pictures are called so, too."""

    @pydantic.field_validator("experiments")
    @classmethod
    def _names_files(cls, experiments: dict[str, Experiment]) -> dict[str, Experiment]:
        for name in experiments:
            if not re.fullmatch(r"\w[\w .+-]*", name):
                raise ValueError(
                    f"'{name}' is no name for a picture: use letters, digits, spaces and . + - _"
                )
        return experiments


@dataclass(frozen=True)
class Trial:
    """One run of a study.

    Attributes:
        folder: of the run, and of what was measured of it.
        evaluates: whether its recipe needs the evaluations of training; else there are none.
    """

    experiment: str
    variant: str
    seed: int
    recipe: str
    overrides: Overrides
    folder: Path
    evaluates: bool = False

    @property
    def name(self) -> str:
        """What it is called in messages."""
        return f"{self.experiment}/{self.variant}/{self.seed}"

    @property
    def evaluation(self) -> Path:
        """Where its measurements are written."""
        return self.folder / "evaluation.json"

    @property
    def config(self) -> Path:
        """The recipe that was run, once it was."""
        return self.folder / "config.yaml"

    def load(self) -> Recipe:
        """The recipe that is to be run."""
        return load_recipe(self.recipe, self.options())

    def words(self) -> list[str]:
        """The words of its `nextscale train`."""
        pairs = ((f"--{key}", value) for key, value in self.options().items())
        return ["train", self.recipe, *(word for pair in pairs for word in pair)]

    def options(self) -> dict[str, str]:
        """What differs from its recipe, as it is given on the command line."""
        # What its recipe or its variant needs to be measured on the way is.
        needless = {"run.save_steps": 0} | ({} if self.evaluates else {"run.eval_steps": 0})
        own = {
            "run.seed": self.seed,
            "run.output_dir": str(self.folder),
            "run.overwrite": True,
            "run.report_to": "none",
            "run.disable_tqdm": True,
        }
        assert own.keys() <= OWN
        return {key: _text(value) for key, value in (needless | self.overrides | own).items()}


def read_study(path: Path) -> Study:
    """A study from its file.

    Raises:
        ConfigError: the file cannot be read, is not YAML, or not a study.
    """
    try:
        text = read_text(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"study '{path}' cannot be read: {in_words(error)}") from None
    values = parse_yaml(text, f"'{path}'")
    if not isinstance(values, Mapping):
        raise ConfigError(f"'{path}' is not a study: expected seeds and experiments")
    try:
        return Study.model_validate(values)
    except pydantic.ValidationError as error:
        raise ConfigError(f"'{path}': {describe_validation_error(Study, error)}") from None


def trials(study: Study, folder: Path, beside: Path = Path()) -> list[Trial]:
    """All runs: seed by seed, so that what is there of an unfinished study can be compared.

    Args:
        folder: where each run gets a folder EXPERIMENT/VARIANT/SEED.
        beside: folder of the study, where recipes are looked for.

    Raises:
        ConfigError: a variant is no recipe, or has no such aim; or two runs would be in one folder.
    """
    found: list[Trial] = []
    for name, experiment in study.experiments.items():
        for variant, overrides in experiment.variants.items():
            given = experiment.common | overrides
            if own := sorted(OWN & given.keys()):
                raise ConfigError(
                    f"experiment '{name}', variant '{variant}': '{own[0]}' is the study's to say"
                    + ("; give its seeds" if own[0] == "run.seed" else "")
                )
            path = str(given.pop("recipe", experiment.recipe))
            if (beside / path).is_file():
                path = str(beside / path)
            try:
                recipe = load_recipe(path, {key: _text(value) for key, value in given.items()})
                _check_aim(experiment.aim, recipe)
            except ConfigError as error:
                raise ConfigError(f"experiment '{name}', variant '{variant}': {error}") from None
            # Held-out rewards are refused where nothing would measure them, and so is keeping the best model.
            is_watched = recipe.run.save_best is not None or any(
                each.held_out for each in recipe.rewards.values()
            )
            place = folder / name / re.sub(r"[^\w.]+", "-", variant)
            found += [
                Trial(name, variant, seed, path, given, place / str(seed), is_watched) for seed in study.seeds
            ]
    taken: dict[Path, Trial] = {}
    for trial in found:
        if (other := taken.setdefault(trial.folder, trial)) is not trial:
            raise ConfigError(
                f"the runs {other.name} and {trial.name} would both be in '{trial.folder}': give them names "
                "that differ by letters or digits, and each seed once"
            )
    return sorted(found, key=lambda trial: study.seeds.index(trial.seed))


def _check_aim(aim: str, recipe: Recipe) -> None:
    """Check what can be known of a metric before a run: that its reward is there.

    Raises:
        ConfigError: it is not.
    """
    known = [f"rewards/{name}/{each}" for name in recipe.rewards for each in ("mean", "std", "sem")]
    if aim.startswith("rewards/") and aim not in known:
        raise ConfigError(f"it has no metric '{aim}', the aim{did_you_mean(aim, known)}")


def _text(value: Any) -> str:
    """A value as it is given on the command line."""
    return value if isinstance(value, str) else json.dumps(value)
