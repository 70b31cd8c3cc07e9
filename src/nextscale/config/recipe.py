"""Recipes: YAML in, one validated record out, and back."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import pydantic
from pydantic import BeforeValidator, Field, field_validator, model_validator
from typing_extensions import Self

from nextscale.base.errors import ConfigError
from nextscale.base.records import FREE_ON_RESUME, Record
from nextscale.config.overrides import apply_overrides
from nextscale.config.reading import dump_yaml, read_recipe
from nextscale.constraints import AtLeast, AtMost, BoundValue, Constraint, check_bound
from nextscale.grpo import GRPOConfig
from nextscale.optimizer import OptimizerConfig
from nextscale.policy import SamplingConfig
from nextscale.rewards import (
    Aesthetic,
    ClassProbability,
    ClipScore,
    HPSv2,
    ImageReward,
    PickScore,
    Remote,
    Reward,
    VlmJudge,
    load_function,
)
from nextscale.rewards.jpeg import JPEG_REWARDS
from nextscale.rewards.pixels import PIXEL_REWARDS
from nextscale.runs.config import RunConfig


class RewardKind(NamedTuple):
    """How a kind of reward is made: `make(value, **options)`, with those of `options` that are set."""

    make: Callable[..., Reward]
    options: tuple[str, ...] = ()


REQUEST_OPTIONS = ("request_timeout", "retries", "api_key_env")

# A new kind is a line here and a field of the same name in RewardConfig.
REWARD_KINDS: dict[str, RewardKind] = {
    "aesthetic": RewardKind(Aesthetic, ("clip",)),
    "clip_score": RewardKind(ClipScore, ("clip", "negative")),
    "pick_score": RewardKind(PickScore, ("checkpoint", "tokenizer")),
    "hps": RewardKind(HPSv2, ("checkpoint", "tokenizer")),
    "image_reward": RewardKind(ImageReward, ("checkpoint", "tokenizer")),
    "class_probability": RewardKind(ClassProbability, ("match",)),
    "python": RewardKind(load_function),
    "jpeg": RewardKind(lambda name: JPEG_REWARDS[name]()),
    "pixels": RewardKind(lambda name: PIXEL_REWARDS[name]),
    "remote": RewardKind(Remote, ("batch_size", *REQUEST_OPTIONS)),
    "vlm_judge": RewardKind(
        VlmJudge, ("vlm_model", "question", "score_range", "concurrency", *REQUEST_OPTIONS)
    ),
}


# What a reward can be for: an objective with a weight, a constraint, or only measured.
ROLES = ("weight", "at_least", "at_most", "held_out")
COMMON_OPTIONS = (*ROLES, "timeout")  # of a reward of any kind


def _check_bound(value: Any) -> Any:
    if value is not None:
        check_bound(value)
    return value


def _roles(reward: Mapping[str, Any]) -> list[str]:
    return [role for role in ROLES if reward.get(role) is not None and reward[role] is not False]


# Checked before pydantic's own sentences about each member of the union.
Bound = Annotated[BoundValue | None, BeforeValidator(_check_bound)]


class RewardConfig(Record):
    """One reward: exactly one of its kinds, and exactly one of its roles, by default the weight 1."""

    model_config = pydantic.ConfigDict(json_schema_extra={"kinds": list(REWARD_KINDS)})

    aesthetic: str | None = None
    """Aesthetic predictor: "toy", LAION's by name such as "laion-v2-l14", or the file of a head."""
    clip_score: str | tuple[str, ...] | None = None
    """CLIP score with a prompt such as "a painting of a {label}", or the mean over several."""
    pick_score: str | None = None
    """PickScore with a prompt such as "a photo of a {label}"."""
    hps: str | None = None
    """Human preference score v2.1 with a prompt such as "a photo of a {label}"."""
    image_reward: str | None = None
    """ImageReward with a prompt such as "a photo of a {label}"."""
    class_probability: str | None = None
    """Probability of the class asked for, under an image classifier: a folder or a hub repository."""
    python: str | None = None
    """A function of your own, path/to/file.py:function; beside the recipe, or else from where you are."""
    jpeg: Literal["compressibility", "incompressibility"] | None = None
    """Kilobytes of the image as a JPEG, negated for compressibility."""
    pixels: Literal["colourfulness", "sharpness", "brightness"] | None = None
    """A statistic of the pixels."""
    remote: str | None = None
    """The URL of a server of yours that scores images (docs/rewards.md has the protocol)."""
    vlm_judge: str | None = None
    """A vision-language model: the URL of an OpenAI-compatible API, such as http://localhost:8000/v1."""
    clip: str | None = None
    """The CLIP of an aesthetic or clip_score reward: "toy", a folder or a hub repository."""
    negative: str | tuple[str, ...] | None = None
    """Prompts whose mean CLIP score is taken off that of a clip_score reward."""
    checkpoint: str | None = None
    """A local folder (pick_score) or file (hps, image_reward) in place of the hub's."""
    tokenizer: str | None = None
    """The tokenizer of a pick_score, hps or image_reward reward: a folder or a hub repository."""
    match: Literal["name", "label"] | None = None
    """How a class_probability reward finds the class: by its "name" (default) or by its "label"."""
    batch_size: int | None = Field(default=None, ge=1, json_schema_extra=FREE_ON_RESUME)
    """Images of one request of a remote reward; 32 by default."""
    vlm_model: str | None = None
    """The name by which the server of a vlm_judge reward knows its model."""
    question: str | None = None
    """What a vlm_judge reward asks of each image, such as "How well drawn is this {label}?"."""
    score_range: tuple[float, float] | None = None
    """The lowest and highest score that a vlm_judge reward asks for; [0, 10] by default."""
    concurrency: int | None = Field(default=None, ge=1, json_schema_extra=FREE_ON_RESUME)
    """Requests of a vlm_judge reward under way at once; 8 by default."""
    request_timeout: float | None = Field(
        default=None, gt=0, allow_inf_nan=False, json_schema_extra=FREE_ON_RESUME
    )
    """Seconds that a request of a remote or vlm_judge reward waits for the server; 60 by default."""
    retries: int | None = Field(default=None, ge=0, json_schema_extra=FREE_ON_RESUME)
    """Further tries of such a request where one may help; 3 by default."""
    api_key_env: str | None = Field(default=None, json_schema_extra=FREE_ON_RESUME)
    """The environment variable that holds the API key of a remote or vlm_judge reward."""
    weight: float | None = Field(default=None, allow_inf_nan=False)
    """Weight in the sum of rewards that is trained on; 1 for a reward of no other role."""
    at_least: Bound = None
    """A constraint: its mean stays at this number or above; "base" is its mean before training."""
    at_most: Bound = None
    """A constraint: its mean stays at this number or below; "base" as for at_least."""
    held_out: bool = Field(default=False, strict=True)
    """Measured in evaluations and never trained on; a fall while the trained reward rises gives a warning."""
    timeout: float | None = Field(default=None, gt=0, allow_inf_nan=False, json_schema_extra=FREE_ON_RESUME)
    """Seconds after which the run stops if the reward has not answered; by default it waits."""

    @property
    def kind(self) -> str:
        """The one key of REWARD_KINDS that is set."""
        return next(name for name in REWARD_KINDS if getattr(self, name) is not None)

    @property
    def constraint(self) -> Constraint | None:
        """What its mean has to keep to, where it is a constraint."""
        if self.at_least is not None:
            return AtLeast(self.at_least)
        return None if self.at_most is None else AtMost(self.at_most)

    def options(self) -> dict[str, Any]:
        """What is set besides the kind and what every kind has."""
        others = (name for name in type(self).model_fields if name not in {*REWARD_KINDS, *COMMON_OPTIONS})
        return {name: getattr(self, name) for name in others if getattr(self, name) is not None}

    @model_validator(mode="before")
    @classmethod
    def _weighs_one_without_another_role(cls, values: Any) -> Any:
        return values if not isinstance(values, Mapping) or _roles(values) else {**values, "weight": 1.0}

    @model_validator(mode="after")
    def _has_one_role(self) -> Self:
        roles = _roles(self.model_dump())
        if len(roles) > 1:
            raise ValueError(
                f"'{roles[0]}' has no effect beside '{roles[1]}': a reward has one role; remove one of them"
            )
        return self

    @model_validator(mode="after")
    def _has_one_kind_and_its_options(self) -> Self:
        kinds = [name for name in REWARD_KINDS if getattr(self, name) is not None]
        if len(kinds) != 1:
            raise ValueError(f"a reward needs exactly one of {', '.join(REWARD_KINDS)}")
        for name in self.options():
            if name not in REWARD_KINDS[kinds[0]].options:
                raise ValueError(f"'{name}' has no effect on a {kinds[0]} reward; remove it")
        return self


