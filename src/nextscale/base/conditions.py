"""Conditions: what an image is asked to show."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nextscale.base.errors import ConfigError


@dataclass(frozen=True)
class Condition:
    """What one image was asked to show.

    Attributes:
        label: class index, or None for a text-conditional model.
        text: the class name, such as "golden retriever", or the prompt.
        data: what else its prompt came with, column by column, for rewards.
    """

    label: int | None
    text: str
    data: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def key(self) -> int | str:
        """What seeds are derived from: the label, or else the prompt."""
        return self.text if self.label is None else self.label


def check_unicode(text: str, told: str) -> None:
    """Check that a text can be encoded: no tokenizer takes half of a surrogate pair, which JSON can have, and
    which bytes of the command line become that are not UTF-8.

    Args:
        told: what to call it.

    Raises:
        ConfigError: it cannot.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{told} {text!r} is no Unicode: {text[error.start]!r} stands for no character; write it in UTF-8"
        ) from None
