"""What the method asks of a model family. A new family is a module in this folder that meets it.

Shapes: B images · L tokens of all scales · l tokens of the scales at hand · V codebook size · D codebook
width · h w the full latent grid · H W pixels
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from nextscale.base.conditions import Condition
from nextscale.models.scales import ScaleSchedule


@dataclass(frozen=True)
class Conditioning:
    """The conditions of B images as tensors. What they mean is known to the family that made them, and to
    no other.

    Attributes:
        tensors: name to (B, ...), such as labels or text embeddings.
        null: the same names, (1, ...): the empty condition of classifier-free guidance.
    """

    tensors: Mapping[str, Tensor]
    null: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def select(self, part: slice) -> "Conditioning":
        """The conditions of some of the images."""
        return replace(self, tensors={name: each[part] for name, each in self.tensors.items()})

    def repeat(self, num_images: int) -> "Conditioning":
        """Each condition `num_images` times; those of one condition stand together."""
        return replace(
            self, tensors={name: each.repeat_interleave(num_images, 0) for name, each in self.tensors.items()}
        )

    @staticmethod
    def cat(parts: "Sequence[Conditioning]") -> "Conditioning":
        """Parts that `select` cut from one whole, put together."""
        names = parts[0].tensors
        return replace(parts[0], tensors={name: torch.cat([each[name] for each in parts]) for name in names})

    def with_null(self) -> "Conditioning":
        """(2B) The conditions, followed by as many empty ones."""
        both = {
            name: torch.cat([each, self.null[name].expand_as(each)]) for name, each in self.tensors.items()
        }
        return replace(self, tensors=both)


class NextScaleModel(nn.Module, ABC):
    """A transformer that gives the distribution of each scale's tokens, given all coarser scales and a
    condition.

    Attributes:
        config: the record of its sizes, with `codebook_size`, `codebook_width` and `scale_sizes` among them.
        schedule: the scales.
        num_classes: of a class-conditional model; 0 of any other.
        gradient_checkpointing: recompute activations in the backward pass.
    """

    config: Any
    schedule: ScaleSchedule
    num_classes: int = 0
    gradient_checkpointing: bool = False

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    def parts(self) -> list[list[nn.Module]]:
        """What can be sharded apart where the parameters are spread over processes (FSDP), in the order it
        runs: each a list of modules that are gathered together, and whose parameters are read in their own
        forward passes alone. By default none: the model is then gathered as a whole."""
        return []

    @abstractmethod
    def encode_conditions(self, conditions: Sequence[Condition]) -> Conditioning:
        """What the conditions are to this model, on its device."""

    @abstractmethod
    def new_cache(self) -> Any:
        """An empty cache for one batch of images to be sampled; owned by the caller."""

    @abstractmethod
    def forward(self, conditioning: Conditioning, inputs_BlD: Tensor, cache: Any | None = None) -> Tensor:
        """Logits of the next tokens.

        Args:
            conditioning: of the B images.
            inputs_BlD: without a cache, all scales at once under the block-causal mask (teacher forcing): the
                (B, L - 1, D) of `Tokenizer.tokens_to_inputs`. With one, the next scale alone: its (B, l,
                D), or (B, 0, D) for the first scale.
            cache: from `new_cache`; it grows by the scale.

        Returns:
            (B, L, V) logits, or with a cache (B, l, V); always float32.
        """


class Tokenizer(Protocol):
    """Images as grids of tokens, coarse to fine, and back. Frozen: the method never trains it."""

    schedule: ScaleSchedule

    def empty_latent(self, num_images: int) -> Tensor:
        """(B, D, h, w) zeros: the latent before the first scale."""
        ...

    def add_scale(self, f_hat_BDhw: Tensor, tokens_Bl: Tensor, k: int) -> Tensor:
        """The accumulated latent after scale k."""
        ...

    def next_inputs(self, f_hat_BDhw: Tensor, k: int) -> Tensor:
        """(B, l, D): what the transformer sees at scale k of the latent accumulated so far."""
        ...

    def latent_to_images(self, f_hat_BDhw: Tensor) -> Tensor:
        """(B, D, h, w) to (B, 3, H, W) float32 images in [0, 1]."""
        ...

    def tokens_to_inputs(self, tokens_BL: Tensor) -> Tensor:
        """(B, L) tokens to the (B, L - 1, D) teacher-forcing inputs of scales 2 to S."""
        ...

    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) images in [0, 1] to (B, L) int64 tokens."""
        ...

    def decode(self, tokens_BL: Tensor) -> Tensor:
        """(B, L) tokens to (B, 3, H, W) float32 images in [0, 1]."""
        ...
