"""Recipes: YAML in, one validated record out, and back."""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from nextscale.base.errors import ConfigError
from nextscale.base.records import FREE_ON_RESUME, Record
from nextscale.config import schema
from nextscale.config.files import dump_yaml, find_recipe, read_mapping
from nextscale.config.overrides import apply_overrides
from nextscale.grpo import GRPOConfig
from nextscale.optimizer import OptimizerConfig
from nextscale.policy import SamplingConfig
from nextscale.rewards.kinds import AnyReward, in_full
from nextscale.rewards.protocol import RewardConfig
from nextscale.runs.config import RunConfig
from nextscale.tuning import TuningConfig


class Recipe(Record):
    """Everything that defines a run."""

    description: str = Field(default="", json_schema_extra=FREE_ON_RESUME)
    """What the run shows; the report starts with it."""
    model: str = "toy"
    """Model to fine-tune: "toy", a published one such as "var-d16", a folder or hub repository that nextscale
    wrote, or, with `vae`, the file of a transformer such as var_d16.pth."""
    vae: str | None = None
    """File of the tokenizer, if the model is a file."""
    prompts: str | None = None
    """Of a text-conditional model, the file of the prompts to train on: .txt, .jsonl or .csv, or
    hf://datasets/OWNER/NAME/FILE. Rewards see its other columns."""
    eval_prompts: str | None = None
    """File of the prompts that evaluations draw, none of which may be trained on; by default those of
    prompts."""
    sampling: SamplingConfig = SamplingConfig()
    """Keys that are not given are the model's: see `config.build.resolve`."""
    rewards: dict[str, AnyReward] = Field(min_length=1)
    grpo: GRPOConfig = GRPOConfig()
    tuning: TuningConfig = TuningConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    run: RunConfig = RunConfig()

    @field_validator("rewards")
    @classmethod
    def _trains_on_one(cls, rewards: dict[str, RewardConfig]) -> dict[str, RewardConfig]:
        if all(reward.weight is None for reward in rewards.values()):
            raise ValueError("every reward is a constraint or held out; give one to train on")
        return rewards


def load_recipe(path: str | Path, overrides: Mapping[str, str] | None = None) -> Recipe:
    """The recipe in a YAML file, or the packaged one of this name, with some keys overridden.

    Args:
        overrides: dotted keys to values in YAML, such as {"grpo.beta": "0.02"}.

    Raises:
        ConfigError: there is no such file, it is not a recipe, or a key or value cannot be used.
    """
    mapping = apply_overrides(read_recipe(path), overrides or {})
    try:
        return Recipe.from_mapping(mapping)
    except ConfigError as error:
        raise ConfigError(f"recipe '{path}': {error}") from None


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The mapping in the file of a recipe, its rewards written in full, not yet validated.

    A reward of kind `python` names the file beside the recipe, if there is one, and so do prompts and the
    folder of pictures.
    """
    mapping, folder = read_mapping(path), find_recipe(path).parent
    for key in ("prompts", "eval_prompts"):
        if isinstance(file := mapping.get(key), str) and (folder / file).is_file():
            mapping[key] = str(folder / file)
    rewards = mapping.get("rewards")
    if not isinstance(rewards, dict):
        return mapping
    for name, reward in rewards.items():
        with contextlib.suppress(ValueError):  # raised again where the recipe is validated
            rewards[name] = reward = in_full(reward)
        if not isinstance(reward, dict):
            continue
        if isinstance(pictures := reward.get("folder"), str) and (folder / pictures).is_dir():
            reward["folder"] = str(folder / pictures)
        reference = reward.get("function")
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


def json_schema() -> dict[str, Any]:
    """The recipe's JSON Schema; in a recipe, the defaults of `sampling` are the model's."""
    content = Recipe.model_json_schema()
    del content["properties"]["sampling"]["default"]
    for each in content["$defs"]["SamplingConfig"]["properties"].values():
        del each["default"]
        each["description"] += " By default the model's."
    return content


def write_schema() -> None:
    """Write the recipe's JSON Schema anew, for what has no time to import the records (`make schema`)."""
    schema.FILE.write_text(json.dumps(json_schema(), indent=1) + "\n", encoding="utf-8")
