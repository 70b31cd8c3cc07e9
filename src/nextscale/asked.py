"""What a user asks to be drawn, checked: classes, prompts, and prompts that guidance leads away from."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from nextscale.base.checks import as_list, shown
from nextscale.base.conditions import Condition, check_unicode
from nextscale.base.errors import ConfigError
from nextscale.models.class_names import find_class

Classes = int | str | Tensor | Iterable[int | str]
"""Classes by number or name; a single one may stand alone."""


def class_conditions(
    classes: Classes | None, class_names: Sequence[str] | None, num_classes: int
) -> list[Condition]:
    """The conditions of classes.

    Args:
        classes: numbers or names, as `find_class` takes them; a single one may stand alone.
        class_names: the model's, by label; None if they are unknown.
        num_classes: 0 for a model that draws by prompts.

    Raises:
        ConfigError: the model draws no classes, none are given, or one is not a class of the model.
    """
    if not num_classes:
        raise ConfigError(
            "the model draws by prompts and has no classes: say what to draw with `conditions` or prompts"
        )
    labels = [_label(each, class_names or (), num_classes) for each in as_list(classes)]
    if not labels:
        raise ConfigError(f"no class labels given: give at least one of 0 to {num_classes - 1}")
    return [Condition(label, class_names[label] if class_names else f"class {label}") for label in labels]


def _label(given: Any, class_names: Sequence[str], num_classes: int) -> int:
    value = given if getattr(given, "ndim", 1) else given.item()  # of a tensor or an array
    last = num_classes - 1
    if isinstance(value, str):
        value = find_class(value, class_names, num_classes)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(f"class {shown(value)} cannot be used: give a name, or a number of 0 to {last}")
    if not 0 <= value <= last:
        raise ConfigError(f"class {value} is out of range: the model has classes 0 to {last}")
    return value


def prompt_conditions(prompts: str | Sequence[str | Condition], num_classes: int) -> list[Condition]:
    """The conditions of prompts.

    Args:
        prompts: texts, or what `read_prompts` read; a single text may stand alone.
        num_classes: 0 for a model that draws by prompts.

    Raises:
        ConfigError: the model draws by classes, or no prompts are given, or an empty one, or one that is no
            Unicode.
    """
    if num_classes:
        raise ConfigError("the model draws by classes, not by prompts: say what with class labels")
    several = as_list(prompts)
    if not several:
        raise ConfigError("no prompts given: give at least one")
    for each in several:
        text = each.text if isinstance(each, Condition) else each
        if not isinstance(text, str) or not text.strip():
            raise ConfigError(f"prompt {shown(each)} cannot be used: give a text")
        check_unicode(text, "the prompt")
    return [Condition(None, each) if isinstance(each, str) else each for each in several]


def negative_prompts(
    given: str | Sequence[str], num_prompts: int, num_classes: int, is_guided: bool
) -> list[str]:
    """What guidance leads away from: a text for each prompt, or one for all.

    Args:
        is_guided: whether the model is sampled with guidance.

    Raises:
        ConfigError: the model draws by classes or without guidance, or one is no text or no Unicode, or
            they are neither one nor as many as the prompts.
    """
    texts = as_list(given)
    if num_classes:
        raise ConfigError("the model draws by classes and takes no negative prompt: leave it out")
    for each in texts:
        if not isinstance(each, str):
            raise ConfigError(f"negative prompt {shown(each)} cannot be used: give a text")
        check_unicode(each, "the negative prompt")
    if len(texts) not in (1, num_prompts):
        raise ConfigError(
            f"{len(texts)} negative prompts for {num_prompts} prompts: give one, or one for each"
        )
    texts = [each.strip() for each in texts]
    if any(texts) and not is_guided:
        raise ConfigError("a negative prompt has no effect without guidance: set guidance_scale too")
    return texts
