"""CLIP score: how well an image fits a prompt."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from nextscale.base.conditions import Condition
from nextscale.rewards.networks.clip import load_clip
from nextscale.rewards.prompts import DEFAULT_PROMPT, check_prompts

DEFAULT_CLIP = "openai/clip-vit-large-patch14"


class ClipScore:
    """Mean cosine between an image and some prompts, in [-1, 1]; with negative prompts, less theirs.

    Args:
        prompt: a template or several; "{label}" becomes the condition's text: "a painting of a {label}".
        clip: "toy", a folder, or a hub repository.
        negative: templates of what the image should not show.

    Raises:
        ConfigError: no prompt, or one that is empty or broken, or has a field other than {label}.
        CheckpointError: the CLIP cannot be had.
    """

    def __init__(
        self,
        prompt: str | Sequence[str] = DEFAULT_PROMPT,
        clip: str | Path = DEFAULT_CLIP,
        negative: str | Sequence[str] = (),
    ) -> None:
        self.positive = check_prompts(prompt)
        self.negative = check_prompts(negative) if negative else ()
        self.clip = load_clip(clip)

    def __call__(self, images: Tensor, conditions: Sequence[Condition]) -> Tensor:
        cosines = self.clip.cosines(images, conditions, [*self.positive, *self.negative])
        scores = cosines[:, : len(self.positive)].mean(1)
        return scores - cosines[:, len(self.positive) :].mean(1) if self.negative else scores
