"""What a study compares: a YAML file of experiments, their variants and seeds."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic
import yaml
from pydantic import Field

from nextscale.base.errors import ConfigError
from nextscale.base.records import Record, describe_validation_error

Overrides = dict[str, Any]
"""Dotted keys of a recipe to values, as on the command line."""


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

    seeds: tuple[int, ...] = Field(min_length=1)
    """Seeds of the runs: others than those that settings were tuned on."""
    num_images: int = Field(default=512, ge=2)
    """Images of each run's evaluation."""
    eval_seed: int = Field(default=2000, ge=0)
    """Seed of these images."""
    experiments: dict[str, Experiment] = Field(min_length=1)
    """Name to experiment."""


@dataclass(frozen=True)
class Trial:
    """One run of a study.

    Attributes:
        folder: of the run; `evaluation.json` in it says that it is done.
    """

    experiment: str
    variant: str
    seed: int
    recipe: str
    overrides: Overrides
    folder: Path

    @property
    def evaluation(self) -> Path:
        """Where its measurements are written."""
        return self.folder / "evaluation.json"

    def words(self) -> list[str]:
        """The words of its `nextscale train`."""
        own = {
            "run.seed": self.seed,
            "run.output_dir": str(self.folder),
            "run.overwrite": True,
            "run.eval_steps": 0,
            "run.save_steps": 0,
            "run.report_to": "none",
            "run.disable_tqdm": True,
        }
        words = ["train", self.recipe]
        for key, value in (self.overrides | own).items():
            words += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
        return words


def read_study(path: Path) -> Study:
    """A study from its file.

    Raises:
        ConfigError: the file is not YAML, or not a study.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"'{path}' is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, Mapping):
        raise ConfigError(f"'{path}' is not a study: expected seeds and experiments")
    try:
        return Study.model_validate(values)
    except pydantic.ValidationError as error:
        raise ConfigError(f"'{path}': {describe_validation_error(Study, error)}") from None


def trials(study: Study, folder: Path, beside: Path = Path()) -> Iterator[Trial]:
    """All runs: seed by seed, so that what is there of an unfinished study can be compared.

    Args:
        folder: where each run gets a folder EXPERIMENT/VARIANT/SEED.
        beside: folder of the study, where recipes are looked for.
    """
    for seed in study.seeds:
        for name, experiment in study.experiments.items():
            for variant, overrides in experiment.variants.items():
                path = folder / name / re.sub(r"[^\w.]+", "-", variant) / str(seed)
                given = experiment.common | overrides
                recipe = given.pop("recipe", experiment.recipe)
                if (beside / recipe).is_file():
                    recipe = str(beside / recipe)
                yield Trial(name, variant, seed, recipe, given, path)