class Recipe(Record):
    """All that decides a run."""

    description: str = Field(default="", json_schema_extra=FREE_ON_RESUME)
    """What the run shows; stands at the top of its report."""
    model: str = "toy"
    """The model to fine-tune: "toy", a published one such as "var-d16", a folder or hub repository that
    nextscale wrote, or, with `vae`, the file of a transformer such as var_d16.pth."""
    vae: str | None = None
    """The tokenizer's file, where the model is a file."""
    sampling: SamplingConfig = SamplingConfig()
    rewards: dict[str, RewardConfig] = Field(min_length=1)
    grpo: GRPOConfig = GRPOConfig()
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
        overrides: dotted keys to values in YAML, as in {"grpo.beta": "0.02"}.

    Raises:
        ConfigError: no such file, not a recipe, or a key or value that cannot be used.
    """
    mapping = apply_overrides(read_recipe(path), overrides or {})
    try:
        return Recipe.from_mapping(mapping)
    except ConfigError as error:
        raise ConfigError(f"recipe '{path}': {error}") from None


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe with all its keys; `load_recipe` reads it back equal."""
    content = recipe.model_dump()
    content["rewards"] = {name: each.model_dump(exclude_none=True) for name, each in recipe.rewards.items()}
    return dump_yaml(content)
