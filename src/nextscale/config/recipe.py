"""Recipes: YAML in, one validated record out, and back."""

import re
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import pydantic
import yaml
from pydantic import BeforeValidator, Field, field_validator, model_validator
from typing_extensions import Self

from nextscale.base.errors import ConfigError
from nextscale.base.records import ROLES, Record, did_you_mean, suggest
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
from nextscale.rewards.roles import AtLeast, AtMost, BoundValue, Constraint, check_bound
from nextscale.runs.config import RunConfig

RECIPES = Path(__file__).parents[1] / "recipes"


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
    batch_size: int | None = Field(default=None, ge=1)
    """Images of one request of a remote reward; 32 by default."""
    vlm_model: str | None = None
    """The name by which the server of a vlm_judge reward knows its model."""
    question: str | None = None
    """What a vlm_judge reward asks of each image, such as "How well drawn is this {label}?"."""
    score_range: tuple[float, float] | None = None
    """The lowest and highest score that a vlm_judge reward asks for; [0, 10] by default."""
    concurrency: int | None = Field(default=None, ge=1)
    """Requests of a vlm_judge reward under way at once; 8 by default."""
    request_timeout: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Seconds that a request of a remote or vlm_judge reward waits for the server; 60 by default."""
    retries: int | None = Field(default=None, ge=0)
    """Further tries of such a request where one may help; 3 by default."""
    api_key_env: str | None = None
    """The environment variable that holds the API key of a remote or vlm_judge reward."""
    weight: float | None = Field(default=None, allow_inf_nan=False)
    """Weight in the sum of rewards that is trained on; 1 for a reward of no other role."""
    at_least: Bound = None
    """A constraint: its mean stays at this number or above; "base" is its mean before training."""
    at_most: Bound = None
    """A constraint: its mean stays at this number or below; "base" as for at_least."""
    held_out: bool = Field(default=False, strict=True)
    """Measured in evaluations and never trained on; a fall while the trained reward rises gives a warning."""
    timeout: float | None = Field(default=None, gt=0, allow_inf_nan=False)
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

    description: str = ""
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


SECTIONS: dict[str, type[Record]] = {
    "sampling": SamplingConfig,
    "grpo": GRPOConfig,
    "optimizer": OptimizerConfig,
    "run": RunConfig,
}
"""The sections whose keys are the fields of one record; `rewards` has a RewardConfig for each name."""


class _Loader(yaml.SafeLoader):
    """Scalars as in YAML 1.2: `no` and `on` are words, 1e-4 is a number, 010 is ten."""


class _Dumper(yaml.SafeDumper):
    """Quotes whatever YAML 1.1 or 1.2 would not read back as text."""


_SCALARS = (
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
)
_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in _SCALARS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value))


def packaged_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_recipe(path: str | Path, overrides: Mapping[str, str] | None = None) -> Recipe:
    """The recipe in a YAML file, or the packaged one of this name, with some keys overridden.

    Args:
        overrides: dotted keys to values in YAML, as in {"grpo.beta": "0.02"}.

    Raises:
        ConfigError: no such file, not a recipe, or a key or value that cannot be used.
    """
    mapping = read_recipe(path)
    if overrides:
        mapping = apply_overrides(mapping, overrides)
    try:
        return Recipe.from_mapping(mapping)
    except ConfigError as error:
        raise ConfigError(f"recipe '{path}': {error}") from None


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The mapping in a recipe's file, not yet validated."""
    found, name = Path(path), str(path)
    if not found.exists() and found.parent == Path() and found.stem in packaged_recipes():
        found = RECIPES / f"{found.stem}.yaml"
    if found.is_dir():
        hint = f"; did you mean '{found / 'config.yaml'}'?" if (found / "config.yaml").is_file() else ""
        raise ConfigError(f"recipe '{name}' is a folder, expected a YAML file{hint}")
    try:
        text = found.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(
            f"no recipe '{name}': it is neither a file nor a packaged recipe"
            f"{did_you_mean(found.stem, packaged_recipes())}"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe '{name}' cannot be read: {error}") from None
    mapping = _parse_yaml(text, f"recipe '{name}'")
    if not isinstance(mapping, dict):
        found_kind = "nothing" if mapping is None else f"a {type(mapping).__name__}"
        raise ConfigError(f"recipe '{name}' holds {found_kind}, expected keys such as 'rewards:' with values")
    _find_python_files(mapping, found.parent)
    return mapping


def apply_overrides(mapping: Mapping[str, Any], overrides: Mapping[str, str]) -> dict[str, Any]:
    """The recipe's mapping with dotted keys set to values in YAML; a hyphen in a key equals an underscore.

    Raises:
        ConfigError: names an unknown key and the valid one nearest to it.
    """
    result = _copy(mapping)
    rewards = result.get("rewards")
    known_rewards = list(rewards) if isinstance(rewards, dict) else []
    for key, text in overrides.items():
        path, annotation = _resolve(key, known_rewards)
        inner = result
        for name in path[:-1]:
            inner = inner.setdefault(name, {})
            if not isinstance(inner, dict):
                raise ConfigError(
                    f"'{key}' cannot be set: '{name}' of the recipe is {inner!r}, expected keys"
                )
        inner[path[-1]] = _parse_value(key, text, annotation)
    for name in {key.split(".")[1]: None for key in overrides if key.startswith("rewards.")}:
        reward = result["rewards"].get(name)  # none, where the name was matched by its hyphens
        if name not in known_rewards and reward and not set(reward) & set(REWARD_KINDS):
            raise ConfigError(f"the recipe has no reward '{name}'{did_you_mean(name, known_rewards)}")
    return result


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe with all its keys; `load_recipe` reads it back equal."""
    content = recipe.model_dump()
    content["rewards"] = {name: each.model_dump(exclude_none=True) for name, each in recipe.rewards.items()}
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


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


def takes_text(annotation: Any) -> bool:
    """Whether a value of this type is taken as it is typed: a string, or one of several words."""
    if get_origin(annotation) in (Union, types.UnionType):
        return all(takes_text(each) for each in get_args(annotation) if each is not type(None))
    return annotation is str or get_origin(annotation) is Literal


def _find_python_files(mapping: dict[str, Any], folder: Path) -> None:
    """Let rewards of kind `python` name the file beside the recipe, where there is one; in place."""
    rewards = mapping.get("rewards")
    for reward in rewards.values() if isinstance(rewards, dict) else ():
        reference = reward.get("python") if isinstance(reward, dict) else None
        if isinstance(reference, str) and (folder / reference.rpartition(":")[0]).is_file():
            reward["python"] = str(folder / reference)


def _resolve(key: str, known_rewards: list[str]) -> tuple[list[str], Any]:
    """The names along a dotted key, and the type of its value."""
    first, *rest = key.split(".")
    first = first.replace("-", "_")
    if first not in Recipe.model_fields:
        keys = [f"{section}.{name}" for section, each in SECTIONS.items() for name in each.model_fields]
        near = suggest(key, keys) if rest else None
        hint = f"; did you mean '{near}'?" if near else did_you_mean(first, Recipe.model_fields)
        raise ConfigError(f"unknown key '{key}'{hint}")
    if first not in SECTIONS and first != "rewards":
        if rest:
            raise ConfigError(f"unknown key '{key}': '{first}' has no keys of its own")
        return [first], Recipe.model_fields[first].annotation
    depth = 2 if first == "rewards" else 1
    path, record = [first, *rest], SECTIONS.get(first, RewardConfig)
    if len(path) != depth + 1:
        example = (
            "rewards.NAME.weight" if first == "rewards" else f"{first}.{next(iter(record.model_fields))}"
        )
        raise ConfigError(f"unknown key '{key}': expected a key such as '{example}'")
    if first == "rewards":
        alike = [name for name in known_rewards if name.replace("-", "_") == path[1].replace("-", "_")]
        path[1] = path[1] if path[1] in known_rewards else (alike or [path[1]])[0]
    path[-1] = path[-1].replace("-", "_")
    if path[-1] not in record.model_fields:
        raise ConfigError(f"unknown key '{key}'{_suggest_key(path, record)}")
    return path, record.model_fields[path[-1]].annotation


def _suggest_key(path: list[str], record: type[pydantic.BaseModel]) -> str:
    prefix = ".".join(path[:-1])
    return did_you_mean(".".join(path), [f"{prefix}.{name}" for name in record.model_fields])


def _parse_value(key: str, text: str, annotation: Any) -> Any:
    is_one_of_several = tuple[str, ...] in get_args(annotation) and not text.lstrip().startswith("[")
    if takes_text(annotation) or is_one_of_several:
        is_optional = type(None) in get_args(annotation)
        return None if is_optional and text in ("null", "~") else text
    return _parse_yaml(text, f"value '{text}' of '{key}'")


def _parse_yaml(text: str, what: str) -> Any:
    try:
        return yaml.load(text, _Loader)  # a SafeLoader: plain values, no objects
    except yaml.YAMLError as error:
        mark = error.problem_mark if isinstance(error, yaml.MarkedYAMLError) else None
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        where = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{what}{where}, is not valid YAML: {problem}") from None
    except ValueError as error:  # such as the date 2024-99-99
        raise ConfigError(f"{what} is not valid YAML: {error}") from None


def _copy(value: Any) -> Any:
    return {key: _copy(each) for key, each in value.items()} if isinstance(value, Mapping) else value
