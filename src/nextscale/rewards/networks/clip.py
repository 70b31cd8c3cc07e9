"""A CLIP of transformers, loaded by name, path or hub repository.

Shapes: B images · N texts · P prompts · E width of the embedding
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from nextscale.base.conditions import Condition
from nextscale.base.images import read_image
from nextscale.models.embedded import CLIPS
from nextscale.models.pretrained import follow, load_frozen, load_tokenizer
from nextscale.models.texts import warn_if_cut
from nextscale.rewards.networks.preprocessing import Preprocessing, clip_preprocessing
from nextscale.rewards.networks.prompts import fill


class Clip:
    """Image and text towers, frozen; embeddings are L2-normalised float32, under autocast too.

    Args:
        model: frozen.
        tokenizer: tokenizer of the text tower.
        prepare: preprocessing of the images; CLIP's own by default.
    """

    def __init__(
        self, model: "transformers.CLIPModel", tokenizer: Any, prepare: Preprocessing | None = None
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        config: Any = model.config
        self.prepare = prepare or clip_preprocessing(config.vision_config.image_size)
        self.max_text_length: int = config.text_config.max_position_embeddings
        self._texts: dict[str, Tensor] = {}

    @classmethod
    def from_pretrained(cls, name: str | Path, tokenizer: str | Path | None = None) -> Self:
        """A separate CLIP, not shared with other rewards.

        Args:
            name: "toy", a folder, or a hub repository such as "openai/clip-vit-large-patch14".
            tokenizer: folder or repository of its tokenizer; by default that of the model.

        Raises:
            CheckpointError: either cannot be loaded, or some of the weights are missing.
        """
        source = CLIPS.get(str(name), name)
        model = load_frozen(transformers.CLIPModel, "CLIP", source)
        return cls(model, load_tokenizer(source if tokenizer is None else tokenizer))

    def _follow(self, images: Tensor) -> None:
        if follow(cast("nn.Module", self.model), images):
            self._texts.clear()

    def embed_images(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] to (B, E), on the images' device; differentiable."""
        self._follow(images)
        pooled = self.model.vision_model(pixel_values=self.prepare(images)).pooler_output
        return F.normalize(self.model.visual_projection(pooled).float(), dim=-1)

    @torch.no_grad()
    def embed_files(self, files: Sequence[Path], device: torch.device | str) -> Tensor:
        """N image files to (N, E), one by one, since they may differ in size.

        Raises:
            ConfigError: one cannot be read.
        """
        with torch.autocast(torch.device(device).type, enabled=False):
            return torch.cat([self.embed_images(read_image(file).to(device)[None]) for file in files])

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """N texts to (N, E); each distinct text is encoded once and cached.

        It is encoded alone: in a batch its last bits would depend on the other texts, and so on whether a run
        was resumed.
        """
        for text in dict.fromkeys(texts):
            if text not in self._texts:
                self._texts[text] = self._embed_text(text)
        return torch.stack([self._texts[text] for text in texts])

    def _embed_text(self, text: str) -> Tensor:
        warn_if_cut(text, self.tokenizer, self.max_text_length)
        tokens = self.tokenizer(text, truncation=True, max_length=self.max_text_length, return_tensors="pt")
        device = self.model.device
        with torch.autocast(device.type, enabled=False):  # what is kept is the same, whoever asked first
            pooled = self.model.text_model(tokens["input_ids"].to(device)).pooler_output
            return F.normalize(self.model.text_projection(pooled).float(), dim=-1)[0]

    def cosines(self, images: Tensor, conditions: Sequence[Condition], prompts: Sequence[str]) -> Tensor:
        """(B, P) cosine of each image with each prompt, filled in with the condition of the image."""
        image_BE = self.embed_images(images)
        texts = [self.embed_texts(fill(prompt, conditions)) for prompt in prompts]
        return torch.stack([(image_BE * text_BE).sum(-1) for text_BE in texts], dim=1)


@lru_cache(maxsize=4)
def load_clip(name: str | Path, tokenizer: str | Path | None = None) -> Clip:
    """A CLIP, shared by all rewards of the process."""
    return Clip.from_pretrained(name, tokenizer)
