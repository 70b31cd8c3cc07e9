"""CLIP score: how well an image fits a prompt."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from torch import Tensor

from nextscale.base.conditions import Condition
from nextscale.rewards.networks.clip import load_clip
from nextscale.rewards.networks.prompts import DEFAULT_PROMPT, check_prompts, fill
from nextscale.rewards.protocol import RewardConfig

DEFAULT_CLIP = "openai/clip-vit-large-patch14"


class ClipScore:
    """Mean cosine of an image with its prompts, in [-1, 1], minus that with the negative ones, if any.

    Args:
        prompt: one template or several, such as "a painting of a {label}": the condition's text replaces
            "{label}", and its column "colour" replaces "{data[colour]}".
        clip: "toy", a folder, or a hub repository.
        negative: templates of what the image should not show.

    Raises:
        ConfigError: there is no prompt, or one is empty, malformed, or has a field other than these.
        CheckpointError: the CLIP cannot be loaded.
    """

    def __init__(
        self,
        prompt: str | Sequence[str] = DEFAULT_PROMPT,
        clip: str | Path = DEFAULT_CLIP,
        negative: str | Sequence[str] | None = None,
    ) -> None:
        self.positive = check_prompts(prompt)
        self.negative = check_prompts(negative) if negative else ()
        self.clip = load_clip(clip)

    def __call__(self, images: Tensor, conditions: Sequence[Condition]) -> Tensor:
        cosines = self.clip.cosines(images, conditions, [*self.positive, *self.negative])
        scores = cosines[:, : len(self.positive)].mean(1)
        return scores - cosines[:, len(self.positive) :].mean(1) if self.negative else scores

    def check_conditions(self, conditions: Sequence[Condition]) -> None:
        for prompt in (*self.positive, *self.negative):
            fill(prompt, conditions)


class ClipScoreConfig(RewardConfig):
    """CLIP score: how well an image fits a prompt."""

    main_option = "prompt"
    reward = ClipScore

    kind: Literal["clip_score"] = "clip_score"
    prompt: str | tuple[str, ...] = DEFAULT_PROMPT
    """Prompt such as "a photo of a {label}"; for CLIP, also a list whose mean counts."""
    clip: str = DEFAULT_CLIP
    """CLIP: "toy", a folder or a hub repository; an aesthetic head comes with its own by default."""
    negative: str | tuple[str, ...] | None = None
    """Prompts whose mean score is subtracted."""

    @property
    def backbone(self) -> str | None:
        return self.clip
