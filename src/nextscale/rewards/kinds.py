"""The kinds of rewards: one table, and the types that are built from it."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args

import pydantic
from pydantic import BeforeValidator, Discriminator, Field, Tag, TypeAdapter, WithJsonSchema

from nextscale.base.errors import ConfigError
from nextscale.base.records import Record, describe_validation_error, did_you_mean, unknown_key
from nextscale.rewards.aesthetic import AestheticConfig
from nextscale.rewards.class_probability import ClassProbabilityConfig
from nextscale.rewards.clip_class import ClipClassConfig
from nextscale.rewards.clip_score import ClipScoreConfig
from nextscale.rewards.diversity import DiversityConfig
from nextscale.rewards.geneval import GenEvalConfig
from nextscale.rewards.hps import HPSv2Config
from nextscale.rewards.image_reward import ImageRewardConfig
from nextscale.rewards.jpeg import JpegConfig
from nextscale.rewards.ocr import OcrConfig
from nextscale.rewards.pick_score import PickScoreConfig
from nextscale.rewards.pictures import PicturesConfig
from nextscale.rewards.pixels import PixelsConfig
from nextscale.rewards.protocol import RewardConfig
from nextscale.rewards.python import PythonConfig
from nextscale.rewards.remote import RemoteConfig
from nextscale.rewards.vlm_judge import VlmJudgeConfig

# To add a kind of reward, write its file, with its record, and add the record here.
RECORDS: tuple[type[RewardConfig], ...] = (
    AestheticConfig,
    ClipScoreConfig,
    ClipClassConfig,
    PickScoreConfig,
    HPSv2Config,
    ImageRewardConfig,
    ClassProbabilityConfig,
    GenEvalConfig,
    OcrConfig,
    DiversityConfig,
    PicturesConfig,
    PythonConfig,
    JpegConfig,
    PixelsConfig,
    RemoteConfig,
    VlmJudgeConfig,
)

REWARD_KINDS = {record.model_fields["kind"].default: record for record in RECORDS}
"""Name of a kind to its record."""

EXAMPLES = {
    "head": "laion-v2-l14",
    "prompt": "a photo of a {label}",
    "among": "imagenet",
    "classifier": "google/vit-base-patch16-224",
    "detector": "facebook/mask2former-swin-small-coco-instance",
    "reader": "microsoft/trocr-base-printed",
    "folder": "pictures/",
    "function": "rewards.py:score",
    "url": "http://localhost:8000/v1",
}
"""A value of each main option that takes any word, for errors."""


def read_reward(values: Mapping[str, Any]) -> RewardConfig:
    """The record of a reward as a recipe writes it, in full or in short.

    Raises:
        ConfigError: there is no such kind, or an option cannot be used.
    """
    try:
        return TypeAdapter(AnyReward).validate_python(values)
    except pydantic.ValidationError as error:
        raise ConfigError(describe_validation_error(RewardConfig, error)) from None


def in_full(reward: Any) -> Any:
    """`{clip_score: VALUE, ...}` as `{kind: clip_score, prompt: VALUE, ...}`; options that are null left out.

    Raises:
        ValueError: it does not have exactly one kind, or that has no value.
    """
    if not isinstance(reward, Mapping):
        return reward
    given = {
        name: value
        for name, value in reward.items()
        if value is not None or name not in RewardOptions.model_fields
    }
    kinds = [kind for kind in REWARD_KINDS if kind in given]
    if not kinds and "kind" in given:
        if (kind := str(given["kind"])) not in REWARD_KINDS:
            raise ValueError(f"unknown kind '{kind}'{did_you_mean(kind, REWARD_KINDS)}")
        return given
    for name in given:
        if name not in RewardOptions.model_fields:
            raise unknown_key(str(name), RewardOptions.model_fields)
    named = dict.fromkeys([str(given["kind"]), *kinds] if "kind" in given else kinds)
    for kind in REWARD_KINDS if not named else ():
        if kind in reward:
            raise ValueError(f"'{kind}' has no value: give one, such as '{kind}: {_example(kind)}'")
    if len(named) != 1:
        found = f", got {' and '.join(named)}" if named else ""
        raise ValueError(f"a reward needs exactly one of {', '.join(REWARD_KINDS)}{found}")
    main = REWARD_KINDS[kinds[0]].main_option
    if main in given:
        raise ValueError(f"'{main}' and '{kinds[0]}' mean the same option; remove one of them")
    return {"kind": kinds[0], main: given.pop(kinds[0]), **given}


def _example(kind: str) -> str:
    """What the main option of a kind may be: the first of its words, or else one of any."""
    option = REWARD_KINDS[kind].main_option
    words = get_args(REWARD_KINDS[kind].model_fields[option].annotation)
    return words[0] if words and isinstance(words[0], str) else EXAMPLES.get(option, option.upper())


def _union() -> Any:
    """One of the records, told apart by `kind`.

    A tag stands in brackets, so that an error does not take it for a part of the key.
    """

    def tag_of(reward: Any) -> str:
        kind = reward.get("kind") if isinstance(reward, Mapping) else getattr(reward, "kind", None)
        return f"[{kind}]"

    members = tuple(Annotated[record, Tag(f"[{kind}]")] for kind, record in REWARD_KINDS.items())
    told = "expected the options of a reward, such as 'clip_score: a painting of a {label}'"
    return Annotated[
        Union[members],  # noqa: UP007
        Discriminator(tag_of, custom_error_type="no_reward", custom_error_message=told),
        BeforeValidator(in_full),
        WithJsonSchema(RewardOptions.model_json_schema()),  # in full or in short
    ]


def _every_option() -> type[Record]:
    """A record of all keys that a reward of a recipe may have, for help and overrides."""
    kind_field = Field(default=None, description="Kind of reward.")
    fields: dict[str, Any] = {"kind": (Literal[tuple(REWARD_KINDS)], kind_field)}
    for kind, record in REWARD_KINDS.items():
        annotation = record.model_fields[record.main_option].annotation
        told = f"{record.__doc__} Sets kind and {record.main_option}."
        field = Field(default=None, description=told, json_schema_extra={"main_option": record.main_option})
        fields[kind] = (annotation, field)
    for name in dict.fromkeys(name for record in RECORDS for name in record.own_options()):
        owners = {kind: record for kind, record in REWARD_KINDS.items() if name in record.model_fields}
        first, *others = (record.model_fields[name] for record in owners.values())
        annotation = Union[tuple(each.annotation for each in (first, *others))]  # noqa: UP007
        is_common = not first.is_required() and all(each.default == first.default for each in others)
        field = Field(
            default=first.default if is_common else None,
            description=f"{first.description} Option of {', '.join(owners)}.",
            json_schema_extra=first.json_schema_extra,
        )
        fields[name] = (annotation, field)
    for name, field in RewardConfig.model_fields.items():
        fields[name] = (field.annotation, field)
    return pydantic.create_model("RewardOptions", __base__=Record, **fields)


RewardOptions = _every_option()

if TYPE_CHECKING:
    AnyReward = RewardConfig
else:
    AnyReward = _union()
