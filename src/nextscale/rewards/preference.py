"""The options that all models of human preference share."""

from typing import ClassVar

from nextscale.rewards.networks.prompts import DEFAULT_PROMPT
from nextscale.rewards.protocol import RewardConfig

CLIP_H_TOKENIZER = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


class PreferenceConfig(RewardConfig):
    """A network that scores an image for a prompt."""

    main_option = "prompt"
    repository: ClassVar[str]
    """Where its weights are, unless `checkpoint` says otherwise."""

    prompt: str = DEFAULT_PROMPT
    """Prompt such as "a photo of a {label}"; for CLIP, also a list whose mean counts."""
    checkpoint: str | None = None
    """Local folder (pick_score) or file (hps, image_reward) in place of the weights on the hub."""
    tokenizer: str = CLIP_H_TOKENIZER
    """Tokenizer of the text encoder: a folder or a hub repository."""

    @property
    def backbone(self) -> str | None:
        return self.checkpoint or self.repository
