"""The VAR transformer: the distribution of the tokens of each scale, given all coarser scales and a class.

Shapes: B images · S scales · L tokens of all scales · l tokens of the scales at hand · V codebook size ·
C width · D codebook width · H heads · d width of a head

Source: VAR (arXiv 2404.02905), section 3.2; parameter names are those of the official checkpoints.
"""

import math
from abc import abstractmethod
from collections.abc import Iterable, Sequence
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
from nextscale.models.layers import AdaLNBeforeHead, Head, as_stored, last_weight, modulate
from nextscale.models.protocol import Conditioning, NextScaleModel
from nextscale.models.scales import ScaleSchedule

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
    scale_sizes: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
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


class VARStack(NextScaleModel):
    """The next-scale transformer of VAR. A subclass says what it is conditioned on.

    Raises:
        ValueError: the number of heads does not divide the width.
    """

    LORA_TARGETS = ("mat_qkv", "proj", "fc1", "fc2")

    lvl_1L: Tensor
    attn_bias_for_masking: Tensor

    def __init__(self, config: Any) -> None:
        super().__init__()
        if config.width % config.num_heads:
            raise ValueError(f"num_heads ({config.num_heads}) must divide width ({config.width})")
        self.config = config
        self.schedule = ScaleSchedule(config.scale_sizes)
        width, num_tokens = config.width, self.schedule.num_tokens
        self.pos_start = nn.Parameter(torch.empty(1, 1, width))
        self.pos_1LC = nn.Parameter(torch.empty(1, num_tokens, width))
        self.register_buffer("lvl_1L", self.schedule.scale_of_token()[None])
        # Of the official files alone, which have it: attention runs scale by scale, and needs no mask.
        self.register_buffer("attn_bias_for_masking", self.schedule.attention_bias()[None, None])
        self.word_embed = nn.Linear(config.codebook_width, width)
        self.add_condition_layers()
        self.lvl_embed = nn.Embedding(self.schedule.num_scales, width)
        if config.shared_adaln:
            self.shared_ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.head_nm = AdaLNBeforeHead(width)
        self.head = Head(width, config.codebook_size)
        self.init_weights()

    @abstractmethod
    def add_condition_layers(self) -> None:
        """The layers that `condition` needs."""

    @abstractmethod
    def condition(self, conditioning: Conditioning) -> Tensor:
        """(B, C): the start of the first token, and what every AdaLN is computed from."""

    def in_float32(self) -> list[nn.Module]:
        """The head and all modulations."""
        named = self.named_modules()
        return [self.head, *(each for name, each in named if name.endswith(("ada_lin", "shared_ada_lin")))]

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
        x_BlC = self._embed(condition_BC, inputs_BlD, start)
        lengths = self.schedule.lengths_of(start, start + x_BlC.shape[1])
        shared_B16C = None
        if self.config.shared_adaln:
            six_BC = as_stored(self.shared_ada_lin, condition_BC)
            shared_B16C = rearrange(six_BC, "B (n C) -> B 1 n C", n=6)
        recomputes = self.gradient_checkpointing and cache is None and torch.is_grad_enabled()
        for layer, block in enumerate(cast("Iterable[Block]", self.blocks)):
            arguments = x_BlC, condition_BC, shared_B16C, lengths, cache, layer
            x_BlC = self._through(block, *arguments, recomputes=recomputes)
        if cache is not None:
            cache.num_tokens += x_BlC.shape[1]
        return self.head_nm(x_BlC, condition_BC)

    def _embed(self, condition_BC: Tensor, inputs_BlD: Tensor, start: int) -> Tensor:
        # In one layout: a CPU rounds products of others in another way.
        inputs_BlD = inputs_BlD.to(self.word_embed.weight.dtype).contiguous()
        x_BlC = self.word_embed(inputs_BlD).float()
        if start == 0:
            first_B1C = (condition_BC[:, None] + self.pos_start).float()
            x_BlC = torch.cat([first_B1C, x_BlC], dim=1)
        at = slice(start, start + x_BlC.shape[1])
        return x_BlC + self.lvl_embed(self.lvl_1L[:, at]).float() + self.pos_1LC[:, at].float()

    def init_weights(self, adaln_std: float = 0.5, adaln_gamma_std: float = 1e-5) -> None:
        """Random weights as in the official code: every block starts near the identity.

        Args:
            adaln_std: factor on the weights of the AdaLN projections.
            adaln_gamma_std: factor on those of the gates.
        """
        std = math.sqrt(1 / self.config.width / 3)
        for parameter in (self.pos_start, self.pos_1LC):
            nn.init.trunc_normal_(parameter, std=std)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=std)
        with torch.no_grad():
            self.head.weight.mul_(0.02)
            last_weight(self.head_nm.ada_lin).mul_(adaln_std)
            for block in cast("Iterable[Block]", self.blocks):
                block.attn.proj.weight.div_(math.sqrt(2 * self.config.depth))
                block.ffn.fc2.weight.div_(math.sqrt(2 * self.config.depth))
                if not self.config.shared_adaln:
                    weight, gamma = last_weight(block.ada_lin), 2 * self.config.width
                    weight[gamma:].mul_(adaln_std)
                    weight[:gamma].mul_(adaln_gamma_std)
                else:
                    block.ada_gss[:, :, 2:].mul_(adaln_std)
                    block.ada_gss[:, :, :2].mul_(adaln_gamma_std)


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
            ConfigError: a condition without a label.
        """
        labels = [each.label for each in conditions]
        if None in labels:
            raise ConfigError(
                f"'{conditions[labels.index(None)].text}' has no class label, which this model draws by"
            )
        return self.conditioning_from_labels(torch.tensor(labels, device=self.device))

    def conditioning_from_labels(self, labels_B: Tensor) -> Conditioning:
        """The conditioning of class indices in [0, num_classes); num_classes itself is the null class."""
        null = torch.full((1,), self.num_classes, dtype=torch.long, device=labels_B.device)
        return Conditioning({"labels": labels_B}, {"labels": null})
