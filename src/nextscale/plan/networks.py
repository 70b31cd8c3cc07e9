"""The networks beside the model: those of rewards and those that encode prompts, by their sizes alone.

Each is built without weights, and run once as the run would.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    CLIPConfig,
    CLIPModel,
    Mask2FormerConfig,
    TrOCRConfig,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES

from nextscale.models.texts import TextEncoder
from nextscale.rewards.geneval import DEFAULT_DETECTOR
from nextscale.rewards.networks.backbones import backbone_config, model_type
from nextscale.rewards.networks.detection import MASKED, input_shape, network_class, read_preparation
from nextscale.rewards.ocr import DEFAULT_READER, MOST_TOKENS


class Network(ABC):
    """A network that scores images."""

    @abstractmethod
    def build(self) -> Any:
        """All of it, on the device of the context, its weights not those of any file."""

    @abstractmethod
    def run(self, num_images: int, image_size: int) -> Callable[[], object]:
        """Runs it on so many square images: what needs gradients of none of its own weights."""


@dataclass(frozen=True)
class ClipNetwork(Network):
    """A CLIP, of which the image tower runs: each text is embedded once."""

    config: CLIPConfig

    def build(self) -> Any:
        return CLIPModel(self.config)

    def run(self, num_images: int, image_size: int) -> Callable[[], object]:
        vision: Any = self.config.vision_config  # transformers types its sizes loosely
        tower, size = CLIPModel(self.config).vision_model, vision.image_size
        pixels = torch.zeros(num_images, 3, size, size)
        return lambda: tower(pixel_values=pixels)


@dataclass(frozen=True)
class DetectorNetwork(Network):
    """A detector of objects.

    Attributes:
        size: of the images that it is shown, as `input_shape` takes it.
    """

    config: Any
    size: Any

    def build(self) -> Any:
        return network_class(self.config).from_config(self.config)

    def run(self, num_images: int, image_size: int) -> Callable[[], object]:
        network = self.build().eval()
        pixels = torch.zeros(num_images, 3, *input_shape(self.size, image_size, image_size))
        return lambda: network(pixel_values=pixels)


@dataclass(frozen=True)
class ReaderNetwork(Network):
    """A reader of text: its encoder once, and its decoder on as many tokens as it may write at most."""

    config: Any

    def build(self) -> Any:
        return VisionEncoderDecoderModel(self.config)

    def run(self, num_images: int, image_size: int) -> Callable[[], object]:
        network, size = self.build().eval(), self.config.encoder.image_size
        height, width = (size, size) if isinstance(size, int) else size
        pixels = torch.zeros(num_images, 3, height, width)
        tokens = torch.zeros(num_images, MOST_TOKENS, dtype=torch.long)
        # All tokens at once cost what one after the other do with a cache.
        return lambda: network(pixel_values=pixels, decoder_input_ids=tokens, use_cache=False)


def find_network(name: str) -> Network | None:
    """The network that "toy", a folder or a hub repository names; None where its sizes are not known here."""
    if clip := backbone_config(name):
        return ClipNetwork(clip)
    if name == DEFAULT_DETECTOR:
        # Source: transformers' documentation, whose defaults are this model's, and its test of this model, by
        # which it is shown images of 384 px.
        config: Any = Mask2FormerConfig()
        config.num_labels = 80  # COCO's
        return DetectorNetwork(config, (384, 384))
    if name == DEFAULT_READER:
        # Source: transformers' conversion of TrOCR's files, its model "base".
        parts = ViTConfig(image_size=384, qkv_bias=False), TrOCRConfig(cross_attention_hidden_size=768)
        return ReaderNetwork(VisionEncoderDecoderConfig.from_encoder_decoder_configs(*parts))
    kind = model_type(Path(name))
    if kind == "vision-encoder-decoder":
        return ReaderNetwork(AutoConfig.from_pretrained(name))
    if kind in MASKED or kind in MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES:
        return DetectorNetwork(AutoConfig.from_pretrained(name), read_preparation(name)[0])
    return None


def text_networks(encoder: TextEncoder | None) -> dict[str, Callable[[], nn.Module] | None]:
    """What encodes prompts: each network's name to what builds it; None where its sizes are not known."""
    if encoder is None:
        return {}
    configs = {name: backbone_config(name) for name in encoder.names}
    return {name: partial(encoder.build, config) if config else None for name, config in configs.items()}
