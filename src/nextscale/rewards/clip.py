"""A CLIP of transformers, loaded by name, path or hub repository, and one preprocessing for its images.

Shapes: B images · N texts · E width of the embedding
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPModel
from transformers.utils import logging as transformers_logging

from nextscale.errors import CheckpointError
from nextscale.models import zoo

# OpenAI's CLIP, and most of its kin.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


class Clip:
    """Image and text towers, frozen; embeddings are L2-normalised.

    Args:
        model: "toy", a folder, or a hub repository such as "openai/clip-vit-large-patch14".

    Raises:
        CheckpointError: the model cannot be had, or some of its weights are missing.
    """

    def __init__(self, model: str | Path) -> None:
        source = str(zoo.CLIPS.get(str(model), model))
        level = transformers_logging.get_verbosity()
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        try:
            found = CLIPModel.from_pretrained(source, dtype=torch.float32, output_loading_info=True)
            loaded, info = cast("tuple[CLIPModel, dict[str, Any]]", found)
            self.tokenizer = AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            reason = str(error).strip().splitlines()[0]
            raise CheckpointError(f"CLIP '{model}' cannot be loaded: {reason}") from None
        finally:
            transformers_logging.set_verbosity(level)
            transformers_logging.enable_progress_bar()
        if missing := sorted(info["missing_keys"]):  # transformers fills them with random numbers
            raise CheckpointError(f"CLIP '{model}' cannot be loaded: it has no '{missing[0]}'")
        self.model: CLIPModel = loaded.eval().requires_grad_(False)
        config: Any = self.model.config
        self.image_size: int = config.vision_config.image_size
        self.max_text_length: int = config.text_config.max_position_embeddings
        self._texts: dict[str, Tensor] = {}

    def _follow(self, images: Tensor) -> None:
        if self.model.device != images.device:
            cast("nn.Module", self.model).to(images.device)
            self._texts.clear()

    @torch.no_grad()
    def embed_images(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] to (B, E), on the images' device."""
        self._follow(images)
        pixels = preprocess(images.float(), self.image_size)
        pooled = self.model.vision_model(pixel_values=pixels).pooler_output
        return F.normalize(self.model.visual_projection(pooled), dim=-1)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """N texts to (N, E); each distinct text is run once and remembered."""
        new = [text for text in dict.fromkeys(texts) if text not in self._texts]
        if new:
            length = self.max_text_length
            tokens = self.tokenizer(
                new, padding=True, truncation=True, max_length=length, return_tensors="pt"
            )
            pooled = self.model.text_model(
                input_ids=tokens["input_ids"].to(self.model.device),
                attention_mask=tokens["attention_mask"].to(self.model.device),
            ).pooler_output
            embeddings = F.normalize(self.model.text_projection(pooled), dim=-1)
            self._texts.update(zip(new, embeddings, strict=True))
        return torch.stack([self._texts[text] for text in texts])


@lru_cache(maxsize=4)
def load_clip(model: str | Path) -> Clip:
    """A CLIP that all rewards of a process share."""
    return Clip(model)


def preprocess(images: Tensor, size: int) -> Tensor:
    """Resize the shorter side to `size` (antialiased bicubic), crop the centre, normalise.

    The longer side is cut to whole pixels, not rounded, as OpenAI's and transformers' preprocessing do.

    Args:
        images: (B, 3, H, W) in [0, 1].

    Returns:
        (B, 3, size, size).
    """
    height, width = images.shape[-2:]
    if (height, width) != (size, size):
        shorter = min(height, width)
        shape = height * size // shorter, width * size // shorter
        images = F.interpolate(images, shape, mode="bicubic", antialias=True).clamp(0, 1)
        top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
        images = images[..., top : top + size, left : left + size]
    mean, std = (torch.tensor(each, device=images.device).view(3, 1, 1) for each in (MEAN, STD))
    return (images - mean) / std
