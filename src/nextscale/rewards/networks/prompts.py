"""Prompts: templates of text that an image should match."""

from collections.abc import Sequence
from string import Formatter

from nextscale.base.conditions import Condition
from nextscale.base.errors import ConfigError

FIELDS = {"label", "text"}  # the class name and the prompt: both are the condition's text

DEFAULT_PROMPT = "a photo of a {label}"


def check_prompts(prompts: str | Sequence[str]) -> tuple[str, ...]:
    """One template or several as a tuple, checked; "{label}" or "{text}" stands for the condition's text.

    Raises:
        ConfigError: there is no template, or one is empty, malformed, or has a field other than these.
    """
    prompts = (prompts,) if isinstance(prompts, str) else tuple(prompts)
    if not prompts:
        raise ConfigError('no prompt given: give at least one, such as "a photo of a {label}"')
    for prompt in prompts:
        try:
            fields = {field for _, field, _, _ in Formatter().parse(prompt) if field is not None}
            if fields <= FIELDS:
                prompt.format(label="", text="")  # finds a format such as {label:d} here, not while training
        except (ValueError, LookupError) as error:
            raise ConfigError(f"prompt '{prompt}' is not a template: {error}") from None
        if not prompt or fields - FIELDS:
            raise ConfigError(
                f"prompt '{prompt}' may hold the field {{label}} or {{text}} and no other, and must not be "
                "empty"
            )
    return prompts


def fill(prompt: str, conditions: Sequence[Condition]) -> list[str]:
    """The template filled in for each condition."""
    return [prompt.format(label=condition.text, text=condition.text) for condition in conditions]
