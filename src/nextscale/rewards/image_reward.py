"""ImageReward: how people would rate an image for a prompt.

Shapes: B images · L tokens of text · C width of the text encoder
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextscale.base.conditions import Condition
from nextscale.base.errors import CheckpointError
from nextscale.base.tensors import read_state_dict, shape_of
from nextscale.models.pretrained import follow, hub_file, load_tokenizer
from nextscale.rewards.networks.blip import build_text_encoder, build_vision_encoder
from nextscale.rewards.networks.preprocessing import clip_preprocessing
from nextscale.rewards.networks.prompts import DEFAULT_PROMPT, check_prompts, fill
from nextscale.rewards.preference import PreferenceConfig

REPOSITORY, FILE = "THUDM/ImageReward", "ImageReward.pt"
DEFAULT_TOKENIZER = "google-bert/bert-base-uncased"
MAX_LENGTH = 35
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the network's outputs, taken off them
HEAD_LAYERS = (0, 2, 4, 6, 7)  # with dropout between and no activation
UNUSED = ("blip.vision_proj.", "blip.text_proj.")  # of BLIP's training


class ImageReward:
    """Predicted preference, about -2.5 to 2; over its authors' images the mean is 0 and the deviation 1.

    Args:
        prompt: a template; the condition's text replaces "{label}".
        checkpoint: the file `ImageReward.pt`; downloaded from the hub by default.
        tokenizer: that of uncased BERT: a folder or a hub repository.

    Raises:
        ConfigError: the prompt is empty or malformed.
        CheckpointError: the weights or the tokenizer cannot be loaded, or do not belong together.

    Source: Xu et al., "ImageReward", 2023; github.com/THUDM/ImageReward ImageReward/ImageReward.py
    """

    def __init__(
        self,
        prompt: str = DEFAULT_PROMPT,
        checkpoint: str | Path | None = None,
        tokenizer: str | Path = DEFAULT_TOKENIZER,
    ) -> None:
        (self.prompt,) = check_prompts(prompt)
        path = hub_file(REPOSITORY, FILE, "'checkpoint'") if checkpoint is None else Path(checkpoint)
        self.network = load_network(path)
        self.prepare = clip_preprocessing(self.network.vision.config.image_size)
        self.tokenizer = load_tokenizer(tokenizer)
        self.tokenizer.add_tokens(["[DEC]", "[ENC]"], special_tokens=True)  # as BLIP's authors do
        vocab_size = self.network.text.config.vocab_size
        if len(self.tokenizer) != vocab_size:
            raise CheckpointError(
                f"tokenizer '{tokenizer}' has {len(self.tokenizer)} tokens, the network in '{path}' "
                f"{vocab_size}: they do not belong together"
            )

    def __call__(self, images: Tensor, conditions: Sequence[Condition]) -> Tensor:
        follow(self.network, images)
        tokens = self.tokenizer(
            fill(self.prompt, conditions),
            padding=True,
            truncation=True,
            max_length=MAX_LENGTH,
            return_tensors="pt",
        ).to(images.device)
        outputs = self.network(self.prepare(images), tokens["input_ids"], tokens["attention_mask"])
        return (outputs - MEAN) / STD

    def check_conditions(self, conditions: Sequence[Condition]) -> None:
        fill(self.prompt, conditions)


class Network(nn.Module):
    """A text encoder that attends to an image, and a linear head on its first token.

    Args:
        vision: image encoder.
        text: text encoder.
        head: weights (out, in) and biases (out,) of the linear layers, the last with out = 1.
    """

    def __init__(self, vision: nn.Module, text: nn.Module, head: Sequence[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.vision: Any = vision
        self.text: Any = text
        self.head = nn.ParameterList(
            nn.Parameter(each.float(), requires_grad=False) for layer in head for each in layer
        )

    def forward(self, images: Tensor, tokens_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """(B, 3, H, W) preprocessed images and their texts to (B,) outputs."""
        patches = self.vision(pixel_values=images).last_hidden_state
        hidden_BLC = self.text(
            input_ids=tokens_BL, attention_mask=mask_BL, encoder_hidden_states=patches
        ).last_hidden_state
        with torch.autocast(images.device.type, enabled=False):  # as its authors do
            x = hidden_BLC[:, 0].float()
            for weight, bias in zip(self.head[::2], self.head[1::2], strict=True):
                x = F.linear(x, weight, bias)
        return x.squeeze(-1)


def load_network(path: Path) -> Network:
    """The network in `ImageReward.pt`, or a smaller one of its kind; its sizes are read from the tensors.

    Raises:
        CheckpointError: names the first key that is missing, unknown or of the wrong shape.
    """
    state = read_state_dict(path)
    parts: dict[str, dict[str, Tensor]] = {"blip.visual_encoder.": {}, "blip.text_encoder.": {}, "mlp.": {}}
    for key, value in state.items():
        prefix = next((each for each in parts if key.startswith(each)), None)
        if prefix:
            parts[prefix][key.removeprefix(prefix)] = value
        elif not key.startswith(UNUSED):
            raise CheckpointError(f"'{path}' holds '{key}', which ImageReward does not have")
    vision_state, text_state, head_state = parts.values()
    vision, text = build_vision_encoder(vision_state, path), build_text_encoder(text_state, path)
    head, width = [], text.config.hidden_size
    for i in HEAD_LAYERS:
        out, found = shape_of(head_state, path, "ImageReward", f"layers.{i}.weight", 2)
        bias = shape_of(head_state, path, "ImageReward", f"layers.{i}.bias", 1)
        if found != width or bias != (out,):
            raise CheckpointError(
                f"'{path}': layer {i} of the head has shapes {(out, found)} and {bias}, "
                f"expected {width} inputs and as many biases as outputs"
            )
        head.append((head_state.pop(f"layers.{i}.weight"), head_state.pop(f"layers.{i}.bias")))
        width = out
    if head_state or width != 1:
        found = f"'mlp.{min(head_state)}'" if head_state else f"{width} outputs"
        raise CheckpointError(
            f"'{path}': the head has {found}, expected {len(HEAD_LAYERS)} layers to 1 output"
        )
    if vision.config.hidden_size != text.config.encoder_hidden_size:
        raise CheckpointError(
            f"'{path}': the text encoder attends to images of width {text.config.encoder_hidden_size}, "
            f"the image encoder gives {vision.config.hidden_size}"
        )
    return Network(vision, text, head).eval()


class ImageRewardConfig(PreferenceConfig):
    """ImageReward: how people would rate an image for a prompt, about -2.5 to 2."""

    repository, reward = REPOSITORY, ImageReward

    kind: Literal["image_reward"] = "image_reward"
    tokenizer: str = DEFAULT_TOKENIZER
    """Tokenizer of the text encoder: a folder or a hub repository."""
