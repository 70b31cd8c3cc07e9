"""Human preference score v2.1."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from nextscale.base.conditions import Condition
from nextscale.base.errors import CheckpointError
from nextscale.models.pretrained import hub_file, load_tokenizer
from nextscale.rewards.networks.clip import Clip
from nextscale.rewards.networks.open_clip import load_open_clip
from nextscale.rewards.networks.preprocessing import Preprocessing
from nextscale.rewards.networks.prompts import DEFAULT_PROMPT, check_prompts, fill
from nextscale.rewards.preference import CLIP_H_TOKENIZER, PreferenceConfig

REPOSITORY, FILE = "xswu/HPSv2", "HPS_v2.1_compressed.pt"


class HPSv2:
    """Cosine of image and prompt under a ViT-H-14 trained on preferences, about 0.2 to 0.35.

    The tokenizer has open_clip's byte pairs. It does not pad, whereas open_clip pads with 0, which makes no
    difference: attention is causal, and the features are those of the end of the text, before any padding.

    Args:
        prompt: a template, as in `ClipScore`.
        checkpoint: the file `HPS_v2.1_compressed.pt`; downloaded from the hub by default.
        tokenizer: a folder or a hub repository.

    Raises:
        ConfigError: the prompt is empty or malformed.
        CheckpointError: the weights or the tokenizer cannot be loaded, or do not belong together.

    Source: Wu et al., "Human Preference Score v2", 2023; github.com/tgxs002/HPSv2 hpsv2/img_score.py
    """

    def __init__(
        self,
        prompt: str = DEFAULT_PROMPT,
        checkpoint: str | Path | None = None,
        tokenizer: str | Path = CLIP_H_TOKENIZER,
    ) -> None:
        self.prompts = check_prompts(prompt)
        path = hub_file(REPOSITORY, FILE, "'checkpoint'") if checkpoint is None else Path(checkpoint)
        model, words = load_open_clip(path), load_tokenizer(tokenizer)
        config: Any = model.config
        end = config.text_config.eos_token_id
        if words.eos_token_id != end:
            raise CheckpointError(
                f"tokenizer '{tokenizer}' ends a text with token {words.eos_token_id}, the CLIP in '{path}' "
                f"with {end}: they do not belong together"
            )
        prepare = Preprocessing(size=config.vision_config.image_size, edge="longest")
        self.clip = Clip(model, words, prepare)

    def __call__(self, images: Tensor, conditions: Sequence[Condition]) -> Tensor:
        return self.clip.cosines(images, conditions, self.prompts)[:, 0]

    def check_conditions(self, conditions: Sequence[Condition]) -> None:
        fill(self.prompts[0], conditions)


class HPSv2Config(PreferenceConfig):
    """Human preference score v2.1: how people would rank an image for a prompt, about 0.2 to 0.35."""

    repository, reward = REPOSITORY, HPSv2

    kind: Literal["hps"] = "hps"
