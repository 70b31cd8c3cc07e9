"""What the transformers of VAR and of Switti have in common: tokens and a condition go in, blocks follow, and
a norm that the condition modulates stands before the head.

Shapes: B images · L tokens of all scales · l tokens of the scales at hand · C width · D codebook width
"""

import math
from abc import abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from nextscale.models.attention import KVCache
from nextscale.models.layers import AdaLNBeforeHead, Head, last_weight
from nextscale.models.protocol import Conditioning, NextScaleModel
from nextscale.models.scales import ScaleSchedule


class BlockTransformer(NextScaleModel):
    """Blocks of a residual stream in float32. A subclass adds the layers of its condition and `lvl_embed`,
    the embedding of a token's scale, and then its blocks.

    Args:
        config: sizes, with `width`, `codebook_width`, `codebook_size` and `scale_sizes` among them.
    """

    lvl_1L: Tensor
    lvl_embed: nn.Embedding

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config, self.schedule = config, ScaleSchedule(config.scale_sizes)
        self.register_buffer("lvl_1L", self.schedule.scale_of_token()[None])
        self.pos_start = nn.Parameter(torch.empty(1, 1, config.width))
        self.word_embed = nn.Linear(config.codebook_width, config.width)

    def add_blocks(self, blocks: Iterable[nn.Module]) -> None:
        """The last layers; then all get random weights. A block is called with the stream, the condition,
        what `shared_inputs` gives, the lengths of the scales at hand, the cache or None, and its number."""
        self.blocks = nn.ModuleList(blocks)
        self.head_nm = AdaLNBeforeHead(self.config.width)
        self.head = Head(self.config.width, self.config.codebook_size)
        self.init_weights()

    @abstractmethod
    def condition(self, conditioning: Conditioning) -> Tensor:
        """(B, C): the start of the first token, and what every AdaLN is computed from."""

    @abstractmethod
    def shared_inputs(self, conditioning: Conditioning, condition_BC: Tensor, at: slice) -> tuple[Any, ...]:
        """What all blocks are given besides the stream and the condition.

        Args:
            at: the tokens at hand, among all.
        """

    @abstractmethod
    def init_block(self, block: Any, adaln_std: float, adaln_gamma_std: float) -> None:
        """Scale a block's random weights such that it starts near the identity; as `init_weights`."""

    def parts(self) -> list[list[nn.Module]]:
        """The blocks."""
        return [[block] for block in self.blocks]

    def new_cache(self) -> KVCache:
        return KVCache(self.schedule.num_tokens)

    def features(
        self, conditioning: Conditioning, inputs_BlD: Tensor, cache: KVCache | None = None
    ) -> Tensor:
        start = 0 if cache is None else cache.num_tokens
        condition_BC = self.condition(conditioning)
        # In one layout: a CPU rounds products of others in another way.
        inputs_BlD = inputs_BlD.to(self.word_embed.weight.dtype).contiguous()
        x_BlC = self.word_embed(inputs_BlD).float()
        if start == 0:
            first_B1C = (condition_BC[:, None] + self.pos_start).float()
            x_BlC = torch.cat([first_B1C, x_BlC], dim=1)
        at = slice(start, start + x_BlC.shape[1])
        for position_1lC in self.positions(at):
            x_BlC = x_BlC + position_1lC

        # With a cache, a block sees the coarser scales there; without one, all scales are in the stream.
        lengths = self.schedule.lengths_of(at.start, at.stop)
        shared = self.shared_inputs(conditioning, condition_BC, at)
        recomputes = self.gradient_checkpointing and cache is None and torch.is_grad_enabled()
        for layer, block in enumerate(self.blocks):
            arguments = x_BlC, condition_BC, *shared, lengths, cache, layer
            x_BlC = self._through(block, *arguments, recomputes=recomputes)
        if cache is not None:
            cache.num_tokens = at.stop
        return self.head_nm(x_BlC, condition_BC)

    def positions(self, at: slice) -> tuple[Tensor, ...]:
        """Each (1, l, C) float32: what is added to the tokens at hand, one after the other, for where they
        stand."""
        return (self.lvl_embed(self.lvl_1L[:, at]).float(),)

    def init_weights(self, adaln_std: float = 0.5, adaln_gamma_std: float = 1e-5) -> None:
        """Random weights as in VAR's official code: every block starts near the identity.

        Args:
            adaln_std: factor on the weights of the AdaLN projections.
            adaln_gamma_std: factor on those of the gates.
        """
        std = math.sqrt(1 / self.config.width / 3)
        for position in self.parameters(recurse=False):
            nn.init.trunc_normal_(position, std=std)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        with torch.no_grad():
            self.head.weight.mul_(0.02)
            last_weight(self.head_nm.ada_lin).mul_(adaln_std)
            for block in self.blocks:
                self.init_block(block, adaln_std, adaln_gamma_std)


def init_adaln(weight: Tensor, adaln_std: float, adaln_gamma_std: float) -> None:
    """Scale the weights of a block's AdaLN: of six equal parts the first two make the gates."""
    of_gates, of_rest = weight.tensor_split([len(weight) // 3])
    of_gates.mul_(adaln_gamma_std)
    of_rest.mul_(adaln_std)
