"""The VAR transformer: the distribution of the tokens of each scale, given all coarser scales and a class.

Shapes: B images · S scales · L tokens of all scales · l tokens of the scales at hand · V codebook size ·
C width · D codebook width · H heads · d width of a head

Source: VAR (arXiv 2404.02905), section 3.2; parameter names are those of the official checkpoints.
"""

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field
from torch import Tensor, nn

from nextscale.base.compiling import Fusible
from nextscale.base.conditions import Condition
from nextscale.base.errors import ConfigError
from nextscale.base.records import Record
from nextscale.models.attention import AttentionByScale, KVCache
from nextscale.models.layers import as_stored, last_weight, modulate
from nextscale.models.protocol import Conditioning
from nextscale.models.scales import ScaleSizes
from nextscale.models.transformer import BlockTransformer, init_adaln

MAX_LOG_ATTENTION_SCALE = math.log(100)


class VARSizes(Record):
    """What transformers of VAR's structure have, whatever they are conditioned on. The defaults are those of
    the official VAR-d16."""

    depth: int = Field(default=16, gt=0)
    """Number of transformer blocks."""
    width: int = Field(default=1024, gt=0)
    """Transformer width, C."""
    num_heads: int = Field(default=16, gt=0)
    """Number of attention heads, H; must divide the width."""
    mlp_ratio: float = Field(default=4.0, gt=0)
    """Hidden width of the feed-forward layers, as a multiple of the transformer's width."""
    codebook_size: int = Field(default=4096, gt=0)
    """Number of codes, V."""
    codebook_width: int = Field(default=32, gt=0)
    """Width of a code, D."""
    scale_sizes: ScaleSizes = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    """Side lengths of the token grids, coarse to fine."""
    shared_adaln: bool = False
    """Whether all blocks share one AdaLN projection, as in VAR-d36 at 512 px."""


class VARConfig(VARSizes):
    """Sizes of a class-conditional VAR transformer."""

    num_classes: int = Field(default=1000, gt=0)
    """Number of classes. The null class is not counted; its label is `num_classes`."""


