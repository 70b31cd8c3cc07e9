"""Recipes: YAML in, one validated record out, and back."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from nextscale.base.errors import ConfigError
from nextscale.base.records import Record
from nextscale.config.files import dump_yaml, find_recipe, read_mapping
from nextscale.config.overrides import apply_overrides
from nextscale.grpo import GRPOConfig
from nextscale.optimizer import OptimizerConfig
from nextscale.policy import SamplingConfig
from nextscale.rewards.kinds import AnyReward, RewardOptions, in_full
from nextscale.rewards.protocol import RewardConfig
from nextscale.runs.config import RunConfig


class Recipe(Record):
    """Everything that defines a run."""

    description: str = ""
    """What the run shows; the report starts with it."""
    model: str = "toy"
    """Model to fine-tune: "toy", a published one such as "var-d16", a folder or hub repository that nextscale
    wrote, or, with `vae`, the file of a transformer such as var_d16.pth."""
    vae: str | None = None
    """File of the tokenizer, if the model is a file."""
    sampling: SamplingConfig = SamplingConfig()
    rewards: dict[str, AnyReward] = Field(min_length=1)
    grpo: GRPOConfig = GRPOConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    run: RunConfig = RunConfig()

    @field_validator("rewards")
    @classmethod
    def _trains_on_one(cls, rewards: dict[str, RewardConfig]) -> dict[str, RewardConfig]:
        if all(reward.weight is None for reward in rewards.values()):
            raise ValueError("every reward is a constraint or held out; give one to train on")
        return rewards


SECTIONS: dict[str, type[Record]] = {
    "sampling": SamplingConfig,
    "grpo": GRPOConfig,
    "optimizer": OptimizerConfig,
    "run": RunConfig,
}
"""The sections whose keys are the fields of one record; `rewards` has a record for each reward."""

KEYS: dict[str, Any] = {
    **{name: Recipe.model_fields[name].annotation for name in ("description", "model", "vae")},
    **{
        f"{section}.{name}": field.annotation
        for section, record in {**SECTIONS, "rewards.NAME": RewardOptions}.items()
        for name, field in record.model_fields.items()
    },
}
"""Every dotted key with the type of its value; NAME stands for the name of a reward."""


def load_recipe(path: str | Path, overrides: Mapping[str, str] | None = None) -> Recipe:
    """The recipe in a YAML file, or the packaged one of this name, with some keys overridden.

    Args:
        overrides: dotted keys to values in YAML, such as {"grpo.beta": "0.02"}.

    Raises:
        ConfigError: there is no such file, it is not a recipe, or a key or value cannot be used.
    """
    mapping = apply_overrides(read_recipe(path), overrides or {}, KEYS)
    try:
        return Recipe.from_mapping(mapping)
    except ConfigError as error:
        raise ConfigError(f"recipe '{path}': {error}") from None


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The mapping in the file of a recipe, its rewards written in full, not yet validated.

    A reward of kind `python` names the file beside the recipe, if there is one.
    """
    mapping, folder = read_mapping(path), find_recipe(path).parent
    rewards = mapping.get("rewards")
    if not isinstance(rewards, dict):
        return mapping
    for name, reward in rewards.items():
        with contextlib.suppress(ValueError):  # raised again where the recipe is validated
            rewards[name] = reward = in_full(reward)
        reference = reward.get("function") if isinstance(reward, dict) else None
        if isinstance(reference, str) and (folder / reference.rpartition(":")[0]).is_file():
            reward["function"] = str(folder / reference)
    return mapping


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe with all its keys; `load_recipe` reads it back equal."""
    content = recipe.model_dump()
    content["rewards"] = {name: _kind_first(reward) for name, reward in recipe.rewards.items()}
    return dump_yaml(content)


def _kind_first(reward: RewardConfig) -> dict[str, Any]:
    values = reward.model_dump(exclude_none=True)
    return {name: values[name] for name in sorted(values, key=lambda name: name in RewardConfig.model_fields)}


def flatten(recipe: Recipe) -> dict[str, Any]:
    """Every value of a recipe under its dotted key."""
    flat: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, each in value.items():
                walk(f"{prefix}.{key}" if prefix else key, each)
        else:
            flat[prefix] = value

    walk("", recipe.model_dump())
    return flat
