"""Conditions: what an image is asked to show."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Condition:
    """What one image was asked to show.

    Attributes:
        label: class index, or None for a text-conditional model.
        text: the class name, such as "golden retriever", or the prompt.
    """

    label: int | None
    text: str

    @property
    def key(self) -> int | str:
        """What seeds are derived from: the label, or else the prompt."""
        return self.text if self.label is None else self.label
