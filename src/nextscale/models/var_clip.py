"""VAR-CLIP: a VAR whose condition is the embedding of a text.

Shapes: B images · C width · E width of a text's embedding

Source: VAR-CLIP (arXiv 2408.01181); parameter names are those of the published file.
"""

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor, nn

from nextscale.base.conditions import Condition
from nextscale.base.errors import ConfigError
from nextscale.models.layers import as_stored
from nextscale.models.protocol import Conditioning
from nextscale.models.texts import CLIP_L, Projected, TextEncoder
from nextscale.models.var import VARSizes, VARStack


class VARClipConfig(VARSizes):
    """Sizes of a VAR-CLIP transformer. The defaults are those of the published model."""

    text_width: int = Field(default=768, gt=0)
    """Width of a text's embedding, E."""
    text_encoder: str = CLIP_L
    """The CLIP whose text tower embeds prompts: a folder or a hub repository."""
    text_activation: str | None = "gelu"
    """Activation of the text tower; None for that of its own configuration. The published code runs OpenAI's
    weights, which were trained with `quick_gelu`, with the exact GELU, and so most likely trained with it."""


class VARClip(VARStack):
    """The transformer that draws by the embedding of a text.

    Attributes:
        text_encoder: what turns prompts into embeddings; loaded with the first prompt.
    """

    config: VARClipConfig

    def __init__(self, config: VARClipConfig, text_encoder: TextEncoder | None = None) -> None:
        super().__init__(config)
        self.text_encoder = text_encoder or Projected(config.text_encoder, config.text_activation)

    def add_condition_layers(self) -> None:
        self.cond_proj = nn.Linear(self.config.text_width, self.config.width)
        self.noise = nn.Embedding(1, self.config.text_width)  # the learned null

    def condition(self, conditioning: Conditioning) -> Tensor:
        embeds_BE = conditioning["embeds"].to(self.noise.weight.dtype)
        embeds_BE = torch.where(conditioning["is_null"][:, None], self.noise.weight, embeds_BE)
        return as_stored(self.cond_proj, embeds_BE)

    def encode_conditions(self, conditions: Sequence[Condition]) -> Conditioning:
        """The embeddings of the prompts.

        Raises:
            CheckpointError: the text encoder cannot be loaded.
        """
        texts = self.text_encoder([each.text for each in conditions], self.device)
        return self.conditioning_from_embeddings(**texts)

    def conditioning_from_embeddings(self, embeds: Tensor) -> Conditioning:
        """The conditioning of B images by the embeddings of their prompts.

        Args:
            embeds: (B, E) a CLIP's projected text embeddings, L2-normalised.

        Raises:
            ConfigError: the shape does not fit.
        """
        if embeds.ndim != 2 or embeds.shape[1] != self.config.text_width:
            found, width = tuple(embeds.shape), self.config.text_width
            raise ConfigError(f"embeds has shape {found}, expected (B, {width})")
        embeds_BE = embeds.to(self.device)
        is_null_B = torch.zeros(len(embeds), dtype=torch.bool, device=self.device)
        null = {"embeds": torch.zeros_like(embeds_BE[:1]), "is_null": torch.ones_like(is_null_B[:1])}
        return Conditioning({"embeds": embeds_BE, "is_null": is_null_B}, null)

    def blank_conditions(self, num_images: int) -> Conditioning:
        return self.conditioning_from_embeddings(torch.zeros(num_images, self.config.text_width))

    def in_float32(self) -> list[nn.Module]:
        return [*super().in_float32(), self.cond_proj]
