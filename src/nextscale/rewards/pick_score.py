"""PickScore: which image people pick for a prompt."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from torch import Tensor

from nextscale.base.conditions import Condition
from nextscale.rewards.networks.clip import load_clip
from nextscale.rewards.networks.prompts import DEFAULT_PROMPT, check_prompts, fill
from nextscale.rewards.preference import CLIP_H_TOKENIZER, PreferenceConfig

REPOSITORY = "yuvalkirstain/PickScore_v1"


class PickScore:
    """Learned scale of the CLIP times the cosine of image and prompt, about 18 to 26.

    Args:
        prompt: a template; the condition's text replaces "{label}".
        checkpoint: a CLIP trained on picks, as a folder or a hub repository; PickScore v1 by default.
        tokenizer: a folder or a hub repository; PickScore's own repository has none.

    Raises:
        ConfigError: the prompt is empty or malformed.
        CheckpointError: the CLIP or its tokenizer cannot be loaded.

    Source: Kirstain et al., "Pick-a-Pic", 2023, equation 2; huggingface.co/yuvalkirstain/PickScore_v1
    """

    def __init__(
        self,
        prompt: str = DEFAULT_PROMPT,
        checkpoint: str | Path | None = None,
        tokenizer: str | Path = CLIP_H_TOKENIZER,
    ) -> None:
        self.prompts = check_prompts(prompt)
        self.clip = load_clip(checkpoint or REPOSITORY, tokenizer)

    def __call__(self, images: Tensor, conditions: Sequence[Condition]) -> Tensor:
        cosines = self.clip.cosines(images, conditions, self.prompts)[:, 0]
        return self.clip.model.logit_scale.exp() * cosines

    def check_conditions(self, conditions: Sequence[Condition]) -> None:
        fill(self.prompts[0], conditions)


class PickScoreConfig(PreferenceConfig):
    """PickScore: which image people would pick for a prompt, about 18 to 26."""

    repository, reward = REPOSITORY, PickScore

    kind: Literal["pick_score"] = "pick_score"
