"""What the method asks of a model family. A new family is a module in this folder that meets it.

Shapes: B images · L tokens of all scales · l tokens of the scales at hand · V codebook size · C width of the
features · D codebook width · h w the full latent grid · H W pixels
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nextscale.base.conditions import Condition
from nextscale.base.errors import ConfigError
from nextscale.models.scales import ScaleSchedule

MIN_BLOCKS = 16
"""A reader is given the logits in at least so many blocks of tokens, where there are as many tokens. What it
computes then takes a sixteenth of the memory that it would take for all tokens at once."""
MAX_BLOCK_BYTES = 32 * 2**20
"""Most bytes of the logits of one block: enough to keep a GPU busy, and little beside a large model's
activations however many images there are."""

Reader = Callable[[Tensor, slice], Mapping[str, Tensor]]
"""Takes the (B, l, V) logits of a block and which of the tokens it has; returns named (B, l) tensors, which
may be of fewer images."""


@dataclass(frozen=True)
class Conditioning:
    """The conditions of B images as tensors. What they mean is known to the family that made them, and to
    no other.

    Attributes:
        tensors: name to (B, ...), such as labels or text embeddings.
        null: the empty condition of classifier-free guidance: those of the names that it changes, (1, ...) or
            (B, ...). Without any there is none.
    """

    tensors: Mapping[str, Tensor]
    null: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def select(self, part: slice | Tensor) -> "Conditioning":
        """The conditions of some of the images, by a slice or by indices."""
        return self._of_images(lambda each: each[part])

    def repeat(self, num_images: int) -> "Conditioning":
        """Each condition `num_images` times; those of one condition stand together."""
        return self._of_images(lambda each: each.repeat_interleave(num_images, 0))

    def _of_images(self, take: Callable[[Tensor], Tensor]) -> "Conditioning":
        """The same of everything that has a row for each image; an empty condition may have one for all."""
        has_rows = {name: len(each) == len(self) > 1 for name, each in self.null.items()}
        return Conditioning(
            {name: take(each) for name, each in self.tensors.items()},
            {name: take(each) if has_rows[name] else each for name, each in self.null.items()},
        )

    @staticmethod
    def cat(parts: "Sequence[Conditioning]") -> "Conditioning":
        """Parts that `select` cut from one whole, put together."""
        names, null = parts[0].tensors, {}
        for name, first in parts[0].null.items():
            nulls = [each.null[name] for each in parts]
            is_one = all(len(each) == 1 and torch.equal(each, first) for each in nulls)
            null[name] = first if is_one else torch.cat(nulls)
        return Conditioning({name: torch.cat([each[name] for each in parts]) for name in names}, null)

    def against(self, negative: "Conditioning") -> "Conditioning":
        """The same, guided away from other conditions than the empty one.

        Args:
            negative: one for all images, or one for each.
        """
        return replace(self, null={name: negative[name] for name in self.null})

    def with_null(self) -> "Conditioning":
        """(2B) The conditions, followed by as many empty ones.

        Raises:
            ConfigError: there is no empty condition.
        """
        if not self.null:
            raise ConfigError(
                "guidance needs the empty condition, and these have none: give the null prompt's "
                "embeddings too, or set guidance_scale to 0"
            )
        both = {
            name: torch.cat([each, self.null.get(name, each).expand_as(each)])
            for name, each in self.tensors.items()
        }
        return replace(self, tensors=both)


class NextScaleModel(nn.Module, ABC):
    """A transformer that gives the distribution of each scale's tokens, given all coarser scales and a
    condition.

    Attributes:
        config: the record of its sizes, with `codebook_size`, `codebook_width` and `scale_sizes` among them.
        schedule: the scales.
        head: the module that makes logits of features, token by token.
        num_classes: of a class-conditional model; 0 of any other.
        gradient_checkpointing: recompute activations in the backward pass.
        keeping_inputs: where what a recomputed block starts from waits for the backward pass: a context like
            torch's `save_on_cpu`.
    """

    config: Any
    schedule: ScaleSchedule
    head: Any
    FLOAT32_TENSORS: ClassVar[frozenset[str]] = frozenset()
    """Keys of the state dict that stay float32 in a model of any dtype."""
    NOT_NEEDED: ClassVar[frozenset[str]] = frozenset()
    """Keys of published files that the model does not need, and does not read."""
    LORA_TARGETS: ClassVar[tuple[str, ...]] = ("*",)
    """Words of the names of the linear layers that get an adapter by default."""

    num_classes: int = 0
    gradient_checkpointing: bool = False
    keeping_inputs: Callable[[], AbstractContextManager[Any]] = nullcontext

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    @property
    def num_cached(self) -> int:
        """Tokens whose keys and values every block keeps when the last scale is sampled; for plans."""
        return self.schedule.num_tokens

    def parts(self) -> list[list[nn.Module]]:
        """What can be sharded apart where the parameters are spread over processes (FSDP), in the order it
        runs: each a list of modules that are gathered together, and whose parameters are read in their own
        forward passes alone. By default none: the model is then gathered as a whole."""
        return []

    @abstractmethod
    def encode_conditions(self, conditions: Sequence[Condition]) -> Conditioning:
        """What the conditions are to this model, on its device."""

    def blank_conditions(self, num_images: int) -> Conditioning:
        """Conditions of the right shapes without a meaning, to count or time what a model does."""
        return self.encode_conditions([Condition(0, "any")] * num_images)

    @abstractmethod
    def new_cache(self) -> Any:
        """An empty cache for one batch of images to be sampled; owned by the caller.

        For rollouts that branch, its `select(index_B)` gives a cache of these images, some of them several
        times.
        """

    @abstractmethod
    def features(self, conditioning: Conditioning, inputs_BlD: Tensor, cache: Any | None = None) -> Tensor:
        """(B, l, C) features of the next tokens, from which the head makes their logits.

        Args:
            conditioning: of the B images.
            inputs_BlD: without a cache, all scales or the first few at once under the block-causal mask
                (teacher forcing): the (B, L - 1, D) of `Tokenizer.tokens_to_inputs`, or as much of them as
                these scales have. With one, the next scale alone: its (B, l, D), or (B, 0, D) for the first
                scale.
            cache: from `new_cache`; it grows by the scale.
        """

    def _through(self, block: nn.Module, *arguments: Any, recomputes: bool) -> Tensor:
        """What a block makes of its inputs; only they are kept for the backward pass if it is to be run again
        there."""
        if not recomputes:
            return block(*arguments)
        with self.keeping_inputs():
            return checkpoint(block, *arguments, use_reentrant=False)

    def features_of_branches(self, conditioning: Conditioning, inputs_BlD: Tensor, num_guided: int) -> Tensor:
        """(2B, l, C) features of B conditions and as many empty ones, which are run on the scales that are
        guided alone: their other features are 0. No scale sees a finer one, so the rest is as with all.

        Args:
            conditioning: the conditions, followed by the empty ones.
            inputs_BlD: (2B, l - 1, D) of all tokens.
            num_guided: tokens of the scales that are guided, fewer than all.
        """
        # The class's own method: that of a sharded model gathers its weights by itself, and would let go of
        # them afterwards, in the middle of this pass and within `Sharded.whole`.
        run, half = type(self).features, len(inputs_BlD) // 2
        whole_BlC = run(self, conditioning.select(slice(half)), inputs_BlD[:half])
        part_BlC = run(self, conditioning.select(slice(half, 2 * half)), inputs_BlD[half:, : num_guided - 1])
        missing = whole_BlC.shape[1] - num_guided
        return torch.cat([whole_BlC, F.pad(part_BlC, (0, 0, 0, missing))])

    def in_float32(self) -> list[nn.Module]:
        """The parts that run in float32 whatever autocast says: the head, and what a family adds."""
        return [self.head]

    def logits(self, features_BlC: Tensor) -> Tensor:
        """(B, l, V) float32 logits: log-probabilities need that precision, under autocast too."""
        with torch.autocast(features_BlC.device.type, enabled=False):
            return self.head(features_BlC.float())

    def forward(
        self,
        conditioning: Conditioning,
        inputs_BlD: Tensor,
        cache: Any | None = None,
        read: Reader | None = None,
        num_guided: int | None = None,
    ) -> Any:
        """Logits of the next tokens, or what `read` makes of them.

        The logits are the largest tensors of an update by far. A reader gets them in blocks of tokens, and
        the backward pass computes each block again, so that they never exist as a whole. It is called here,
        since only within its forward pass does a sharded model have its weights.

        Args:
            conditioning, inputs_BlD, cache: as in `features`.
            read: called once for each block, and again in the backward pass.
            num_guided: as in `features_of_branches`, where the second half are empty conditions; None where
                all are run on all tokens.

        Returns:
            (B, l, V) float32 logits; with `read` its results, each put together for all tokens.
        """
        if num_guided is None:
            features_BlC = type(self).features(self, conditioning, inputs_BlD, cache)
        else:
            features_BlC = type(self).features_of_branches(self, conditioning, inputs_BlD, num_guided)
        if read is None:
            return self.logits(features_BlC)
        blocks: list[Mapping[str, Tensor]] = []
        start = 0
        for block_BlC in features_BlC.split(self._block_length(features_BlC), 1):
            at = slice(start, start + block_BlC.shape[1])
            start = at.stop
            if torch.is_grad_enabled():
                blocks.append(checkpoint(self._read, block_BlC, at, read, use_reentrant=False))
            else:
                blocks.append(self._read(block_BlC, at, read))
        return {name: torch.cat([each[name] for each in blocks], 1) for name in blocks[0]}

    def _read(self, features_BlC: Tensor, at: slice, read: Reader) -> Mapping[str, Tensor]:
        return read(self.logits(features_BlC), at)

    def _block_length(self, features_BlC: Tensor) -> int:
        num_images, num_tokens, _ = features_BlC.shape
        fitting = MAX_BLOCK_BYTES // (4 * num_images * self.config.codebook_size)  # of float32
        return max(1, min(fitting, -(-num_tokens // MIN_BLOCKS)))


class Tokenizer(Protocol):
    """Images as grids of tokens, coarse to fine, and back. Frozen: the method never trains it."""

    schedule: ScaleSchedule

    @property
    def codebook(self) -> Tensor:
        """(V, D) the code of each token."""
        ...

    def empty_latent(self, num_images: int) -> Tensor:
        """(B, D, h, w) zeros: the latent before the first scale."""
        ...

    def codes_to_latent(self, codes_BLD: Tensor) -> Tensor:
        """(B, L, D) codes, of the codebook or any others, to the (B, D, h, w) latent that they add up to: an
        affine function of them."""
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