class Attention(nn.Module):
    """The weights of multi-head attention with L2-normalized queries and keys and a learned scale per head.
    The block runs it."""

    zero_k_bias: Tensor

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale_mul_1H11 = nn.Parameter(torch.full((1, num_heads, 1, 1), math.log(4.0)))
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("zero_k_bias", torch.zeros(width))
        self.mat_qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def queries_keys_values(self, x_BlC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Each (B, l, H, d)."""
        qkv = self.mat_qkv(x_BlC)  # called, not read for its weight: it may carry an adapter
        # Each in a tensor of its own: what a backward pass saves of one would keep the others as well.
        biases = self.q_bias, self.zero_k_bias, self.v_bias
        q_BlHd, k_BlHd, v_BlHd = (
            rearrange(each_BlC + bias_C.to(qkv.dtype), "B l (H d) -> B l H d", H=self.num_heads)
            for each_BlC, bias_C in zip(qkv.chunk(3, -1), biases, strict=True)
        )
        scale_H1 = self.scale_mul_1H11.clamp_max(MAX_LOG_ATTENTION_SCALE).exp()[0, :, :, 0]
        q_BlHd = (F.normalize(q_BlHd, dim=-1) * scale_H1).to(v_BlHd.dtype)
        return q_BlHd, F.normalize(k_BlHd, dim=-1).to(v_BlHd.dtype), v_BlHd


class FeedForward(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(Fusible):
    """Attention and feed-forward, each scaled, shifted and gated by the condition (AdaLN)."""

    def __init__(self, config: VARSizes) -> None:
        super().__init__()
        width = config.width
        if config.shared_adaln:
            self.ada_gss = nn.Parameter(torch.randn(1, 1, 6, width) / width**0.5)
        self.attn = Attention(width, config.num_heads)
        self.ffn = FeedForward(width, round(width * config.mlp_ratio))
        if not config.shared_adaln:
            self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def modulation(self, condition_BC: Tensor, shared_B16C: Tensor | None) -> tuple[Tensor, ...]:
        if shared_B16C is not None:
            six_B16C = shared_B16C + self.ada_gss
        else:
            six_B16C = rearrange(as_stored(self.ada_lin, condition_BC), "B (n C) -> B 1 n C", n=6)
        return six_B16C.float().unbind(2)

    def forward(
        self,
        x_BlC: Tensor,
        condition_BC: Tensor,
        shared_B16C: Tensor | None,
        lengths: tuple[int, ...],
        cache: KVCache | None,
        layer: int,
    ) -> Tensor:
        modulation = None if cache is None else cache.of_conditions.get(layer)
        if modulation is None:
            modulation = self.modulation(condition_BC, shared_B16C)
        if cache is not None:
            cache.of_conditions[layer] = modulation
        gamma1, gamma2, scale1, scale2, shift1, shift2 = modulation
        attended_BlHd = self.attended(x_BlC, scale1, shift1, lengths, cache, layer)
        return self.fused(Block.after_attention, x_BlC, attended_BlHd, gamma1, gamma2, scale2, shift2)

    def attended(
        self,
        x_BlC: Tensor,
        scale_B1C: Tensor,
        shift_B1C: Tensor,
        lengths: tuple[int, ...],
        cache: KVCache | None,
        layer: int,
    ) -> Tensor:
        """(B, l, H, d) what each token saw in its own scale and in coarser ones."""
        q_BlHd, k_BLHd, v_BLHd = self.fused(Block.before_attention, x_BlC, scale_B1C, shift_B1C)
        if cache is not None:
            k_BLHd, v_BLHd = cache.extend(layer, k_BLHd, v_BLHd)
        return AttentionByScale.apply(q_BlHd, k_BLHd, v_BLHd, lengths)

    def before_attention(self, x_BlC: Tensor, scale_B1C: Tensor, shift_B1C: Tensor) -> tuple[Tensor, ...]:
        """(B, l, H, d) queries, keys and values."""
        return self.attn.queries_keys_values(modulate(x_BlC, scale_B1C, shift_B1C, self.attn.proj.weight))

    def after_attention(
        self,
        x_BlC: Tensor,
        attended_BlHd: Tensor,
        gamma1_B1C: Tensor,
        gamma2_B1C: Tensor,
        scale_B1C: Tensor,
        shift_B1C: Tensor,
    ) -> Tensor:
        """(B, l, C) what the block adds up to."""
        # The residual stream stays float32: in bfloat16, sampling and teacher forcing would drift apart.
        attended_BlC = self.attn.proj(rearrange(attended_BlHd, "B l H d -> B l (H d)"))
        x_BlC = torch.addcmul(x_BlC, attended_BlC, gamma1_B1C)
        fed_BlC = self.ffn(modulate(x_BlC, scale_B1C, shift_B1C, self.ffn.fc1.weight))
        return torch.addcmul(x_BlC, fed_BlC, gamma2_B1C)


class VARStack(BlockTransformer):
    """The next-scale transformer of VAR. A subclass says what it is conditioned on.

    Raises:
        ValueError: the number of heads does not divide the width.
    """

    LORA_TARGETS = ("mat_qkv", "proj", "fc1", "fc2")

    attn_bias_for_masking: Tensor

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        if config.width % config.num_heads:
            raise ValueError(f"num_heads ({config.num_heads}) must divide width ({config.width})")
        width = config.width
        self.pos_1LC = nn.Parameter(torch.empty(1, self.schedule.num_tokens, width))
        # Of the official files alone, which have it: attention runs scale by scale, and needs no mask.
        self.register_buffer("attn_bias_for_masking", self.schedule.attention_bias()[None, None])
        self.add_condition_layers()
        self.lvl_embed = nn.Embedding(self.schedule.num_scales, width)
        if config.shared_adaln:
            self.shared_ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.add_blocks(Block(config) for _ in range(config.depth))

    @abstractmethod
    def add_condition_layers(self) -> None:
        """The layers that `condition` needs."""

    def in_float32(self) -> list[nn.Module]:
        """The head and all modulations."""
        named = self.named_modules()
        return [self.head, *(each for name, each in named if name.endswith(("ada_lin", "shared_ada_lin")))]

    def shared_inputs(
        self, conditioning: Conditioning, condition_BC: Tensor, at: slice
    ) -> tuple[Tensor | None]:
        if not self.config.shared_adaln:
            return (None,)
        six_BC = as_stored(self.shared_ada_lin, condition_BC)
        return (rearrange(six_BC, "B (n C) -> B 1 n C", n=6),)

    def positions(self, at: slice) -> tuple[Tensor, ...]:
        return *super().positions(at), self.pos_1LC[:, at].float()

    def init_block(self, block: Block, adaln_std: float, adaln_gamma_std: float) -> None:
        block.attn.proj.weight.div_(math.sqrt(2 * self.config.depth))
        block.ffn.fc2.weight.div_(math.sqrt(2 * self.config.depth))
        if not self.config.shared_adaln:
            init_adaln(last_weight(block.ada_lin), adaln_std, adaln_gamma_std)
        else:
            init_adaln(block.ada_gss[0, 0], adaln_std, adaln_gamma_std)


class VAR(VARStack):
    """The class-conditional transformer."""

    config: VARConfig

    def add_condition_layers(self) -> None:
        self.num_classes = self.config.num_classes
        self.class_emb = nn.Embedding(self.num_classes + 1, self.config.width)

    def condition(self, conditioning: Conditioning) -> Tensor:
        return self.class_emb(conditioning["labels"])

    def encode_conditions(self, conditions: Sequence[Condition]) -> Conditioning:
        """The class labels, int64; the null class is the one after the last.

        Raises:
            ConfigError: a condition without a label, or with one that the model has not.
        """
        labels = [each.label for each in conditions]
        if None in labels:
            raise ConfigError(
                f"'{conditions[labels.index(None)].text}' has no class label, which this model draws by"
            )
        for each in conditions:
            if not 0 <= cast("int", each.label) < self.num_classes:
                raise ConfigError(
                    f"'{each.text}' has the class label {each.label}, and this model has 0 to "
                    f"{self.num_classes - 1}"
                )
        return self.conditioning_from_labels(torch.tensor(labels, device=self.device))

    def conditioning_from_labels(self, labels_B: Tensor) -> Conditioning:
        """The conditioning of class indices in [0, num_classes); num_classes itself is the null class."""
        null = torch.full((1,), self.num_classes, dtype=torch.long, device=labels_B.device)
        return Conditioning({"labels": labels_B}, {"labels": null})
