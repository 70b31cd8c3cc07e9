"""PickScore: which image people pick for a prompt."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from nextscale.base.conditions import Condition
from nextscale.rewards.networks.clip import load_clip
from nextscale.rewards.prompts import DEFAULT_PROMPT, check_prompts

REPOSITORY = "yuvalkirstain/PickScore_v1"
DEFAULT_TOKENIZER = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


class PickScore:
    """The CLIP's learnt scale times the cosine of image and prompt, about 18 to 26.

    Args:
        prompt: a template; "{label}" becomes the condition's text.
        checkpoint: a CLIP trained on picks: a folder or a hub repository.
        tokenizer: a folder or a hub repository; PickScore's own repository holds none.

    Raises:
        ConfigError: the prompt is empty or broken.
        CheckpointError: the CLIP or its tokenizer cannot be had.

    Source: Kirstain et al., "Pick-a-Pic", 2023, equation 2; huggingface.co/yuvalkirstain/PickScore_v1
    """

    def __init__(
        self,
        prompt: str = DEFAULT_PROMPT,
        checkpoint: str | Path = REPOSITORY,
        tokenizer: str | Path = DEFAULT_TOKENIZER,
    ) -> None:
        self.prompts = check_prompts(prompt)
        self.clip = load_clip(checkpoint, tokenizer)

    def __call__(self, images: Tensor, conditions: Sequence[Condition]) -> Tensor:
        cosines = self.clip.cosines(images, conditions, self.prompts)[:, 0]
        return self.clip.model.logit_scale.exp() * cosines
