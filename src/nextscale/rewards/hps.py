"""Human preference score v2.1."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from nextscale.base.conditions import Condition
from nextscale.base.errors import CheckpointError
from nextscale.rewards.networks.clip import Clip, load_tokenizer
from nextscale.rewards.networks.open_clip import load_open_clip
from nextscale.rewards.networks.preprocessing import Preprocessing
from nextscale.rewards.networks.pretrained import hub_file
from nextscale.rewards.networks.prompts import DEFAULT_PROMPT, check_prompts
from nextscale.rewards.protocol import Reward, RewardConfig

REPOSITORY, FILE = "xswu/HPSv2", "HPS_v2.1_compressed.pt"
DEFAULT_TOKENIZER = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


class HPSv2:
    """Cosine of image and prompt under a ViT-H-14 trained on preferences, about 0.2 to 0.35.

    The tokenizer has open_clip's byte pairs. It does not pad, whereas open_clip pads with 0, which makes no
    difference: attention is causal, and the features are those of the end of the text, before any padding.

    Args:
        prompt: a template; the condition's text replaces "{label}".
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
        tokenizer: str | Path = DEFAULT_TOKENIZER,
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


class HPSv2Config(RewardConfig):
    """Human preference score v2.1: how people would rank an image for a prompt, about 0.2 to 0.35."""

    main_option = "prompt"

    kind: Literal["hps"] = "hps"
    prompt: str = DEFAULT_PROMPT
    """Prompt such as "a photo of a {label}"; for a clip_score, also a list whose mean score counts."""
    checkpoint: str | None = None
    """Local folder (pick_score) or file (hps, image_reward) in place of the weights on the hub."""
    tokenizer: str = DEFAULT_TOKENIZER
    """Tokenizer of the text encoder: a folder or a hub repository."""

    def make(self) -> Reward:
        return HPSv2(**self.options())

    @property
    def backbone(self) -> str | None:
        return self.checkpoint or REPOSITORY
