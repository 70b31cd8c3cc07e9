"""What an image is asked to show."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Condition:
    """What one image was asked to show.

    Attributes:
        label: class index, or None for a text-conditioned model.
        text: the class name ("golden retriever") or the prompt.
    """

    label: int | None
    text: str
